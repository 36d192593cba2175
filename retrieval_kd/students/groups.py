"""Drawing groups: which documents a query is trained with at each visit.

A draw depends on the seed, the query and the visit alone: a resumed run, or one with more workers, draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from retrieval_kd.students.sampling import Groups


@dataclass(frozen=True)
class TrainingQuery:
    """A query with its candidates (rows of the collection, best first by the teacher or the run).

    ``scores`` are NaN where unknown, ``positives`` the positions that may fill slot 0, ``file`` the score file that
    the list is from (0 where files are joined). A query has a list for each file that is mixed, and for each relevant
    document where all have visits of their own.
    """

    query_id: str
    text: str
    rows: np.ndarray
    scores: np.ndarray
    relevant: np.ndarray
    positives: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    file: int = 0


def draw(query: TrainingQuery, groups: Groups, seed: Sequence[int]) -> np.ndarray:
    """Positions (into the query's candidates) of one group: the positive first, at most ``groups.documents`` in all.

    None for a query without candidates.
    """
    if not len(query.rows):
        return np.zeros(0, dtype=np.int64)
    rng = np.random.default_rng(seed)
    positive = int(rng.choice(query.positives))
    others = allowed_negatives(query, groups, positive)
    if groups.negatives == "top-random":
        others = others[: groups.pool]
    wanted = min(groups.documents - 1, len(others))
    if wanted == 0:
        chosen = others
    elif groups.negatives == "hardest":
        chosen = others[:wanted]
    elif groups.negatives == "spread":
        chosen = np.array([rng.choice(part) for part in np.array_split(others, wanted)], dtype=np.int64)
    elif groups.negatives == "margin-bins":
        chosen = _from_bins(others, query.scores, groups.bins, wanted, rng)
    else:
        chosen = rng.choice(others, size=wanted, replace=False)
    return np.concatenate([[positive], chosen]).astype(np.int64)


def allowed_negatives(query: TrainingQuery, groups: Groups, positive: int) -> np.ndarray:
    """The positions that may be drawn beside ``positive``, best first."""
    allowed = ~query.relevant if groups.reads_labels else np.ones(len(query.rows), dtype=bool)
    allowed[positive] = False
    if groups.range is not None:
        best, worst = groups.range
        allowed[: best - 1] = False
        allowed[worst:] = False
    if groups.negatives == "margin-bins":
        allowed &= np.isfinite(query.scores)
    if groups.false_negatives is not None:
        rule, score = groups.false_negatives, query.scores[positive]
        limit = score - rule.margin if rule.margin is not None else score * rule.relative
        allowed &= query.scores <= limit  # false for an unknown score, which no rule can clear
    return np.flatnonzero(allowed)


def _from_bins(others: np.ndarray, scores: np.ndarray, bins: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """``wanted`` of ``others``: each time a bin that is not used up, then one of its documents.

    Bins of the margin to a positive are bins of the score, counted from the other end.
    """
    values = scores[others].astype(np.float64)
    edges = np.linspace(values.min(), values.max(), bins + 1)[1:-1]
    numbers = np.searchsorted(edges, values, side="right")
    left = [rng.permutation(others[numbers == number]).tolist() for number in np.unique(numbers)]
    chosen = []
    for _ in range(wanted):
        i = int(rng.integers(len(left)))
        chosen.append(left[i].pop())
        if not left[i]:
            del left[i]
    return np.array(chosen, dtype=np.int64)
