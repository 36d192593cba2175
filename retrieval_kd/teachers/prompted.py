"""What teachers share that are asked by a prompt: the recipe's keys, and the prompt they name."""

from __future__ import annotations

from typing import Any, Literal

from retrieval_kd.errors import RecipeError
from retrieval_kd.models.prompts import Prompt, load_prompt, prompt_for
from retrieval_kd.teachers.base import TeacherRecipe


class PromptedRecipe(TeacherRecipe):
    """The keys of a teacher that is asked by a prompt."""

    prompt: str
    """The name of a file in ``teachers/prompts/``, or a path."""
    instruction: str | None = None

    def identity(self) -> dict[str, Any]:
        """The recipe and the content of its prompt."""
        return super().identity() | {"prompt_sha256": load_prompt(self.prompt).sha256}


def prompt_of(recipe: PromptedRecipe, kind: Literal["pointwise", "listwise"]) -> Prompt:
    """The recipe's prompt. Raises `RecipeError` when it is of another kind, or has no place for the instruction."""
    prompt = prompt_for(recipe.kind, recipe.prompt, kind)
    if recipe.instruction is not None and not prompt.takes_instruction:
        raise RecipeError(f"prompt '{recipe.prompt}' has no {{instruction}}; leave the recipe's instruction: out")
    return prompt
