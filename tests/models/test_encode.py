from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, OutputExistsError, UsageError
from retrieval_kd.models import encode as module
from retrieval_kd.models.encode import encode, estimate_encode
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.models.encoders import open_encoder
from retrieval_kd.models.multi_vector_encoder import MultiVectorEncoder
from retrieval_kd.models.sparse_encoder import SparseEncoder
from retrieval_kd.models.vectors_of_texts import SparseVectors, strongest


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


@pytest.fixture(scope="module")
def models(shared: Path) -> dict[str, Path]:
    """A model of each layout that cuts each of the 40 documents by one token, and an inference-free one."""
    lengths = (None, 5)
    return {
        "dense": tiny.make_dense(shared / "short-dense", lengths=lengths),
        "sparse": tiny_encoders.make_splade(shared / "short-splade", lengths=lengths),
        "multi-vector": tiny_encoders.make_multi_vector(shared / "short-colbert", lengths=lengths),
        "inference-free": tiny_encoders.make_inference_free(shared / "encode-inference-free"),
    }


@pytest.mark.parametrize("layout", ["dense", "sparse", "multi-vector"])
def test_killed_and_resumed_gives_the_same_bytes(
    layout: str,
    models: dict[str, Path],
    collection: Collection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    undisturbed = encode(models[layout], collection, tmp_path / "undisturbed")
    calls: list[int] = []
    kind = {"dense": DenseEncoder, "sparse": SparseEncoder, "multi-vector": MultiVectorEncoder}[layout]
    original = kind.encode

    def dies_in_second_chunk(self: Any, texts: Sequence[str], task: str) -> Any:
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, texts, task)

    monkeypatch.setattr(kind, "encode", dies_in_second_chunk)
    out = tmp_path / "vectors"
    with pytest.raises(KeyboardInterrupt):
        encode(models[layout], collection, out)
    assert not out.exists() and calls == [16, 16]
    with caplog.at_level(logging.INFO, "retrieval_kd"):
        resumed = encode(models[layout], collection, out)
    assert calls == [16, 16, 16, 8]
    assert "going on after 16 of 40 texts" in caplog.text
    for name in undisturbed.manifest.files:
        assert (resumed.path / name).read_bytes() == (undisturbed.path / name).read_bytes()
    assert resumed.fingerprint == undisturbed.fingerprint
    assert resumed.manifest.details["tokens_lost"] == undisturbed.manifest.details["tokens_lost"] == 40
    assert resumed.problems() == []


def test_sparse_vectors_are_the_models_own(models: dict[str, Path], collection: Collection, tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder as Stock

    vectors = encode(models["sparse"], collection, tmp_path / "vectors")
    texts = [tiny.document_text(row) for row in range(40)]
    expected = Stock(str(models["sparse"])).encode_document(texts, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(vectors.rows(0, 40).toarray(), expected, rtol=1e-4, atol=1e-6)
    assert (vectors.layout, vectors.similarity, vectors.dimension) == ("sparse", "dot", 68)
    assert vectors.vocabulary[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w0"]
    assert vectors.manifest.details["mean_nonzeros"] == pytest.approx(np.count_nonzero(expected) / 40, abs=0.01)
    files = ["ids.arrow", "indptr.npy", "terms.npy", "vocabulary.json", "weights.npy"]
    assert sorted(vectors.manifest.files) == files


def test_queries_of_an_inference_free_model_by_hand(
    models: dict[str, Path], collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Query dev-3 is ``w3 w43``, which weigh .3 and 4.3; w0 of dev-0 weighs 0; nothing runs a network."""
    vectors = encode(models["inference-free"], collection, tmp_path / "vectors", queries="dev")
    rows = vectors.rows(0, 6).toarray()
    assert np.flatnonzero(rows[3]).tolist() == [5 + 3, 5 + 43]
    np.testing.assert_allclose(rows[3, [5 + 3, 5 + 43]], [0.3, 4.3], rtol=1e-6)
    assert np.flatnonzero(rows[0]).tolist() == [5 + 40]
    assert vectors.manifest.details["empty_vectors"] == 0
    only_w0 = tiny_encoders.make_collection_of(tmp_path, ["w0", "w2", "nowhere"])
    model = SparseEncoder.load(models["inference-free"])
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        # The tokens of a document route through BERT never come to nothing: the query side stands for it.
        monkey = pytest.MonkeyPatch()
        monkey.setattr(model, "encode", lambda texts, task: SparseEncoder.encode(model, texts, "query"))
        found = encode(model, only_w0, tmp_path / "empty")
        monkey.undo()
    assert found.manifest.details["empty_vectors"] == 2
    assert "2 of 3 texts have no term and match nothing" in caplog.text


def test_pruning_by_hand(models: dict[str, Path], collection: Collection, tmp_path: Path) -> None:
    """Queries keep 2 terms: w43 w50 w3 weigh 4.3, 5.0, .3. Documents keep 4 of those above .05."""
    model = shutil.copytree(models["inference-free"], tmp_path / "pruned")
    whole = SparseEncoder.load(model).encode(["w1 w41"], "document")
    pruning = {"query": {"top_terms": 2}, "document": {"top_terms": 4, "threshold": 0.05}}
    (model / "retrieval_kd.json").write_text(json.dumps({"kind": "dense", "pruning": pruning}))
    encoder = open_encoder(model)
    query = encoder.encode(["w43 w50 w3", "w7"], "query")
    assert isinstance(query, SparseVectors)
    assert (query.lengths.tolist(), query.terms.tolist()) == ([2, 1], [5 + 43, 5 + 50, 5 + 7])
    np.testing.assert_allclose(query.weights, [4.3, 5.0, 0.7], rtol=1e-6)
    document = encoder.encode(["w1 w41"], "document")
    assert isinstance(document, SparseVectors)
    kept = sorted(sorted((-w, t) for t, w in zip(whole.terms, whole.weights, strict=True) if w > 0.05)[:4])
    assert 0 < len(kept) <= 4 < whole.lengths[0]
    assert document.terms.tolist() == sorted(term for _, term in kept)
    (model / "retrieval_kd.json").write_text(json.dumps({"pruning": {"query": {"top_k": 2}}}))
    with pytest.raises(InputError, match=r"pruning of 'query' with \['top_k'\]; it has query and document"):
        open_encoder(model).encode(["w1"], "query")


def test_of_equal_weights_the_lower_term_stays() -> None:
    weights = np.array([1, 2, 1, 2, 1], dtype=np.float32)
    terms, kept = strongest(np.array([3, 4, 7, 8, 9], dtype=np.int32), weights, top_terms=3)
    assert (terms.tolist(), kept.tolist()) == ([3, 4, 8], [1, 2, 2])
    assert strongest(terms, kept, threshold=1.0)[0].tolist() == [4, 8]


def test_token_vectors_are_the_models_own(models: dict[str, Path], collection: Collection, tmp_path: Path) -> None:
    from sentence_transformers import MultiVectorEncoder as Stock

    vectors = encode(models["multi-vector"], collection, tmp_path / "vectors")
    stock = Stock(str(models["multi-vector"]))
    expected = [matrix.numpy() for matrix in stock.encode_document([tiny.document_text(row) for row in range(40)])]
    assert vectors.lengths.tolist() == [len(matrix) for matrix in expected]
    np.testing.assert_allclose(vectors.multi_vector.tokens, np.concatenate(expected), atol=1e-5)
    assert (vectors.layout, vectors.similarity, vectors.dimension) == ("multi-vector", "maxsim", 8)
    half = encode(models["multi-vector"], collection, tmp_path / "half", half=True)
    np.testing.assert_array_equal(half.multi_vector.tokens, vectors.multi_vector.tokens.astype(np.float16))
    assert half.manifest.details["bytes_per_vector"] == 8 + 5 * 8 * 2
    assert half.rows(0, 1)[0].dtype == np.float32
    with pytest.raises(UsageError, match="half is for the token vectors"):
        encode(models["dense"], collection, tmp_path / "dense", half=True)


def test_a_document_without_tokens_is_counted(collection: Collection, tmp_path: Path) -> None:
    """Only w1 (number 6) is compared: documents 1 has it and no other."""
    model = tiny_encoders.make_multi_vector(tmp_path / "choosy", keep_only=[5 + 1])
    vectors = encode(model, collection, tmp_path / "vectors")
    assert np.flatnonzero(vectors.lengths).tolist() == [1]
    assert vectors.manifest.details["empty_vectors"] == 39 and vectors.problems() == []


def test_models_that_make_no_vectors(cross_encoder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(cross_encoder, tmp_path / "ranker")
    (model / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    with pytest.raises(InputError, match="is a CrossEncoder: it makes no vectors of texts"):
        open_encoder(model)
    (model / "config_sentence_transformers.json").unlink()
    (model / "retrieval_kd.json").write_text(json.dumps({"kind": "prettr"}))
    with pytest.raises(InputError, match="is a prettr: it makes no vectors of texts"):
        open_encoder(model)


def test_finished_work_is_not_done_again(
    collection: Collection, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(dense, collection, tmp_path / "vectors")
    monkeypatch.setattr(DenseEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert encode(dense, collection, tmp_path / "vectors").manifest.created == first.manifest.created


def test_another_model_at_the_same_place(collection: Collection, dense: Path, tmp_path: Path) -> None:
    encode(dense, collection, tmp_path / "vectors", queries="dev")
    other = tiny.make_dense(tmp_path / "other", seed=1)
    with pytest.raises(OutputExistsError, match="another model"):
        encode(other, collection, tmp_path / "vectors", queries="dev")
    replaced = encode(other, collection, tmp_path / "vectors", queries="dev", force=True)
    assert replaced.model_ref.fingerprint == DenseEncoder.load(other).ref().fingerprint


def test_estimate(collection: Collection, models: dict[str, Path]) -> None:
    expected = {
        "texts": 40,
        "layout": "dense",
        "dimension": 16,
        "entries_per_vector": 1.0,
        "bytes_per_vector": 64.0,
        "bytes": 2560,
        "similarity": "cosine",
    }
    assert estimate_encode(models["dense"], collection) == expected
    assert estimate_encode(models["dense"], collection, queries="test")["texts"] == 6
    tokens = estimate_encode(models["multi-vector"], collection, half=True)
    assert (tokens["entries_per_vector"], tokens["bytes_per_vector"]) == (5.0, 8 + 5 * 8 * 2)


@pytest.mark.parametrize("layout", ["sparse", "multi-vector"])
def test_what_is_estimated_is_written(
    layout: str, models: dict[str, Path], collection: Collection, tmp_path: Path
) -> None:
    expected = estimate_encode(models[layout], collection)
    written = encode(models[layout], collection, tmp_path / "vectors")
    files = [name for name in written.manifest.files if name.endswith(".npy")]
    size = sum((written.path / name).stat().st_size - 128 for name in files)
    assert expected["bytes"] == pytest.approx(size - 8, abs=40)
    assert expected["bytes_per_vector"] == written.manifest.details["bytes_per_vector"]
