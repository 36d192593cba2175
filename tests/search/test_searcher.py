"""A searcher finds its model and collection, refuses others, and gives the hits of the plain inner products."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_encoders
from tiny import make_dense, make_tiny_collection

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, RecipeError, UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.models.encode import encode
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.models.encoders import open_encoder
from retrieval_kd.models.load import find_model
from retrieval_kd.search import run as run_module
from retrieval_kd.search.run import search_run
from retrieval_kd.search.searcher import Searcher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a collection, a model, and a bm25 and a flat index of them."""
    folder = tmp_path_factory.mktemp("world")
    collection = make_tiny_collection(folder)
    make_dense(folder / "model")
    build_index("bm25", collection=collection, out=folder / "bm25")
    build_index("flat", collection=folder / "tiny", model=folder / "model", out=folder / "flat")
    return folder


def test_dense_hits_are_the_cosines_of_the_model(world: Path) -> None:
    collection = Collection.load(world / "tiny")
    encoder = DenseEncoder.load(world / "model")
    documents = encoder.encode_documents(list(collection.documents.iter_texts())).astype(np.float64)
    query = encoder.encode_queries(["w3 w41"])[0].astype(np.float64)
    cosines = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
    best = sorted(range(len(cosines)), key=lambda row: (cosines[row], f"d{row:02d}"), reverse=True)[:5]
    hits = Searcher.load(world / "flat").search("w3 w41", k=5)
    assert [hit.doc_id for hit in hits] == [f"d{row:02d}" for row in best]
    np.testing.assert_allclose([hit.score for hit in hits], cosines[best], rtol=1e-5)
    assert [hit.text for hit in hits] == [collection.documents[row].text for row in best]


def test_bm25_needs_no_model(world: Path) -> None:
    hits = Searcher.load(world / "bm25").search("w3")
    assert [(hit.doc_id, hit.title, hit.text) for hit in hits] == [("d03", "", "w3 w43 w53 w50")]
    # N 40, df 1, every length 4: idf = ln(1 + 39.5/1.5) = 3.308107, tf part = 1 / (1 + .9) = 0.526316
    assert hits[0].score == pytest.approx(3.308107 * 0.526316, rel=1e-5)
    with pytest.raises(UsageError, match="takes no model"):
        Searcher.load(world / "bm25", model=world / "model")


def test_many_queries_equal_one_by_one_and_empty_ones_have_no_hits(world: Path) -> None:
    searcher = Searcher.load(world / "flat")
    queries = ["w3 w41", "", "w7", "   ", "w12 w50"]
    doc_ids, scores = searcher.search_many(queries, 4)
    assert [len(found) for found in doc_ids] == [4, 0, 4, 0, 4]
    for query, found, query_scores in zip(queries, doc_ids, scores, strict=True):
        if query.strip():
            alone = searcher.search(query, 4)
            assert [hit.doc_id for hit in alone] == found
            np.testing.assert_allclose([hit.score for hit in alone], query_scores, rtol=1e-5)
        assert query_scores.dtype == np.float32
    assert searcher.search_many([], 4) == ([], [])


def test_more_hits_than_documents(world: Path) -> None:
    assert len(Searcher.load(world / "flat").search("w1", k=10**12)) == 40


def test_threads_share_a_searcher(world: Path) -> None:
    searcher = Searcher.load(world / "flat")
    queries = [f"w{i} w4{i}" for i in range(8)]
    alone = [searcher.search(query, 5) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda query: searcher.search(query, 5), queries)) == alone


@pytest.mark.parametrize("name", ["bm25", "flat"])
def test_usage_errors(name: str, world: Path) -> None:
    searcher = Searcher.load(world / name)
    for empty in ("", " \n"):
        with pytest.raises(UsageError, match="the query is empty"):
            searcher.search(empty)
    with pytest.raises(UsageError, match="at least 1"):
        searcher.search("w1", k=0)
    with pytest.raises(UsageError, match="one string"):
        searcher.search_many("w1")


def test_another_model_is_refused_and_the_same_one_elsewhere_accepted(world: Path, tmp_path: Path) -> None:
    other = make_dense(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match=r"is not the model that .*flat was made with"):
        Searcher.load(world / "flat", model=other)
    shutil.copytree(world / "model", tmp_path / "copy")
    expected = Searcher.load(world / "flat").search("w9", 3)
    assert Searcher.load(world / "flat", model=tmp_path / "copy").search("w9", 3) == expected
    assert Searcher.load(world / "flat", model=open_encoder(tmp_path / "copy")).search("w9", 3) == expected


def test_a_moved_folder_finds_its_own_model_and_collection(world: Path, tmp_path: Path) -> None:
    expected = Searcher.load(world / "flat").search("w9", 3)
    before = shutil.copytree(world, tmp_path / "before")
    moved = before.rename(tmp_path / "moved")
    searcher = Searcher.load(moved / "flat")
    assert searcher.encoder is not None and searcher.encoder.source.path == moved / "model"
    assert searcher.search("w9", 3) == expected


def test_what_is_gone(world: Path, tmp_path: Path) -> None:
    """Without the collection hits have no text; without the model there is no search."""
    here = shutil.copytree(world, tmp_path / "here")
    collection, model = make_tiny_collection(here, "own"), make_dense(here / "own-model", seed=4)
    build_index("flat", collection=collection, model=model, out=here / "own-flat")
    shutil.rmtree(here / "own")
    hits = Searcher.load(here / "own-flat").search("w9", 2)
    assert [(hit.title, hit.text) for hit in hits] == [(None, None)] * 2
    shutil.rmtree(model)
    with pytest.raises(
        ArtifactError, match=r"its model is not at .*own-model any more; give its new place with --model"
    ):
        Searcher.load(here / "own-flat")


def test_another_collection_is_refused(world: Path, tmp_path: Path) -> None:
    beir = tmp_path / "other"
    shutil.copytree(world / "tiny-beir", beir)
    with (beir / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "title": "", "text": "w1"}\n')
    from retrieval_kd.data.sources import make_collection

    other = make_collection(str(beir), tmp_path / "other-collection")
    with pytest.raises(ArtifactError, match="is not the collection that"):
        Searcher.load(world / "flat", collection=other)


def test_search_parameters_of_a_loaded_index(world: Path) -> None:
    with pytest.raises(RecipeError, match="has no search parameter 'nprobe'"):
        Searcher.load(world / "flat", search={"nprobe": 2})
    with pytest.raises(UsageError, match="set when an index is loaded"):
        Searcher.load(Index.load(world / "bm25"), search={"nprobe": 2})


def test_building_with_a_model_keeps_the_vectors_beside_the_index(world: Path) -> None:
    index = Index.load(world / "flat")
    assert index.locate("vectors") == world / "flat.vectors"
    assert index.locate("collection") == world / "tiny"
    assert index.manifest.inputs["model"]["fingerprint"] == DenseEncoder.load(world / "model").ref().fingerprint
    estimate = estimate_index("flat", collection=world / "tiny", model=world / "model")
    assert {key: estimate[key] for key in ("documents", "dimension", "bytes_per_document", "bytes")} == {
        "documents": 40,
        "dimension": 16,
        "bytes_per_document": 64.0,
        "bytes": 2560,
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sparse and a multi-vector index, their models, and a query split encoded by each."""
    folder = tmp_path_factory.mktemp("kinds")
    collection = make_tiny_collection(folder)
    for kind, model in (
        ("sparse-exact", tiny_encoders.make_inference_free(folder / "sparse")),
        ("maxsim-exact", tiny_encoders.make_multi_vector(folder / "multi")),
    ):
        build_index(kind, collection=collection, model=model, out=folder / kind)
        encode(model, collection, folder / f"{kind}-queries", queries="test")
    return folder


@pytest.mark.parametrize("kind", ["sparse-exact", "maxsim-exact"])
def test_ready_query_vectors_of_every_layout(
    kind: str, kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search_run(kinds / kind, kinds / "tiny", "test", tmp_path / "run", k=5)
    vectors = kinds / f"{kind}-queries"
    monkeypatch.setattr(Searcher, "load", lambda *arguments, **options: pytest.fail("encoded"))
    monkeypatch.setattr(run_module, "_BATCH", 4)
    ready = search_run(kinds / kind, kinds / "tiny", "test", tmp_path / "ready", k=5, vectors=vectors)
    assert ready.query_ids == expected.query_ids and len(ready.query_ids) == 6
    for (_, ids, scores), (_, ready_ids, ready_scores) in zip(expected, ready, strict=True):
        assert ids == ready_ids
        np.testing.assert_allclose(scores, ready_scores, rtol=1e-5)


def test_queries_of_an_inference_free_model_run_no_network(kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit's score is .3 · w3's weight in the document + 4.3 · w43's, whatever comes before in the batch."""
    from transformers import BertForMaskedLM

    vectors = Vectors.load(kinds / "sparse-exact.vectors")
    documents = vectors.rows(0, 40).toarray()
    searcher = Searcher.load(kinds / "sparse-exact")
    monkeypatch.setattr(BertForMaskedLM, "forward", lambda *_, **__: pytest.fail("the network ran"))
    doc_ids, scores = searcher.search_many(["w7", "w3 w43 w43 nowhere"], 40)
    expected = 0.3 * documents[:, 5 + 3] + 4.3 * documents[:, 5 + 43]
    rows = [int(doc_id[1:]) for doc_id in doc_ids[1]]
    assert sorted(rows) == np.flatnonzero(expected > 0).tolist()
    np.testing.assert_allclose(scores[1], expected[rows], rtol=1e-5)


class Stand:
    """An encoder that runs another way and says which model it stands for."""

    def __init__(self, model: Path, stands_for: set[str]) -> None:
        self._encoder = DenseEncoder.load(model)
        self.layout, self.similarity = "dense", "cosine"
        self.source, self.truncation = find_model(model), self._encoder.truncation
        self.stands_for, self.encode = stands_for, self._encoder.encode

    def ref(self) -> InputRef:
        return InputRef("e" * 64, name="exported")


def test_an_exported_model_may_stand_for_its_original(world: Path) -> None:
    needed = Index.load(world / "flat").manifest.inputs["model"]["fingerprint"]
    stand = Stand(world / "model", {"e" * 64, needed})
    expected = Searcher.load(world / "flat").search("w3 w41", 5)
    found = Searcher.load(world / "flat", model=stand).search("w3 w41", 5)  # type: ignore[arg-type]
    assert [hit.doc_id for hit in found] == [hit.doc_id for hit in expected]
    np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], rtol=1e-5)
    with pytest.raises(ArtifactError, match=rf"fingerprint eeeeeeeeeeee, needed {needed[:12]}"):
        Searcher.load(world / "flat", model=Stand(world / "model", {"e" * 64}))  # type: ignore[arg-type]


def test_no_torch_is_imported_by_what_searches() -> None:
    """An index of vectors and a model that needs no torch must do without it."""
    program = """
import sys
import retrieval_kd.search.run, retrieval_kd.search.searcher, retrieval_kd.indexes.build, retrieval_kd.indexes.bm25
import retrieval_kd.indexes.faiss_index, retrieval_kd.indexes.sparse_exact, retrieval_kd.indexes.maxsim_exact
import retrieval_kd.models.encoders, retrieval_kd.models.encode, retrieval_kd.models.vectors_of_texts
print([name for name in ("torch", "transformers", "sentence_transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
