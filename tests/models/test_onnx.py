from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.errors import MissingExtraError, RetrievalKDError
from retrieval_kd.models.onnx import OnnxSession, default_threads, deviation, export_onnx, quantize_int8, require_onnx


def features(rows: list[list[int]]) -> dict[str, Any]:
    """Token ids and mask, padded with 0."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture(scope="module")
def network() -> Any:
    """The mean of the tokens' embeddings, then a layer on sequences and a head: token i is i in every dimension."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(10, 8)
            self.words.weight.data = torch.arange(10.0)[:, None].expand(10, 8).clone()
            self.layer = torch.nn.Linear(8, 8, bias=False)
            self.layer.weight.data = torch.eye(8) * torch.arange(1.0, 9.0)
            self.head = torch.nn.Linear(8, 1)
            self.head.weight.data.fill_(1.0)
            self.head.bias.data.fill_(0.5)

        def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
            mask = features["attention_mask"][:, :, None].float()
            mean = (self.layer(self.words(features["input_ids"])) * mask).sum(1) / mask.sum(1)
            score: torch.Tensor = self.head(mean)
            return score

    return Network()


@pytest.fixture(scope="module")
def exported(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(network, features([[1, 2, 3], [4]]), path, output="scores")
    return path


def test_any_batch_and_length(exported: Path) -> None:
    """36 times the mean token (1 + … + 8 = 36) and 0.5, at batches and lengths other than those of the example."""
    session = OnnxSession(exported)
    np.testing.assert_allclose(session(features([[1, 2, 3, 4, 5]])), [[36 * 3 + 0.5]], rtol=1e-6)
    rows = [[2, 4], [9], [1, 1, 1, 1, 1, 1, 5]]
    expected = [[36 * 3 + 0.5], [36 * 9 + 0.5], [36 * 11 / 7 + 0.5]]
    np.testing.assert_allclose(session({**features(rows), "token_type_ids": None}), expected, rtol=1e-6)


def test_int8_keeps_embeddings_and_head(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A scale a column: 1 to 8 are each the largest weight of their column and stay exact. Nothing is said about it."""
    import onnx

    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        quantize_int8(exported, tmp_path / "int8.onnx")
        assert logging.getLogger().handlers == []
    assert capfd.readouterr() == ("", "")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["MatMulInteger"] == 1 and operators["MatMul"] + operators["Gemm"] == 1
    types = {onnx.TensorProto.DataType.Name(tensor.data_type): tuple(tensor.dims) for tensor in graph.initializer}
    assert types["INT8"] == (8, 8)
    values = OnnxSession(tmp_path / "int8.onnx")(features([[1, 2, 3, 4, 5], [9]]))
    np.testing.assert_allclose(values, [[108.5], [324.5]], rtol=0.01)


def test_a_model_that_cannot_be_exported(tmp_path: Path) -> None:
    import torch

    class Counts(torch.nn.Module):
        def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.ones(1) if int(features["input_ids"].sum()) > 3 else torch.zeros(1)

    with pytest.raises(RetrievalKDError, match="torch cannot export this model to ONNX"):
        export_onnx(Counts(), features([[1, 2], [3]]), tmp_path / "model.onnx", output="scores")
    assert not (tmp_path / "model.onnx").exists()


def test_a_graph_of_one_length_only_is_refused(tmp_path: Path) -> None:
    """A loop over the tokens is unrolled for the example's length without a word from torch."""
    import torch

    class Loop(torch.nn.Module):
        def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
            ids = features["input_ids"].float()
            total = ids[:, :1] * 0
            for start in range(0, ids.shape[1], 2):
                total = total + ids[:, start : start + 2].sum(dim=1, keepdim=True)
            return total

    with pytest.raises(RetrievalKDError, match=r"one length or batch only \(input input_ids\)"):
        export_onnx(Loop(), {"input_ids": features([[1, 2, 3], [4]])["input_ids"]}, tmp_path / "m.onnx", output="x")


def test_threads_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    for value, expected in (("2", 2), ("4,2", 4), ("0", 3), ("many", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert default_threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() == 3


def test_missing_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retrieval-kd\[onnx\]'"):
        require_onnx()


def test_deviation_by_hand() -> None:
    """Differences 0, 0.5 and 1; of three pairs of values two are in the same order: tau = (2 - 1) / 3."""
    found = deviation(np.array([1, 2, 3], dtype=np.float32), np.array([1, 2.5, 2], dtype=np.float32))
    assert found == (3, 1.0, 0.5, pytest.approx(1 / 3))
    assert deviation(np.ones(2), np.array([1.0, 2.0])).kendall_tau is None
    assert deviation(np.ones(1), np.ones(1)) == (1, 0.0, 0.0, None)
