"""Vectors of chosen documents for tests of indexes, and what an index finds in a form to compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tiny import unit

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.data.vectors import Vectors

MODEL = InputRef("f" * 64, name="nobody/model")


def write_documents(
    out: Path,
    values: Any,
    ids: Sequence[str],
    similarity: str = "dot",
    *,
    model: InputRef = MODEL,
    collection: InputRef | None = None,
) -> Vectors:
    """The vectors artifact of documents ``ids`` by one model; terms of sparse ones are ``w0``, ``w1``, …"""
    given: dict[str, Any] = {"of": "documents", "split": None, "similarity": similarity}
    if not isinstance(values, list) and not isinstance(values, np.ndarray):
        given["vocabulary"] = [f"w{term}" for term in range(values.shape[1])]
    return write_vectors(out, values, ids, model=model, collection=collection or InputRef("c" * 64), **given)


def sparse_documents(number: int, seed: int = 3, terms: int = 12) -> csr_array:
    """Sparse vectors of whole weights, so that some scores tie; every one has term 0."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 4, (number, terms)) * (rng.random((number, terms)) < 0.3)
    weights[:, 0] = 1
    return csr_array(weights.astype(np.float32))


def hits(index: Any, queries: Any, k: int, allowed: np.ndarray | None = None) -> list[list[tuple[str, float]]]:
    """Id and score of each query's hits, which do not depend on how an index numbers its rows."""
    scores, rows = index.search(queries, k, allowed)
    return [
        [(doc_id, float(score)) for doc_id, score in zip(index.ids_of(of[of >= 0]), line[of >= 0], strict=True)]
        for line, of in zip(scores, rows, strict=True)
    ]


def all_scores(queries: Any, documents: Any, similarity: str) -> np.ndarray:
    """Scores [Q, n] float32 of every document by brute force, float64 sums; -inf for one that cannot be a hit."""
    if isinstance(documents, list):
        pairs = [[(query.astype(float) @ d.T.astype(float)).max(axis=1).sum() for d in documents] for query in queries]
        return np.asarray(pairs, dtype=np.float32)
    matrix, asked = documents, queries
    if not isinstance(documents, np.ndarray):
        matrix, asked = documents.toarray(), queries.toarray()
    matrix, asked = matrix.astype(np.float64), asked.astype(np.float64)
    if similarity == "cosine":
        if not isinstance(documents, np.ndarray):  # weights are normalised once, and stored as float32
            matrix = unit(matrix).astype(np.float32).astype(np.float64)
        else:
            matrix = unit(matrix)
        asked = unit(asked)
    scores = (asked @ matrix.T).astype(np.float32)
    if not isinstance(documents, np.ndarray):
        scores[scores <= 0] = -np.inf
    return scores


def best(scores: np.ndarray, ids: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
    """Id and score of the best ``k`` of each query, score descending then id descending."""
    ranked = [
        sorted(((float(s), i) for s, i in zip(line, ids, strict=True) if s > -np.inf), reverse=True) for line in scores
    ]
    return [[(doc_id, score) for score, doc_id in line[:k]] for line in ranked]


def recall(found: list[list[tuple[str, float]]], wanted: list[list[tuple[str, float]]]) -> float:
    """The share of the wanted documents that were found, over all queries; 1.0 when none is wanted."""
    pairs = [({i for i, _ in got}, {i for i, _ in want}) for got, want in zip(found, wanted, strict=True)]
    total = sum(len(want) for _, want in pairs)
    return sum(len(got & want) for got, want in pairs) / total if total else 1.0
