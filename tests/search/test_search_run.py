"""The run of a split: the searcher's own hits, counted, written once, bound to its index and collection."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tiny import make_dense, make_tiny_collection

from retrieval_kd.data.run import Run
from retrieval_kd.data.sources import make_collection
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.errors import ArtifactError, InputError, OutputExistsError, UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.models.encode import encode
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.models.export import export_model
from retrieval_kd.search.run import search_run
from retrieval_kd.search.searcher import Searcher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a collection, a model, and a bm25 and a flat index of them."""
    folder = tmp_path_factory.mktemp("world")
    collection = make_tiny_collection(folder)
    make_dense(folder / "model")
    build_index("bm25", collection=collection, out=folder / "bm25")
    build_index("flat", collection=collection, model=folder / "model", out=folder / "flat")
    return folder


def test_a_bm25_run_by_hand(world: Path, tmp_path: Path) -> None:
    """Query test-3 is ``w3 w43``: d03 has both, d13, d23 and d33 have w43; equal texts but for unique words tie."""
    run = search_run(world / "bm25", world / "tiny", "test", tmp_path / "run", k=3)
    doc_ids, scores = run.hits("test-3")
    assert doc_ids == ["d03", "d33", "d23"]
    # idf(w3) = ln(1 + 39.5/1.5) = 3.308107, idf(w43) = ln(1 + 36.5/4.5) = 2.209495, each · 1/1.9
    np.testing.assert_allclose(scores, np.array([5.517602, 2.209495, 2.209495]) / 1.9, rtol=1e-5)
    assert run.query_ids == [f"test-{i}" for i in range(6)]
    assert run.manifest is not None
    assert run.manifest.recipe == {"kind": "search", "split": "test", "k": 3, "search": {}}
    assert run.manifest.details == {"queries": 6, "queries_without_hits": 0}
    assert set(run.manifest.inputs) == {"index", "collection"}


def test_a_run_is_the_searchers_hits(world: Path, tmp_path: Path) -> None:
    run = search_run(world / "flat", world / "tiny", "train", tmp_path / "run", k=7)
    searcher = Searcher.load(world / "flat")
    texts = list(searcher.collection.queries("train").values()) if searcher.collection else []
    doc_ids, scores = searcher.search_many(texts, 7)
    for (_, run_ids, run_scores), own_ids, own_scores in zip(run, doc_ids, scores, strict=True):
        assert run_ids == own_ids
        np.testing.assert_array_equal(run_scores, own_scores)


def test_it_is_not_searched_twice(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search_run(world / "bm25", world / "tiny", "test", tmp_path / "run", k=3)
    monkeypatch.setattr(Searcher, "load", lambda *arguments, **options: pytest.fail("searched again"))
    assert search_run(world / "bm25", world / "tiny", "test", tmp_path / "run", k=3).ref() == first.ref()
    with pytest.raises(OutputExistsError, match="another recipe"):
        search_run(world / "bm25", world / "tiny", "test", tmp_path / "run", k=4)


def test_a_trec_file(world: Path, tmp_path: Path) -> None:
    run = search_run(world / "bm25", world / "tiny", "test", tmp_path / "run.trec", k=2)
    line = (tmp_path / "run.trec").read_text().splitlines()[0].split()
    assert line[:4] == ["test-0", "Q0", "d00", "1"]
    assert run.hits("test-0")[0] == Run.load(tmp_path / "run.trec").hits("test-0")[0] == ["d00", "d30"]


def test_queries_without_hits_are_counted_and_named(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "cat"}\n')
    queries = [{"_id": "q1", "text": "cat"}, {"_id": "q2", "text": "unicorn"}]
    (beir / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t1\n")
    collection = make_collection(str(beir), tmp_path / "collection")
    index = build_index("bm25", collection=collection, out=tmp_path / "index")
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        run = search_run(index, collection, "test", tmp_path / "run")
    assert "1 of 2 queries have no hit: 'q2'" in caplog.text
    assert run.manifest is not None and run.manifest.details == {"queries": 2, "queries_without_hits": 1}
    assert run.query_ids == ["q1"]
    with pytest.raises(ArtifactError, match="is not the collection that"):
        search_run(world / "bm25", collection, "test", tmp_path / "other")


def test_vectors_of_a_model_that_stands_for_the_indexs(world: Path, tmp_path: Path) -> None:
    """A query tower for the index's model, and its export, search the index by text or by ready vectors alike."""
    needed = Index.load(world / "flat").manifest.inputs["model"]["fingerprint"]
    tower = make_dense(tmp_path / "tower", seed=4)
    teacher = {"kind": "query-tower", "queries_for": {"fingerprint": needed, "similarity": "cosine"}}
    (tower / "retrieval_kd.json").write_text(json.dumps(teacher))
    exported = export_model(tower, format="onnx", out=tmp_path / "exported").path
    for model in (tower, exported):
        ready = encode(model, world / "tiny", tmp_path / f"{model.name}-queries", queries="test")
        assert needed in ready.manifest.details["stands_for"]
        by_vectors = search_run(
            world / "flat", world / "tiny", "test", tmp_path / f"{model.name}-ready", k=10**12, vectors=ready.path
        )
        by_texts = search_run(world / "flat", world / "tiny", "test", tmp_path / f"{model.name}-run", model=model)
        for (_, ids, scores), (_, ready_ids, ready_scores) in zip(by_texts, by_vectors, strict=True):
            assert ids == ready_ids and len(ids) == 40
            np.testing.assert_allclose(scores, ready_scores, rtol=1e-5)
    with pytest.raises(UsageError, match="or a model, not both"):
        search_run(world / "flat", world / "tiny", "test", tmp_path / "both", model=tower, vectors=ready.path)


def test_ready_vectors_spare_the_encoding(world: Path, tmp_path: Path) -> None:
    encoded = encode(world / "model", world / "tiny", tmp_path / "queries", queries="test")
    expected = search_run(world / "flat", world / "tiny", "test", tmp_path / "run", k=5)
    ready = search_run(world / "flat", world / "tiny", "test", tmp_path / "ready", k=5, vectors=tmp_path / "queries")
    for (_, ids, scores), (_, ready_ids, ready_scores) in zip(expected, ready, strict=True):
        assert ids == ready_ids
        np.testing.assert_allclose(scores, ready_scores, rtol=1e-5)
    with pytest.raises(UsageError, match="vectors of test, not of the queries of 'dev'"):
        search_run(world / "flat", world / "tiny", "dev", tmp_path / "dev", vectors=tmp_path / "queries")
    shuffled = write_vectors(
        tmp_path / "shuffled",
        encoded.matrix[::-1],
        encoded.ids[::-1],
        of="queries",
        split="test",
        similarity="cosine",
        model=DenseEncoder.load(world / "model").ref(),
        collection=make_tiny_collection(tmp_path).ref(),
    )
    with pytest.raises(ArtifactError, match="in their order"):
        search_run(world / "flat", world / "tiny", "test", tmp_path / "x", vectors=shuffled.path)


def test_mistakes_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tset"):
        search_run(world / "bm25", world / "tiny", "tset", tmp_path / "run")
    with pytest.raises(UsageError, match="at least 1"):
        search_run(world / "bm25", world / "tiny", "test", tmp_path / "run", k=0)
    assert not (tmp_path / "run").exists()
