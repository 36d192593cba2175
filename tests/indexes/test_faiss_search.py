"""FAISS indexes under filters, grown from one another, and re-ranked: against brute force over what they store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import yaml
from tiny import unit

from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, InputError, RecipeError, UsageError
from retrieval_kd.indexes import faiss_search
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Index, Source
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.indexes.stored_vectors import StoredVectors, StoredVectorsWriter
from retrieval_kd.plan import Draft

Embed = Callable[..., Vectors]
Build = Callable[..., Any]
N = 600


def random_matrix(number: int, dimension: int = 16, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, dimension)).astype(np.float32)


@pytest.fixture
def build(tmp_path: Path, embed: Embed) -> Build:
    """A function that builds a faiss index of a matrix from the recipe's keys."""

    def make(matrix: np.ndarray, factory: str, name: str = "index", similarity: str = "dot", **keys: Any) -> Index:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"kind": "faiss", "factory": factory, "threads": 1, **keys}))
        vectors = embed(matrix, similarity, name=f"{name}-vectors")
        return build_index(recipe, vectors=vectors, out=tmp_path / name)

    return make


EXHAUSTIVE = [
    ("Flat", {}),
    ("SQ8", {}),
    ("PQ8x4", {}),
    ("PQ16x4fs", {}),
    ("RaBitQ", {}),
    ("RQ4x4", {}),
    ("LSQ2x4", {}),
    ("OPQ4,PQ4x4", {}),
    ("PCAR8,SQ8", {}),
    ("IVF8,Flat", {"nprobe": 2}),
    ("IVF8,PQ8x4", {"nprobe": 3}),
    ("IVF8,PQ16x4fs", {"nprobe": 3}),
    ("IVF8,RaBitQ", {"nprobe": 3}),
    ("IVF8,RQ4x4", {"nprobe": 3}),
    ("OPQ4,IVF8,PQ4x4", {"nprobe": 3}),
    ("IVF8_HNSW8,SQ8", {"nprobe": 3, "quantizer_ef_search": 32}),
]
"""Factories whose first k hits do not depend on k."""


@pytest.mark.parametrize(("factory", "search"), EXHAUSTIVE, ids=[factory for factory, _ in EXHAUSTIVE])
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_allowed_hits_are_all_hits_without_the_others(
    factory: str, search: dict[str, Any], share: float, build: Build
) -> None:
    """Ties included: every vector is there twice."""
    matrix = np.repeat(random_matrix(N // 2), 2, axis=0)
    index = build(matrix, factory, search=search)
    allowed = np.random.default_rng(2).random(N) < share
    queries = random_matrix(7, seed=8)
    all_scores, all_rows = index.search(queries, N)
    scores, rows = index.search(queries, 10, allowed)
    for place in range(len(queries)):
        keep = (all_rows[place] >= 0) & allowed[all_rows[place]]
        expected = all_rows[place][keep][:10]
        found = rows[place][rows[place] >= 0]
        assert found.tolist() == expected.tolist()
        np.testing.assert_allclose(scores[place][: len(found)], all_scores[place][keep][:10], rtol=1e-5, atol=1e-5)
        assert np.isneginf(scores[place][len(found) :]).all()


@pytest.mark.parametrize("factory", ["HNSW16", "HNSW16,SQ8", "PCAR12,HNSW16", "NSG16", "HNSW16,RFlat"])
def test_a_graph_finds_what_is_allowed(factory: str, build: Build) -> None:
    """Few allowed rows are scanned: exactly the best by what is stored; then the worse half for the first query."""
    matrix = random_matrix(N)
    index = build(matrix, factory, search={} if factory == "NSG16" else {"ef_search": 64})
    queries = random_matrix(12, seed=8)
    if factory.startswith("PCAR"):
        first = index.native.chain.at(0)
        reference = first.apply(queries) @ first.apply(matrix).T
    else:
        reference = queries @ (index.native.reconstruct_n(0, N) if "SQ8" in factory else matrix).T
    few = np.zeros(N, dtype=bool)
    few[np.random.default_rng(3).choice(N, 20, replace=False)] = True
    for allowed, recall in ((few, 1.0), (reference[0] < np.median(reference[0]), 0.95)):
        _, rows = index.search(queries, 10, allowed)
        assert (rows >= 0).all() and allowed[rows].all()
        best = np.argsort(-np.where(allowed, reference, -np.inf), axis=1)[:, :10]
        found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), best.tolist(), strict=True)])
        assert found >= recall, allowed.sum()


def test_a_graph_searches_longer_for_more_hits(build: Build) -> None:
    """FAISS alone stops after ef_search vectors: of 300 hits it gives fewer."""
    matrix = unit(random_matrix(N)).astype(np.float32)
    index = build(matrix, "HNSW16", search={"ef_search": 16})
    queries = random_matrix(5, seed=1)
    assert (index.native.search(queries, 300)[1] < 0).any()
    rows = index.search(queries, 300)[1]
    best = np.argsort(-(queries @ matrix.T), axis=1)[:, :300]
    assert np.mean([len(set(a) & set(b)) / 300 for a, b in zip(rows.tolist(), best.tolist(), strict=True)]) > 0.98


def test_nothing_or_everything_allowed(build: Build) -> None:
    index = build(random_matrix(50), "PQ8x4")
    queries = random_matrix(3, seed=1)
    scores, rows = index.search(queries, 4, np.zeros(50, dtype=bool))
    assert (rows == -1).all() and np.isneginf(scores).all()
    for ours, plain in zip(index.search(queries, 4, np.ones(50, dtype=bool)), index.search(queries, 4), strict=True):
        np.testing.assert_array_equal(ours, plain)
    with pytest.raises(UsageError, match="allowed is an array of 50 booleans"):
        index.search(queries, 4, np.ones(49, dtype=bool))


def test_a_filter_keeps_the_search_parameters(build: Build) -> None:
    """With one list probed of 16, a filter that takes nothing away from it changes nothing."""
    index = build(random_matrix(N), "IVF16,Flat", search={"nprobe": 1})
    queries = random_matrix(9, seed=4)
    plain = index.search(queries, 60)[1]
    allowed = np.ones(N, dtype=bool)
    allowed[np.setdiff1d(np.arange(N), plain)[:1]] = False
    np.testing.assert_array_equal(index.search(queries, 60, allowed)[1], plain)
    assert (plain == -1).any()


@pytest.mark.parametrize("factory", ["PQ16x4fs", "RQ4x4"])
def test_few_hits_are_fetched_at_a_time(factory: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an index that cannot filter: never more than 500 hits at once, or all of one query."""
    index = build(random_matrix(N), factory)
    queries, allowed = random_matrix(9, seed=4), np.random.default_rng(1).random(N) < 0.1
    expected = index.search(queries, 10, allowed)
    kind = type(faiss.downcast_index(index.native))
    plain, sizes = kind.search, []

    def search(self: Any, queries: np.ndarray, number: int, **options: Any) -> Any:
        sizes.append(len(queries) * number)
        return plain(self, queries, number, **options)

    monkeypatch.setattr(kind, "search", search)
    monkeypatch.setattr(faiss_search, "_FETCHED", 500)
    scores, rows = index.search(queries, 10, allowed)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=1e-6)  # FAISS's sums depend on the batch
    assert len(sizes) > 2 and max(sizes) <= N


def test_two_threads_with_filters_equal_one(build: Build) -> None:
    index = build(random_matrix(N), "IVF8,PQ8x4", search={"nprobe": 4})
    queries = random_matrix(9, seed=4)
    masks = [np.random.default_rng(seed).random(N) < 0.3 for seed in range(8)]
    alone = [index.search(queries, 10, mask) for mask in masks]
    with ThreadPoolExecutor(2) as pool:
        for (scores, rows), expected in zip(
            pool.map(lambda m: index.search(queries, 10, m), masks), alone, strict=True
        ):
            np.testing.assert_array_equal(scores, expected[0])
            np.testing.assert_array_equal(rows, expected[1])


@pytest.mark.parametrize("factory", ["IVF8,PQ8x4", "OPQ4,PQ4x4", "SQ8", "HNSW8", "PQ8x4,RFlat", "NSG16", "RaBitQ"])
def test_a_grown_segment_has_the_same_codebooks(factory: str, tmp_path: Path, embed: Embed, build: Build) -> None:
    """The same vectors have the same codes in a segment that was grown from another's training."""
    first = random_matrix(N)
    index = build(first, factory, similarity="cosine", search={} if "IVF" not in factory else {"nprobe": 8})
    more = np.concatenate([random_matrix(140, seed=77), first[:20]])
    draft = Draft(tmp_path / "grown", resumed=False)
    draft.path.mkdir()
    index.grow(Source(vectors=embed(more, name="more")), draft)
    grown = faiss.read_index(str(draft.path / "index.faiss"))
    assert (grown.ntotal, draft.counts, draft.details["metric"]) == (160, {"documents": 160}, "cosine")
    queries = unit(random_matrix(5, seed=9))
    structure.set_parameters(grown, factory, index.search_values)
    scores, rows = grown.search(queries, 160)
    old_scores, old_rows = index.search(queries, N)
    for place in range(5):
        old = dict(zip(old_rows[place].tolist(), old_scores[place].tolist(), strict=True))
        new = dict(zip(rows[place].tolist(), scores[place].tolist(), strict=True))
        both = [(old[row], new[140 + row]) for row in range(20) if row in old and 140 + row in new]
        assert len(both) >= 5
        np.testing.assert_allclose([a for a, _ in both], [b for _, b in both], rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="vectors of 8 numbers, the index has 16"):
        index.grow(Source(vectors=embed(random_matrix(3, 8), name="short")), draft)


@pytest.mark.parametrize(("store", "error"), [("float32", 0.0), ("float16", 4e-4), ("int8", 8e-3)])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_reranking_is_exact_among_the_candidates(store: str, error: float, similarity: str, build: Build) -> None:
    """All rows are candidates: the hits are the best by float64 inner products with the stored vectors."""
    matrix = random_matrix(N, 32)
    index = build(matrix, "PQ4x4", similarity=similarity, rerank={"store": store}, search={"candidates": N})
    queries = random_matrix(6, 32, seed=2)
    documents = unit(matrix.astype(np.float64)) if similarity == "cosine" else matrix.astype(np.float64)
    asked = unit(queries) if similarity == "cosine" else queries
    stored = StoredVectors.open(index.path)
    assert stored is not None
    values = stored.of(np.arange(N))
    measured = np.linalg.norm(values - documents) / np.linalg.norm(documents)
    assert measured <= error + 1e-7
    assert index.manifest.details["rerank_error"] == pytest.approx(measured, abs=1e-6)
    scores, rows = index.search(queries, 10)
    exact = asked.astype(np.float64) @ values.T
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :10])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], rtol=1e-5)


def test_candidates_are_the_best_of_the_codes_and_raise_recall(tmp_path: Path, build: Build) -> None:
    matrix, queries = random_matrix(N, 32), random_matrix(50, 32, seed=2)
    plain = build(matrix, "PQ8x4", "plain")
    reranked = build(matrix, "PQ8x4", rerank={"store": "float16"}, search={"candidates": 30})
    best = np.argsort(-(queries @ matrix.T), axis=1)[:, :10]

    def recall(rows: np.ndarray) -> float:
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), best.tolist(), strict=True)]))

    candidates = plain.search(queries, 30)[1]
    rows = reranked.search(queries, 10)[1]
    for place in range(50):
        own = matrix[candidates[place]].astype(np.float16).astype(np.float64) @ queries[place].astype(np.float64)
        assert rows[place].tolist() == candidates[place][np.argsort(-own)][:10].tolist()
    wide = Index.load(tmp_path / "index", search={"candidates": 200}).search(queries, 10)[1]
    assert recall(plain.search(queries, 10)[1]) + 0.15 < recall(rows) < recall(wide)
    allowed = np.random.default_rng(0).random(N) < 0.04
    filtered = Index.load(tmp_path / "index", search={"candidates": N}).search(queries, 5, allowed)[1]
    by_score = np.where(allowed, queries @ matrix.astype(np.float16).astype(np.float32).T, -np.inf)
    np.testing.assert_array_equal(filtered, np.argsort(-by_score, axis=1)[:, :5])


def test_equal_vectors_tie_after_reranking(build: Build) -> None:
    index = build(np.repeat(random_matrix(75, 50), 4, axis=0), "PQ10x4", rerank={"store": "int8"})
    scores, rows = index.search(random_matrix(3, 50, seed=1), 8)
    assert [len(set(line.tolist())) for line in scores] == [2, 2, 2]
    for line in rows:
        ids = index.ids_of(line)
        assert ids[:4] == sorted(ids[:4], reverse=True)


def test_an_int8_by_hand(tmp_path: Path) -> None:
    """(127, -64, 0) has scale 1; (0.5, 0.25, 0) scale .5/127, where .25 is 63.5 scales and rounds to 64; 0 stays 0."""
    writer = StoredVectorsWriter(tmp_path, (3, 3), "int8")
    batch = np.array([[127, -64, 0], [0.5, 0.25, 0], [0, 0, 0]], dtype=np.float32)
    writer.write(0, batch)
    error = writer.close()
    stored = StoredVectors.open(tmp_path)
    assert stored is not None and len(stored) == 3
    values = stored.of(np.arange(3))
    np.testing.assert_allclose(values, [[127, -64, 0], [0.5, 64 * 0.5 / 127, 0], [0, 0, 0]], rtol=1e-6)
    assert error == pytest.approx(0.5 * 0.5 / 127 / np.sqrt(127**2 + 64**2 + 0.25 + 0.0625), rel=1e-4)
    scores = stored.scores(np.array([[1, 1, 1]], dtype=np.float32), np.array([[2, 0, -1]]))
    assert scores.tolist() == [[0.0, 63.0, -np.inf]]


def test_reranking_is_counted_and_its_mistakes_are_named(tmp_path: Path, embed: Embed, build: Build) -> None:
    matrix = random_matrix(N, 32)
    for store, each in (("float16", 64), ("int8", 36), ("float32", 128)):
        recipe = tmp_path / "estimate.yaml"
        recipe.write_text(yaml.safe_dump({"kind": "faiss", "factory": "PQ8x8", "rerank": {"store": store}}))
        vectors = embed(matrix, name=f"estimate-{store}")
        assert estimate_index(recipe, vectors=vectors)["bytes_per_document"] == 8 + each
    with pytest.raises(RecipeError, match="candidates needs rerank"):
        build(matrix, "PQ8x4", "a", search={"candidates": 50})
    with pytest.raises(RecipeError, match="'Flat' compares whole vectors already"):
        build(matrix, "Flat", "b", rerank={"store": "int8"})
    with pytest.raises(InputError, match="has the value 70000, float16 ends at 65504; store float32"):
        build(np.full((30, 16), 70000, dtype=np.float32), "PQ8x4", "c", rerank={"store": "float16"})


@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ8x4", "HNSW8", "IVF8,PQ16x4fs"])
def test_a_memory_mapped_index_gives_the_same_hits(factory: str, tmp_path: Path, build: Build) -> None:
    index = build(random_matrix(N), factory)
    queries = random_matrix(5, seed=3)
    mapped = Index.load(tmp_path / "index", search={"memory_map": True})
    for ours, theirs in zip(index.search(queries, 20), mapped.search(queries, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("factory", "dimension", "words"),
    [
        ("PQ7", 384, "multiple of the number of subquantizers .*; M = 7 does not divide 384, 6 and 8 do"),
        ("OPQ5_30,PQ7", 32, "M = 7 does not divide 30, 6 and 10 do"),
        ("IVF4,PQ7x4fs", 32, "M = 7 does not divide 32, 4 and 8 do"),
        ("PCAR20,PQ6", 32, "M = 6 does not divide 20, 5 and 10 do"),
    ],
)
def test_a_dimension_that_m_does_not_divide(factory: str, dimension: int, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        structure.new_index(factory, dimension)


@pytest.mark.parametrize("factory", ["IVF4,PQ8x4", "OPQ8,PQ8x4", "RQ4x4", "PRQ2x2x4", "IVF4,RQ4x4", "IVF4,PQ8x4fs"])
def test_faiss_prints_nothing_about_few_training_vectors(
    factory: str, build: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    build(random_matrix(100), factory)
    assert "WARNING" not in "".join(capfd.readouterr())


def test_more_lists_than_documents(build: Build) -> None:
    with pytest.raises(InputError, match=r"'IVF64,Flat' needs at least 64 vectors to train .* gets 50 of 50"):
        build(random_matrix(50), "IVF64,Flat")


def test_zero_vectors_under_cosine_are_counted(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    matrix = random_matrix(50)
    matrix[[3, 9]] = 0
    index = build(matrix, "SQ8", similarity="cosine")
    assert "2 of 50 vectors are zero and have no direction" in caplog.text
    assert index.manifest.details["zero_vectors"] == 2


def test_a_truncated_index_file(tmp_path: Path, build: Build) -> None:
    index = build(random_matrix(50), "HNSW8")
    file = tmp_path / "index" / "gen-000001" / "index.faiss"
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(ArtifactError, match=r"index\.faiss has \d+ bytes, \d+ were written"):
        Index.load(tmp_path / "index")
    with pytest.raises(ArtifactError, match=r"index\.faiss: damaged .*; restore it or build again"):
        index.open(index.recipe, index.recipe.search)
