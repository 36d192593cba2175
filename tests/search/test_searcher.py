"""A searcher finds its model and collection, refuses others, and gives the hits of the plain inner products."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny import make_dense, make_tiny_collection

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import ArtifactError, RecipeError, UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.models.encoder import DenseEncoder
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
    assert len(Searcher.load(world / "flat").search("w1", k=100)) == 40


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
    assert Searcher.load(world / "flat", model=DenseEncoder.load(tmp_path / "copy")).search("w9", 3) == expected


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
