"""Queries by a language model on this machine that is asked by a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retrieval_kd.data.collection import Document, model_text
from retrieval_kd.models.language_model import LanguageModel, Precision
from retrieval_kd.queries.base import Made, approximate_tokens
from retrieval_kd.queries.local_model import LocalModelQueryMaker
from retrieval_kd.queries.prompted import PromptedRecipe

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection


class LLMQueriesRecipe(PromptedRecipe):
    """Keys of ``kind: llm``."""

    kind: Literal["llm"]
    model: str
    revision: str | None = None
    document_length: int = Field(default=384, ge=8)
    """Tokens of a document in the prompt; what is cut is counted. The prompt's own text never is."""
    answer_length: int = Field(default=128, ge=1)
    """The most tokens of an answer."""
    batch_tokens: int | None = Field(default=None, ge=1)
    precision: Precision = "auto"


class LLMQueries(LocalModelQueryMaker):
    """Queries from the greedy answer to a prompt (InPars, Bonifacio et al. 2022, arXiv 2202.05144)."""

    Recipe = LLMQueriesRecipe
    recipe: LLMQueriesRecipe

    @cached_property
    def network(self) -> LanguageModel:
        """The loaded model."""
        return LanguageModel.load(self.source, precision=self.recipe.precision)

    @property
    def prompt_sha256(self) -> str:
        """Hash of the prompt."""
        return self.recipe.prompt_sha256

    def details(self) -> dict[str, Any]:
        """Model, revision and the prompt's hash."""
        revision = self.source.revision
        return {"model": self.source.name, "revision": revision, "prompt_sha256": self.prompt_sha256}

    def from_documents(self, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        """The queries of each answer; ``malformed_answers`` have none.

        Raises `InputError` when a prompt and its answer are more tokens than the model reads.
        """
        model, limit = self.network, self.recipe.document_length
        texts = [model.ordinary(model_text(document.title, document.text)) for document in documents]
        filled = [i for i, text in enumerate(texts) if text]
        ends = model.token_ends([texts[i] for i in filled])
        lost = [len(of_text) - limit for of_text in ends if len(of_text) > limit]
        shown = [
            texts[i][: of_text[limit - 1]] if len(of_text) > limit else texts[i]
            for i, of_text in zip(filled, ends, strict=True)
        ]
        tokens = model.tokenize([self.recipe.rendered(text) for text in shown])
        if tokens:
            model.check_length(max(map(len, tokens)) + self.recipe.answer_length)
        answers = model.generate(
            tokens, max_new_tokens=self.recipe.answer_length, batch_tokens=self.recipe.batch_tokens
        )
        made: list[list[str]] = [[] for _ in documents]
        for i, answer in zip(filled, answers, strict=True):
            made[i] = self.recipe.read(answer)
        malformed = sum(not made[i] for i in filled)
        counts = {"truncated_documents": len(lost), "tokens_lost": sum(lost), "malformed_answers": malformed}
        return Made(made, counts)

    def estimate(self, collection: Collection) -> dict[str, Any]:
        """Documents, the most queries, and about how many tokens are read and at most written."""
        counts = super().estimate(collection)
        rows, words = self.rows(len(collection.documents)), len(self.recipe.prompt.split())
        read = approximate_tokens(collection, rows, words, self.recipe.document_length)
        return {**counts, "approximate_tokens": read, "written_tokens_at_most": len(rows) * self.recipe.answer_length}
