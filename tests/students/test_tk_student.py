from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_rerankers

from retrieval_kd.errors import RecipeError
from retrieval_kd.models.load import Model
from retrieval_kd.models.tk import word_embeddings

Trained = Callable[..., Model]


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return tiny_rerankers.make_base(shared / "tk-student-base")


def recipe(base: Path, **changes: Any) -> dict[str, Any]:
    values = {"kind": "tk", "base": str(base), "heads": 2, "feed_forward": 20, "losses": [{"kind": "margin-mse"}]}
    return {**values, **tiny_rerankers.LENGTHS, **changes}


def test_it_starts_with_the_words_of_the_base_or_random_ones(base: Path, fit: Trained) -> None:
    words = tiny.weights(fit(inputs={}, **recipe(base, steps=0)).path)["embeddings.weight"]
    np.testing.assert_array_equal(words, word_embeddings(base, tiny_rerankers.tokenizer(base)).numpy())
    model = fit(inputs={}, **recipe(base, steps=0, dimension=8, depth=1))
    weights = tiny.weights(model.path)
    assert weights["embeddings.weight"].shape == (68, 8)
    assert {name.split(".")[2] for name in weights if name.startswith("context.layers")} == {"0"}
    again = fit(inputs={}, **recipe(base, steps=0, dimension=8, depth=1))
    np.testing.assert_array_equal(tiny.weights(again.path)["embeddings.weight"], weights["embeddings.weight"])


def test_kernels_have_a_learning_rate_of_their_own(base: Path, fit: Trained, scores: Path) -> None:
    """With none for the rest, in 2 steps of Adam each kernel's weight moves by at most 2 × 0.1, and nothing else."""
    steps = {"inputs": {"scores": [scores]}, "weight_decay": 0.0, "warmup": 0.0, "schedule": "constant_with_warmup"}
    values = recipe(base, learning_rate=1e-12, kernel_learning_rate=0.1)
    start = tiny.weights(fit(inputs={}, **{**values, "steps": 0}).path)
    trained = tiny.weights(fit(**steps, **{**values, "steps": 2}).path)
    for name, weight in trained.items():
        moved = float(np.abs(weight - start[name]).max())
        if name in ("pooling.alpha", "weights"):
            assert 0.05 < moved < 0.21, name
        else:
            assert moved < 1e-8, name


def test_recipes_that_cannot_be(base: Path, fit: Trained) -> None:
    for change, message in (
        ({"layers": [0]}, "its own layers are `depth`"),
        ({"gradient_checkpointing": True}, "`recompute` saves memory"),
    ):
        with pytest.raises(RecipeError, match=message):
            fit(inputs={}, **recipe(base, **change))
