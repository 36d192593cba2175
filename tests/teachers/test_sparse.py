"""The sparse teacher against sentence-transformers' own vectors and similarity."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.models.sparse_encoder import SparseEncoder
from retrieval_kd.teachers import encoded
from retrieval_kd.teachers.base import ScoringJob
from retrieval_kd.teachers.sparse import SparseTeacher

QUERIES = {"a": ("w3 w43 w50", [20, 0, 7]), "b": ("w1", [7, 39, 20]), "c": ("", [1])}


def teacher(model: Path, **values: Any) -> SparseTeacher:
    return tiny_encoders.make_teacher(SparseTeacher, kind="sparse", model=str(model), **values)


@pytest.fixture
def job(collection: Collection, tmp_path: Path) -> ScoringJob:
    return tiny_encoders.make_job(collection, QUERIES, tmp_path / "work")


@pytest.fixture(scope="module")
def splade(shared: Path) -> Path:
    return tiny_encoders.make_splade(shared / "splade")


@pytest.fixture(scope="module")
def inference_free(shared: Path) -> Path:
    return tiny_encoders.make_inference_free(shared / "inference-free")


@pytest.mark.parametrize("name", ["splade", "inference_free"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_scores_are_the_models_own(
    name: str, batch_tokens: int, job: ScoringJob, request: pytest.FixtureRequest
) -> None:
    from sentence_transformers import SparseEncoder as Stock

    path = request.getfixturevalue(name)
    sparse = teacher(path, batch_tokens=batch_tokens)
    assert sparse.ref().path == path and "encoder" not in sparse.__dict__
    sparse.prepare(job)
    scores, lost = tiny_encoders.score_all(sparse, job)
    stock = Stock(str(path))
    assert sparse.score_kind == stock.similarity_fn_name == "dot"
    for values, of_query, (text, rows) in zip(scores, lost, QUERIES.values(), strict=True):
        documents = stock.encode_document([tiny.document_text(row) for row in rows])
        expected = stock.similarity(stock.encode_query([text]), documents)[0].numpy()
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        assert values.dtype == np.float32 and of_query.dtype == np.int32
        assert of_query.tolist() == [0] * len(rows)
    assert np.ptp(scores[0]) > 0.01


def test_inference_free_queries_are_looked_up(inference_free: Path) -> None:
    """w3 and w43 weigh .3 and 4.3, however often they occur; w0 weighs 0 and an unknown word too."""
    encoder = SparseEncoder.load(inference_free)
    found = encoder.encode(["w43 w3 w3 w0 nowhere", "", "w0"], "query", 100)
    assert found.lengths.tolist() == [2, 0, 0]
    assert found.terms.tolist() == [5 + 3, 5 + 43]
    np.testing.assert_allclose(found.weights, [0.3, 4.3], rtol=1e-6)
    assert found.weights.dtype == np.float32 and found.terms.dtype == np.int32


def test_queries_without_a_term_score_zero(inference_free: Path, collection: Collection, tmp_path: Path) -> None:
    """No query of the job has a term: the files of terms and weights are empty."""
    job = tiny_encoders.make_job(collection, {"a": ("", [1, 2]), "b": ("w0", [3])}, tmp_path / "work")
    for _ in range(2):
        sparse = teacher(inference_free)
        sparse.prepare(job)
        assert [values.tolist() for values in tiny_encoders.score_all(sparse, job).scores] == [[0, 0], [0]]


def test_prompts_and_lost_tokens(collection: Collection, tmp_path: Path) -> None:
    """Query [CLS] query : and words [SEP], read to 6; document [CLS] passage : and 4 words [SEP], 8 tokens, to 6."""
    prompts = {"query": "query: ", "document": "passage: "}
    model = tiny_encoders.make_splade(tmp_path / "short", prompts=prompts, lengths=(6, 6))
    job = tiny_encoders.make_job(collection, QUERIES, tmp_path / "work")
    sparse = teacher(model)
    sparse.prepare(job)
    scores, lost = tiny_encoders.score_all(sparse, job)
    assert [of_query.tolist() for of_query in lost] == [[3, 3, 3], [2, 2, 2], [2]]
    bare = SparseEncoder.load(tmp_path / "short-plain").model
    cut = bare.encode_document(["passage: " + " ".join(tiny.document_text(row).split()[:2]) for row in (20, 0, 7)])
    expected = bare.similarity(bare.encode_query(["query: w3 w43"]), cut)[0].numpy()
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-5)
    assert sparse.details()["prompts"] == prompts


def test_the_second_worker_encodes_nothing(splade: Path, job: ScoringJob, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = teacher(splade), teacher(splade)
    first.prepare(job)
    monkeypatch.setattr(SparseEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    second.prepare(job)
    for a, b in zip(
        tiny_encoders.score_all(first, job).scores, tiny_encoders.score_all(second, job).scores, strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert "encoder" not in second.__dict__


def test_killed_encoding_goes_on(
    splade: Path, job: ScoringJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Blocks of 2; the third block of documents dies after its terms were written and before its weights were."""
    undisturbed = teacher(splade)
    undisturbed.prepare(dataclasses.replace(job, work=tmp_path / "undisturbed"))
    monkeypatch.setattr(encoded, "BLOCK", 2)
    append = encoded._append
    written: list[str] = []

    def dies(path: Path, array: np.ndarray, valid: int) -> None:
        written.append(path.name)
        if written.count("weights") == 3:
            raise KeyboardInterrupt
        append(path, array, valid)

    with monkeypatch.context() as patch:
        patch.setattr(encoded, "_append", dies)
        with pytest.raises(KeyboardInterrupt):
            teacher(splade).prepare(job)
    resumed = teacher(splade)
    resumed.prepare(job)
    expected = tiny_encoders.score_all(undisturbed, job)
    tiny_encoders.assert_same(tiny_encoders.score_all(resumed, job), expected, atol=1e-5)
    terms = np.fromfile(tmp_path / "work" / "documents" / "terms", dtype=np.int32)
    np.testing.assert_array_equal(terms, np.fromfile(tmp_path / "undisturbed" / "documents" / "terms", dtype=np.int32))


def test_a_model_that_gives_nan_for_everything_stops_the_run(collection: Collection, tmp_path: Path) -> None:
    """The output layer shares the embedding of w7, so that every text has a NaN, an empty one too."""
    model = tiny.spoil(tiny_encoders.make_splade(tmp_path / "spoilt"))
    job = tiny_encoders.make_job(collection, QUERIES, tmp_path / "work")
    with pytest.raises(RetrievalKDError, match="NaN or infinite vectors for 5 of 5 document texts"):
        teacher(model).prepare(job)


def test_a_model_of_another_kind_is_refused(dense: Path, shared: Path) -> None:
    """A dense model would get a random sparse layer; a plain masked language model lacks nothing."""
    with pytest.raises(InputError, match="is not a SparseEncoder: as one it gives another vector each time"):
        assert teacher(dense).encoder
    plain = teacher(tiny_encoders.make_masked_model(shared / "masked")).encoder
    assert plain.encode(["w1"], "document", 100).lengths[0] > 0
