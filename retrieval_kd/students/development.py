"""Periodic evaluation during training: held-out queries against a small pool of documents."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers.base.evaluation import BaseEvaluator

from retrieval_kd.data.run import Run
from retrieval_kd.errors import InputError
from retrieval_kd.measures import evaluate_run
from retrieval_kd.students.base import Development, Student
from retrieval_kd.students.groups import TrainingQuery

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

METRIC = "development"


class PoolEvaluator(BaseEvaluator):
    """The mean of one measure over held-out queries, each ranking its pool of documents.

    ``pools[i]`` are the rows query i ranks and ``relevant[i]`` those it should find. A bi-encoder ranks one pool shared
    by all queries; a re-ranker ranks each query's own candidates.
    """

    def __init__(
        self,
        student: Student,
        collection: Collection,
        texts: Sequence[str],
        pools: Sequence[np.ndarray],
        relevant: Sequence[np.ndarray],
        measure: str,
    ) -> None:
        super().__init__()
        self.primary_metric = METRIC
        self.student = student
        self.collection = collection
        self.texts = texts
        self.pools = pools
        self.measure = measure
        self.qrels = {str(i): {str(row): 1 for row in rows.tolist()} for i, rows in enumerate(relevant)}

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
            return list(
                self.student.development_scores(model, self.texts, self.collection.documents.texts(self.pools[0]))
            )
        return [
            self.student.development_scores(model, [text], self.collection.documents.texts(pool))[0]
            for text, pool in zip(self.texts, self.pools, strict=True)
        ]


def held_out(
    settings: Development, queries: list[TrainingQuery], seed: int
) -> tuple[list[TrainingQuery], list[TrainingQuery]]:
    """``queries`` without, and only, those held out for an evaluation against the teacher (a tenth at most)."""
    if settings.against != "teacher":
        return queries, []
    n = min(settings.queries, len(queries) // 10)
    if n == 0:
        log.warning("%d training queries are too few to hold any out: no development evaluation", len(queries))
    chosen = set(np.random.default_rng((seed, 1)).choice(len(queries), size=n, replace=False).tolist())
    kept = [query for i, query in enumerate(queries) if i not in chosen]
    return kept, [query for i, query in enumerate(queries) if i in chosen]


def evaluator(
    student: Student,
    settings: Development,
    collection: Collection,
    held: Sequence[TrainingQuery],
    own_pools: bool,
    seed: int,
) -> PoolEvaluator | None:
    """The evaluator a recipe's ``development:`` asks for; None when there is nothing to evaluate on.

    With ``own_pools`` (a re-ranker) a query ranks its own candidates; else all rank the relevant documents of all,
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
    if own_pools and candidates:
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
