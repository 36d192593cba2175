from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.merge_scores import merge_scores
from retrieval_kd.data.score_rows import ScoreRows
from retrieval_kd.data.score_writer import ShardWriter, write_failed
from retrieval_kd.data.scores import FAILED, ScoredQuery, Scores, total_counts, write_shard
from retrieval_kd.errors import ArtifactError, OutputExistsError, UsageError
from retrieval_kd.plan import Plan
from retrieval_kd.verify import check

Row = tuple[str, list[str], list[float]]
ROWS: list[Row] = [("q1", ["a", "b"], [3.0, 1.0]), ("q2", ["b"], [-2.0]), ("q3", ["c", "a"], [0.5, 7.5])]


def scored(row: Row) -> ScoredQuery:
    return ScoredQuery(row[0], row[1], np.array(row[2], dtype=np.float32), np.arange(len(row[1]), dtype=np.int32))


def make(
    out: Path,
    rows: dict[int, Row],
    *,
    shards: int = 3,
    recipe: dict[str, Any] | None = None,
    failed: Sequence[Sequence[str]] = (),
    independent: bool = True,
    dtype: str = "float32",
    usage: dict[str, float] | None = None,
    **inputs: str,
) -> Path:
    """A score file of one row a shard."""
    named = {"collection": "cc", "model": "mm", **inputs}
    plan = Plan(
        "scores",
        {"kind": "made", "model": "m", "candidates": [], **(recipe or {})},
        {name: InputRef(value * 32, name=value) for name, value in named.items()},
    )
    with plan.write(out) as draft:
        statistics = []
        for i, row in rows.items():
            one = scored(row)
            assert one.tokens_lost is not None
            lost = one.tokens_lost
            statistics.append(
                {
                    "queries": 1,
                    "pairs": len(row[1]),
                    "truncated_pairs": int((lost > 0).sum()),
                    "tokens_lost": int(lost.sum()),
                    "failed_pairs": len(failed) * (i == 0),
                    FAILED: [list(pair) for pair in failed] * (i == 0),
                }
            )
            path = draft.path / f"shard-{i:05d}-of-{shards:05d}.parquet"
            write_shard(path, [row[0]], [row[1]], [one.scores], statistics[-1], [lost])
        draft.counts.update(total_counts(statistics))
        draft.details.update({"score_kind": "logit", "teacher": "made", "dtype": dtype, "independent": independent})
        if usage:
            draft.details.update({"usage": usage, "served_models": []})
        write_failed(draft.path, list(failed))
    return out


def content(scores: Scores) -> list[Row]:
    return [(row.query_id, row.doc_ids, row.scores.tolist()) for row in scores]


def test_slices_become_the_undivided_file(tmp_path: Path) -> None:
    failed = [["q1", "z", "NaN"]]
    whole = make(tmp_path / "whole", dict(enumerate(ROWS)), failed=failed)
    parts = [
        make(tmp_path / "2", {2: ROWS[2]}, recipe={"slice": "2/2"}),
        make(tmp_path / "1", {0: ROWS[0], 1: ROWS[1]}, recipe={"slice": "1/2"}, failed=failed),
    ]
    merged = merge_scores(parts, tmp_path / "merged")
    expected = Scores.load(whole)
    assert merged.fingerprint == expected.fingerprint
    assert merged.manifest.counts == expected.manifest.counts and merged.manifest.counts["failed_pairs"] == 1
    assert merged.manifest.details == expected.manifest.details
    assert content(merged) == ROWS and check(merged.path) == []
    assert (merged.path / "failed.jsonl").read_text() == '{"query_id": "q1", "doc_id": "z", "reason": "NaN"}\n'
    again = merge_scores(parts, tmp_path / "merged")
    assert again.manifest.created == merged.manifest.created


def test_a_gap_is_refused(tmp_path: Path) -> None:
    parts = [make(tmp_path / f"{i}", {i: ROWS[i]}, recipe={"slice": f"{i + 1}/3"}) for i in (0, 2)]
    with pytest.raises(ArtifactError, match=r"1 of 3 shards are in none of the files: 1 \(here: slices 1/3, 3/3\)"):
        merge_scores(parts, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_slices_that_overlap(tmp_path: Path) -> None:
    """The same shard twice is fine when it is the same, and named when a score differs."""
    one = make(tmp_path / "1", {0: ROWS[0], 1: ROWS[1]}, recipe={"slice": "1/2"})
    two = make(tmp_path / "2", {1: ROWS[1], 2: ROWS[2]}, recipe={"slice": "2/2"})
    assert content(merge_scores([one, two], tmp_path / "merged")) == ROWS
    other = make(tmp_path / "3", {1: ("q2", ["b"], [-2.5]), 2: ROWS[2]}, recipe={"slice": "2/2"})
    with pytest.raises(ArtifactError, match=r"query 'q2', document 'b' has score -2.5, but -2.0 in an earlier file"):
        merge_scores([one, other], tmp_path / "other")
    documents = make(tmp_path / "4", {1: ("q2", ["x"], [-2.0]), 2: ROWS[2]}, recipe={"slice": "2/2"})
    with pytest.raises(ArtifactError, match="has query 'q2' with other documents"):
        merge_scores([one, documents], tmp_path / "other")


def test_other_candidates_are_united(tmp_path: Path) -> None:
    """q3 first has c and a, then d is added; q4 is new; failures of both are kept."""
    one = make(tmp_path / "1", dict(enumerate(ROWS)), candidates="r1", failed=[["q1", "z", "NaN"]])
    more: dict[int, Row] = {0: ("q4", ["a"], [1.5]), 1: ("q3", ["d", "c"], [9.0, 0.5])}
    two = make(tmp_path / "2", more, shards=2, candidates="r2", failed=[["q1", "z", "NaN"], ["q4", "y", "NaN"]])
    merged = merge_scores([one, two], tmp_path / "merged")
    assert content(merged) == [
        *ROWS[:2],
        ("q3", ["c", "a", "d"], [0.5, 7.5, 9.0]),
        ("q4", ["a"], [1.5]),
    ]
    assert [row.tokens_lost.tolist() for row in merged if row.tokens_lost is not None] == [[0, 1], [0], [0, 1, 0], [0]]
    assert merged.manifest.counts == {
        "queries": 4,
        "pairs": 7,
        "shards": 1,
        "truncated_pairs": 2,
        "tokens_lost": 2,
        "failed_pairs": 2,
    }
    assert check(merged.path) == []
    assert list(merged.manifest.inputs) == ["collection", "model", "scores", "scores_2"]
    assert merge_scores([merged.path, one], tmp_path / "again").manifest.counts["pairs"] == 7


def test_pairs_with_different_scores_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "1", dict(enumerate(ROWS)), candidates="r1")
    two = make(tmp_path / "2", {0: ("q3", ["a"], [7.25])}, shards=1, candidates="r2")
    with pytest.raises(ArtifactError, match=r"2: query 'q3', document 'a' has score 7.25, but 7.5 in an earlier file"):
        merge_scores([one, two], tmp_path / "merged")


def test_lists_of_a_listwise_teacher_are_not_mixed(tmp_path: Path) -> None:
    one = make(tmp_path / "1", dict(enumerate(ROWS)), candidates="r1", independent=False)
    same = make(tmp_path / "2", {0: ROWS[2]}, shards=1, candidates="r2", independent=False)
    assert content(merge_scores([one, same], tmp_path / "same")) == ROWS
    other = make(tmp_path / "3", {0: ("q3", ["d"], [1.0])}, shards=1, candidates="r2", independent=False)
    with pytest.raises(ArtifactError, match=r"query 'q3' has another list than in .*1; the ranks"):
        merge_scores([one, other], tmp_path / "merged")


def test_strangers_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "1", dict(enumerate(ROWS)))
    for name, changes, message in (
        ("model", {"model": "xx"}, "made with another model"),
        ("collection", {"collection": "xx"}, "made with another collection"),
        ("recipe", {"recipe": {"max_length": 8}}, "differs from that of .* in max_length; combine .* ensemble"),
        ("precision", {"dtype": "bfloat16"}, "differs from that of .* in dtype"),
    ):
        other = make(tmp_path / name, {0: ROWS[0]}, shards=1, **changes)  # type: ignore[arg-type]
        with pytest.raises(ArtifactError, match=message):
            merge_scores([one, other], tmp_path / "merged")
    sliced = make(tmp_path / "sliced", {0: ROWS[0]}, recipe={"slice": "1/3"})
    with pytest.raises(ArtifactError, match="merge the slices of one run first"):
        merge_scores([one, sliced], tmp_path / "merged")
    with pytest.raises(UsageError, match="at least two"):
        merge_scores([one], tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    with pytest.raises(OutputExistsError):
        merge_scores([one, make(tmp_path / "more", {0: ROWS[0]}, shards=1, candidates="r")], tmp_path / "merged")


def test_an_ensemble_is_not_merged(tmp_path: Path) -> None:
    paths = []
    for name in ("1", "2"):
        with Plan("scores", {"kind": "ensemble", "name": name}, {}).write(tmp_path / name) as draft:
            one = scored(ROWS[0])
            write_shard(draft.path / "shard-00000-of-00001.parquet", ["q1"], [one.doc_ids], [one.scores], {})
            draft.counts.update({"queries": 1, "pairs": 2})
            draft.details.update({"score_kind": "ensemble", "teacher": "ensemble"})
        paths.append(tmp_path / name)
    with pytest.raises(ArtifactError, match="merge its members, then combine them again"):
        merge_scores(paths, tmp_path / "merged")


def test_what_an_endpoint_was_asked_adds_up(tmp_path: Path) -> None:
    usage = {"requests": 3, "cost": 0.5}
    parts = []
    for i in (0, 1):
        parts.append(make(tmp_path / f"{i}", {i: ROWS[i]}, shards=2, recipe={"slice": f"{i + 1}/2"}, usage=usage))
    details = merge_scores(parts, tmp_path / "merged").manifest.details
    assert details["usage"] == {"requests": 6, "cost": 1.0} and details["served_models"] == []


def test_a_pair_that_failed_once_and_was_scored_later_is_no_failure(tmp_path: Path) -> None:
    one = make(tmp_path / "1", {0: ROWS[0]}, shards=1, candidates="r1", failed=[["q1", "z", "NaN"], ["q1", "y", "NaN"]])
    two = make(tmp_path / "2", {0: ("q1", ["z"], [0.5])}, shards=1, candidates="r2")
    merged = merge_scores([one, two], tmp_path / "merged")
    assert content(merged) == [("q1", ["a", "b", "z"], [3.0, 1.0, 0.5])]
    assert (merged.path / "failed.jsonl").read_text() == '{"query_id": "q1", "doc_id": "y", "reason": "NaN"}\n'
    assert merged.manifest.counts["failed_pairs"] == 1


def test_shards_beyond_five_digits_stay_in_order(tmp_path: Path) -> None:
    made = Scores.load(make(tmp_path / "s", {i: (f"q{i}", ["a"], [1.0]) for i in (99_999, 100_000)}, shards=100_001))
    assert [row.query_id for row in made] == ["q99999", "q100000"]


def test_a_moved_input_is_no_obstacle(tmp_path: Path) -> None:
    """The merged file still names where the collection was; the fingerprint is what counts."""
    parts = [make(tmp_path / f"{i}", {i: ROWS[i]}, shards=2, recipe={"slice": f"{i + 1}/2"}) for i in (0, 1)]
    moved = [Path(shutil.move(part, tmp_path / f"moved-{part.name}")) for part in parts]
    assert content(merge_scores(moved, tmp_path / "merged")) == ROWS[:2]


def test_rows_by_query(tmp_path: Path) -> None:
    """More shards than are kept in memory, asked for in any order."""
    rows: list[Row] = [(f"q{i}", [f"d{i}", "x"], [float(i), -1.0]) for i in range(7)]
    file = ScoreRows(Scores.load(make(tmp_path / "s", dict(enumerate(rows)), shards=7)))
    assert list(file) == [f"q{i}" for i in range(7)]
    for i in (3, 0, 6, 3, 5, 1, 2, 4):
        row = file.find(f"q{i}")
        assert row is not None and (row.query_id, row.doc_ids, row.scores.tolist()) == rows[i]
    assert file.find("nobody") is None and "nobody" not in file and "q3" in file


def test_writer_divides_between_queries(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, pairs_per_shard=3)
    for row in ROWS:
        writer.add(scored(row))
    statistics = writer.close()
    assert [(of_shard["queries"], of_shard["pairs"]) for of_shard in statistics] == [(2, 3), (1, 2)]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["shard-00000-of-00002.parquet", "shard-00001-of-00002.parquet"]
