"""Drawing groups: which documents a query is trained with at each visit, from a score file or a run of candidates.

A draw depends on the seed, the query and the visit alone: a resumed run, or one with more workers, draws the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrieval_kd.errors import InputError, first
from retrieval_kd.students.base import Groups

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.run import Run
    from retrieval_kd.data.scores import Scores

log = logging.getLogger("retrieval_kd")


@dataclass(frozen=True)
class TrainingQuery:
    """A query with its candidates (rows of the collection, best first by the teacher or the run)."""

    query_id: str
    text: str
    rows: np.ndarray
    scores: np.ndarray
    relevant: np.ndarray


def training_queries(
    collection: Collection, split: str, groups: Groups, scores: Sequence[Scores], candidates: Run | None
) -> list[TrainingQuery]:
    """The queries of ``split`` that can be trained on. Those that cannot are counted and said.

    Scores come from score files (several are joined; a later file adds what the former lack); documents that only
    ``candidates`` names have the score NaN.
    """
    texts = collection.queries(split)
    by_labels = groups.positive == "qrels"
    qrels = collection.qrels(split) if by_labels else {}
    listed = _listed(scores, candidates, set(texts))
    queries: list[TrainingQuery] = []
    dropped: dict[str, list[str]] = {"candidates": [], "relevant document": [], "negative": [], "teacher's score": []}
    for query_id, text in texts.items():
        doc_scores = dict(listed.get(query_id, {}))
        relevant = [doc_id for doc_id, relevance in qrels.get(query_id, {}).items() if relevance > 0]
        if not doc_scores:
            dropped["candidates"].append(query_id)
        elif by_labels and not relevant:
            dropped["relevant document"].append(query_id)
        elif len(doc_scores.keys() - set(relevant)) < 1 or (not by_labels and len(doc_scores) < 2):
            dropped["negative"].append(query_id)
        elif not by_labels and not any(math.isfinite(value) for value in doc_scores.values()):
            dropped["teacher's score"].append(query_id)
        else:
            for doc_id in relevant:
                doc_scores.setdefault(doc_id, float("nan"))
            queries.append(_query(collection, query_id, text, doc_scores, relevant))
    for what, ids in dropped.items():
        if ids:
            log.warning(
                "%d of %d queries of '%s' have no %s and are left out: %s",
                len(ids),
                len(texts),
                split,
                what,
                first(ids),
            )
    if not queries:
        raise InputError(
            f"no query of split '{split}' can be trained on ({len(texts)} queries, none with candidates"
            f"{' and a relevant document' if by_labels else ''}); were scores or candidates made for this split?"
        )
    return queries


def draw(query: TrainingQuery, groups: Groups, seed: Sequence[int]) -> np.ndarray:
    """Positions (into the query's candidates) of one group: the positive first, at most ``groups.documents`` in all."""
    rng = np.random.default_rng(seed)
    if groups.positive == "qrels":
        positive = int(rng.choice(np.flatnonzero(query.relevant)))
        others = np.flatnonzero(~query.relevant)
    else:
        positive = 0
        others = np.arange(1, len(query.rows))
    wanted = min(groups.documents - 1, len(others))
    if groups.negatives == "hardest":
        chosen = others[:wanted]
    elif groups.negatives == "random":
        chosen = rng.choice(others, size=wanted, replace=False)
    else:
        chosen = np.array([rng.choice(part) for part in np.array_split(others, wanted)], dtype=np.int64)
    return np.concatenate([[positive], chosen]).astype(np.int64)


def _listed(scores: Sequence[Scores], candidates: Run | None, wanted: set[str]) -> Mapping[str, dict[str, float]]:
    listed: dict[str, dict[str, float]] = {}
    for file in scores:
        for row in file:
            if row.query_id in wanted:
                known = listed.setdefault(row.query_id, {})
                for doc_id, value in zip(row.doc_ids, row.scores.tolist(), strict=True):
                    known.setdefault(doc_id, value)
    if candidates is not None:
        for query_id, doc_ids, _ in candidates:
            if query_id in wanted:
                known = listed.setdefault(query_id, {})
                for doc_id in doc_ids:
                    known.setdefault(doc_id, float("nan"))
    return listed


def _query(
    collection: Collection, query_id: str, text: str, doc_scores: Mapping[str, float], relevant: Sequence[str]
) -> TrainingQuery:
    values = np.fromiter(doc_scores.values(), dtype=np.float32, count=len(doc_scores))
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    ids = [list(doc_scores)[i] for i in order]
    known = set(relevant)
    return TrainingQuery(
        query_id,
        text,
        collection.documents.rows(ids),
        values[order],
        np.array([doc_id in known for doc_id in ids], dtype=bool),
    )
