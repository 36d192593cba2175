"""The tiny collection and models, made once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.models.encode import encode
from retrieval_kd.models.load import Model
from retrieval_kd.students.development import PoolEvaluator, VectorEvaluator
from retrieval_kd.students.train import train
from retrieval_kd.teachers.score import score


@pytest.fixture(scope="session")
def teacher(shared: Path) -> Path:
    return tiny.make_dense(shared / "teacher", seed=5)


@pytest.fixture(scope="session")
def scores(shared: Path, collection: Collection, candidates: Path, teacher: Path) -> Path:
    recipe = tiny.write_recipe(shared / "teacher.yaml", {"kind": "bi-encoder", "model": str(teacher)})
    return score(recipe, collection=collection, candidates=[candidates], out=shared / "scores").path


@pytest.fixture(scope="session")
def vectors(shared: Path, collection: Collection, teacher: Path) -> list[Path]:
    documents = encode(teacher, collection, shared / "teacher-documents")
    return [documents.path, encode(teacher, collection, shared / "teacher-queries", queries="train").path]


@pytest.fixture
def fit(tmp_path: Path, dense: Path, collection: Collection) -> Callable[..., Model]:
    """Trains the tiny dense model; ``recipe`` keys by keyword, inputs under their names."""
    numbers = itertools.count()

    def run(*, out: Path | None = None, inputs: dict[str, Any], **recipe: Any) -> Model:
        values = {
            "kind": "dense",
            "base": str(dense),
            "groups": {"documents": 4},
            "steps": 10,
            "batch_size": 8,
            "learning_rate": 5e-3,
            "development": {"against": "nothing"},
            **recipe,
        }
        name = tiny.write_recipe(tmp_path / "student.yaml", values)
        out = out or tmp_path / f"student-{next(numbers)}"
        return train(name, **{"collection": collection, "out": out, **inputs})

    return run


@pytest.fixture
def resumed_equals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., Model]:
    """Trains undisturbed; trains and dies at the second evaluation; goes on from the first, after that step.

    Asserts that nothing is published in between and that ``files``, settings, losses and development are the same.
    Returns the resumed model.
    """

    def run(
        fit: Callable[..., Model],
        values: dict[str, Any],
        *,
        goes_on_from: int,
        files: Sequence[str] = ("model.safetensors",),
        evaluator: type[PoolEvaluator | VectorEvaluator] = PoolEvaluator,
    ) -> Model:
        undisturbed = fit(out=tmp_path / "undisturbed", **values)
        original = evaluator.__call__

        evaluations = itertools.count(1)

        def dies(*arguments: Any, **named: Any) -> Any:
            if next(evaluations) == 2:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "__call__", dies)
            with pytest.raises(KeyboardInterrupt):
                fit(out=tmp_path / "student", **values)
        assert not (tmp_path / "student").exists()
        with caplog.at_level(logging.INFO, "retrieval_kd"):
            resumed = fit(out=tmp_path / "student", **values)
        assert f"going on from checkpoint-{goes_on_from}" in caplog.text
        for name in files:
            assert (resumed.path / name).read_bytes() == (undisturbed.path / name).read_bytes()
        assert resumed.settings == undisturbed.settings
        assert tiny.losses(resumed.path) == tiny.losses(undisturbed.path)
        assert resumed.manifest.details["development"] == undisturbed.manifest.details["development"]
        assert not (resumed.path / "work").exists()
        return resumed

    return run
