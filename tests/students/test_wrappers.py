"""The objective inside the wrappers of sentence-transformers, which ask for `compute_loss_from_embeddings` or a number.

CachedMultipleNegativesRankingLoss and its kin are losses of their own, which take no inner loss: what they save,
`recompute: true` saves with any loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_dense
from tiny_dense import features_and_labels, gradients, make_batch, make_student

from retrieval_kd.losses.on_scores import info_nce, kl_divergence
from retrieval_kd.students.objective import Objective, Summed


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return tiny.make_dense(tmp_path / "deep", layers=3)


def ready(base: Path, **values: Any) -> tuple[Any, Objective, Any, dict[str, Any]]:
    student, model, objective = make_student(base, **values)
    return model, objective, *features_and_labels(student, model, make_batch())


def by_hand(model: Any, labels: dict[str, Any], dimension: int = 16) -> Any:
    """KL over the group and InfoNCE over the batch, of 20 times the cosine of vectors cut at ``dimension``."""
    import torch

    q, d = (
        torch.nn.functional.normalize(model(model.preprocess(texts))["sentence_embedding"][:, :dimension], dim=1)
        for texts in (tiny_dense.QUERIES, tiny_dense.DOCUMENTS)
    )
    scores = 20 * q @ d.T
    kl = kl_divergence(scores.gather(1, labels["column"]), labels["teacher"], labels["present"])
    return kl + info_nce(scores, labels["column"][:, 0], torch.ones(2, 3, dtype=torch.bool))


def test_matryoshka(deep: Path) -> None:
    """The sum over dimensions, values and gradients alike, with the objective called as any loss is."""
    import torch
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    model, objective, features, labels = ready(deep)
    loss = MatryoshkaLoss(model, Summed(objective), [16, 8], matryoshka_weights=[1, 0.5])(features, labels)
    expected = by_hand(model, labels) + 0.5 * by_hand(model, labels, 8)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found, wanted = gradients(model, loss), gradients(model, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_adaptive_layers(deep: Path) -> None:
    """The last layer's loss and the mean of the earlier ones', each by a cut model; early layers get gradients."""
    from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss

    from retrieval_kd.students.exits import exit_of

    model, objective, features, labels = ready(deep)
    wrapper = AdaptiveLayerLoss(model, Summed(objective), n_layers_per_step=-1, kl_temperature=0)
    loss = wrapper(features, labels)
    # sentence-transformers counts the word embeddings as a layer too: of its three earlier ones one is no exit
    embedded = exit_of(model, 1)
    embedded[0].auto_model.encoder.layer = type(embedded[0].auto_model.encoder.layer)()
    earlier = [embedded, exit_of(model, 1), exit_of(model, 2)]
    expected = by_hand(model, labels) + sum(by_hand(cut, labels) for cut in earlier) / 3
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert any("layer.0." in name for name in gradients(model, loss))


def test_matryoshka_over_layers(deep: Path) -> None:
    """Without earlier layers' weight and KL it is the Matryoshka loss; with them every layer gets a gradient."""
    from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss

    model, objective, features, labels = ready(deep)
    settings: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1, "kl_temperature": 0}
    last = Matryoshka2dLoss(model, Summed(objective), [16, 8], prior_layers_weight=0, **settings)
    expected = by_hand(model, labels) + by_hand(model, labels, 8)
    value = last([dict(column) for column in features], labels)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    every = Matryoshka2dLoss(model, Summed(objective), [16, 8], **settings)
    touched = gradients(model, every([dict(column) for column in features], labels))
    assert all(any(f"layer.{i}." in name for name in touched) for i in range(3))


@pytest.mark.parametrize("cached", [False, True], ids=["splade", "cached-splade"])
def test_splade(cached: bool, deep: Path) -> None:
    """The objective's losses by their keys, and FLOPS: the squared mean activation of each dimension, summed."""
    import torch
    from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss

    model, objective, features, labels = ready(deep)
    weights = {"document_regularizer_weight": 0.3, "query_regularizer_weight": 0.1}
    wrapper = (
        CachedSpladeLoss(model, objective, mini_batch_size=2, **weights)
        if cached
        else SpladeLoss(model, objective, **weights)
    )
    losses = wrapper(features, labels)
    q, d = (model(model.preprocess(x))["sentence_embedding"] for x in (tiny_dense.QUERIES, tiny_dense.DOCUMENTS))
    flops = {"query": 0.1 * q.mean(dim=0).square().sum(), "document": 0.3 * d.mean(dim=0).square().sum()}
    assert set(losses) == {"kl", "info-nce", "document_regularizer_loss", "query_regularizer_loss"}
    for task, value in flops.items():
        assert float(losses[f"{task}_regularizer_loss"].detach()) == pytest.approx(float(value.detach()), rel=1e-4)
    assert sum(float(losses[key].detach()) for key in ("kl", "info-nce")) == pytest.approx(
        float(by_hand(model, labels).detach()), rel=1e-4
    )
    found = gradients(model, torch.stack(list(losses.values())).sum())
    wanted = gradients(model, by_hand(model, labels) + sum(flops.values()))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3)
