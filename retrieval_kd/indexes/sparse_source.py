"""What engines over sparse vectors share: documents as they are indexed, and queries that fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrieval_kd.data.vectors import SparseArrays, Vectors
from retrieval_kd.errors import InputError, UsageError


def document_weights(vectors: Vectors) -> SparseArrays:
    """The arrays of ``vectors``, with weights divided by their vector's length where cosine compares them.

    Raises `InputError` when no document has a term, or for weights that are not finite.
    """
    indptr, terms, weights = vectors.sparse
    if not len(terms):
        raise InputError(f"{vectors.path}: none of the {len(vectors)} documents has a term to index")
    if not np.isfinite(weights).all():
        raise InputError(f"{vectors.path}: has NaN or infinite weights; encode again")
    if vectors.similarity == "cosine":
        owners = np.repeat(np.arange(len(vectors)), np.diff(indptr))
        lengths = np.sqrt(np.bincount(owners, weights.astype(np.float64) ** 2, len(vectors)))
        weights = (weights / lengths[owners]).astype(np.float32)
    return SparseArrays(indptr, terms, weights)


def check_sparse_queries(queries: Any, dimension: int) -> None:
    """Raises `UsageError` unless ``queries`` [Q, terms] have ``dimension`` terms and weights that float32 holds."""
    if queries.shape[1] != dimension:
        raise UsageError(
            f"queries have {queries.shape[1]} terms, this index takes {dimension}; "
            "encode queries with the model of the index"
        )
    if not (np.abs(queries.data) <= np.finfo(np.float32).max).all():
        raise UsageError("queries have NaN or infinite weights, or some that float32 cannot hold")


def query_terms(queries: Any, place: int, *, cosine: bool) -> tuple[np.ndarray, np.ndarray]:
    """The terms of one query, ascending and once each, and their float64 weights, divided by its length for cosine."""
    part = slice(queries.indptr[place], queries.indptr[place + 1])
    terms, entries = np.unique(queries.indices[part], return_inverse=True)
    weights: np.ndarray = np.bincount(entries, queries.data[part].astype(np.float64), len(terms))
    if cosine:
        weights = weights / max(float(np.linalg.norm(weights)), 1e-12)
    return terms, weights
