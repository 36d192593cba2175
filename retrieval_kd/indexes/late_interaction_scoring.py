"""Scores of documents by the tokens that a query's tokens retrieved, and exact MaxSim of some documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from retrieval_kd.errors import UsageError

Read = Callable[[np.ndarray], np.ndarray]
"""Numbers of tokens [n] → the stored tokens [n, d]."""

_BLOCK = 65536
"""Tokens of documents that are read and compared at a time; a longer document is a block of its own."""


def check_queries(queries: Any, dimension: int) -> None:
    """Raises `UsageError` unless every query is a finite array [tokens, dimension]."""
    for place, query in enumerate(queries):
        if query.ndim != 2 or query.shape[1] != dimension:
            raise UsageError(
                f"query {place} has shape {list(query.shape)}, this index takes [tokens, {dimension}]; "
                "encode queries with the model of the index"
            )
        if not np.isfinite(query).all():
            raise UsageError(f"query {place} has NaN or infinite values")


def retrieved_sums(scores: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents [m] whose tokens n query tokens retrieved, ascending, and their scores [m] float64.

    ``scores`` [n, t] descend and ``owners`` [n, t] are the tokens' documents, -1 where nothing was retrieved. A score
    is the sum over query tokens of the best token retrieved; where the document has none, the lowest score retrieved
    for the query token stands for it, which none of its tokens exceeds (Lee et al., XTR, 2023). A query token that
    retrieved nothing adds 0.
    """
    number, width = owners.shape
    found = owners >= 0
    if not found.any():
        return np.empty(0, np.int64), np.empty(0)
    lowest = np.where(found, scores, np.inf).min(axis=1).astype(np.float64)
    lowest[np.isinf(lowest)] = 0
    # One number holds document, query token and place: sorted, the best of each pair of the first two comes first.
    lines, places = np.nonzero(found)
    pairs, places = np.divmod(np.sort((owners[lines, places] * number + lines) * width + places), width)
    best = np.flatnonzero(np.diff(pairs, prepend=-1))
    documents, lines = np.divmod(pairs[best], number)
    above = scores[lines, places[best]] - lowest[lines]
    begins = np.flatnonzero(np.diff(documents, prepend=-1))
    return documents[begins], lowest.sum() + np.add.reduceat(above, begins)


def best_and_ties(scores: np.ndarray, number: int) -> np.ndarray:
    """The places of the ``number`` highest scores, and of all that tie with the last of them."""
    if len(scores) <= number:
        return np.arange(len(scores))
    return np.flatnonzero(scores >= _nth_highest(scores, number))


def best_by_maxsim(
    query: np.ndarray, rows: np.ndarray, offsets: np.ndarray, read: Read, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Those of the documents ``rows`` that can be among the best ``k``, and their MaxSim [m] float64.

    Document i has the tokens ``offsets[i]`` to ``offsets[i + 1]``, one at least. All are compared in float32; what its
    rounding leaves in doubt then gets its float64 sum, one document at a time: a score is the same in any company.
    """
    query = np.asarray(query, dtype=np.float32)
    sums = np.empty(len(rows), dtype=np.float32)
    longest = 0.0
    for part, begins, numbers in _blocks(rows, offsets):
        tokens = np.asarray(read(numbers), dtype=np.float32)
        sums[part] = np.maximum.reduceat(query @ tokens.T, begins, axis=1).sum(axis=0)
        longest = max(longest, float(np.einsum("ij,ij->i", tokens, tokens).max()))
    if len(rows) > k:
        terms = query.shape[1] + len(query) + 2
        slack = terms * 2.0**-23 * longest**0.5 * float(np.linalg.norm(query, axis=1).sum())
        rows = rows[sums >= _nth_highest(sums, k) - 2 * slack]
    precise = query.astype(np.float64)
    exact = np.empty(len(rows))
    for i, row in enumerate(rows.tolist()):
        tokens = np.asarray(read(np.arange(offsets[row], offsets[row + 1])), dtype=np.float64)
        exact[i] = (precise @ tokens.T).max(axis=1).sum()
    return rows, exact


def _blocks(rows: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Documents of at most ``_BLOCK`` tokens together: which of ``rows``, where each begins, all their tokens."""
    lengths = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(lengths)
    first = 0
    while first < len(rows):
        before = ends[first] - lengths[first]
        last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
        part = slice(first, last)
        begins = ends[part] - lengths[part] - before
        yield part, begins, np.repeat(offsets[rows[part]] - begins, lengths[part]) + np.arange(ends[last - 1] - before)
        first = last


def _nth_highest(scores: np.ndarray, n: int) -> Any:
    return np.partition(scores, len(scores) - n)[len(scores) - n]
