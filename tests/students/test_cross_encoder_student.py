from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.errors import RecipeError
from retrieval_kd.models.load import Model
from retrieval_kd.teachers.score import score

Trained = Callable[..., Model]


def test_cross_encoder_learns_from_labels(
    fit: Trained, cross_encoder: Path, collection: Collection, tmp_path: Path
) -> None:
    """Negatives are always d30 to d35, so words tell: the loss falls below half of log 4. The result can teach."""
    import torch
    from sentence_transformers import CrossEncoder

    queries = list(collection.queries("train"))
    negatives = Run.from_hits(queries, [tiny.ids_of(range(30, 36))] * 30, [np.arange(6)] * 30)
    negatives.save(tmp_path / "negatives", recipe={"kind": "made"}, inputs={})
    model = fit(
        inputs={"candidates": tmp_path / "negatives"},
        kind="cross-encoder",
        base=str(cross_encoder),
        max_length=32,
        groups={"documents": 4, "positive": "qrels"},
        losses=[{"kind": "info-nce", "over": "group"}],
        steps=30,
        batch_size=10,
        learning_rate=2e-2,
    )
    log = tiny.losses(model.path)
    assert log[0] > 1 and np.mean(log[-5:]) < np.log(4) / 2
    stock = CrossEncoder(str(model.path))
    assert stock.num_labels == 1 and stock.max_seq_length == 32
    assert model.settings["max_length"] == 32
    recipe = tiny.write_recipe(model.path.parent / "ce.yaml", {"kind": "cross-encoder", "model": str(model.path)})
    out = model.path.parent / "scores"
    row = next(iter(score(recipe, collection=collection, candidates=["qrels:dev"], out=out)))
    pair = ("w0 w40", tiny.document_text(0))
    own = stock.predict([pair], activation_fn=torch.nn.Identity(), show_progress_bar=False)[0]
    assert row.scores[0] == pytest.approx(float(own), abs=1e-5)


def test_cross_encoder_keeps_layers(fit: Trained, cross_encoder: Path) -> None:
    from sentence_transformers import CrossEncoder

    values = {"kind": "cross-encoder", "base": str(cross_encoder), "losses": [{"kind": "kl"}], "layers": [1]}
    model = fit(inputs={}, steps=0, **values)
    kept, start = tiny.weights(model.path), tiny.weights(cross_encoder)
    names = [name for name in kept if "layer." in name]
    assert names and all((kept[name] == start[name.replace("layer.0.", "layer.1.")]).all() for name in names)
    assert CrossEncoder(str(model.path))[0].auto_model.config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [{"kind": "info-nce"}]}, "cannot learn 'info-nce' over the batch"),
        ({"losses": [{"kind": "embedding"}]}, "cannot learn 'embedding'"),
        ({"document_length": 64}, "give max_length"),
        ({"similarity": "dot"}, "unknown key 'similarity'"),
    ],
)
def test_cross_encoder_recipes_that_cannot_be(change: dict[str, Any], message: str, fit: Trained) -> None:
    values = {"kind": "cross-encoder", "losses": [{"kind": "kl"}], **change}
    with pytest.raises(RecipeError, match=message):
        fit(inputs={}, **values)
