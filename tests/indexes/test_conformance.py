"""What every registered kind of index promises, run over all of them with one class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conformance_cases import CASES, MAKERS, Case, Made
from tiny_indexes import all_scores, best, hits, recall, write_documents

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.update import update_index
from retrieval_kd.registry import INDEXES, implementation


def test_every_registered_kind_is_a_case() -> None:
    assert {case.recipe["kind"] for case in CASES} == set(INDEXES)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def takes(case: Case) -> str:
    found: str = implementation("indexes", case.recipe["kind"]).takes
    return found


@pytest.fixture
def make(case: Case, takes: str, synthetic_texts: Callable[..., list[str]]) -> Callable[..., Made]:
    """A function that makes documents and queries of the case's kind."""
    return lambda number, copies=(): MAKERS[takes](case, number, copies, synthetic_texts)


@pytest.fixture
def build(
    case: Case, takes: str, make: Callable[..., Made], tmp_path: Path, collect: Callable[..., Collection]
) -> Callable[..., tuple[Index, Any]]:
    """A function that builds the case's index over documents and gives it with queries of its kind."""

    def build(
        number: int | None = None, copies: Sequence[int] = (), *, of: int | None = None, **how: Any
    ) -> tuple[Index, Any]:
        """Of the first ``of`` documents, where that is given."""
        number = case.documents if number is None else number
        recipe = {**case.recipe, **(dict(case.small) if number == 1 else {})}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        made = make(number, copies)
        if takes == "text":
            how["collection"] = collect(made.values[:of], "collection" if of is None else "first")
        else:
            ids = [f"d{row}" for row in range(of or number)]
            how["vectors"] = write_documents(
                tmp_path / ("vectors" if of is None else "first"), made.values[: len(ids)], ids, made.similarity
            )
        return build_index(path, **how, out=tmp_path / "index"), made.queries

    return build


@pytest.fixture
def reference(case: Case, make: Callable[..., Made]) -> Callable[..., list[Any]]:
    """A function that ranks the documents by brute force over their vectors; text indexes have tests of their own."""

    def rank(k: int, copies: Sequence[int] = ()) -> list[Any]:
        made = make(case.documents, copies)
        similarity = "cosine" if case.recipe.get("metric") == "cosine" else made.similarity
        ids = [f"d{row}" for row in range(case.documents)]
        return best(all_scores(made.queries, made.values, similarity), ids, k)

    return rank


def same(case: Case, index: Index, found: list[Any], wanted: list[Any]) -> None:
    """Asserts that hits are those of brute force, or reach the recall that the case states."""
    assert recall(found, wanted) >= case.recall
    if index.exact:
        assert [[doc_id for doc_id, _ in line] for line in found] == [[doc_id for doc_id, _ in line] for line in wanted]
        np.testing.assert_allclose(
            [score for line in found for _, score in line], [score for line in wanted for _, score in line], rtol=3e-7
        )


class TestConformance:
    """One promise a test; approximate indexes state their recall, exact ones equal their own full ranking."""

    @pytest.mark.parametrize("copies", [0, 39])
    def test_top_10_against_the_full_ranking(
        self, case: Case, copies: int, build: Callable[..., Any], reference: Callable[..., Any]
    ) -> None:
        index, queries = build(copies=range(60, 60 + copies))
        if index.takes == "text":
            assert hits(index, queries, 10) == [line[:10] for line in hits(index, queries, len(index))]
        elif case.finds_all_copies or not copies:
            same(case, index, hits(index, queries, 10), reference(10, range(60, 60 + copies)))

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
    def test_a_filter_equals_filtering_all_hits_afterwards(
        self, share: float, case: Case, build: Callable[..., Any]
    ) -> None:
        index, queries = build(copies=range(60, 99))
        allowed = np.zeros(len(index), dtype=bool)
        allowed[np.random.default_rng(2).permutation(len(index))[: round(share * len(index))]] = True
        permitted = {doc_id for doc_id, row in zip(index.ids.to_pylist(), allowed, strict=True) if row}
        everything = hits(index, queries, len(index))
        wanted = [[hit for hit in line if hit[0] in permitted][:10] for line in everything]
        found = hits(index, queries, 10, allowed)
        assert all(doc_id in permitted for line in found for doc_id, _ in line)
        assert recall(found, wanted) >= case.filtered
        if case.filtered == 1:
            assert [[i for i, _ in line] for line in found] == [[i for i, _ in line] for line in wanted]
        if index.exact:
            assert found == wanted

    def test_shards_are_searched_as_one(
        self, case: Case, takes: str, build: Callable[..., Any], reference: Callable[..., Any]
    ) -> None:
        whole, queries = build(copies=range(60, 99))
        of_whole = hits(whole, queries, 10)
        index, _ = build(shards=3, copies=range(60, 99), force=True)
        assert index.manifest.details["segments"] == [f"segment-00000{number}" for number in (1, 2, 3)]
        assert index.problems() == []
        if index.exact:
            assert hits(index, queries, 10) == of_whole
        if takes != "text" and case.finds_all_copies:
            same(case, index, hits(index, queries, 10), reference(10, range(60, 99)))
        scores, rows = index.search(queries, case.documents + 7)
        assert (rows[:, -7:] == -1).all() and np.isneginf(scores[:, -7:]).all()

    def test_an_index_that_grew_and_shrank(
        self,
        case: Case,
        takes: str,
        make: Callable[..., Made],
        build: Callable[..., Any],
        reference: Callable[..., Any],
        collect: Callable[..., Collection],
        tmp_path: Path,
    ) -> None:
        """The last hundred documents come later and d0 and d399 go: the rest of the full ranking is found."""
        first, made = case.documents - 100, make(case.documents)
        given: dict[str, Any]
        if takes == "text":
            whole, _ = build()
            everything = hits(whole, made.queries, case.documents)
            given = {"collection": collect(made.values[first : case.documents], "more", start=first)}
        else:
            everything = reference(case.documents)
            ids = [f"d{row}" for row in range(first, case.documents)]
            more = write_documents(tmp_path / "more", made.values[first : case.documents], ids, made.similarity)
            given = {"vectors": more}
        _, queries = build(of=first, force=True)
        if not implementation("indexes", case.recipe["kind"]).growable:
            with pytest.raises(UsageError, match=r"its scores depend on the whole collection; add --rebuild"):
                update_index(tmp_path / "index", "add", **given)
            given["rebuild"] = True
        update_index(tmp_path / "index", "add", **given)
        gone = {"d0", f"d{case.documents - 1}"}
        index = update_index(tmp_path / "index", "delete", ids=sorted(gone))
        assert index.problems() == [] and index.manifest.counts["documents"] == case.documents - 2
        found = hits(index, queries, 10)
        assert not gone & {doc_id for line in found for doc_id, _ in line}
        same(case, index, found, [[hit for hit in line if hit[0] not in gone][:10] for line in everything])

    def test_shapes_types_and_order(self, build: Callable[..., Any]) -> None:
        index, queries = build()
        scores, rows = index.search(queries, 25)
        assert (scores.shape, scores.dtype, rows.shape, rows.dtype) == ((10, 25), np.float32, (10, 25), np.int64)
        for query_scores, query_rows in zip(scores, rows, strict=True):
            hit = query_rows >= 0
            pairs = list(zip(query_scores[hit].tolist(), index.ids_of(query_rows[hit]), strict=True))
            assert pairs == sorted(pairs, reverse=True)
            assert np.isneginf(query_scores[~hit]).all()

    def test_more_hits_than_documents(self, case: Case, build: Callable[..., Any]) -> None:
        index, queries = build()
        scores, rows = index.search(queries, case.documents + 7)
        assert (rows[:, -7:] == -1).all() and np.isneginf(scores[:, -7:]).all()
        for query_rows in rows:
            found = query_rows[query_rows >= 0]
            assert len(set(found.tolist())) == len(found)

    def test_one_document(self, build: Callable[..., Any]) -> None:
        index, queries = build(1)
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
        if case.finds_all_copies:
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
        if index.deterministic:
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

    def test_an_empty_query_has_no_hits(self, takes: str, build: Callable[..., Any]) -> None:
        if takes == "dense":
            return  # every dense vector is a query
        index, queries = build()
        empty = {"text": [""], "sparse": queries[:1] * 0, "multi-vector": [queries[0][:0]]}[takes]
        if takes == "sparse":
            empty.eliminate_zeros()
        scores, rows = index.search(empty, 3)
        assert rows.tolist() == [[-1, -1, -1]] and np.isneginf(scores).all()

    def test_ids_and_order_stay_on_the_disk(self, build: Callable[..., Any], tmp_path: Path) -> None:
        import pyarrow as pa

        build()
        index, held = Index.load(tmp_path / "index"), pa.total_allocated_bytes()
        assert len(index.ids) == len(index.rank) == len(index)
        assert pa.total_allocated_bytes() == held and isinstance(index.rank.base, np.memmap)

    def test_k_must_be_positive(self, build: Callable[..., Any]) -> None:
        index, queries = build()
        with pytest.raises(UsageError, match="at least 1"):
            index.search(queries, 0)
