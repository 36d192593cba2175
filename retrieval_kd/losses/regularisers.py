"""Sparsity penalties on vectors over a vocabulary, for ``SpladeLoss`` of sentence-transformers (it has FLOPS itself).

Each takes the vectors [n, V] of the queries or of the documents of a batch, none of them negative.
"""

from __future__ import annotations

import torch
from torch import Tensor


class L1(torch.nn.Module):
    """The mean over texts of a vector's sum of absolute weights."""

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """A scalar."""
        return embeddings.abs().sum(dim=1).mean()


class WeightedFlops(torch.nn.Module):
    """FLOPS (Paria et al. 2020) with a coefficient a term: ``sum over t of c_t · (mean over texts of w_t)²``.

    With ``c_t = 1 / idf_t²`` it is the IDF-aware FLOPS of Geng et al. 2024, in which a frequent term pays more. On
    weights u = idf · w it equals plain FLOPS on w.
    """

    coefficients: Tensor

    def __init__(self, coefficients: Tensor) -> None:
        super().__init__()
        self.register_buffer("coefficients", coefficients, persistent=False)

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """A scalar."""
        return (self.coefficients * embeddings.mean(dim=0) ** 2).sum()


def idf_coefficients(idf: Tensor) -> Tensor:
    """``1 / idf²`` [V]; a term that weighs 0 (special tokens) pays as much as the most frequent one."""
    return idf.where(idf > 0, idf[idf > 0].min()).square().reciprocal()


def anti_zero(embeddings: Tensor) -> Tensor:
    """``1 / (sum of all weights)²``, at most 1e6: large when vectors collapse to zero, next to nothing otherwise."""
    return 1 / embeddings.sum().square().clamp(min=1e-6)
