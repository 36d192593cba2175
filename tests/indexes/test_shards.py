"""Shards: which documents they have, what they learn from, how they merge, and what a build may be given."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_indexes import MODEL, all_scores, best, hits, sparse_documents, write_documents
from tiny_scores import make_scores

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, InputError, OutputExistsError, UsageError
from retrieval_kd.indexes import sparse_exact
from retrieval_kd.indexes.base import Index, Source
from retrieval_kd.indexes.bm25 import BM25Index
from retrieval_kd.indexes.build import build_index, estimate_index
from retrieval_kd.indexes.hits import merged
from retrieval_kd.indexes.segments import Segments, shard_bounds
from retrieval_kd.indexes.sparse_exact import SparseExactIndex


@pytest.fixture
def vectors(tmp_path: Path) -> Vectors:
    return write_documents(tmp_path / "vectors", sparse_documents(10), [f"d{row}" for row in range(10)])


def test_ranges_are_contiguous_and_as_equal_as_can_be() -> None:
    assert shard_bounds(10, 4) == [0, 2, 5, 7, 10]
    assert shard_bounds(3, 3) == [0, 1, 2, 3]


def test_merging_by_hand() -> None:
    """k = 3; rows 2 and 5 tie and 5 has the greater id (rank 0); a missing hit comes after all."""
    rank = np.array([5, 4, 3, 2, 1, 0])
    inf = np.inf
    scores, rows = merged(
        np.array([[3.0, 2.0, 1.0], [-inf, -inf, -inf]], dtype=np.float32),
        np.array([[0, 2, 1], [-1, -1, -1]]),
        np.array([[2.0, 0.5, -inf], [-1.0, -inf, -inf]], dtype=np.float32),
        np.array([[5, 3, -1], [4, -1, -1]]),
        rank,
    )
    assert rows.tolist() == [[0, 5, 2], [4, -1, -1]]
    assert scores.tolist() == [[3.0, 2.0, 2.0], [-1.0, -inf, -inf]]


def test_more_shards_than_documents(vectors: Vectors, tmp_path: Path) -> None:
    for number in (11, 400):
        with pytest.raises(UsageError, match=f"{number} shards of 10 documents"):
            build_index("sparse-exact", vectors=vectors, shards=number, out=tmp_path / "index")
    ten = build_index("sparse-exact", vectors=vectors, shards=10, out=tmp_path / "index")
    queries = sparse_documents(3, seed=8)
    expected = best(all_scores(queries, sparse_documents(10), "dot"), [f"d{row}" for row in range(10)], 7)
    assert hits(ten, queries, 7) == expected
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: hits(ten, queries, 7), range(8))) == [expected] * 8


def test_shards_are_part_of_what_an_index_is(vectors: Vectors, tmp_path: Path) -> None:
    two = build_index("sparse-exact", vectors=vectors, shards=2, out=tmp_path / "index")
    assert isinstance(two, Segments) and two.manifest.recipe["shards"] == 2
    assert build_index("sparse-exact", vectors=vectors, shards=2, out=tmp_path / "index").ref() == two.ref()
    with pytest.raises(OutputExistsError, match=r"another recipe \(shards differ\)"):
        build_index("sparse-exact", vectors=vectors, out=tmp_path / "index")
    again = build_index("sparse-exact", vectors=vectors, shards=2, out=tmp_path / "again")
    assert again.fingerprint == two.fingerprint  # the segments' manifests have times
    assert two.manifest.counts == build_index("sparse-exact", vectors=vectors, out=tmp_path / "one").manifest.counts


def test_the_first_shard_trains_on_all_vectors_and_the_others_grow_from_it(tmp_path: Path) -> None:
    """Documents come in two clusters far apart; one shard's own training would place centroids in one of them."""
    import faiss

    rng = np.random.default_rng(0)
    matrix = np.concatenate([rng.normal(-5, 0.1, (100, 4)), rng.normal(5, 0.1, (100, 4))]).astype(np.float32)
    vectors = write_documents(tmp_path / "vectors", matrix, [f"d{row}" for row in range(200)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"kind": "faiss", "factory": "IVF2,Flat", "search": {"nprobe": 1}}))
    index = build_index(recipe, vectors=vectors, shards=2, out=tmp_path / "index")
    assert isinstance(index, Segments)
    pieces = [faiss.read_index(str(segment.path / "index.faiss")) for segment in index.segments]
    centroids = [piece.quantizer.reconstruct_n(0, 2) for piece in pieces]
    np.testing.assert_array_equal(centroids[0], centroids[1])
    assert sorted(np.sign(centroids[0][:, 0]).tolist()) == [-1.0, 1.0]


def test_a_build_is_given_what_the_engine_learns_from(
    vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Source] = []

    def build(recipe: Any, source: Source, draft: Any) -> None:
        given.append(source)
        plain(recipe, source, draft)

    plain = SparseExactIndex.build
    documents = InputRef("c" * 64)
    about: dict[str, Any] = {"of": "queries", "split": "train", "similarity": "dot", "collection": documents}
    words = [f"w{term}" for term in range(12)]
    queries = write_vectors(
        tmp_path / "q", sparse_documents(3, seed=8), ["q0", "q1", "q2"], model=MODEL, vocabulary=words, **about
    )
    files = [
        make_scores(tmp_path / f"s{i}", [("q0", ["d1"], [0.5], None)], inputs={"collection": documents}) for i in "01"
    ]
    how: dict[str, Any] = {"vectors": vectors, "queries": queries, "scores": files}
    with pytest.raises(UsageError, match="a sparse-exact index learns nothing; leave out --queries and --scores"):
        build_index("sparse-exact", **how, out=tmp_path / "index")
    monkeypatch.setattr(sparse_exact.SparseExactIndex, "learns_from", frozenset({"queries", "scores"}))
    monkeypatch.setattr(sparse_exact.SparseExactIndex, "build", build)
    index = build_index("sparse-exact", **how, out=tmp_path / "index")
    assert set(index.manifest.inputs) == {"collection", "vectors", "model", "queries", "scores", "scores_2"}
    assert given[0].queries is queries and [file.path for file in given[0].scores] == files
    assert estimate_index("sparse-exact", **how, shards=2)["documents"] == 10
    other = write_vectors(
        tmp_path / "other", sparse_documents(1), ["q"], model=InputRef("a" * 64), vocabulary=words, **about
    )
    foreign = make_scores(
        tmp_path / "foreign", [("q0", ["d1"], [0.5], None)], inputs={"collection": InputRef("b" * 64)}
    )
    for message, changed in (
        ("these queries were encoded by another model", {"queries": other}),
        ("these are vectors of documents; encode a split", {"queries": vectors}),
        ("these scores are of another collection", {"scores": [foreign]}),
    ):
        with pytest.raises(ArtifactError, match=message):
            build_index("sparse-exact", **{**how, **changed}, out=tmp_path / "wrong")


@pytest.mark.parametrize(
    ("kind", "idf", "average"),
    [("bm25", math.log(1 + 3.5 / 2.5), 5 / 5), ("lucene", math.log(1 + 1.5 / 2.5), 5 / 3)],
)
def test_shards_of_texts_have_the_weights_of_the_whole(
    kind: str, idf: float, average: float, collect: Callable[..., Collection], tmp_path: Path
) -> None:
    """df(cat) = 2 and 5 terms of 5 documents, of which Lucene counts the 3 with a term; the second shard has none."""
    collection = collect(["cat cat", "bird", "the", "?", "cat dog"])
    index = build_index(kind, collection=collection, shards=3, out=tmp_path / "index")
    assert [len(segment) for segment in index.segments] == [1, 2, 2]  # type: ignore[attr-defined]
    found = hits(index, ["cat"], 5)[0]
    assert [doc_id for doc_id, _ in found] == ["d0", "d4"]
    norm = 0.9 * (0.6 + 0.4 * 2 / average)
    np.testing.assert_allclose([score for _, score in found], [idf * 2 / (2 + norm), idf / (1 + norm)], rtol=1e-6)
    assert index.manifest.counts["documents_without_terms"] == 2 and index.problems() == []


@pytest.mark.parametrize("kind", ["bm25", "lucene"])
def test_shards_of_texts_without_any_term(kind: str, collect: Callable[..., Collection], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 3 documents has a term to index"):
        build_index(kind, collection=collect(["the", "?", "of"]), shards=2, out=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_killed_build_of_texts_goes_on_after_the_last_whole_shard(
    collect: Callable[..., Collection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = collect(["cat", "cat dog", "bird", "fish", "cat fish"])
    whole = build_index("bm25", collection=collection, shards=3, out=tmp_path / "whole")
    grow, read = BM25Index.grow, []

    def killed(self: BM25Index, source: Source, draft: Any) -> None:
        read.append(list(source.ids.to_pylist()))
        if len(read) == 2:
            raise KeyboardInterrupt
        grow(self, source, draft)

    monkeypatch.setattr(BM25Index, "grow", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index("bm25", collection=collection, shards=3, out=tmp_path / "index")
    again = build_index("bm25", collection=collection, shards=3, out=tmp_path / "index")
    assert read == [["d1", "d2"], ["d3", "d4"], ["d3", "d4"]]
    assert again.fingerprint == whole.fingerprint


def test_what_a_kill_leaves_in_a_whole_shard_is_no_part_of_the_index(
    vectors: Vectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard is published, and its lock not yet gone."""
    whole = build_index("sparse-exact", vectors=vectors, shards=2, out=tmp_path / "whole")
    plain = SparseExactIndex.grow

    def killed(self: Any, source: Source, draft: Any) -> None:
        (self.path / ".lock").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(SparseExactIndex, "grow", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index("sparse-exact", vectors=vectors, shards=2, out=tmp_path / "index")
    monkeypatch.setattr(SparseExactIndex, "grow", plain)
    again = build_index("sparse-exact", vectors=vectors, shards=2, out=tmp_path / "index")
    assert again.fingerprint == whole.fingerprint and not list(again.path.rglob(".lock"))


@pytest.mark.parametrize("kind", ["bm25", "lucene"])
def test_threads_that_search_shards_of_texts_at_once(
    kind: str, collect: Callable[..., Collection], synthetic_texts: Callable[..., list[str]], tmp_path: Path
) -> None:
    index = build_index(kind, collection=collect(synthetic_texts(60)), shards=4, out=tmp_path / "index")
    queries = synthetic_texts(40, seed=11)
    expected, switch = hits(index, queries, 10), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _: hits(index, queries, 10), range(8))) == [expected] * 8
    finally:
        sys.setswitchinterval(switch)


@pytest.mark.parametrize("kind", ["bm25", "lucene"])
def test_a_cut_inside_a_tie_over_shards_of_texts(kind: str, collect: Callable[..., Collection], tmp_path: Path) -> None:
    """All 60 documents tie, more than Lucene is asked for: the greatest ids are in the first shard and in the last."""
    index = build_index(kind, collection=collect(["same text"] * 60), shards=3, out=tmp_path / "index")
    ids = sorted((f"d{row}" for row in range(60)), reverse=True)
    assert [doc_id for doc_id, _ in hits(index, ["same"], 7)[0]] == ids[:7]
    odd = np.arange(60) % 2 == 1
    scores, rows = index.search(["same"], 40, odd)
    assert index.ids_of(rows[0, :30]) == [doc_id for doc_id in ids if int(doc_id[1:]) % 2]
    assert (rows[0, 30:] == -1).all() and np.isneginf(scores[0, 30:]).all()


def test_a_generation_without_its_segment_is_damaged(vectors: Vectors, tmp_path: Path) -> None:
    index = build_index("sparse-exact", vectors=vectors, shards=2, out=tmp_path / "index")
    (index.path / "segment-000002" / "documents.npy").unlink()
    with pytest.raises(ArtifactError, match=r"segment-000002/documents\.npy is missing"):
        Index.load(tmp_path / "index")
