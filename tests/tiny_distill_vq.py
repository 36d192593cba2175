"""Documents, queries and score files that a Distill-VQ index is trained with in tests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tiny import unit

DIMENSION = 16


class World(NamedTuple):
    """Unit vectors [n, 16] each; queries are near documents, and ``unseen`` ones are of the same kind."""

    documents: np.ndarray
    queries: np.ndarray
    unseen: np.ndarray


def make_world(documents: int = 400, queries: int = 300, seed: int = 0) -> World:
    """Documents with correlated dimensions of very different spread."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((DIMENSION, DIMENSION)) * np.linspace(1.5, 0.3, DIMENSION)
    made = rng.standard_normal((documents, DIMENSION)) @ mixing
    near = made[rng.integers(0, documents, 2 * queries)]
    asked = near + 0.7 * rng.standard_normal((2 * queries, DIMENSION)) @ mixing
    return World(*(unit(part).astype(np.float32) for part in (made, asked[:queries], asked[queries:])))


def overlap(found: np.ndarray, queries: np.ndarray, documents: np.ndarray, k: int = 10) -> float:
    """The share of the exact best ``k`` among the rows found."""
    exact = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found[:, :k], exact, strict=True)]))
