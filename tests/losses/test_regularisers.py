"""Sparsity penalties against numbers worked out by hand, and the two forms of IDF-aware FLOPS against one another."""

from __future__ import annotations

import pytest
import torch

from retrieval_kd.losses.regularisers import L1, WeightedFlops, anti_zero, idf_coefficients

VECTORS = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])


def test_l1() -> None:
    """(3 + 3) / 2, and for absolute values (3 + 5) / 2."""
    assert float(L1().compute_loss_from_embeddings(VECTORS)) == 3
    assert float(L1().compute_loss_from_embeddings(torch.tensor([[-1.0, 2.0], [5.0, 0.0]]))) == 4


def test_weighted_flops() -> None:
    """Means (2, 0, 1): 0.5 · 4 + 7 · 0 + 3 · 1."""
    loss = WeightedFlops(torch.tensor([0.5, 7.0, 3.0]))
    assert float(loss.compute_loss_from_embeddings(VECTORS)) == 5


def test_idf_aware_flops_has_two_equal_forms() -> None:
    """On u = idf · w with 1 / idf², and on w as sentence-transformers computes it; gradients with respect to w too."""
    from sentence_transformers.sparse_encoder.losses import FlopsLoss

    generator = torch.Generator().manual_seed(0)
    idf = torch.rand(50, generator=generator, dtype=torch.float64) * 5 + 0.1
    values = torch.rand(6, 50, generator=generator, dtype=torch.float64)
    explicit, code = values.clone().requires_grad_(), values.clone().requires_grad_()
    one = WeightedFlops(idf_coefficients(idf)).compute_loss_from_embeddings(idf * explicit)
    other = FlopsLoss(None).compute_loss_from_embeddings(code)
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(explicit.grad, code.grad)
    assert other.item() > 1


def test_terms_without_idf_pay_as_the_most_frequent() -> None:
    """1 / 2², 1 / 0.5², and the latter again for 0."""
    assert idf_coefficients(torch.tensor([2.0, 0.5, 0.0])).tolist() == [0.25, 4, 4]


def test_anti_zero() -> None:
    """1 / 6²; at nothing it is bounded; its gradient raises weights: -2 / 6³."""
    vectors = VECTORS.clone().requires_grad_()
    value = anti_zero(vectors)
    value.backward()
    assert value.item() == pytest.approx(1 / 36)
    assert vectors.grad is not None
    torch.testing.assert_close(vectors.grad, torch.full_like(vectors, -2 / 216))
    assert float(anti_zero(torch.zeros(2, 3))) == pytest.approx(1e6)
