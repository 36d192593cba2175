"""A model behind an OpenAI-compatible endpoint as teacher: log-odds, grades or ranks, each answer paid for once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.models.api.cache import AnswerCache
from retrieval_kd.models.api.client import Client, EndpointError
from retrieval_kd.models.api.endpoint import cut_words
from retrieval_kd.models.api.questions import Outcome, Question, ask_all
from retrieval_kd.models.prompts import load_prompt
from retrieval_kd.teachers.api.answers import AnswerError, Order, PairScore, grade, log_odds, order
from retrieval_kd.teachers.api.recipe import ApiRecipe
from retrieval_kd.teachers.base import Candidates, Scored, ScoringJob, Teacher
from retrieval_kd.teachers.windows import Window, rank_scores

T = TypeVar("T")

_MANY = 10
"""So many windows of one round without a readable order are the model's fault, not the passages'."""


class ApiTeacher(Teacher):
    """Scores by the answers of a model behind an endpoint.

    A pointwise prompt with two answers gives their log-odds, one with grades a number; a listwise prompt gives minus
    the rank (Sun et al. 2023, arXiv 2304.09542). Answers come from the cache where they are there, so a shard that was
    scored once is scored again without a request, to the same bytes.

    A pair without a readable answer after ``malformed_attempts`` raises `AnswerError`; a window without one keeps its
    present order and is counted. ``tokens_lost`` is in words, for an endpoint does not tell its tokenizer: each of
    them is at least one token.
    """

    Recipe = ApiRecipe
    recipe: ApiRecipe

    def __init__(self, recipe: ApiRecipe) -> None:
        super().__init__(recipe)
        self.prompt = load_prompt(recipe.prompt)
        recipe.fits(self.prompt)
        self.independent = self.prompt.kind == "pointwise"
        self._job: ScoringJob | None = None

    @property
    def score_kind(self) -> str:
        """``rank``, ``grade`` or ``log_odds``."""
        if self.prompt.kind == "listwise":
            return "rank"
        return "log_odds" if self.prompt.grades is None else "grade"

    def ref(self) -> InputRef:
        """The model at its endpoint, by name: its weights cannot be seen."""
        return self.recipe.model_ref()

    def details(self) -> dict[str, Any]:
        """Model, endpoint, the models that answered, prompt and its hash, and what the run has used."""
        return {
            "model": self.recipe.model,
            "endpoint": self.recipe.base_url,
            "served_models": self.client.ledger.models(),
            "prompt": self.recipe.prompt,
            "prompt_sha256": self.prompt.sha256,
            "max_passage_words": self._most_words,
            "tokens_lost_unit": "words",
            "usage": self.client.ledger.usage(),
        }

    def prepare(self, job: ScoringJob) -> None:
        """Reads the key and opens the record of usage in `job.work`, which resumes and workers share."""
        self._job = job
        self.client.open()

    @cached_property
    def client(self) -> Client:
        """The endpoint. Without `prepare` before, what is used of it is recorded in memory only."""
        return self.recipe.open_client(None if self._job is None else self._job.work)

    @cached_property
    def cache(self) -> AnswerCache:
        """The answers of this endpoint and model."""
        return self.recipe.open_cache()

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """Log-odds, grades or minus ranks. Counts are added when the whole shard has its scores."""
        cut = [[cut_words(text, self._most_words) for text in documents] for documents in texts]
        shown = [[text for text, _ in documents] for documents in cut]
        lost = [np.array([words for _, words in documents], dtype=np.int32) for documents in cut]
        score = self._score_pairs if self.prompt.kind == "pointwise" else self._score_lists
        return Scored(score(shard, shown), lost)

    def _score_pairs(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        questions = [
            self._pair(query, document, text)
            for query, documents in zip(shard, texts, strict=True)
            for document, text in zip(self._names(query), documents, strict=True)
        ]
        counts: Counter[str] = Counter()
        scores = np.empty(len(questions), dtype=np.float32)
        for i, (question, outcome) in enumerate(zip(questions, self._ask(questions), strict=True)):
            if outcome.value is None:
                raise self._unanswered(question, outcome)
            scores[i] = outcome.value.value
            counts["malformed_answers"] += outcome.malformed
            counts["bounded_log_odds"] += outcome.value.bounded
        self.counts.update(counts)
        return np.split(scores, np.cumsum([len(documents) for documents in texts])[:-1])

    def _score_lists(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        counts: Counter[str] = Counter()

        def order_windows(windows: list[Window]) -> list[list[int]]:
            outcomes = self._ask([self._window(shard[w.list], [texts[w.list][i] for i in w.members]) for w in windows])
            orders = []
            for window, outcome in zip(windows, outcomes, strict=True):
                counts["windows"] += 1
                counts["malformed_answers"] += outcome.malformed
                if outcome.value is None:
                    counts["windows_in_present_order"] += 1
                    orders.append(list(range(len(window.members))))
                else:
                    counts["malformed_answers"] += outcome.value.repaired
                    orders.append(outcome.value.positions)
            if len(outcomes) >= _MANY and all(outcome.value is None for outcome in outcomes):
                said = outcomes[0].replies[-1].content[:200]
                raise EndpointError(
                    f"{self.recipe.base_url}: none of {len(outcomes)} answers names a passage (such as {said!r}); the "
                    "candidates' own order would stand for the model's: check model and prompt"
                )
            return orders

        scores = rank_scores(shard, self.recipe, order_windows)
        self.counts.update(counts)
        return scores

    def _pair(self, query: Candidates, document: str, text: str) -> Question[PairScore]:
        prompt, recipe = self.prompt, self.recipe
        rendered = prompt.pointwise(query.text, text, recipe.instruction)
        about = f"query '{query.query_id}', document {document}"
        if prompt.grades is not None:
            low, high = prompt.grades
            reminder = f"Answer with one whole number from {low} to {high} and nothing else."
            request = recipe.asked(rendered, about, answer_start=prompt.answer_start, max_tokens=16)
            return Question(request, lambda reply: grade(reply, low, high), reminder)
        positive, negative = str(prompt.positive), str(prompt.negative)
        request = recipe.asked(
            rendered, about, answer_start=prompt.answer_start, max_tokens=1, top_logprobs=recipe.top_logprobs
        )
        return Question(request, lambda reply: log_odds(reply, positive, negative))

    def _window(self, query: Candidates, passages: Sequence[str]) -> Question[Order]:
        prompt, n = self.prompt, len(passages)
        names = prompt.identifiers_of(n)
        start = prompt.answer_start
        request = self.recipe.asked(
            prompt.listwise(query.text, passages),
            f"query '{query.query_id}', a window of {n} passages",
            answer_start=start,
            max_tokens=8 * n + 8,
        )
        reminder = (
            f"Answer with the identifiers of all {n} passages, the most relevant first, in the form "
            f"[{names[1]}] > [{names[0]}], and nothing else."
        )
        return Question(request, lambda reply: order(reply, names, start), reminder)

    def _ask(self, questions: Sequence[Question[T]]) -> list[Outcome[T]]:
        recipe = self.recipe
        return ask_all(
            questions, self.client, self.cache, concurrency=recipe.concurrency, attempts=recipe.malformed_attempts
        )

    def _unanswered(self, question: Question[PairScore], outcome: Outcome[PairScore]) -> AnswerError:
        said = outcome.replies[-1].content[:200]
        wanted = f"'{self.prompt.positive}' or '{self.prompt.negative}' among the first token's alternatives"
        if self.prompt.grades is not None:
            wanted = f"grade from {self.prompt.grades[0]} to {self.prompt.grades[1]}"
        return AnswerError(f"{question.request.about}: no {wanted} in the answer {said!r}")

    def _names(self, query: Candidates) -> list[str]:
        if self._job is None:
            return [f"in row {row}" for row in query.rows]
        return [f"'{doc_id}'" for doc_id in self._job.collection.documents.ids_of(query.rows)]

    @property
    def _most_words(self) -> int | None:
        return self.recipe.max_passage_words or self.prompt.passage_words
