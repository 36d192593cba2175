from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import OutputExistsError
from retrieval_kd.models import encode as module
from retrieval_kd.models.encode import encode, estimate_encode
from retrieval_kd.models.encoder import DenseEncoder


def test_row_is_id(collection: Collection, dense: Path, tmp_path: Path) -> None:
    vectors = encode(dense, collection, tmp_path / "vectors")
    encoder = DenseEncoder.load(dense)
    assert vectors.ids == tiny.ids_of(range(40))
    for row in (0, 17, 39):
        np.testing.assert_allclose(vectors.matrix[row], encoder.encode_documents([tiny.document_text(row)])[0], 1e-4)
    assert (vectors.of, vectors.split, vectors.similarity) == ("documents", None, "cosine")
    assert vectors.model_ref.fingerprint == encoder.ref().fingerprint
    assert vectors.manifest.inputs["collection"]["fingerprint"] == collection.fingerprint
    assert vectors.manifest.counts == {"vectors": 40}
    assert vectors.problems() == []
    assert sorted(vectors.manifest.files) == ["ids.arrow", "vectors.npy"]


def test_queries_of_a_split(collection: Collection, dense: Path, tmp_path: Path) -> None:
    vectors = encode(dense, collection.path, tmp_path / "vectors", queries="dev")
    assert vectors.ids == [f"dev-{i}" for i in range(6)]
    np.testing.assert_allclose(vectors.matrix[3], DenseEncoder.load(dense).encode_queries(["w3 w43"])[0], rtol=1e-4)
    assert (vectors.of, vectors.split) == ("queries", "dev")


def test_truncation_is_counted_and_said(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A document is [CLS], 4 words and [SEP]: at 5 tokens each of the 40 loses one."""
    model = tiny.make_dense(tmp_path / "short", lengths=(None, 5))
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        vectors = encode(model, collection, tmp_path / "vectors")
    details = vectors.manifest.details
    assert (details["truncated_texts"], details["tokens_lost"]) == (40, 40)
    assert "40 of 40 texts were cut at the model's length, 40 tokens lost" in caplog.text


def test_killed_and_resumed_gives_the_same_bytes(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.make_dense(tmp_path / "short", lengths=(None, 5))
    monkeypatch.setattr(module, "CHUNK", 16)
    undisturbed = encode(model, collection, tmp_path / "undisturbed")
    calls: list[int] = []
    original = DenseEncoder.encode_documents

    def dies_in_second_chunk(self: DenseEncoder, texts: Sequence[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, texts)

    monkeypatch.setattr(DenseEncoder, "encode_documents", dies_in_second_chunk)
    out = tmp_path / "vectors"
    with pytest.raises(KeyboardInterrupt):
        encode(model, collection, out)
    assert not out.exists() and calls == [16, 16]
    with caplog.at_level(logging.INFO, "retrieval_kd"):
        resumed = encode(model, collection, out)
    assert calls == [16, 16, 16, 8]
    assert "going on after 16 of 40 texts" in caplog.text
    for name in ("vectors.npy", "ids.arrow"):
        assert (resumed.path / name).read_bytes() == (undisturbed.path / name).read_bytes()
    assert resumed.fingerprint == undisturbed.fingerprint
    assert resumed.manifest.details["tokens_lost"] == undisturbed.manifest.details["tokens_lost"] == 40


def test_finished_work_is_not_done_again(
    collection: Collection, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(dense, collection, tmp_path / "vectors")
    monkeypatch.setattr(DenseEncoder, "encode_documents", lambda *_: pytest.fail("encoded again"))
    assert encode(dense, collection, tmp_path / "vectors").manifest.created == first.manifest.created


def test_another_model_at_the_same_place(collection: Collection, dense: Path, tmp_path: Path) -> None:
    encode(dense, collection, tmp_path / "vectors", queries="dev")
    other = tiny.make_dense(tmp_path / "other", seed=1)
    with pytest.raises(OutputExistsError, match="another model"):
        encode(other, collection, tmp_path / "vectors", queries="dev")
    replaced = encode(other, collection, tmp_path / "vectors", queries="dev", force=True)
    assert replaced.model_ref.fingerprint == DenseEncoder.load(other).ref().fingerprint


def test_estimate(collection: Collection, dense: Path) -> None:
    expected = {"texts": 40, "dimension": 16, "bytes_per_vector": 64, "bytes": 2560, "similarity": "cosine"}
    assert estimate_encode(dense, collection) == expected
    assert estimate_encode(dense, collection, queries="test")["texts"] == 6
