"""FAISS indexes against brute force in float64, stock FAISS, and the files they write."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import yaml

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, InputError, OutputExistsError, RecipeError, UsageError
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index, estimate_index

Embed = Callable[..., Vectors]


def random_matrix(number: int, dimension: int = 16, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, dimension)).astype(np.float32)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Index]:
    """A function that builds a faiss index of vectors from the recipe's keys."""

    def make(vectors: Vectors | Path, factory: str, name: str = "index", **keys: Any) -> Index:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"kind": "faiss", "factory": factory, **keys}))
        return build_index(recipe, vectors=vectors, out=tmp_path / name)

    return make


def brute_force(matrix: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
    """Scores and ids of the best k by float64 inner products rounded to float32, ties by id descending."""
    scores = (queries.astype(np.float64) @ matrix.astype(np.float64).T).astype(np.float32)
    ids = [
        sorted(range(len(matrix)), key=lambda row: (float(line[row]), f"d{row}"), reverse=True)[:k] for line in scores
    ]
    best = np.stack([line[rows] for line, rows in zip(scores, ids, strict=True)])
    return best, [[f"d{row}" for row in rows] for rows in ids]


@pytest.mark.parametrize("queries", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 7, 100, 300])
def test_flat_equals_brute_force_with_ties_at_every_boundary(
    queries: int, k: int, embed: Embed, build: Callable[..., Index]
) -> None:
    """75 distinct vectors, four copies each in shuffled rows; batches of 64 take FAISS's other code path."""
    matrix = np.repeat(random_matrix(75, 50), 4, axis=0)
    np.random.default_rng(0).shuffle(matrix)
    index = build(embed(matrix), "Flat")
    asked = random_matrix(queries, 50, seed=9)
    scores, rows = index.search(asked, k)
    expected_scores, expected_ids = brute_force(matrix, asked, k)
    assert [index.ids_of(line) for line in rows] == expected_ids
    np.testing.assert_array_equal(scores, expected_scores)


def test_a_tie_larger_than_the_first_fetch(embed: Embed, build: Callable[..., Index]) -> None:
    index = build(embed(np.ones((500, 8), dtype=np.float32)), "Flat")
    scores, rows = index.search(np.ones((2, 8), dtype=np.float32), 3)
    assert index.ids_of(rows[1]) == ["d99", "d98", "d97"]
    assert scores.tolist() == [[8.0] * 3] * 2


def test_cosine_normalises_documents_and_queries(embed: Embed, build: Callable[..., Index]) -> None:
    """cos((3,4),(6,8)) = 1, cos((3,4),(4,3)) = 24/25, cos((3,4),(0,5)) = 4/5, cos((3,4),(0,0)) = 0."""
    matrix = np.array([[6, 8], [4, 3], [0, 5], [0, 0]], dtype=np.float32)
    query = np.array([[3, 4]], dtype=np.float32)
    by_vectors = build(embed(matrix, "cosine"), "Flat", "a")
    np.testing.assert_allclose(by_vectors.search(query, 4)[0], [[1.0, 0.96, 0.8, 0.0]], rtol=1e-6)
    assert by_vectors.manifest.details["metric"] == "cosine"
    assert by_vectors.manifest.details["zero_vectors"] == 1
    dot = build(embed(matrix, "dot", "dot"), "Flat", "b")
    assert dot.search(query, 4)[0].tolist() == [[50.0, 24.0, 20.0, 0.0]]
    forced = build(embed(matrix, "dot", "dot"), "Flat", "c", metric="cosine")
    np.testing.assert_array_equal(forced.search(query, 4)[0], by_vectors.search(query, 4)[0])
    assert query.tolist() == [[3, 4]]


def test_stock_faiss_reads_and_searches_the_file(tmp_path: Path, embed: Embed, build: Callable[..., Index]) -> None:
    index = build(embed(random_matrix(300)), "IVF4,Flat", search={"nprobe": 4})
    stock = faiss.read_index(str(tmp_path / "index" / "gen-000001" / "index.faiss"))
    faiss.ParameterSpace().set_index_parameter(stock, "nprobe", 4)
    scores, rows = stock.search(random_matrix(5, seed=1), 10)
    ours = index.search(random_matrix(5, seed=1), 10)
    np.testing.assert_array_equal(ours[0], scores)
    np.testing.assert_array_equal(ours[1], rows)


def test_search_parameters_change_without_a_build(tmp_path: Path, embed: Embed, build: Callable[..., Index]) -> None:
    matrix = random_matrix(400)
    narrow = build(embed(matrix), "IVF16,Flat", search={"nprobe": 1})
    wide = Index.load(tmp_path / "index", search={"nprobe": 16})
    assert (narrow.search_values, wide.search_values) == ({"nprobe": 1}, {"nprobe": 16})
    queries = random_matrix(20, seed=2)
    exact = brute_force(matrix, queries, 10)[1]
    assert [wide.ids_of(line) for line in wide.search(queries, 10)[1]] == exact
    assert (narrow.search(queries, 60)[1] == -1).any()
    with pytest.raises(RecipeError, match=r"no search parameter 'ef_search' \(it has: nprobe\)"):
        Index.load(tmp_path / "index", search={"ef_search": 3})
    with pytest.raises(RecipeError, match="did you mean 'nprobe'"):
        Index.load(tmp_path / "index", search={"nprob": 3})
    with pytest.raises(RecipeError, match="greater than or equal to 1"):
        Index.load(tmp_path / "index", search={"nprobe": 0})


@pytest.mark.parametrize(
    ("factory", "keys", "message"),
    [
        ("Flatt", {}, "factory 'Flatt' makes no index of 16-dimensional vectors: could not parse"),
        ("PQ7", {}, "16-dimensional vectors: The dimension of the vector .d. should be a multiple of the number of"),
        ("LSH", {}, "factory 'LSH'"),
        ("PCA20,Flat", {}, "'PCA20,Flat': 16 dimensions have no 20 principal components"),
        ("HNSW8_PQ4", {}, "has no inner product"),
        ("IDMap,Flat", {}, "leave out IDMap"),
        ("Flat", {"search": {"nprobe": 4}}, r"'Flat' has no search parameter 'nprobe' \(it has: none\)"),
        ("Flat", {"ef_construction": 4}, "only HNSW graphs"),
        ("Flat", {"metric": "l2"}, "metric"),
    ],
)
def test_a_bad_recipe_is_refused_before_the_build(
    factory: str, keys: dict[str, Any], message: str, tmp_path: Path, embed: Embed, build: Callable[..., Index]
) -> None:
    with pytest.raises(RecipeError, match=message):
        build(embed(random_matrix(20)), factory, **keys)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("factory", "needed"),
    [
        ("IVF64,Flat", 64),
        ("PQ4x8", 256),
        ("OPQ4,IVF4,PQ4x6", 64),
        ("IVF30,PQ4x4fs,RFlat", 30),
        ("RQ2x6", 64),
        ("IVF4,LSQ2x6", 64),
        ("PRQ2x2x6", 64),
    ],
)
def test_too_few_vectors_to_train(factory: str, needed: int, embed: Embed, build: Callable[..., Index]) -> None:
    with pytest.raises(
        InputError, match=f"needs at least {needed} vectors to train .* gets 29 of 29; choose a smaller"
    ):
        build(embed(random_matrix(29)), factory)


@pytest.mark.parametrize(
    ("factory", "needed"),
    [("PCAR12,Flat", 12), ("ITQ12,SQ8", 12), ("RQ2x2", 16), ("IVF2,PRQ2x2x2", 8), ("OPQ4,PQ4x2", 16)],
)
def test_fewer_vectors_than_a_transform_has_dimensions(
    factory: str, needed: int, embed: Embed, build: Callable[..., Index]
) -> None:
    """Of 16 dimensions: those that are kept, all for RQ and OPQ, half of them in each half of PRQ."""
    with pytest.raises(InputError, match=f"needs at least {needed} vectors to train .* gets {needed - 1} of"):
        build(embed(random_matrix(needed - 1), name="few"), factory, "few-index")
    assert len(build(embed(random_matrix(needed)), factory)) == needed


def test_too_small_a_training_sample(embed: Embed, build: Callable[..., Index]) -> None:
    with pytest.raises(InputError, match="gets 10 of 50; raise train_sample"):
        build(embed(random_matrix(50)), "IVF16,Flat", train_sample=10)


def test_the_training_sample_and_seed_change_the_index(embed: Embed, build: Callable[..., Index]) -> None:
    vectors = embed(random_matrix(300))
    keys = {"train_sample": 100}
    one = build(vectors, "IVF4,Flat", "one", seed=1, **keys)
    same = build(vectors, "IVF4,Flat", "same", seed=1, **keys)
    other = build(vectors, "IVF4,Flat", "other", seed=2, **keys)
    assert one.fingerprint == same.fingerprint
    assert one.manifest.files["index.faiss"] != other.manifest.files["index.faiss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float, embed: Embed, build: Callable[..., Index]) -> None:
    matrix = random_matrix(20)
    matrix[[4, 7], 3] = value
    with pytest.raises(InputError, match=r"2 vectors have NaN or infinite values \(documents 'd4', 'd7'"):
        build(embed(matrix), "Flat")
    index = build(embed(random_matrix(20), name="good"), "Flat", "good-index")
    with pytest.raises(UsageError, match="1 query vectors have NaN"):
        index.search(np.full((1, 16), value, dtype=np.float32), 1)


def test_queries_of_another_dimension(embed: Embed, build: Callable[..., Index]) -> None:
    index = build(embed(random_matrix(20)), "Flat")
    with pytest.raises(UsageError, match=r"shape \[2, 8\], this index takes \[queries, 16\]"):
        index.search(random_matrix(2, 8), 1)


def test_vectors_that_are_no_documents_of_the_collection(
    tmp_path: Path, embed: Embed, build: Callable[..., Index], collect: Callable[..., Any]
) -> None:
    with pytest.raises(ArtifactError, match="vectors of queries"):
        build(embed(random_matrix(5), of="queries", split="test"), "Flat")
    collection = collect(["one", "two"])
    with pytest.raises(ArtifactError, match="made from another collection"):
        build_index("flat", vectors=embed(random_matrix(2), name="v"), collection=collection, out=tmp_path / "index")
    own = embed(random_matrix(2), name="own", collection=collection.ref())
    index = build_index("flat", vectors=own, collection=collection, out=tmp_path / "index")
    assert index.locate("collection") == tmp_path / "collection"
    assert index.locate("vectors") == tmp_path / "own"
    assert index.manifest.inputs["model"] == {"fingerprint": "f" * 64, "name": "nobody/model"}
    assert build_index("flat", vectors=own, out=tmp_path / "index").fingerprint == index.fingerprint


def test_wrong_combinations_of_arguments(tmp_path: Path) -> None:
    for given in ({}, {"collection": "x"}, {"model": "x"}, {"model": "x", "vectors": "y"}):
        with pytest.raises(UsageError, match="needs vectors, or a model and a collection"):
            build_index("flat", out=tmp_path / "index", **given)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="needs vectors, or a model and a collection"):
            estimate_index("flat", **given)  # type: ignore[arg-type]


def test_another_recipe_at_the_same_place(embed: Embed, build: Callable[..., Index]) -> None:
    vectors = embed(random_matrix(20))
    build(vectors, "Flat")
    with pytest.raises(OutputExistsError, match=r"another recipe \(factory differ\)"):
        build(vectors, "SQ8")


@pytest.mark.parametrize(
    "factory",
    [
        *("Flat", "SQ8", "PQ8x8", "HNSW16", "IVF16,PQ8x8", "PCAR16,IVF16,Flat", "PQ8x4,RFlat", "IVF8,PQ16x4fs"),
        *("RQ4x4", "PCA16,PQ16x4", "ITQ16,SQ8"),
    ],
)
def test_estimated_bytes_are_those_of_the_file(
    factory: str, tmp_path: Path, embed: Embed, build: Callable[..., Index]
) -> None:
    vectors = embed(random_matrix(3000, 32))
    index = build(vectors, factory, threads=1)
    estimate = estimate_index(tmp_path / "index.yaml", vectors=vectors)
    assert (estimate["documents"], estimate["dimension"]) == (3000, 32)
    assert estimate["bytes"] == pytest.approx(index.manifest.files["index.faiss"]["bytes"], rel=0.05)


def test_bytes_per_vector_by_hand() -> None:
    """384 dimensions: Flat 4·384; PQ 32 codes of a byte; IVF adds the 8-byte number of the vector."""
    expected = {"Flat": 1536, "PQ32x8": 32, "IVF256,PQ32x8": 40, "OPQ32,PQ32x8": 32, "PQ32x8,RFlat": 1568, "SQ8": 384}
    assert {name: structure.bytes_per_vector(structure.new_index(name, 384)) for name in expected} == expected


def test_few_training_vectors_are_said(
    embed: Embed, build: Callable[..., Index], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        build(embed(random_matrix(100)), "IVF4,Flat")
    assert "training on 100 vectors; 156 are advised for 'IVF4,Flat'" in caplog.text


@pytest.mark.parametrize("name", ["flat", "hnsw", "ivfpq", "pq32", "ivfpq-rerank", "fastscan"])
def test_shipped_recipes_build_and_search(name: str, tmp_path: Path, embed: Embed) -> None:
    matrix = random_matrix(300, 64)
    index = build_index(name, vectors=embed(matrix, "cosine"), out=tmp_path / "index", overrides=["threads=1"])
    _, rows = index.search(matrix[:20], 5)
    assert sum(row in line for row, line in enumerate(rows.tolist())) >= 19


def test_a_changed_file_is_found(tmp_path: Path, embed: Embed, build: Callable[..., Index]) -> None:
    build(embed(random_matrix(20)), "Flat")
    file = tmp_path / "index" / "gen-000001" / "index.faiss"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"index\.faiss differs from its checksum"):
        Index.load(tmp_path / "index")


def test_an_index_without_its_collection_keeps_where_it_was(
    tmp_path: Path, embed: Embed, build: Callable[..., Index]
) -> None:
    gone = InputRef("c" * 64, path=tmp_path / "gone")
    index = build(embed(random_matrix(5), collection=gone), "Flat")
    assert index.manifest.inputs["collection"]["absolute"] == str(tmp_path / "gone")
