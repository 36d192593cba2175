"""The exact MaxSim index by hand, against brute force and against sentence-transformers' own similarity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_encoders
from scipy.sparse import csr_array

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.indexes import maxsim_exact as module
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.models.encode import encode
from retrieval_kd.search.searcher import Searcher

Embed = Callable[..., Vectors]
DOCUMENTS = [np.array([[1.0, 0], [0, 1]]), np.zeros((0, 2)), np.array([[0.6, 0.8]]), np.array([[-1.0, 0]])]
QUERY = np.array([[1, 0], [0, 2]], dtype=np.float32)


def build(vectors: Vectors) -> Index:
    return build_index("maxsim-exact", vectors=vectors, out=vectors.path.with_name("index"))


def test_maxsim_by_hand(embed: Embed) -> None:
    """d0: 1 + 2; d2: .6 + 1.6; d3: -1 + 0; d1 has no token and is no hit. A query without tokens has none."""
    index = build(embed(DOCUMENTS, "maxsim"))
    scores, rows = index.search([QUERY, np.zeros((0, 2), np.float32)], 9)
    assert rows[:, :4].tolist() == [[0, 2, 3, -1], [-1] * 4]
    np.testing.assert_allclose(scores[0, :3], [3, 2.2, -1], rtol=1e-6)
    assert index.manifest.counts == {"documents": 4, "tokens": 4, "documents_without_tokens": 1}
    assert index.exact and index.problems() == []


def test_the_mean_over_query_tokens(embed: Embed) -> None:
    index = build(embed(DOCUMENTS, "meanmaxsim"))
    np.testing.assert_allclose(index.search([QUERY], 3)[0], [[1.5, 1.1, -0.5]], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("block", [1, 50, 8192])
def test_brute_force_whatever_the_blocks(k: int, block: int, embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of 0 to 11 tokens, each twice, so that ties cross the cut."""
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_NUMBERS", 300)
    rng = np.random.default_rng(0)
    documents = [rng.standard_normal((rng.integers(0, 12), 6)).astype(np.float32) for _ in range(60)] * 2
    queries = [rng.standard_normal((rng.integers(1, 9), 6)).astype(np.float32) for _ in range(9)]
    index = build(embed(documents, "maxsim"))
    scores, rows = index.search(queries, k)
    with_tokens = [row for row in range(120) if len(documents[row])]
    for query, found, values in zip(queries, rows, scores, strict=True):
        of_all = {
            row: float(np.float32((query.astype(float) @ documents[row].astype(float).T).max(axis=1).sum()))
            for row in with_tokens
        }
        best = sorted(with_tokens, key=lambda row: (of_all[row], f"d{row}"), reverse=True)[:k]
        assert found[found >= 0].tolist() == best
        np.testing.assert_allclose(values[found >= 0], [of_all[row] for row in best], rtol=1e-6)


def test_a_score_is_the_same_in_any_company(embed: Embed) -> None:
    rng = np.random.default_rng(1)
    documents = [rng.standard_normal((rng.integers(1, 30), 16)).astype(np.float32) for _ in range(200)]
    queries = [rng.standard_normal((8, 16)).astype(np.float32) for _ in range(20)]
    index = build(embed(documents, "maxsim"))
    together = index.search(queries, 10)
    for place, query in enumerate(queries):
        alone = index.search([query], 10)
        np.testing.assert_array_equal(alone[0][0], together[0][place])
        np.testing.assert_array_equal(alone[1][0], together[1][place])


@pytest.mark.parametrize("similarity", ["maxsim", "meanmaxsim"])
def test_hits_are_the_models_own_similarity(similarity: str, collection: Collection, tmp_path: Path) -> None:
    """With query expansion and a skip list; half-precision tokens are as near as float16 is."""
    from sentence_transformers import MultiVectorEncoder as Stock

    expansion = {"strategy": "min", "length": 8, "token": None, "attend": True}
    model = tiny_encoders.make_multi_vector(
        tmp_path / "model", expansion=expansion, skiplist=["w50"], similarity=similarity
    )
    build_index("maxsim-exact", model=model, collection=collection, out=tmp_path / "index")
    stock = Stock(str(model))
    documents = stock.encode_document([tiny.document_text(row) for row in range(40)])
    expected = np.asarray(stock.similarity(stock.encode_query(["w3 w43"]), documents)[0])
    hits = Searcher.load(tmp_path / "index").search("w3 w43", 40)
    rows = [int(hit.doc_id[1:]) for hit in hits]
    assert sorted(rows) == list(range(40))
    np.testing.assert_allclose([hit.score for hit in hits], expected[rows], rtol=1e-4, atol=1e-5)
    half = encode(model, collection, tmp_path / "half", half=True)
    estimate = estimate_index("maxsim-exact", vectors=half)
    small = build_index("maxsim-exact", vectors=half, out=tmp_path / "small")
    found = {hit.doc_id: hit.score for hit in Searcher.load(small).search("w3 w43", 40)}
    np.testing.assert_allclose([found[hit.doc_id] for hit in hits], expected[rows], rtol=5e-3)
    assert estimate["bytes_per_document"] == half.manifest.details["bytes_per_vector"]
    sizes = [small.manifest.files[name]["bytes"] - 128 for name in ("tokens.npy", "offsets.npy")]
    assert estimate["bytes"] == sum(sizes) - 8


def test_mistakes_are_named(embed: Embed, tmp_path: Path) -> None:
    sparse = embed(csr_array(np.ones((2, 3))), name="sparse", vocabulary=["a", "b", "c"])
    with pytest.raises(UsageError, match=r"sparse: gives sparse vectors, .* take an index of kind .*sparse-exact"):
        build(sparse)
    with pytest.raises(InputError, match="none of the 2 documents has a token"):
        build(embed([np.zeros((0, 2)), np.zeros((0, 2))], "maxsim", name="empty"))
    with pytest.raises(InputError, match="NaN or infinite"):
        build(embed([np.full((1, 2), np.nan)], "maxsim", name="bad"))
    index = build(embed(DOCUMENTS, "maxsim"))
    with pytest.raises(UsageError, match=r"query 1 has shape \[1, 3\], this index takes \[tokens, 2\]"):
        index.search([QUERY, np.ones((1, 3), np.float32)], 3)
    with pytest.raises(UsageError, match="query 0 has NaN"):
        index.search([np.full((1, 2), np.inf, np.float32)], 3)


def test_problems_of_an_index(embed: Embed) -> None:
    index = build(embed(DOCUMENTS, "maxsim"))
    np.save(index.path / "offsets.npy", np.array([0, 2, 2, 3, 9]))
    index.open(None, None)
    assert index.problems() == ["offsets.npy does not divide 4 tokens into 4 documents"]
