"""Queries by a model behind an OpenAI-compatible endpoint, each answer paid for once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import Document, model_text
from retrieval_kd.models.api.cache import AnswerCache
from retrieval_kd.models.api.client import Client, EndpointError, RefusedError
from retrieval_kd.models.api.endpoint import ENDPOINT_EXECUTION, EndpointKeys, cut_words
from retrieval_kd.models.api.questions import Outcome, Question, ask_all
from retrieval_kd.models.api.reply import Reply
from retrieval_kd.queries.base import DocumentQueryMaker, Made, approximate_tokens
from retrieval_kd.queries.prompted import PromptedRecipe

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

_MANY = 10
"""So many documents of one chunk without a single answer are the endpoint's fault, not theirs."""


class ApiQueriesRecipe(PromptedRecipe, EndpointKeys):
    """Keys of ``kind: api``. The longest answer is 48 tokens for each query where ``max_tokens`` is not given."""

    execution: ClassVar[frozenset[str]] = ENDPOINT_EXECUTION

    kind: Literal["api"]


class ApiQueries(DocumentQueryMaker):
    """Queries from the answers of an endpoint.

    An answer without a query is asked for again ``malformed_attempts`` times; then its document has none and is
    counted, as is a document whose request is refused for good.
    """

    Recipe = ApiQueriesRecipe
    recipe: ApiQueriesRecipe
    resumable = True
    chunk = 256
    _work: Path | None = None

    @cached_property
    def client(self) -> Client:
        """The endpoint; what is used of it is recorded in the work folder."""
        return self.recipe.open_client(self._work)

    @cached_property
    def cache(self) -> AnswerCache:
        """The answers of this endpoint and model."""
        return self.recipe.open_cache()

    @property
    def model(self) -> str:
        """The model's name at its endpoint."""
        return f"{self.recipe.model}@{self.recipe.base_url}"

    @property
    def prompt_sha256(self) -> str:
        """Hash of the prompt."""
        return self.recipe.prompt_sha256

    def refs(self) -> dict[str, InputRef]:
        """The model at its endpoint, by name."""
        return {"model": self.recipe.model_ref()}

    def prepare(self, work: Path) -> None:
        """Reads the key and opens the record of usage, which a run that goes on shares."""
        self._work = work
        self.client.open()

    def details(self) -> dict[str, Any]:
        """Model, endpoint, the models that answered, the prompt's hash, and what the run has used."""
        return {
            "model": self.recipe.model,
            "endpoint": self.recipe.base_url,
            "served_models": self.client.ledger.models(),
            "prompt_sha256": self.prompt_sha256,
            "usage": self.client.ledger.usage(),
        }

    def from_documents(self, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        """The queries of each answer. Raises `EndpointError` when it refuses every one of ten documents or more."""
        cut = [
            cut_words(model_text(document.title, document.text), self.recipe.max_passage_words)
            for document in documents
        ]
        filled = [i for i, (text, _) in enumerate(cut) if text]
        outcomes = self._asked([self._question(documents[i].id, cut[i][0]) for i in filled])
        counts = {
            "truncated_documents": sum(words > 0 for _, words in cut),
            "words_lost": sum(words for _, words in cut),
            "malformed_answers": sum(outcome.malformed for outcome in outcomes if outcome is not None),
            "refused_documents": sum(outcome is None for outcome in outcomes),
        }
        made: list[list[str]] = [[] for _ in documents]
        for i, outcome in zip(filled, outcomes, strict=True):
            made[i] = (outcome.value if outcome is not None else None) or []
        return Made(made, counts)

    def estimate(self, collection: Collection) -> dict[str, Any]:
        """Requests, the most queries, about how many tokens are sent, and what those cost."""
        counts = super().estimate(collection)
        rows, words = self.rows(len(collection.documents)), len(self.recipe.prompt.split())
        tokens = approximate_tokens(collection, rows, words, self.recipe.max_passage_words)
        price = self.recipe.price_per_million
        cost = {} if price is None else {"approximate_input_cost": round(tokens * price.input / 1e6, 2)}
        return {**counts, "requests": len(rows), "approximate_tokens": tokens, **cost}

    def _question(self, doc_id: str, text: str) -> Question[list[str]]:
        number = self.recipe.per_document
        request = self.recipe.asked(self.recipe.rendered(text), f"document '{doc_id}'", max_tokens=48 * number)
        reminder = f"Answer with {number} search queries, one a line, and nothing else."

        def read(reply: Reply) -> list[str] | None:
            return self.recipe.read(reply.content) or None

        return Question(request, read, reminder)

    def _asked(self, questions: Sequence[Question[list[str]]]) -> list[Outcome[list[str]] | None]:
        """An outcome for each question, None for those that are refused: they are looked for one at a time."""
        try:
            return list(self._ask(questions))
        except RefusedError:
            outcomes: list[Outcome[list[str]] | None] = []
            for question in questions:
                try:
                    outcomes += self._ask([question])
                except RefusedError as error:
                    refusal = error
                    outcomes.append(None)
        if len(outcomes) >= _MANY and not any(outcomes):
            raise EndpointError(f"none of {len(outcomes)} requests was taken; the last: {refusal}")
        return outcomes

    def _ask(self, questions: Sequence[Question[list[str]]]) -> list[Outcome[list[str]]]:
        recipe = self.recipe
        return ask_all(
            questions, self.client, self.cache, concurrency=recipe.concurrency, attempts=recipe.malformed_attempts
        )
