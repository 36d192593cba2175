"""What every encoder gives for texts, whatever runs it: vectors, sparse vectors, or a vector a token. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""Task → the names its prompt may have; a model's first one is used, as sentence-transformers does."""


@dataclass
class Truncation:
    """How many texts were cut at the model's maximum length and how many tokens were lost."""

    texts: int = 0
    tokens: int = 0

    def to_json(self) -> dict[str, int]:
        """The manifest's two counts."""
        return {"truncated_texts": self.texts, "tokens_lost": self.tokens}


class Encoded(NamedTuple):
    """Vectors [n, d] float32 of texts, and the tokens [n] int32 that were cut off each."""

    vectors: np.ndarray
    tokens_lost: np.ndarray


class SparseVectors(NamedTuple):
    """Text i has the next ``lengths[i]`` of ``terms`` (int32, ascending) and ``weights`` (float32, none of them 0)."""

    lengths: np.ndarray
    terms: np.ndarray
    weights: np.ndarray
    tokens_lost: np.ndarray
    """int32 [n]: tokens that were cut off each text."""


class MultiVectors(NamedTuple):
    """Text i has the next ``lengths[i]`` rows of ``tokens`` [sum, d] float32; ``lengths`` is int32 [n]."""

    lengths: np.ndarray
    tokens: np.ndarray
    tokens_lost: np.ndarray
    """int32 [n]: tokens that were cut off each text."""


def strongest(
    terms: np.ndarray, weights: np.ndarray, *, threshold: float = 0.0, top_terms: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The terms of one text (ascending, with their weights) that weigh more than ``threshold``, at most ``top_terms``.

    Of equal weights the lower term stays.
    """
    kept = np.flatnonzero(weights > threshold)
    if top_terms is not None and len(kept) > top_terms:
        kept = np.sort(kept[np.argsort(-weights[kept], kind="stable")[:top_terms]])
    return terms[kept], weights[kept]
