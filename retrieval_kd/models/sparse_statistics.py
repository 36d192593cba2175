"""What sparse vectors cost: nonzeros a text, and the multiply-adds that a query and a document are expected to need."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Sparse(Protocol):
    """Sparse vectors of texts: text i has the next ``lengths[i]`` of ``terms``."""

    @property
    def lengths(self) -> np.ndarray:
        """Terms of each text [n]."""

    @property
    def terms(self) -> np.ndarray:
        """The terms of all texts, one text after another."""


class SparseCost(NamedTuple):
    """Means over queries and documents."""

    query_terms: float
    document_terms: float
    flops: float
    """``sum over t of P_q(t) · P_d(t)``: multiply-adds of a query with a document, P the share of texts with term t."""


def sparse_cost(queries: Sparse, documents: Sparse) -> SparseCost:
    """Mean terms a query and a document, and FLOPS as in Geng et al. 2024 (arXiv 2411.04403); 0 without texts."""
    size = 1 + max(int(queries.terms.max(initial=-1)), int(documents.terms.max(initial=-1)))
    shares = [np.bincount(s.terms, minlength=size) / max(1, len(s.lengths)) for s in (queries, documents)]
    return SparseCost(
        float(shares[0].sum()),
        float(shares[1].sum()),
        float(shares[0] @ shares[1]),
    )
