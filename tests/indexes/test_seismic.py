"""The approximate sparse index against the exact one: scores to the bit, order, filters, and stated recall."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from tiny_sparse_vectors import overlap, skewed

from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, InputError, RecipeError, UsageError
from retrieval_kd.indexes import seismic
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index, estimate_index

Embed = Callable[..., Vectors]
TERMS = 300
WHOLE = ["search.query_cut=1000", "search.heap_factor=0.1"]
"""Reads every list of a query: what is found is all that there is."""


def build(
    embed: Embed, matrix: Any, similarity: str = "dot", overrides: list[str] | None = None
) -> tuple[Index, Index]:
    """An index and the exact one over the same documents."""
    vectors = embed(matrix, similarity, vocabulary=[f"w{i}" for i in range(matrix.shape[1])])
    made = [
        build_index(kind, vectors=vectors, out=vectors.path.with_name(kind), overrides=keys)
        for kind, keys in (("seismic", overrides or []), ("sparse-exact", []))
    ]
    return made[0], made[1]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_recall_and_scores_to_the_bit(similarity: str, embed: Embed) -> None:
    index, exact = build(embed, skewed(800, TERMS, seed=1), similarity)
    queries = skewed(30, TERMS, seed=2, entries=12)
    scores, rows = index.search(queries, 10)
    best = exact.search(queries, 10)[1]
    assert overlap(rows, best) >= 0.97
    of_all, all_rows = exact.search(queries, 800)
    for found, values, every, in_order in zip(rows, scores, of_all, all_rows, strict=True):
        known = dict(zip(in_order.tolist(), every.tolist(), strict=True))
        assert [known[row] for row in found.tolist()] == values.tolist()


@pytest.mark.parametrize("k", [1, 10, 400])
def test_ties_across_the_cut(k: int, embed: Embed) -> None:
    """Weights of few distinct values and float16 scores that a tie of the exact ones must not hide behind."""
    rng = np.random.default_rng(0)
    documents = rng.integers(0, 4, (300, 40)) * (rng.random((300, 40)) < 0.2) * np.float32(1.0004)
    queries = csr_array((rng.integers(0, 3, (20, 40)) * (rng.random((20, 40)) < 0.3)).astype(np.float32))
    index, exact = build(embed, csr_array(documents), overrides=WHOLE)
    for ours, theirs in zip(index.search(queries, k), exact.search(queries, k), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("scanned", [0, 2000])
def test_filters(share: float, scanned: int, embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the exact index's, whether allowed documents are all scored or the search is widened."""
    monkeypatch.setattr(seismic, "_SCANNED", scanned)
    index, exact = build(embed, skewed(500, TERMS, seed=1), overrides=WHOLE)
    queries = skewed(10, TERMS, seed=2, entries=12)
    allowed = np.random.default_rng(5).random(500) < share
    for ours, theirs in zip(index.search(queries, 10, allowed), exact.search(queries, 10, allowed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_search_goes_on_to_lighter_terms_until_there_are_k(embed: Embed) -> None:
    """With one term a query, d0 alone has the heaviest; two more documents have the other."""
    documents = np.array([[3, 0, 0], [0, 2, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    index, _ = build(embed, csr_array(documents), overrides=["search.query_cut=1"])
    scores, rows = index.search(csr_array(np.array([[2, 1, 0]], dtype=np.float32)), 4)
    assert rows.tolist() == [[0, 1, 2, -1]] and scores[0, :3].tolist() == [6, 2, 1]


def test_search_parameters_trade_recall(embed: Embed) -> None:
    index, exact = build(embed, skewed(800, TERMS, seed=1))
    queries = skewed(30, TERMS, seed=2, entries=12)
    best = exact.search(queries, 10)[1]
    poor = Index.load(index.path.parent, search={"query_cut": 1, "heap_factor": 1.0})
    whole = Index.load(index.path.parent, search={"query_cut": 100, "heap_factor": 0.1})
    assert overlap(poor.search(queries, 10)[1], best) < 0.9
    np.testing.assert_array_equal(whole.search(queries, 10)[1], best)
    with pytest.raises(RecipeError, match=r"search\.nprobe"):
        Index.load(index.path.parent, search={"nprobe": 3})


def test_empty_documents_queries_and_terms_that_no_document_has(embed: Embed) -> None:
    documents = np.array([[1, 2, 0, 0], [0, 0, 0, 0], [0, 3, 0, 0]], dtype=np.float32)
    vectors = embed(csr_array(documents), vocabulary=["é", "##ing", "日本", "a b"])
    index = build_index("seismic", vectors=vectors, out=vectors.path.with_name("index"))
    scores, rows = index.search(csr_array(np.array([[0, 1, 0, 5], [0, 0, 0, 0], [0, 0, 7, 7], [-1, 0, 0, 0.0]])), 3)
    assert rows.tolist() == [[2, 0, -1], [-1] * 3, [-1] * 3, [-1] * 3]
    assert scores[0, :2].tolist() == [3, 2] and np.isneginf(scores[1:]).all()
    assert index.manifest.counts == {"documents": 3, "postings": 3, "documents_without_terms": 1}


def test_a_vocabulary_of_more_than_65536_terms(embed: Embed) -> None:
    matrix = csr_array((np.array([1, 2, 3], np.float32), ([0, 1, 1], [3, 3, 69_999])), shape=(2, 70_000))
    index, _ = build(embed, matrix)
    scores, rows = index.search(matrix, 2)
    assert rows.tolist() == [[1, 0], [1, 0]] and scores.tolist() == [[2, 1], [13, 2]]
    assert index.problems() == []


def test_nothing_is_printed(embed: Embed, capfd: pytest.CaptureFixture[str]) -> None:
    build(embed, skewed(20, TERMS, seed=1))
    assert capfd.readouterr() == ("", "")


def test_estimate_is_an_upper_bound(embed: Embed) -> None:
    index, _ = build(embed, skewed(800, TERMS, seed=1))
    estimate = estimate_index("seismic", vectors=index.path.parent.with_name("vectors"))
    assert index.manifest.details["bytes"] < estimate["bytes"]


def test_mistakes_are_named(embed: Embed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def attempt(matrix: Any, name: str) -> Index:
        vectors = embed(csr_array(matrix), name=name, vocabulary=["a", "b"])
        return build_index("seismic", vectors=vectors, out=tmp_path / f"{name}-index")

    with pytest.raises(InputError, match="none of the 2 documents has a term"):
        attempt(np.zeros((2, 2)), "empty")
    with pytest.raises(InputError, match="NaN or infinite"):
        attempt(np.array([[np.nan, 1]]), "nan")
    with pytest.raises(InputError, match="weights above 65504"):
        attempt(np.array([[70000.0, 1]]), "large")
    with pytest.raises(InputError, match="all weights are at most 3e-08, which is 0 for Seismic"):
        attempt(np.array([[1e-9, 2.0**-25]]), "small")
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        assert attempt(np.array([[1e-9, 3e-8]]), "partly-small").manifest.counts["weights_of_0"] == 1
    assert "1 weights are too small for Seismic's float16" in caplog.text
    index = attempt(np.ones((3, 2)), "good")
    with pytest.raises(UsageError, match="queries have 3 terms, this index takes 2"):
        index.search(csr_array(np.ones((1, 3))), 1)
    with pytest.raises(UsageError, match="NaN or infinite"):
        index.search(csr_array(np.array([[np.inf, 0]])), 1)
    with pytest.raises(UsageError, match="allowed is an array of 3 booleans"):
        index.search(csr_array(np.ones((1, 2))), 1, np.ones(2, dtype=bool))


def test_problems_of_an_index(embed: Embed) -> None:
    index, _ = build(embed, skewed(20, TERMS, seed=1))
    other = index.path / "weights.npy"
    np.save(other, np.load(other)[:-1])
    index.open(index.recipe, index.recipe.search)
    assert [problem.split(" in Seismic")[0] for problem in index.problems()] != []
    native = index.path / "index.seismic"
    native.write_bytes(native.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="Seismic cannot read it"):
        index.open(index.recipe, index.recipe.search)
