"""What the language-model teachers share: the model, its prompt, and what the manifest says of both."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.models.language_model import LanguageModel, Precision
from retrieval_kd.models.load import ModelSource, find_model
from retrieval_kd.teachers.base import ModelTeacherRecipe, Teacher
from retrieval_kd.teachers.prompts import Prompt, PromptedRecipe


class LLMRecipe(PromptedRecipe, ModelTeacherRecipe):
    """The keys of a teacher that is a language model on this machine."""

    max_length: int = Field(default=512, ge=16)
    """Tokens of a whole prompt, and of its answer if it is a permutation; documents are cut where they do not fit."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens of a batch; by default as many as suit the device."""
    precision: Precision = "auto"


class LLMTeacher(Teacher):
    """A language model that is asked by ``prompt``, which a subclass loads."""

    recipe: LLMRecipe
    prompt: Prompt

    @cached_property
    def source(self) -> ModelSource:
        """Where the model is."""
        return find_model(self.recipe.model, self.recipe.revision)

    def ref(self) -> InputRef:
        """The model's reference."""
        return self.source.ref()

    @cached_property
    def model(self) -> LanguageModel:
        """The loaded model. Raises `InputError` when it does not go with the recipe."""
        model = LanguageModel.load(self.source, precision=self.recipe.precision)
        model.check_length(self.recipe.max_length)
        self.refuse(model)
        return model

    @abstractmethod
    def refuse(self, model: LanguageModel) -> None:
        """Raises `InputError` for a model that cannot be asked in this way."""

    def details(self) -> dict[str, Any]:
        """Model, revision, length, dtype and prompt."""
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "max_length": self.recipe.max_length,
            "dtype": self.model.dtype,
            "prompt": self.recipe.prompt,
            "prompt_sha256": self.prompt.sha256,
        }
