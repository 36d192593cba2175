"""A loss that is not a number stops training at once, names the queries and keeps the last good checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retrieval_kd.atomic import unfinished
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.models.load import Model
from retrieval_kd.students.dense import DenseStudent

Trained = Callable[..., Model]


def test_nan_stops_at_the_first_and_keeps_the_checkpoint(
    fit: Trained, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DenseStudent.compare
    calls: list[int] = []

    def spoiled(self: DenseStudent, queries: torch.Tensor, documents: torch.Tensor, parameters: Any) -> torch.Tensor:
        calls.append(len(queries))
        result = original(self, queries, documents, parameters)
        return result * float("nan") if len(calls) == 6 else result

    monkeypatch.setattr(DenseStudent, "compare", spoiled)
    out = tmp_path / "student"
    with pytest.raises(
        RetrievalKDError, match=r"loss 'kl' is NaN or infinite in a batch of 8 queries \('train-\d+', "
    ) as e:
        fit(
            out=out,
            inputs={"scores": [scores]},
            losses=[{"kind": "kl"}],
            development={"against": "nothing", "times": 5},
        )
    assert len(calls) == 6
    kept = unfinished(out) / "work" / "checkpoints" / "checkpoint-4"
    assert str(kept) in str(e.value) and (kept / "model.safetensors").is_file()
    assert not out.exists()


def test_nan_before_any_checkpoint(fit: Trained, scores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseStudent, "compare", lambda self, q, d, p: (q @ d.T) * float("inf"))
    with pytest.raises(RetrievalKDError, match="no checkpoint was written before"):
        fit(inputs={"scores": [scores]}, losses=[{"kind": "kl"}])


def test_weights_that_are_no_numbers_are_never_a_checkpoint(fit: Trained, scores: Path, tmp_path: Path) -> None:
    """The loss of the only step is a number; what the step makes of the weights is not."""
    out = tmp_path / "student"
    with pytest.raises(RetrievalKDError, match=r"weights are NaN or infinite after step 1 .*no checkpoint was written"):
        fit(out=out, inputs={"scores": [scores]}, losses=[{"kind": "kl"}], learning_rate=1e38, warmup=0, steps=1)
    assert not out.exists()
