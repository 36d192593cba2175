"""What the language-model teachers share: the model, its prompt, and what the manifest says, what never fits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError, first
from retrieval_kd.models.language_model import LanguageModel, Precision
from retrieval_kd.models.load import ModelSource, find_model
from retrieval_kd.models.prompts import Prompt
from retrieval_kd.teachers.base import Candidates, ModelTeacherRecipe, ScoringJob, Teacher
from retrieval_kd.teachers.prompted import PromptedRecipe

_QUERIES_AT_ONCE = 256


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


def refuse_long_queries(job: ScoringJob, excess: Callable[[Sequence[Candidates]], Sequence[int]]) -> None:
    """Raises `InputError` when queries of ``job`` cannot be asked about, however much is cut off their documents.

    ``excess`` gives for each query by how many tokens its prompt with empty documents is too long; 0 or less fits.
    A run is looked through once: its resumes and its other workers find that in ``job.work``, and need no model for it.
    """
    looked_through = job.work / "queries-fit"
    if looked_through.exists():
        return
    too_long: list[str] = []
    most = 0
    for start in range(0, len(job.candidates), _QUERIES_AT_ONCE):
        queries = job.candidates[start : start + _QUERIES_AT_ONCE]
        for query, over in zip(queries, excess(queries), strict=True):
            if over > 0:
                too_long.append(query.query_id)
                most = max(most, over)
    if too_long:
        raise InputError(
            f"{len(too_long)} queries do not fit into max_length even with empty documents, by up to {most} tokens: "
            f"{first(too_long)}; raise max_length, shorten or leave out these queries, or show fewer documents at once"
        )
    looked_through.touch()
