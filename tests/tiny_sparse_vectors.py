"""Synthetic learned sparse vectors: a few terms are in many texts, most in few, and weights differ by text."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array


def skewed(number: int, terms: int, *, seed: int, entries: int = 30) -> csr_array:
    """Rows of about ``entries`` terms [number, terms], drawn by Zipf's law, with log-normal weights."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, terms + 1)
    owners = np.repeat(np.arange(number), entries)
    drawn = rng.choice(terms, size=len(owners), p=frequency / frequency.sum())
    weights = rng.lognormal(-0.5, 0.6, len(owners)) / frequency[drawn] ** 0.2
    matrix = csr_array((weights.astype(np.float32), (owners, drawn)), shape=(number, terms))
    matrix.sum_duplicates()
    return matrix


def overlap(found: np.ndarray, best: np.ndarray) -> float:
    """The mean share of the rows in ``best`` [Q, k] that ``found`` [Q, k] has too."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), best.tolist(), strict=True)]))
