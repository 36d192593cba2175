from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_scores import Row, by_query, make_scores, scored

from retrieval_kd.data import score_rows
from retrieval_kd.data.scores import Scores
from retrieval_kd.errors import ArtifactError, InputError, OutputExistsError, RecipeError, RetrievalKDError, UsageError
from retrieval_kd.recipe import load_recipe
from retrieval_kd.teachers.combine import Ensemble, EnsembleRecipe, ranks
from retrieval_kd.teachers.ensemble import ensemble_scores

A: Row = ("q", ["a", "b", "c"], [4.0, 2.0, 2.0], [0, 5, 1])
B: Row = ("q", ["b", "c", "a"], [0.9, 0.5, 0.1], [2, 3, 0])

# Of A and B, for the documents a, b, c.
NORMALISED: dict[str, tuple[list[float], list[float]]] = {
    "min-max": ([2 / (2 + 1e-6), 0, 0], [0, 0.8 / (0.8 + 1e-6), 0.4 / (0.8 + 1e-6)]),
    "z-score": ([math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)], [-math.sqrt(1.5), math.sqrt(1.5), 0]),
    "rank": ([1, 0.5, 0.5], [1 / 3, 1, 2 / 3]),
    "softmax": (
        [math.e / (math.e + 2), 1 / (math.e + 2), 1 / (math.e + 2)],
        [math.exp(x) / (math.exp(0.05) + math.exp(0.45) + math.exp(0.25)) for x in (0.05, 0.45, 0.25)],
    ),
    "none": ([4, 2, 2], [0.1, 0.9, 0.5]),
}


def recipe(folder: Path, **values: Any) -> str:
    return tiny.write_recipe(folder / "ensemble.yaml", {"kind": "ensemble", **values})


def members(folder: Path, rows: Mapping[str, list[Row]], **details: Any) -> dict[str, Path]:
    return {name: make_scores(folder / name, of_member, **details) for name, of_member in rows.items()}


def combined(folder: Path, rows: Mapping[str, list[Row]], **values: Any) -> Scores:
    return ensemble_scores(recipe(folder, **values), members(folder, rows), out=folder / "out")


@pytest.mark.parametrize("normalise", list(NORMALISED))
@pytest.mark.parametrize("aggregate", ["mean", "weighted", "max"])
def test_every_normalisation_and_aggregate(normalise: str, aggregate: str, tmp_path: Path) -> None:
    ours, theirs = NORMALISED[normalise]
    expected = {
        "mean": [(x + y) / 2 for x, y in zip(ours, theirs, strict=True)],
        "weighted": [(3 * x + y) / 4 for x, y in zip(ours, theirs, strict=True)],
        "max": [max(x, y) for x, y in zip(ours, theirs, strict=True)],
    }[aggregate]
    weights = {"weights": {"B": 1, "A": 3}} if aggregate == "weighted" else {}
    found = combined(
        tmp_path, {"A": [A], "B": [B]}, normalise=normalise, aggregate=aggregate, temperature=2, scale=10, **weights
    )
    (row,) = found
    assert row.doc_ids == ["a", "b", "c"]
    assert row.scores.dtype == np.float32
    np.testing.assert_allclose(row.scores, 10 * np.array(expected), rtol=1e-6, atol=1e-6)
    assert row.tokens_lost is not None and row.tokens_lost.tolist() == [0, 5, 3]
    assert found.problems() == []


def test_reciprocal_rank_with_ties(tmp_path: Path) -> None:
    """b and c share the ranks 2 and 3 of A."""
    found = combined(tmp_path, {"A": [A], "B": [B]}, aggregate="reciprocal-rank")
    expected = {"a": 1 / 61 + 1 / 63, "b": 1 / 62.5 + 1 / 61, "c": 1 / 62.5 + 1 / 62}
    assert by_query(found)["q"] == pytest.approx(expected, rel=1e-6)


def test_reciprocal_rank_of_a_union(tmp_path: Path) -> None:
    """A missing document adds nothing, and a query that one member has needs no other."""
    rows: dict[str, list[Row]] = {
        "A": [("q1", ["a", "b"], [2, 1], None)],
        "B": [("q2", ["c"], [3], None), ("q1", ["b", "c"], [9, 8], None)],
    }
    found = combined(tmp_path, rows, aggregate="reciprocal-rank", k=1, join="union")
    assert list(by_query(found)) == ["q1", "q2"]
    assert by_query(found)["q1"] == pytest.approx({"a": 1 / 2, "b": 1 / 3 + 1 / 2, "c": 1 / 3})
    assert by_query(found)["q2"] == pytest.approx({"c": 1 / 2})
    assert found.manifest.counts["missing_scores"] == 3
    assert next(iter(found)).tokens_lost is None


def test_ranks_share_their_mean() -> None:
    assert ranks(np.array([5.0, 7, 5, 1, 5])).tolist() == [3, 1, 3, 5, 3]
    assert ranks(np.array([2.0])).tolist() == [1]


@pytest.mark.parametrize(
    ("normalise", "over", "expected"),
    [
        ("min-max", "query", {"q1": {"a": 0, "b": 1}, "q2": {"a": 0, "b": 0}}),
        ("min-max", "global", {"q1": {"a": 0, "b": 1}, "q2": {"a": 0.5, "b": 0.5}}),
        ("z-score", "query", {"q1": {"a": -1, "b": 1}, "q2": {"a": 0, "b": 0}}),
        ("z-score", "global", {"q1": {"a": -math.sqrt(2), "b": math.sqrt(2)}, "q2": {"a": 0, "b": 0}}),
    ],
)
def test_over_a_query_or_the_whole_file(
    normalise: str, over: str, expected: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    """0, 10, 5, 5: mean 5, deviation the root of 12.5. The other member is the first one times two."""
    rows: list[Row] = [("q1", ["a", "b"], [0, 10], None), ("q2", ["a", "b"], [5, 5], None)]
    twice: list[Row] = [(q, docs, [2 * s for s in scores], lost) for q, docs, scores, lost in rows]
    found = combined(tmp_path, {"A": rows, "B": twice}, normalise=normalise, over=over)
    for query_id, values in by_query(found).items():
        assert values == pytest.approx(expected[query_id], abs=1e-6)


@pytest.mark.parametrize("over", ["query", "global"])
@pytest.mark.parametrize("normalise", ["min-max", "z-score"])
def test_equal_scores_are_zero(over: str, normalise: str, tmp_path: Path) -> None:
    """0.1 is no binary number: the mean of many is not exactly it."""
    rows: dict[str, list[Row]] = {
        "A": [("q", [f"d{i}" for i in range(7)], [0.1] * 7, None)],
        "B": [("q", [f"d{i}" for i in range(7)], [0.7] * 7, None)],
    }
    found = combined(tmp_path, rows, normalise=normalise, over=over)
    assert set(by_query(found)["q"].values()) == {0}


UNION: dict[str, list[Row]] = {
    "A": [("q1", ["a", "b"], [3, 1], [1, 1]), ("q2", ["a"], [5], [0])],
    "B": [("q3", ["a"], [1], [0]), ("q1", ["c", "b", "d"], [8, 4, 6], [2, 0, 9])],
}


def test_intersection_counts_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """q1 keeps b of a, b, c, d; q2 and q3 have one member. A member is normalised over all that it scored."""
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        found = combined(tmp_path, UNION, normalise="rank")
    assert by_query(found) == {"q1": {"b": pytest.approx((1 / 2 + 1 / 3) / 2)}}
    assert next(iter(found)).tokens_lost.tolist() == [1]  # type: ignore[union-attr]
    assert found.manifest.counts == {
        "queries": 1,
        "pairs": 1,
        "shards": 1,
        "truncated_pairs": 1,
        "tokens_lost": 1,
        "failed_pairs": 0,
        "queries_left_out": 2,
        "pairs_left_out": 3,
        "missing_scores": 0,
    }
    assert "2 queries were left out, and 3 pairs of the others" in caplog.text


def test_union_filled_with_a_number(tmp_path: Path) -> None:
    """A's 1 and 1/2 for a and b; B's 1, 1/3, 2/3 for c, b, d. The first member's documents come first."""
    found = combined(tmp_path, UNION, normalise="rank", join="union", fill=-1)
    assert by_query(found) == {
        "q1": pytest.approx({"a": 0, "b": (1 / 2 + 1 / 3) / 2, "c": 0, "d": -1 / 6}, abs=1e-7),
        "q2": {"a": 0},
        "q3": {"a": 0},
    }
    assert [list(docs) for docs in by_query(found).values()] == [["a", "b", "c", "d"], ["a"], ["a"]]
    assert found.manifest.counts["missing_scores"] == 5
    assert next(iter(found)).tokens_lost.tolist() == [1, 1, 2, 9]  # type: ignore[union-attr]


def test_union_filled_with_the_lowest(tmp_path: Path) -> None:
    """A's lowest is 1/2, B's 1/3; a query that a member lacks has no lowest and is left out."""
    found = combined(tmp_path, UNION, normalise="rank", join="union", fill="lowest")
    expected = {"a": (1 + 1 / 3) / 2, "b": (1 / 2 + 1 / 3) / 2, "c": (1 / 2 + 1) / 2, "d": (1 / 2 + 2 / 3) / 2}
    assert by_query(found) == {"q1": pytest.approx(expected)}
    assert found.manifest.counts["queries_left_out"] == 2


def test_queries_in_another_order(tmp_path: Path) -> None:
    """Query i has the scores i and −i in one member and ten times that in the other, from last to first."""
    rows: list[Row] = [(f"q{i}", ["a", "b"], [i, -i], None) for i in range(30)]
    tenfold: list[Row] = [(q, docs[::-1], [10 * s for s in scores[::-1]], lost) for q, docs, scores, lost in rows]
    found = combined(tmp_path, {"A": rows, "B": tenfold[::-1]}, pairs_per_shard=7)
    assert by_query(found) == {f"q{i}": {"a": 5.5 * i, "b": -5.5 * i} for i in range(30)}
    assert [path.name for path in found.shards] == [f"shard-{i:05d}-of-00010.parquet" for i in range(10)]
    assert found.problems() == []


def test_few_shards_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [(f"q{i}", ["a", "b"], [i, -i], None) for i in range(60)]
    files = members(tmp_path, {"A": rows})
    files["B"] = make_scores(tmp_path / "B", rows[::-1], pairs_per_shard=6)
    alive: list[weakref.ref[Any]] = []
    most = 0
    original = score_rows.read_shard

    def counted(path: Path) -> Any:
        nonlocal most
        table = original(path)
        alive.append(weakref.ref(table))
        most = max(most, sum(reference() is not None for reference in alive))
        return table

    monkeypatch.setattr(score_rows, "read_shard", counted)
    ensemble_scores(recipe(tmp_path), files, out=tmp_path / "out")
    assert len(alive) == 30 + 20
    assert most <= 6


def test_mean_of_three_cross_encoders(tmp_path: Path) -> None:
    """Raw logits: 9, 3, 0 give 4; −1, −1, 5 give 1."""
    files = [
        make_scores(tmp_path / name, [("q", ["a", "b"], values, None)])
        for name, values in {"base": [9.0, -1.0], "large": [3.0, -1.0], "albert": [0.0, 5.0]}.items()
    ]
    found = ensemble_scores("teachers/ensemble-t2", files, out=tmp_path / "out")
    assert by_query(found) == {"q": {"a": 4, "b": 1}}
    assert list(found.manifest.details["members"]) == ["base", "large", "albert"]


def test_heterogeneous_ensemble(tmp_path: Path) -> None:
    """30 times the mean of (s − min) / (max − min + 1e-6)."""
    files = {
        "dense": make_scores(tmp_path / "d", [("q", ["a", "b", "c"], [0.5, 0.25, 0.0], None)], score_kind="cosine"),
        "sparse": make_scores(tmp_path / "s", [("q", ["c", "a", "b"], [40, 20, 0], None)], score_kind="dot"),
    }
    found = ensemble_scores("ensemble-heterogeneous", files, out=tmp_path / "out")
    dense, sparse = 1 / (0.5 + 1e-6), 1 / (40 + 1e-6)
    expected = {
        "a": 15 * (0.5 * dense + 20 * sparse),
        "b": 15 * (0.25 * dense),
        "c": 15 * (40 * sparse),
    }
    assert by_query(found)["q"] == pytest.approx(expected, rel=1e-6)


def test_what_the_manifest_says(tmp_path: Path) -> None:
    collection = tiny.reference("cc")
    files = members(
        tmp_path, {"A": [A], "B": [B]}, inputs={"collection": collection}, model="some/model", revision="12ab"
    )
    found = ensemble_scores(recipe(tmp_path), files, out=tmp_path / "out")
    assert {name: entry["fingerprint"] for name, entry in found.manifest.inputs.items()} == {
        "collection": collection.fingerprint,
        "scores:A": Scores.load(files["A"]).fingerprint,
        "scores:B": Scores.load(files["B"]).fingerprint,
    }
    assert found.locate("scores:A") == files["A"]
    assert (found.score_kind, found.manifest.details["teacher"]) == ("ensemble", "ensemble")
    assert found.manifest.details["members"]["B"] == {
        "score_kind": "logit",
        "teacher": "made",
        "model": "some/model",
        "revision": "12ab",
        "fingerprint": Scores.load(files["B"]).fingerprint,
    }
    assert found.manifest.recipe["members"] == ["A", "B"]


@pytest.mark.parametrize(
    ("values", "listwise", "expected"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"normalise": "min-max"}, False, False),
        ({"normalise": "min-max", "over": "global"}, False, False),
        ({"aggregate": "reciprocal-rank"}, False, False),
        ({"join": "union", "fill": "lowest"}, False, False),
        ({"join": "union", "fill": 0}, False, True),
    ],
)
def test_whether_other_documents_matter(values: dict[str, Any], listwise: bool, expected: bool, tmp_path: Path) -> None:
    files = members(tmp_path, {"A": [A], "B": [B]}, independent=not listwise)
    found = ensemble_scores(recipe(tmp_path, **values), files, out=tmp_path / "out")
    assert found.manifest.details["independent"] is expected


def test_the_same_again_and_something_else(tmp_path: Path) -> None:
    files = members(tmp_path, {"A": [A], "B": [B]})
    first = ensemble_scores(recipe(tmp_path), files, out=tmp_path / "out")
    before = (first.path / "manifest.json").stat().st_mtime_ns
    assert by_query(first)["q"]["a"] == pytest.approx(2.05)
    again = ensemble_scores(recipe(tmp_path), files, out=tmp_path / "out")
    assert (again.path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(OutputExistsError, match="another recipe"):
        ensemble_scores(recipe(tmp_path), files, out=tmp_path / "out", overrides=["scale=2"])
    other = ensemble_scores(recipe(tmp_path), files, out=tmp_path / "out", overrides=["scale=2"], force=True)
    assert by_query(other)["q"]["a"] == pytest.approx(4.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aggregate": "weighted"}, "weights and aggregate: weighted go together"),
        ({"weights": [1, 2]}, "weights and aggregate: weighted go together"),
        ({"aggregate": "weighted", "weights": [0, 0]}, "at least one must be above 0"),
        ({"aggregate": "weighted", "weights": [1, -2]}, "greater than or equal to 0"),
        ({"aggregate": "reciprocal-rank", "normalise": "rank"}, "leave out normalise"),
        ({"over": "global", "normalise": "softmax"}, "over: global is for"),
        ({"join": "union"}, "fill .* is what a union takes"),
        ({"fill": "lowest"}, "fill .* is what a union takes"),
        ({"join": "union", "aggregate": "reciprocal-rank", "fill": 0}, "reciprocal-rank needs none"),
        ({"join": "union", "fill": "zero"}, "fill"),
        ({"join": "union", "fill": float("nan")}, "finite"),
        ({"scale": 0}, "greater than 0"),
        ({"normalize": "rank"}, r"unknown key 'normalize' \(did you mean 'normalise'\?\)"),
    ],
)
def test_recipes_that_cannot_be_right(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(tmp_path, **values), "teachers")


def test_members_that_do_not_fit(tmp_path: Path) -> None:
    files = members(tmp_path, {"A": [A], "B": [B]})
    weighted = ["aggregate=weighted"]

    def refused(error: type[RetrievalKDError], message: str, given: Any, *overrides: str) -> None:
        with pytest.raises(error, match=message):
            ensemble_scores(recipe(tmp_path), given, out=tmp_path / "out", overrides=overrides)
        assert not (tmp_path / "out").exists()

    refused(UsageError, "two score files or more", {"A": files["A"]})
    refused(UsageError, "A and C are the same scores", {**files, "C": files["A"]})
    (tmp_path / "other").mkdir()
    refused(UsageError, "called the same .*NAME=SCORES", [files["A"], make_scores(tmp_path / "other" / "A", [B])])
    refused(UsageError, "weights are for A, C, the score files are A, B", files, *weighted, "weights={A: 1, C: 2}")
    refused(UsageError, r"3 weights for 2 score files \(A, B\)", files, *weighted, "weights=[1, 2, 3]")
    elsewhere = make_scores(tmp_path / "elsewhere", [B], inputs={"collection": tiny.reference("cc")})
    refused(ArtifactError, "E scores another collection than A", {"A": files["A"], "E": elsewhere})
    strangers = make_scores(tmp_path / "strangers", [("other", ["a"], [1], None)])
    refused(InputError, "none of the 2 queries has a document that all", {"A": files["A"], "S": strangers})
    refused(RetrievalKDError, "query 'q': a combined score is too large", files, "scale=1e39")
    twice = make_scores(tmp_path / "twice", [B, B])
    refused(ArtifactError, "T: a query has two rows", {"A": files["A"], "T": twice})
    with pytest.raises(UsageError, match="kind 'bi-encoder' reads texts; run it with `score`"):
        ensemble_scores("teachers/bi-encoder", files, out=tmp_path / "out")


def test_scores_without_a_common_unit(tmp_path: Path) -> None:
    """Ranks are no quantities; a logit and a cosine have no mean. What is normalised, or ranked anew, may be joined."""
    logit = make_scores(tmp_path / "logit", [A])
    cosine = make_scores(tmp_path / "cosine", [B], score_kind="cosine")
    rank = make_scores(tmp_path / "rank", [("q", ["a", "b", "c"], [-1, -2, -3], None)], score_kind="rank")
    rank2 = make_scores(tmp_path / "rank2", [("q", ["a", "b", "c"], [-3, -2, -1], None)], score_kind="rank")
    for pair in ([logit, cosine], [logit, rank], [rank, rank2]):
        with pytest.raises(InputError, match=r"cannot be combined as they are: .*; set normalise \(min-max"):
            ensemble_scores(recipe(tmp_path), pair, out=tmp_path / "out")
    for n, values in enumerate(("normalise=rank", "normalise=z-score", "aggregate=reciprocal-rank")):
        ensemble_scores(recipe(tmp_path), [rank, rank2], out=tmp_path / f"{n}", overrides=[values])
        assert len(set(by_query(Scores.load(tmp_path / f"{n}"))["q"].values())) <= 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=1, max_size=20),
    st.integers(1, 50),
    st.integers(-500, 500),
)
def test_min_max_does_not_see_an_affine_change(pairs: list[tuple[int, int]], factor: int, offset: int) -> None:
    """Of one member's raw scores, with a positive factor; up to the 1e-6 in the divisor."""
    ensemble = Ensemble(EnsembleRecipe(kind="ensemble", normalise="min-max"), np.ones(2))
    documents = [f"d{i}" for i in range(len(pairs))]

    def scores(change: bool) -> np.ndarray:
        ours = [factor * x + offset if change else x for x, _ in pairs]
        rows = [scored(("q", documents, [float(x) for x in values], None)) for values in (ours, [y for _, y in pairs])]
        found = ensemble.combine("q", rows)
        assert found is not None
        return found.scores

    np.testing.assert_allclose(scores(True), scores(False), atol=2e-6)
