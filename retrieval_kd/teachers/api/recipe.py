"""The recipe of the API teacher, and which prompts it can be asked by."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from retrieval_kd.errors import RecipeError
from retrieval_kd.models.api.endpoint import ENDPOINT_EXECUTION, EndpointKeys
from retrieval_kd.models.prompts import Prompt
from retrieval_kd.teachers.prompted import PromptedRecipe
from retrieval_kd.teachers.windows import WindowKeys


class ApiRecipe(PromptedRecipe, EndpointKeys, WindowKeys):
    """Keys of ``kind: api``. The prompt decides what is asked for: log-odds of two answers, a grade, or an order.

    Documents are cut to the prompt's ``passage_words`` where ``max_passage_words`` is not given. The longest answer is
    1 token for log-odds, 16 for a grade, 8 for each passage and 8 more where ``max_tokens`` is not given.
    """

    execution: ClassVar[frozenset[str]] = ENDPOINT_EXECUTION

    kind: Literal["api"]
    top_logprobs: int = Field(default=20, ge=2)
    pairs_per_shard: int = Field(default=1024, ge=1)

    def fits(self, prompt: Prompt) -> None:
        """Raises `RecipeError` when the prompt cannot be asked in this way."""
        if prompt.kind == "pointwise":
            for key, field in WindowKeys.model_fields.items():
                if getattr(self, key) != field.default:
                    raise RecipeError(f"{key}: the prompt '{self.prompt}' is pointwise, and has no windows")
        elif prompt.most_passages is not None and self.window > prompt.most_passages:
            raise RecipeError(
                f"window: {self.window} passages, but the prompt '{self.prompt}' has {prompt.most_passages} identifiers"
            )
        if prompt.answer_start and prompt.messages is not None:
            raise RecipeError(
                f"prompt '{self.prompt}': an endpoint cannot be made to begin a chat answer with answer_start; "
                "use a prompt with text:, or one without answer_start:"
            )
        if self.instruction is not None and not prompt.takes_instruction:
            raise RecipeError(f"prompt '{self.prompt}' has no {{instruction}}; leave the recipe's instruction: out")
