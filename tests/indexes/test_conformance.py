"""What every registered kind of index promises, run over all of them with one class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.sparse import csr_array
from tiny import unit

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.registry import INDEXES

DOCUMENTS, DIMENSION = 400, 32


@dataclass(frozen=True)
class Case:
    """A recipe and the recall@10 of its own exact scores that it must reach on the random documents."""

    recipe: dict[str, Any]
    recall: float

    @property
    def name(self) -> str:
        return "-".join(str(value) for key, value in self.recipe.items() if key in ("kind", "factory", "metric"))


CASES = [
    Case({"kind": "bm25"}, 1.0),
    Case({"kind": "sparse-exact"}, 1.0),
    Case({"kind": "maxsim-exact"}, 1.0),
    Case({"kind": "faiss", "factory": "Flat"}, 1.0),
    Case({"kind": "faiss", "factory": "Flat", "metric": "cosine"}, 1.0),
    Case({"kind": "faiss", "factory": "HNSW16", "search": {"ef_search": 64}}, 0.95),
    Case({"kind": "faiss", "factory": "IVF8,Flat", "search": {"nprobe": 8}}, 1.0),
    Case({"kind": "faiss", "factory": "IVF8,Flat", "search": {"nprobe": 3}}, 0.6),
    Case({"kind": "faiss", "factory": "SQ8"}, 0.95),
    Case({"kind": "faiss", "factory": "PQ16x4"}, 0.5),
    Case({"kind": "faiss", "factory": "PCAR32,IVF4,PQ8x4,RFlat", "search": {"nprobe": 4, "k_factor": 8}}, 0.9),
]


def test_every_registered_kind_is_a_case() -> None:
    assert {case.recipe["kind"] for case in CASES} == set(INDEXES)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def build(
    case: Case,
    tmp_path: Path,
    collect: Callable[..., Collection],
    embed: Callable[..., Vectors],
    synthetic_texts: Callable[..., list[str]],
) -> Callable[..., tuple[Index, Any]]:
    """A function that builds the case's index over documents and gives it with queries of its kind."""

    def make(number: int = DOCUMENTS, copies: Sequence[int] = (), factory: str | None = None) -> tuple[Index, Any]:
        recipe = dict(case.recipe)
        if factory and recipe["kind"] == "faiss":
            recipe = {"kind": "faiss", "factory": factory}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        rng = np.random.default_rng(3)
        if case.recipe["kind"] == "bm25":
            texts = synthetic_texts(number)
            for copy in copies:
                texts[copy] = texts[0]
            index = build_index(path, collection=collect(texts), out=tmp_path / "index")
            return index, [texts[0], *synthetic_texts(9, seed=8)]
        if case.recipe["kind"] == "sparse-exact":
            weights = rng.random((number + 9, DIMENSION)).astype(np.float32)
            weights[:, 1:] *= rng.random((number + 9, DIMENSION - 1)) < 0.2  # all have term 0: each is every one's hit
            weights[list(copies)] = weights[0]
            vocabulary = [f"w{term}" for term in range(DIMENSION)]
            vectors = embed(csr_array(weights[:number]), "cosine", vocabulary=vocabulary)
            asked = csr_array(np.concatenate([weights[:1], weights[number:]]))
            return build_index(path, vectors=vectors, out=tmp_path / "index"), asked
        if case.recipe["kind"] == "maxsim-exact":
            tokens = [unit(rng.standard_normal((rng.integers(1, 9), 8))).astype(np.float32) for _ in range(number + 9)]
            for copy in copies:
                tokens[copy] = tokens[0]
            index = build_index(path, vectors=embed(tokens[:number], "maxsim"), out=tmp_path / "index")
            return index, [tokens[0], *tokens[number:]]
        matrix = rng.standard_normal((number, DIMENSION)).astype(np.float32)
        matrix[list(copies)] = matrix[0]
        index = build_index(path, vectors=embed(matrix), out=tmp_path / "index")
        return index, np.concatenate([matrix[:1], rng.standard_normal((9, DIMENSION)).astype(np.float32)])

    return make


class TestConformance:
    """One promise a test; approximate indexes state their recall, exact ones equal their own full ranking."""

    def test_top_10_against_the_full_ranking(self, case: Case, build: Callable[..., Any], tmp_path: Path) -> None:
        index, queries = build()
        _, rows = index.search(queries, 10)
        if index.takes == "text":
            _, reference = index.search(queries, len(index))
        elif index.takes == "multi-vector":
            made = Vectors.load(tmp_path / "vectors").rows(0, len(index))
            scores = [[(query.astype(float) @ d.T).max(axis=1).sum() for d in made] for query in queries]
            reference = np.argsort(-np.array(scores), axis=1)
        elif index.takes == "sparse":
            made = unit(Vectors.load(tmp_path / "vectors").rows(0, len(index)).toarray().astype(float))
            reference = np.argsort(-(queries.toarray() @ made.T), axis=1)
        else:
            matrix = np.load(tmp_path / "vectors" / "vectors.npy").astype(np.float64)
            if case.recipe.get("metric") == "cosine":
                matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
            reference = np.argsort(-(queries.astype(np.float64) @ matrix.T), axis=1)
        recall = np.mean([len(set(got) & set(want[:10])) / 10 for got, want in zip(rows, reference, strict=True)])
        assert recall >= case.recall
        if index.exact:
            np.testing.assert_array_equal(rows, reference[:, :10])

    def test_shapes_types_and_order(self, build: Callable[..., Any]) -> None:
        index, queries = build()
        scores, rows = index.search(queries, 25)
        assert (scores.shape, scores.dtype, rows.shape, rows.dtype) == ((10, 25), np.float32, (10, 25), np.int64)
        for query_scores, query_rows in zip(scores, rows, strict=True):
            hit = query_rows >= 0
            pairs = list(zip(query_scores[hit].tolist(), index.ids_of(query_rows[hit]), strict=True))
            assert pairs == sorted(pairs, reverse=True)
            assert np.isneginf(query_scores[~hit]).all()

    def test_more_hits_than_documents(self, build: Callable[..., Any]) -> None:
        index, queries = build()
        scores, rows = index.search(queries, DOCUMENTS + 7)
        assert (rows[:, -7:] == -1).all() and np.isneginf(scores[:, -7:]).all()
        for query_rows in rows:
            found = query_rows[query_rows >= 0]
            assert len(set(found.tolist())) == len(found)

    def test_one_document(self, build: Callable[..., Any]) -> None:
        index, queries = build(1, factory="Flat")
        scores, rows = index.search(queries[:1], 3)
        assert rows.tolist() == [[0, -1, -1]]
        assert np.isfinite(scores[0, 0]) and np.isneginf(scores[0, 1:]).all()
        assert index.ids_of([0]) == ["d0"]

    def test_copies_tie_and_are_ordered_by_id_across_the_boundary(self, case: Case, build: Callable[..., Any]) -> None:
        """``d0`` and 39 copies lead; a cut inside the tie keeps the greatest ids as strings."""
        copies = list(range(60, 99))
        index, queries = build(copies=copies)
        scores, rows = index.search(queries[:1], 12)
        expected = sorted((f"d{row}" for row in [0, *copies]), reverse=True)[:12]
        if case.recipe.get("search", {}).get("nprobe", 8) >= 4 and case.recipe.get("factory") != "HNSW16":
            assert index.ids_of(rows[0]) == expected
        assert len(set(scores[0].tolist())) == 1

    def test_load_gives_the_same_hits(self, build: Callable[..., Any], tmp_path: Path) -> None:
        index, queries = build()
        again = Index.load(tmp_path / "index")
        assert again.problems() == []
        assert type(again) is type(index)
        for ours, theirs in zip(index.search(queries, 20), again.search(queries, 20), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_two_builds_give_the_same_bytes(self, build: Callable[..., Any], tmp_path: Path) -> None:
        index, _ = build()
        kind = index.takes
        given = {"collection": tmp_path / "collection"} if kind == "text" else {"vectors": tmp_path / "vectors"}
        again = build_index(tmp_path / "recipe.yaml", out=tmp_path / "again", **given)
        assert again.manifest.files == index.manifest.files
        assert again.fingerprint == index.fingerprint

    def test_two_threads_equal_one(self, build: Callable[..., Any]) -> None:
        index, queries = build()
        alone = index.search(queries, 20)
        with ThreadPoolExecutor(2) as pool:
            for scores, rows in pool.map(lambda _: index.search(queries, 20), range(20)):
                np.testing.assert_array_equal(scores, alone[0])
                np.testing.assert_array_equal(rows, alone[1])

    def test_no_queries(self, build: Callable[..., Any]) -> None:
        index, queries = build()
        scores, rows = index.search(queries[:0], 4)
        assert scores.shape == rows.shape == (0, 4)

    def test_k_must_be_positive(self, build: Callable[..., Any]) -> None:
        index, queries = build()
        with pytest.raises(UsageError, match="at least 1"):
            index.search(queries, 0)
