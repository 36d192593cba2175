"""Several processes, accumulated parts and recomputed parts: the same training as one process with one large batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_dense import features_and_labels, make_batch, make_student

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import UsageError
from retrieval_kd.losses.objective import WeightedLosses
from retrieval_kd.losses.terms import TAID
from retrieval_kd.models.load import Model
from retrieval_kd.students.objective import Objective
from retrieval_kd.students.trainer import _freeze_unused

Trained = Callable[..., Model]
LOSSES = [{"kind": "margin-mse", "target": {"scale": 20}}, {"kind": "kl", "teacher_temperature": 0.05}]


@pytest.fixture(scope="module")
def steady(shared: Path) -> Path:
    """A network without dropout: what differs between two runs is then the arithmetic alone."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny.make_transformer(shared / "steady", **changes)


def recipe(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "dense",
        "base": str(base),
        "groups": {"documents": 4},
        "losses": LOSSES,
        "steps": 8,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "development": {"against": "nothing"},
        **changes,
    }


def curve(model: Path) -> np.ndarray:
    return np.array(tiny.losses(model))


def test_two_processes_are_one_with_two_accumulated_parts(
    steady: Path, fit: Trained, scores: Path, collection: Collection, tmp_path: Path
) -> None:
    """A step's 8 queries in two processes of 4, or in one process as twice 4: the same losses and weights."""
    one = fit(inputs={"scores": [scores]}, **recipe(steady, accumulate=2))
    file = tiny.write_recipe(tmp_path / "student.yaml", recipe(steady))
    out = tmp_path / "together"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "retrieval_kd", "train"]
    arguments = [str(file), "--collection", str(collection.path), "--scores", str(scores), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = Model.load(out)
    np.testing.assert_allclose(curve(together.path), curve(one.path), rtol=1e-3)
    assert together.settings["scale"] == pytest.approx(one.settings["scale"], rel=1e-4)
    mine = tiny.weights(one.path)
    for name, value in tiny.weights(together.path).items():
        np.testing.assert_allclose(value, mine[name], atol=2e-3, err_msg=name)


def test_accumulated_parts_are_one_batch(steady: Path, fit: Trained, scores: Path) -> None:
    """The mean over two halves of equal weight is the mean over all: losses without documents of other queries."""
    whole = fit(inputs={"scores": [scores]}, **recipe(steady))
    parts = fit(inputs={"scores": [scores]}, **recipe(steady, accumulate=4))
    np.testing.assert_allclose(curve(parts.path), curve(whole.path), rtol=1e-3)


def test_recomputed_parts_have_the_same_gradients(dense: Path, fit: Trained, scores: Path) -> None:
    """With dropout: a part that is run again in the backward pass draws the same units."""
    kept = fit(inputs={"scores": [scores]}, **recipe(dense, texts_at_once=5))
    again = fit(inputs={"scores": [scores]}, **recipe(dense, texts_at_once=5, recompute=True))
    mine = tiny.weights(kept.path)
    assert all((value == mine[name]).all() for name, value in tiny.weights(again.path).items())
    assert kept.settings["scale"] == again.settings["scale"]


def test_gradient_checkpointing_changes_nothing(dense: Path, fit: Trained, scores: Path) -> None:
    plain = fit(inputs={"scores": [scores]}, **recipe(dense))
    checkpointed = fit(inputs={"scores": [scores]}, **recipe(dense, gradient_checkpointing=True))
    np.testing.assert_allclose(curve(checkpointed.path), curve(plain.path), rtol=1e-5)


def test_bf16_follows_fp32(steady: Path, fit: Trained, scores: Path) -> None:
    full = fit(inputs={"scores": [scores]}, **recipe(steady, precision="fp32"))
    half = fit(inputs={"scores": [scores]}, **recipe(steady, precision="bf16"))
    assert not np.array_equal(curve(half.path), curve(full.path))
    np.testing.assert_allclose(curve(half.path), curve(full.path), rtol=0.1)
    assert {value.dtype for value in tiny.weights(half.path).values()} == {np.dtype("float32")}


def test_a_batch_that_cannot_be_divided_is_refused(steady: Path, fit: Trained, scores: Path) -> None:
    with pytest.raises(UsageError, match="8 queries cannot be divided into 3 equal parts"):
        fit(inputs={"scores": [scores]}, **recipe(steady, accumulate=3))


def test_looking_for_unused_weights_moves_no_target(steady: Path) -> None:
    """The pooler is frozen; TAID's t has not been moved, nor has dropout been turned off."""
    student, model, _ = make_student(steady)
    objective = Objective(student, model, WeightedLosses([TAID(kind="taid")], passes=10)).train()
    features, labels = features_and_labels(student, model, make_batch())
    columns = {
        f"{task}_{key}": value
        for task, part in zip(("query", "document"), features, strict=True)
        for key, value in part.items()
    }
    _freeze_unused(objective, {**columns, "label": labels})
    frozen = [name for name, weights in model.named_parameters() if not weights.requires_grad]
    assert frozen and all("pooler" in name for name in frozen)
    assert int(objective.losses.states["taid"].passed) == 0 and objective.training
