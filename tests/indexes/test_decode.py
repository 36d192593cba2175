"""What `decode_index` writes: vectors whose inner products with queries are the scores of the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_distill_vq import make_world

from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.decode import decode_index
from retrieval_kd.indexes.update import update_index

Embed = Callable[..., Vectors]
WORLD = make_world(documents=300, queries=60)


@pytest.fixture
def build(tmp_path: Path, embed: Embed) -> Callable[..., Index]:
    """A function that builds an index of the world's documents, twice as long as unit vectors."""

    def make(factory: str, *, similarity: str = "dot", shards: int = 1, **keys: Any) -> Index:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"kind": "faiss", "factory": factory, **keys}))
        vectors = embed(2 * WORLD.documents, similarity=similarity)
        return build_index(recipe, vectors=vectors, shards=shards, out=tmp_path / "index")

    return make


@pytest.mark.parametrize(
    ("factory", "keys"),
    [
        ("Flat", {}),
        ("SQ8", {}),
        ("OPQ4,PQ4x4", {"similarity": "cosine"}),
        ("OPQ4,IVF4,PQ4x4", {"search": {"nprobe": 4}, "shards": 2}),
        ("RQ4x4", {"similarity": "cosine"}),
        ("IVF4,Flat", {"search": {"nprobe": 4}, "shards": 3}),
        ("RR8,PQ4x4", {}),
        ("HNSW8", {"search": {"ef_search": 200}}),
    ],
)
def test_scores_are_inner_products_with_decoded_documents(
    factory: str, keys: dict[str, Any], build: Callable[..., Index], tmp_path: Path
) -> None:
    index = build(factory, **keys)
    vectors = decode_index(tmp_path / "index", tmp_path / "decoded")
    queries = 3 * WORLD.unseen
    scores, rows = index.search(queries, 10)
    asked = WORLD.unseen if keys.get("similarity") == "cosine" else queries
    expected = np.take_along_axis(asked @ vectors.matrix.T, rows, axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert vectors.ids == [f"d{i}" for i in range(300)]
    assert (vectors.similarity, vectors.decoded, vectors.of, vectors.problems()) == ("dot", True, "documents", [])
    source = Vectors.load(tmp_path / "vectors")
    assert vectors.model_ref.fingerprint == source.model_ref.fingerprint and not source.decoded
    assert vectors.manifest.inputs["collection"]["fingerprint"] == "c" * 64
    assert vectors.manifest.inputs["index"]["fingerprint"] == index.fingerprint


@pytest.mark.parametrize("factory", ["PQ4x4fs", "IVF4,PQ4x4fs", "OPQ4,IVF4,PQ4x4fs"])
def test_fast_scan_rounds_scores_of_what_is_decoded(factory: str, build: Callable[..., Index], tmp_path: Path) -> None:
    """To 255 steps of a table's range, of the 4 tables that are added: at most 4 halves of 12 / 255."""
    index = build(factory, **({"search": {"nprobe": 4}} if "IVF" in factory else {}))
    decoded = decode_index(index, tmp_path / "decoded").matrix
    scores, rows = index.search(3 * WORLD.unseen, 10)
    expected = np.take_along_axis(3 * WORLD.unseen @ decoded.T, rows, axis=1)
    np.testing.assert_allclose(scores, expected, atol=4 * 12 / 255 / 2)


def test_a_map_of_queries_is_in_the_decoded_documents(embed: Embed, tmp_path: Path) -> None:
    """A learned map that is no rotation: queries go through it, and decoded documents through its transpose."""
    keys = {"epochs": 1, "learning_rate": 0.003, "temperature": 0.2, "query_learning_rate": 0.003}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"kind": "distill-vq", "factory": "RQ4x4", "training": keys}))
    index = build_index(recipe, vectors=embed(WORLD.documents), out=tmp_path / "index")
    assert index.manifest.details["shipped"] == "distilled"
    vectors = decode_index(index, tmp_path / "decoded")
    scores, rows = index.search(WORLD.unseen, 10)
    expected = np.take_along_axis(WORLD.unseen @ vectors.matrix.T, rows, axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "keys", "message"),
    [
        ("RaBitQ", {}, "scores of factory 'RaBitQ' are no inner products"),
        ("PCA8,Flat", {}, "are no inner products"),
        ("PQ4x4,RFlat", {}, "are no inner products"),
        ("PQ4x4", {"rerank": {"store": "int8"}}, "its scores are not those of its codes"),
    ],
)
def test_indexes_whose_scores_are_others_are_refused(
    factory: str, keys: dict[str, Any], message: str, build: Callable[..., Index], tmp_path: Path
) -> None:
    index = build(factory, **keys)
    with pytest.raises(UsageError, match=message):
        decode_index(index, tmp_path / "decoded")


def test_text_indexes_and_deleted_documents_are_refused(
    build: Callable[..., Index], collect: Callable[..., Any], tmp_path: Path
) -> None:
    words = build_index("bm25", collection=collect(["alko", "beko"]), out=tmp_path / "bm25")
    with pytest.raises(UsageError, match="only dense indexes of FAISS are decoded"):
        decode_index(words, tmp_path / "decoded")
    build("Flat")
    update_index(tmp_path / "index", "delete", ids=["d3"])
    with pytest.raises(UsageError, match="has deleted documents; first: retrieval-kd update INDEX compact"):
        decode_index(tmp_path / "index", tmp_path / "decoded")
