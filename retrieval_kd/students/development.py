"""Periodic evaluation during training: held-out queries against a small pool of documents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from sentence_transformers.base.evaluation import BaseEvaluator

from retrieval_kd.data.run import Run
from retrieval_kd.errors import InputError
from retrieval_kd.measures import evaluate_run
from retrieval_kd.students.base import Development, TrainerStudent
from retrieval_kd.students.groups import TrainingQuery

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection, Documents

log = logging.getLogger("retrieval_kd")

METRIC = "development"


class ScoresPools(Protocol):
    """A student that scores the documents of a small pool."""

    def pool_scores(self, model: Any, queries: Sequence[str], documents: Documents, rows: np.ndarray) -> np.ndarray:
        """Scores [queries, rows]."""


class PoolEvaluator(BaseEvaluator):
    """The mean of one measure over held-out queries, each ranking its pool of documents.

    ``pools[i]`` are the rows query i ranks and ``relevant[i]`` those it should find (``grades[i]`` how relevant they
    are, 1 when not given). A bi-encoder ranks one pool shared
    by all queries; a re-ranker ranks each query's own candidates.
    """

    def __init__(
        self,
        student: ScoresPools,
        collection: Collection,
        texts: Sequence[str],
        pools: Sequence[np.ndarray],
        relevant: Sequence[np.ndarray],
        measure: str,
        grades: Sequence[np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self.primary_metric = METRIC
        self.student = student
        self.collection = collection
        self.texts = texts
        self.pools = pools
        self.measure = measure
        grades = [np.ones(len(rows), dtype=np.int64) for rows in relevant] if grades is None else grades
        self.qrels = {
            str(i): dict(zip(map(str, rows.tolist()), of_query.tolist(), strict=True))
            for i, (rows, of_query) in enumerate(zip(relevant, grades, strict=True))
        }

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """``{"development": mean}``."""
        scores = self._scores(model)
        run = Run.from_hits(
            [str(i) for i in range(len(self.texts))],
            [[str(row) for row in pool.tolist()] for pool in self.pools],
            scores,
        )
        by_query = evaluate_run(run, self.qrels, [self.measure])[self.measure]
        return {METRIC: float(np.mean(list(by_query.values())))}

    def _scores(self, model: Any) -> list[np.ndarray]:
        shared = all(pool is self.pools[0] for pool in self.pools)
        if shared:
            return list(self.student.pool_scores(model, self.texts, self.collection.documents, self.pools[0]))
        return [
            self.student.pool_scores(model, [text], self.collection.documents, pool)[0]
            for text, pool in zip(self.texts, self.pools, strict=True)
        ]


class VectorEvaluator(BaseEvaluator):
    """The mean cosine of the vectors a model makes of queries and the teacher's ``goal`` [n, d]."""

    def __init__(self, texts: Sequence[str], goal: np.ndarray) -> None:
        super().__init__()
        self.primary_metric = METRIC
        self.texts = texts
        self.goal = goal

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """``{"development": mean}``."""
        found = model.encode_query(list(self.texts), show_progress_bar=False)
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(self.goal, axis=1)
        return {METRIC: float(((found * self.goal).sum(axis=1) / np.maximum(lengths, 1e-12)).mean())}


def held_out(
    settings: Development, queries: list[TrainingQuery], seed: int
) -> tuple[list[TrainingQuery], list[TrainingQuery]]:
    """``queries`` without, and only, those held out for an evaluation against the teacher (a tenth at most)."""
    if settings.against != "teacher":
        return queries, []
    ids = list(dict.fromkeys(query.query_id for query in queries))  # a query may have several lists
    n = min(settings.queries, len(ids) // 10)
    if n == 0:
        log.warning("%d training queries are too few to hold any out: no development evaluation", len(ids))
    chosen = {ids[i] for i in np.random.default_rng((seed, 1)).choice(len(ids), size=n, replace=False)}
    kept = [query for query in queries if query.query_id not in chosen]
    return kept, [query for query in queries if query.query_id in chosen]


def evaluator(
    student: TrainerStudent,
    settings: Development,
    collection: Collection,
    held: Sequence[TrainingQuery],
    seed: int,
) -> PoolEvaluator | None:
    """The evaluator a recipe's ``development:`` asks for; None when there is nothing to evaluate on.

    For a re-ranker a query ranks its own candidates; else all rank the relevant documents of all,
    filled up at random to ``settings.documents``.
    """
    rng = np.random.default_rng((seed, 2))
    if settings.against == "nothing" or (settings.against == "teacher" and not held):
        return None
    if settings.against == "teacher":
        texts = [query.text for query in held]
        relevant = [query.rows[:1] for query in held]
        candidates = [query.rows[: settings.documents] for query in held]
    else:
        texts, relevant = _judged(settings, collection, rng)
        candidates = []
    if student.reranks and candidates:
        return PoolEvaluator(student, collection, texts, candidates, relevant, settings.measure)
    pool = np.unique(np.concatenate(relevant))
    rest = np.setdiff1d(
        np.unique(np.concatenate(candidates)) if candidates else np.arange(len(collection.documents)), pool
    )
    fill = max(0, min(settings.documents - len(pool), len(rest)))
    pool = np.sort(np.concatenate([pool, rng.choice(rest, size=fill, replace=False)])).astype(np.int64)
    return PoolEvaluator(student, collection, texts, [pool] * len(texts), relevant, settings.measure)


def _judged(
    settings: Development, collection: Collection, rng: np.random.Generator
) -> tuple[list[str], list[np.ndarray]]:
    texts = collection.queries(settings.split)
    relevant = {
        query_id: [doc_id for doc_id, relevance in judged.items() if relevance > 0]
        for query_id, judged in collection.qrels(settings.split).items()
    }
    ids = [query_id for query_id in texts if relevant.get(query_id)]
    if not ids:
        raise InputError(f"development: no query of split '{settings.split}' has a relevant document")
    chosen = [ids[i] for i in np.sort(rng.choice(len(ids), size=min(settings.queries, len(ids)), replace=False))]
    return [texts[i] for i in chosen], [collection.documents.rows(relevant[i]) for i in chosen]
