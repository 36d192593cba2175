"""Hits: the one order that every kind of index gives them in, and what a search may be asked."""

from __future__ import annotations

import numpy as np

from retrieval_kd.errors import UsageError


def no_hits(queries: int, documents: int, k: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores [Q, k] float32 of -inf and rows [Q, k] int64 of -1, to be filled by a search for ``k`` hits.

    Raises `UsageError` for a ``k`` below 1, or ``allowed`` that does not say of each document whether it may be a hit.
    """
    check_k(k)
    check_allowed(allowed, documents)
    return np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), -1, dtype=np.int64)


def ordered(scores: np.ndarray, rows: np.ndarray, rank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best ``k`` of one query's candidates, score descending then id descending, padded with -inf and -1."""
    best = np.lexsort((rank[rows], -scores))[:k]
    top_scores = np.full(k, -np.inf, dtype=np.float32)
    top_rows = np.full(k, -1, dtype=np.int64)
    top_scores[: len(best)] = scores[best]
    top_rows[: len(best)] = rows[best]
    return top_scores, top_rows


def best_positive(
    scores: np.ndarray, rank: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best ``k`` of one query's scores [documents], those above 0 and allowed only, as `ordered` gives them."""
    found = np.flatnonzero(scores > 0 if allowed is None else (scores > 0) & allowed)
    if len(found) > k:
        positive = scores[found]
        boundary = np.partition(positive, len(positive) - k)[len(positive) - k]
        found = found[positive >= boundary]  # a tie at the k-th hit is whole before it is ordered
    return ordered(scores[found], found, rank, k)


def merged(
    scores: np.ndarray, rows: np.ndarray, more_scores: np.ndarray, more_rows: np.ndarray, rank: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of two lists of k hits a query [Q, k] each, score descending then id descending."""
    scores, rows = np.concatenate([scores, more_scores], axis=1), np.concatenate([rows, more_rows], axis=1)
    order = np.lexsort((np.where(rows < 0, len(rank), rank[rows]), -scores))[:, : more_rows.shape[1]]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def check_allowed(allowed: np.ndarray | None, documents: int) -> None:
    """Raises `UsageError` unless ``allowed`` is None or says of each row whether it may be a hit."""
    if allowed is not None and (allowed.dtype != bool or allowed.shape != (documents,)):
        raise UsageError(
            f"allowed is an array of {documents} booleans, one a row (got {allowed.dtype} {list(allowed.shape)})"
        )


def check_k(k: int) -> None:
    """Raises `UsageError` unless ``k`` is a positive number of hits."""
    if k < 1:
        raise UsageError(f"k is the number of hits wanted and at least 1 (got {k})")
