from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_rerankers

from retrieval_kd.errors import InputError, RecipeError
from retrieval_kd.models.load import Model

Trained = Callable[..., Model]


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return tiny_rerankers.make_base(shared / "prettr-student-base")


def recipe(base: Path, **changes: Any) -> dict[str, Any]:
    values = {"kind": "prettr", "base": str(base), "layers_apart": 1, "losses": [{"kind": "margin-mse"}]}
    return {**values, **tiny_rerankers.LENGTHS, **changes}


def test_it_starts_from_the_layers_that_are_kept(base: Path, fit: Trained) -> None:
    model = fit(inputs={}, **recipe(base, steps=0, layers=[1], layers_apart=0))
    kept, start = tiny.weights(model.path), tiny.weights(base)
    names = [name for name in kept if "layer." in name]
    assert names and all(
        (kept[name] == start[name.removeprefix("network.").replace("layer.0.", "layer.1.")]).all() for name in names
    )
    assert model.settings["layers_apart"] == 0 and not any("pooler" in name for name in kept)


def test_stored_states_of_a_trained_model_give_its_scores(base: Path, fit: Trained, scores: Path) -> None:
    """Trained with whole layers as checkpoints of the activations, which must not change the loss."""
    from sentence_transformers import CrossEncoder

    values = recipe(base, steps=6, batch_size=8, learning_rate=1e-2)
    model, sparing = (
        fit(inputs={"scores": [scores]}, **values, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    np.testing.assert_allclose(tiny.losses(sparing.path), tiny.losses(model.path), rtol=1e-5)
    reranker = CrossEncoder(str(model.path), trust_remote_code=True)
    documents = [tiny.document_text(i) for i in range(40)]
    found = reranker[0].score_states("w1 w41", reranker[0].document_states(documents)).numpy()
    expected = reranker.predict([("w1 w41", text) for text in documents])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-3


def test_recipes_that_cannot_be(base: Path, fit: Trained) -> None:
    with pytest.raises(InputError, match="layers_apart: 2: of 2 layers"):
        fit(inputs={}, **recipe(base, layers_apart=2, steps=0))
    with pytest.raises(InputError, match="the base has 64 positions"):
        fit(inputs={}, **recipe(base, document_length=200, steps=0))
    with pytest.raises(RecipeError, match="layers_apart"):
        fit(inputs={}, **recipe(base, layers_apart=-1))
