from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling

from retrieval_kd.models.splade_pooling import pool_maxima_first


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_vectors_and_gradients_are_those_of_the_stock_module(activation: str) -> None:
    """[2, 3, 4] logits, the second text of one token: also where all logits of a term are negative."""
    logits = torch.tensor(
        [
            [[1.0, -2.0, 0.5, 3.0], [2.0, -1.0, 0.0, -3.0], [0.5, -0.5, 0.7, 1.0]],
            [[-1.0, 4.0, 0.2, -0.1], [9.0, 9.0, 9.0, 9.0], [8.0, 8.0, 8.0, 8.0]],
        ]
    )
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = []
    for change in (False, True):
        pooling = SpladePooling("max", activation_function=activation)
        assert not change or pool_maxima_first(pooling) == 1
        x = logits.clone().requires_grad_()
        vectors = pooling({"token_embeddings": x, "attention_mask": mask})["sentence_embedding"]
        (vectors * torch.arange(1.0, 9.0).view(2, 4)).sum().backward()
        with torch.no_grad():
            inference = pooling.eval()({"token_embeddings": logits.clone(), "attention_mask": mask})
        found.append((vectors.detach(), x.grad, inference["sentence_embedding"]))
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=0)
    first = torch.tensor([2.0, 0.0, 0.7, 3.0]).log1p()
    torch.testing.assert_close(found[1][0][0], first.log1p() if activation == "log1p_relu" else first)


def test_it_is_saved_as_the_stock_module(tmp_path: Path) -> None:
    pooling = SpladePooling("max")
    pool_maxima_first(pooling)
    pooling.save(str(tmp_path))
    assert type(SpladePooling.load(str(tmp_path))).forward is SpladePooling.forward


def test_sums_are_left_alone() -> None:
    assert pool_maxima_first(SpladePooling("sum")) == 0
