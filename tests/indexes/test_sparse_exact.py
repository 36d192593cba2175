"""The exact sparse index by hand, against brute force and against sentence-transformers' own similarity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
from scipy.sparse import csr_array

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import DataError, InputError, UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.search.searcher import Searcher

Embed = Callable[..., Vectors]
DOCUMENTS = np.array([[1, 2, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 3, 0], [2, 0, 0, 1]])
WORDS = ["a", "b", "c", "d"]


def build(vectors: Vectors, name: str = "index") -> Index:
    return build_index("sparse-exact", vectors=vectors, out=vectors.path.with_name(name))


def hits(index: Index, query: list[float], k: int = 9) -> list[tuple[str, float]]:
    scores, rows = index.search(csr_array(np.array([query], dtype=np.float32)), k)
    found = rows[0] >= 0
    return list(zip(index.ids_of(rows[0][found]), scores[0][found].tolist(), strict=True))


def test_dot_products_by_hand(embed: Embed) -> None:
    """A document without a common term is no hit, and neither is one whose score is 0; ties by id descending."""
    index = build(embed(csr_array(DOCUMENTS), vocabulary=WORDS))
    assert hits(index, [0.5, 0, 0, 1]) == [("d4", 2.0), ("d1", 1.0), ("d0", 0.5)]
    assert hits(index, [0, 1, 0, 0]) == [("d1", 2.0), ("d0", 2.0)]
    assert hits(index, [0, 1, 0, 0], k=1) == [("d1", 2.0)]
    assert hits(index, [1, 0, 0, -2]) == [("d0", 1.0)], "d4 scores 0, d1 below it"
    assert hits(index, [0, 0, 0, 0]) == []
    counts = {"documents": 5, "postings": 7, "documents_without_terms": 1}
    assert index.manifest.counts == counts
    assert index.manifest.details["metric"] == "inner_product"
    assert index.exact and index.problems() == []


def test_cosines_by_hand(embed: Embed) -> None:
    """cos((1,2,0,0), (0,2,0,0)) = 2/sqrt(5); a query of any length gives the same."""
    index = build(embed(csr_array(DOCUMENTS), "cosine", vocabulary=WORDS))
    for length in (1.0, 7.0):
        found = hits(index, [0, length, 0, 0])
        assert [doc for doc, _ in found] == ["d1", "d0"]
        np.testing.assert_allclose([score for _, score in found], 2 / np.sqrt(5), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 10, 400])
def test_brute_force(k: int, embed: Embed) -> None:
    """Weights of few distinct values, so that ties cross the cut."""
    rng = np.random.default_rng(0)
    documents = rng.integers(0, 4, (300, 40)) * (rng.random((300, 40)) < 0.2)
    queries = rng.integers(0, 3, (20, 40)) * (rng.random((20, 40)) < 0.3)
    index = build(embed(csr_array(documents), vocabulary=[str(term) for term in range(40)]))
    scores, rows = index.search(csr_array(queries.astype(np.float32)), k)
    for of_all, found, values in zip(queries @ documents.T, rows, scores, strict=True):
        best = sorted(
            (row for row in range(300) if of_all[row]), key=lambda row: (of_all[row], f"d{row}"), reverse=True
        )
        assert found[found >= 0].tolist() == best[:k]
        assert values[found >= 0].tolist() == of_all[best[:k]].tolist()


@pytest.mark.parametrize("make", [tiny_encoders.make_splade, tiny_encoders.make_inference_free])
def test_hits_are_the_models_own_similarity(
    make: Callable[[Path], Path], collection: Collection, tmp_path: Path
) -> None:
    from sentence_transformers import SparseEncoder as Stock

    model = make(tmp_path / "model")
    build_index("sparse-exact", model=model, collection=collection, out=tmp_path / "index")
    stock = Stock(str(model))
    documents = stock.encode_document([tiny.document_text(row) for row in range(40)])
    expected = stock.similarity(stock.encode_query(["w3 w43"]), documents)[0].numpy()
    searcher = Searcher.load(tmp_path / "index")
    doc_ids, scores = searcher.search_many(["w3 w43", ""], 40)
    rows = [int(doc_id[1:]) for doc_id in doc_ids[0]]
    assert sorted(rows) == np.flatnonzero(expected > 0).tolist() and doc_ids[1] == []
    np.testing.assert_allclose(scores[0], expected[rows], rtol=1e-4, atol=1e-5)
    assert (np.diff(scores[0]) <= 0).all()


def test_estimate_and_what_is_built(embed: Embed) -> None:
    vectors = embed(csr_array(DOCUMENTS), vocabulary=WORDS)
    estimate = estimate_index("sparse-exact", vectors=vectors)
    assert (estimate["documents"], estimate["dimension"]) == (5, 4)
    assert (estimate["bytes_per_document"], estimate["bytes"]) == (8 * 7 / 5, 8 * 7 + 8 * 5)
    files = build(vectors).manifest.files
    size = sum(entry["bytes"] - 128 for name, entry in files.items() if name not in ("ids.arrow", "rank.npy"))
    assert size == estimate["bytes"]


def test_mistakes_are_named(embed: Embed, tmp_path: Path, dense: Path, collection: Collection) -> None:
    matrix = embed(np.ones((2, 3)), name="dense")
    with pytest.raises(
        UsageError, match=r"dense: gives dense vectors, a sparse-exact index takes sparse ones; .*faiss"
    ):
        build(matrix)
    for verb in (build_index, estimate_index):
        arguments: dict[str, Any] = {"out": tmp_path / "index"} if verb is build_index else {}
        with pytest.raises(UsageError, match=r"gives dense vectors, a sparse-exact index takes sparse ones"):
            verb("sparse-exact", model=dense, collection=collection, **arguments)
    assert not (tmp_path / "index.vectors").exists()
    sparse = embed(csr_array(DOCUMENTS), vocabulary=WORDS)
    with pytest.raises(UsageError, match=r"takes dense ones; take an index of kind .*sparse-exact"):
        build_index("flat", vectors=sparse, out=tmp_path / "index")
    with pytest.raises(InputError, match="none of the 2 documents has a term"):
        build(embed(csr_array(np.zeros((2, 4))), name="empty", vocabulary=WORDS))
    index = build(sparse)
    with pytest.raises(UsageError, match="queries have 5 terms, this index takes 4"):
        index.search(csr_array(np.ones((1, 5))), 3)
    with pytest.raises(UsageError, match="NaN or infinite"):
        index.search(csr_array(np.array([[np.nan, 0, 0, 0]])), 3)


def test_damaged_vectors_are_not_handed_to_scipy(embed: Embed) -> None:
    vectors = embed(csr_array(DOCUMENTS), vocabulary=WORDS)
    np.save(vectors.path / "terms.npy", np.full(7, 900, dtype=np.int32))
    with pytest.raises(DataError, match="terms outside the vocabulary"):
        build(Vectors(vectors.path, vectors.manifest))


def test_problems_of_an_index(embed: Embed) -> None:
    index = build(embed(csr_array(DOCUMENTS), vocabulary=WORDS))
    np.save(index.path / "documents.npy", np.array([0, 4, 0, 1, 3, 9], dtype=np.int32))
    index.open(None, None)
    assert index.problems() == ["7 postings but 6 rows, 7 weights", "postings of documents that are not among the 5"]
