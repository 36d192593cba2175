"""A teacher's scores against the relevance judgements of its collection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import ScoredQuery, read_shard, rows_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.scores import Scores

MEASURE = "nDCG@10"

Qrels = dict[str, dict[str, int]]


def against_labels(scores: Scores, collection: Collection, split: str | None = None) -> dict[str, dict[str, Any]]:
    """Split → what the judgements say of the teacher; without ``split``, every split that has a query in the file.

    ``auc`` is the mean, over the ``auc_queries`` queries that have both, of the share of (relevant, other) pairs that
    the teacher orders right, half for a tie. ``nDCG@10`` is the mean over the ``queries`` that are judged and scored,
    of the teacher's own ranking of the candidates. An unjudged document counts as not relevant. Both are None when
    there is no such query. Raises `InputError` for a split that the collection has not.
    """
    found = {name: _Split(collection.qrels(name)) for name in ([split] if split else collection.splits)}
    for shard in scores.shards:
        rows = list(rows_of(read_shard(shard)))
        for of_split in found.values():
            of_split.add([row for row in rows if row.query_id in of_split.qrels])
    return {name: of_split.to_json() for name, of_split in found.items() if split or of_split.gains}


def auc(scores: np.ndarray, relevant: np.ndarray) -> float | None:
    """The share of (relevant, other) pairs of a query in the right order, half for ties; None when one kind is missing.

    ``scores`` [n]; ``relevant`` [n] bool.
    """
    if relevant.all() or not relevant.any():
        return None
    difference = scores[relevant].astype(np.float64)[:, None] - scores[~relevant]
    return float((np.sign(difference) / 2 + 0.5).mean())


class _Split:
    """The running sums of one split."""

    def __init__(self, qrels: Qrels) -> None:
        self.qrels = qrels
        self.gains: list[float] = []
        self._areas: list[float] = []
        self._relevant = 0
        self._relevant_scored = 0

    def add(self, rows: list[ScoredQuery]) -> None:
        from retrieval_kd.measures import evaluate_run

        if not rows:
            return
        run = Run.from_hits([row.query_id for row in rows], [row.doc_ids for row in rows], [row.scores for row in rows])
        judged = {row.query_id: self.qrels[row.query_id] for row in rows}
        self.gains += evaluate_run(run, judged, [MEASURE])[MEASURE].values()
        for row in rows:
            relevant = _relevant(row.doc_ids, judged[row.query_id])
            self._relevant += sum(grade > 0 for grade in judged[row.query_id].values())
            self._relevant_scored += int(relevant.sum())
            area = auc(row.scores, relevant)
            if area is not None:
                self._areas.append(area)

    def to_json(self) -> dict[str, Any]:
        return {
            "judged_queries": len(self.qrels),
            "queries": len(self.gains),
            "relevant": self._relevant,
            "relevant_scored": self._relevant_scored,
            "auc": float(np.mean(self._areas)) if self._areas else None,
            "auc_queries": len(self._areas),
            MEASURE: float(np.mean(self.gains)) if self.gains else None,
        }


def _relevant(doc_ids: list[str], grades: Mapping[str, int]) -> np.ndarray:
    return np.array([grades.get(doc_id, 0) > 0 for doc_id in doc_ids], dtype=bool)
