from __future__ import annotations

import numpy as np

from retrieval_kd.models.sparse_statistics import sparse_cost
from retrieval_kd.models.vectors_of_texts import SparseVectors


def vectors(*texts: list[int]) -> SparseVectors:
    terms = np.array([term for text in texts for term in text], dtype=np.int32)
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    return SparseVectors(lengths, terms, np.ones(len(terms), np.float32), np.zeros(len(texts), np.int32))


def test_terms_and_flops() -> None:
    """Shares in queries: 1 of term 1, 1/2 of 3; in documents: 3/4 of 1, 1/4 of 2, 1/2 of 3: 1 · 3/4 + 1/2 · 1/2."""
    cost = sparse_cost(vectors([1, 3], [1]), vectors([1, 3], [1], [1, 2, 3], []))
    assert cost == (1.5, 1.5, 1.0)


def test_nothing_in_common_and_nothing_at_all() -> None:
    assert sparse_cost(vectors([1], [2]), vectors([7])) == (1, 1, 0)
    assert sparse_cost(vectors([], []), vectors()) == (0, 0, 0)
