"""Tuning: the point it chooses against a recall counted here, its record, and how a search applies it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import unit

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, RecipeError, RetrievalKDError, UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.tune import OperatingPoint, _Measured, tune_index
from retrieval_kd.indexes.update import update_index

Embed = Callable[..., Vectors]
Build = Callable[..., Any]


def clustered(number: int, seed: int, dimension: int = 16) -> np.ndarray:
    """Unit vectors around 40 centres."""
    centres = np.random.default_rng(0).standard_normal((40, dimension))
    rng = np.random.default_rng(seed)
    chosen = centres[rng.integers(0, 40, number)]
    return unit(chosen + 1.2 * rng.standard_normal((number, dimension))).astype(np.float32)


DOCUMENTS, QUERIES = clustered(2000, 1), clustered(60, 2)


@pytest.fixture
def build(tmp_path: Path, embed: Embed) -> Build:
    """A function that builds a faiss index of the documents from the recipe's keys."""

    def make(factory: str, name: str = "index", similarity: str = "cosine", **keys: Any) -> Index:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"kind": "faiss", "factory": factory, "threads": 1, **keys}))
        collection = InputRef("c" * 64)
        vectors = embed(DOCUMENTS, similarity, name=f"{name}-vectors", collection=collection)
        return build_index(recipe, vectors=vectors, out=tmp_path / name)

    return make


@pytest.fixture
def queries(embed: Embed) -> Vectors:
    return embed(QUERIES, "cosine", name="queries", of="queries", split="train")


def recall(index: Index, k: int = 10) -> float:
    best = np.argsort(-(QUERIES @ DOCUMENTS.T), axis=1)[:, :k]
    rows = index.search(QUERIES, k)[1]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(rows.tolist(), best.tolist(), strict=True)]))


def test_the_fewest_lists_that_are_enough(tmp_path: Path, build: Build, queries: Vectors) -> None:
    """FAISS's range of nprobe and all 32 lists: the least of them whose recall, counted here, is enough."""
    index = build("IVF32,Flat")
    tuned = tune_index(tmp_path / "index", queries=queries.path, recall=0.9)
    by_nprobe = {n: recall(Index.load(tmp_path / "index", search={"nprobe": n})) for n in (1, 2, 4, 8, 16, 32)}
    least = min(n for n, value in by_nprobe.items() if value >= 0.9)
    assert 1 < least < 32
    assert tuned.search == {"nprobe": least}
    assert tuned.recall == pytest.approx(by_nprobe[least], abs=1e-6)
    assert (tuned.target, tuned.k, tuned.queries, tuned.fingerprint) == (0.9, 10, 60, index.fingerprint)
    times = [point.ms for point in tuned.points]
    assert times == sorted(times) and [p.recall for p in tuned.points] == sorted(p.recall for p in tuned.points)
    for point in tuned.points:
        assert point.recall == pytest.approx(by_nprobe[point.search["nprobe"]], abs=1e-6)
    record = json.loads((tmp_path / "index" / "tuned.json").read_text())
    assert (record["search"], record["recall"], record["file"]) == (tuned.search, tuned.recall, tuned.file)


def test_a_search_uses_what_was_found_when_it_is_told_to(tmp_path: Path, build: Build, queries: Vectors) -> None:
    build("IVF32,Flat", search={"nprobe": 1})
    with pytest.raises(UsageError, match=r"was never tuned \(retrieval-kd tune .*index --queries QV\)"):
        Index.load(tmp_path / "index", search={"tuned": True})
    opened = Index.load(tmp_path / "index")
    tuned = tune_index(opened, queries=queries, recall=0.9)
    assert opened.search_values == {"nprobe": 1} and (opened.search(QUERIES, 500)[1] < 0).any(), "it keeps its own"
    assert Index.load(tmp_path / "index").search_values == {"nprobe": 1}
    assert Index.load(tmp_path / "index", search={"tuned": True}).search_values == tuned.search
    assert recall(Index.load(tmp_path / "index", search={"tuned": True})) >= 0.9
    assert Index.load(tmp_path / "index", search={"tuned": True, "nprobe": 3}).search_values == {"nprobe": 3}


def test_the_fastest_of_those_that_are_enough() -> None:
    """nprobe 1 with 20 candidates and nprobe 2 with 10 both reach .9; the second takes 2 ms and the first 3."""
    measured = _Measured(None, [], QUERIES, [], 10)  # type: ignore[arg-type]
    for nprobe, candidates, recall_, ms in (
        (1, 10, 0.8, 1.0),
        (1, 20, 0.95, 3.0),
        (2, 10, 0.92, 2.0),
        (2, 20, 1.0, 4.0),
    ):
        search = {"nprobe": nprobe, "candidates": candidates}
        measured._points[nprobe, candidates] = OperatingPoint(search, recall_, ms)
    axes = {"nprobe": [1, 2], "candidates": [10, 20]}
    assert measured.fastest(axes, 0.9).search == {"nprobe": 2, "candidates": 10}
    assert measured.fastest(axes, 0.97).search == {"nprobe": 2, "candidates": 20}


def test_tuned_is_for_searches_alone(tmp_path: Path, build: Build, queries: Vectors) -> None:
    with pytest.raises(RecipeError, match=r"search\.tuned is no key of a recipe: .* --set tuned=true"):
        build("IVF32,Flat", search={"tuned": True})
    assert not (tmp_path / "index").exists()
    build("IVF32,Flat", search={"nprobe": 2})
    assert Index.load(tmp_path / "index", search={"tuned": False}).search_values == {"nprobe": 2}


def test_a_record_of_another_generation_is_not_used(
    tmp_path: Path, build: Build, queries: Vectors, caplog: pytest.LogCaptureFixture
) -> None:
    build("IVF32,Flat", search={"nprobe": 1})
    tune_index(tmp_path / "index", queries=queries, recall=0.9)
    file = tmp_path / "index" / "tuned.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "0" * 64}))
    assert Index.load(tmp_path / "index", search={"tuned": True}).search_values == {"nprobe": 1}
    assert "is of another generation of the index and not used; tune again" in caplog.text
    file.write_text("{")
    with pytest.raises(ArtifactError, match=r"damaged .*; tune again"):
        Index.load(tmp_path / "index", search={"tuned": True})


@pytest.mark.parametrize(
    ("factory", "keys", "names"),
    [
        ("HNSW8", {}, {"ef_search"}),
        ("IVF16,PQ8x4,RFlat", {}, {"nprobe", "k_factor"}),
        ("IVF16,PQ8x4", {"rerank": {"store": "float16"}}, {"nprobe", "candidates"}),
        ("IVF16_HNSW8,Flat", {}, {"nprobe", "quantizer_ef_search"}),
    ],
)
def test_every_parameter_that_an_index_has(
    factory: str, keys: dict[str, Any], names: set[str], tmp_path: Path, build: Build, queries: Vectors
) -> None:
    build(factory, **keys)
    tuned = tune_index(tmp_path / "index", queries=queries, recall=0.85)
    assert set(tuned.search) == names
    assert recall(Index.load(tmp_path / "index", search={"tuned": True})) == pytest.approx(tuned.recall, abs=0.01)
    assert tuned.recall >= 0.85


def test_a_recall_that_cannot_be_reached(tmp_path: Path, build: Build, queries: Vectors) -> None:
    build("IVF16,PQ4x4")
    best = recall(Index.load(tmp_path / "index", search={"nprobe": 16}))
    with pytest.raises(RetrievalKDError, match=rf"the best recall@10 is {best:.4f}, with nprobe=16 .*lower --recall"):
        tune_index(tmp_path / "index", queries=queries, recall=0.99)
    assert not (tmp_path / "index" / "tuned.json").exists()


def test_mistakes_are_named(tmp_path: Path, build: Build, queries: Vectors, embed: Embed) -> None:
    build("Flat", "flat")
    with pytest.raises(UsageError, match="flat: a faiss index has no search parameters to tune"):
        tune_index(tmp_path / "flat", queries=queries)
    build("IVF16,Flat")
    with pytest.raises(UsageError, match=r"recall is above 0 and at most 1, k at least 1 \(got 1.5 and 10\)"):
        tune_index(tmp_path / "index", queries=queries, recall=1.5)
    with pytest.raises(ArtifactError, match="2000 documents, the vectors of 500 are in"):
        tune_index(tmp_path / "index", queries=queries, vectors=embed(DOCUMENTS[:500], "cosine", name="few"))
    with pytest.raises(ArtifactError, match="these are vectors of documents; encode a split with --queries SPLIT"):
        tune_index(tmp_path / "index", queries=tmp_path / "index-vectors")
    (tmp_path / "index-vectors").rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match=r"its vectors .* is not at .* any more; .* --vectors"):
        tune_index(tmp_path / "index", queries=queries)
    assert tune_index(tmp_path / "index", queries=queries, vectors=tmp_path / "moved", recall=0.5).recall >= 0.5
    with pytest.raises(RecipeError, match="tuned"):
        Index.load(tmp_path / "index", search={"tuned": 7})


def test_an_index_of_shards_with_deletions(tmp_path: Path, build: Build, queries: Vectors) -> None:
    """Every shard gets the point; a deleted document is no right hit."""
    build("IVF16,Flat", shards=2)
    best = np.argsort(-(QUERIES @ DOCUMENTS.T), axis=1)[:, :3]
    gone = sorted(set(best.ravel().tolist()))
    index = update_index(tmp_path / "index", "delete", ids=[f"d{row}" for row in gone])
    tuned = tune_index(tmp_path / "index", queries=queries, recall=0.9)
    opened: Any = Index.load(tmp_path / "index", search={"tuned": True})
    assert [segment.search_values for segment in opened.segments] == [tuned.search, tuned.search]
    assert opened.search_values == tuned.search, "a run records what was searched with, not that it was tuned"
    assert tuned.fingerprint == index.fingerprint
    left = QUERIES @ DOCUMENTS.T
    left[:, gone] = -np.inf
    wanted = np.argsort(-left, axis=1)[:, :10]
    rows = opened.search(QUERIES, 10)[1]
    counted = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), wanted.tolist(), strict=True)])
    assert tuned.recall == pytest.approx(counted, abs=1e-6)


def test_a_document_that_was_added_again_counts_with_its_last_vector(
    tmp_path: Path, build: Build, embed: Embed, queries: Vectors
) -> None:
    """Documents d0 to d9 get the negative of their vectors: they are no query's best any more."""
    build("IVF16,Flat")
    update_index(tmp_path / "index", "delete", ids=[f"d{row}" for row in range(10)])
    again = embed(-DOCUMENTS[:10], "cosine", name="again")
    update_index(tmp_path / "index", "add", vectors=again.path)
    tuned = tune_index(tmp_path / "index", queries=queries, recall=1.0)
    assert tuned.search["nprobe"] == 16 and tuned.recall == 1.0
