from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval_kd.data.scores import (
    Scores,
    read_shard,
    rows_of,
    schema,
    shard_statistics,
    total_counts,
    verified_statistics,
    write_shard,
)
from retrieval_kd.errors import ArtifactError, RetrievalKDError
from retrieval_kd.plan import Plan

Row = tuple[str, list[str], list[float]]
ROWS: list[Row] = [("q1", ["a", "b", "c"], [3.0, 1.0, 1.0]), ("q2", ["b"], [-2.0]), ("q3", ["c", "a"], [0.5, 7.5])]
LOST = {"queries": 3, "pairs": 6, "truncated_pairs": 2, "tokens_lost": 9}


def shard(path: Path, rows: Sequence[Row]) -> Path:
    write_shard(path, [row[0] for row in rows], [row[1] for row in rows], [np.array(row[2]) for row in rows], LOST)
    return path


def make_scores(out: Path, rows: Sequence[Row] = tuple(ROWS), **counts: int) -> Scores:
    """Two shards: the first two rows, and the rest."""
    plan = Plan("scores", {"kind": "made"}, {})
    with plan.write(out) as draft:
        shard(draft.path / "shard-00000-of-00002.parquet", rows[:2])
        shard(draft.path / "shard-00001-of-00002.parquet", rows[2:])
        draft.counts.update({"queries": 3, "pairs": 6, **counts})
        draft.details.update({"score_kind": "logit", "teacher": "made"})
    return Scores.load(out)


def plant(path: Path, rows: Sequence[Row], lost: list[list[int] | None]) -> None:
    """Writes a shard without the checks of `write_shard`."""
    columns = [*([row[i] for row in rows] for i in range(3)), lost]
    pq.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema(), strict=True)], schema()), path)


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    first, second = shard(tmp_path / "one", ROWS), shard(tmp_path / "two", ROWS)
    assert first.read_bytes() == second.read_bytes()
    table = read_shard(first)
    assert table.to_pydict() == {
        "query_id": ["q1", "q2", "q3"],
        "doc_ids": [["a", "b", "c"], ["b"], ["c", "a"]],
        "scores": [[3.0, 1.0, 1.0], [-2.0], [0.5, 7.5]],
        "tokens_lost": [None, None, None],
    }
    assert shard_statistics(table) == LOST
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_truncated_shard_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "shard", ROWS)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="damaged score shard"):
            read_shard(path)


def test_flipped_bit_in_the_scores_is_refused(tmp_path: Path) -> None:
    """The page's checksum notices one bit in any of the last bytes of the scores."""
    path = shard(tmp_path / "shard", ROWS)
    whole = path.read_bytes()
    scores = pq.read_metadata(path).row_group(0).column(2)
    end = scores.dictionary_page_offset + scores.total_compressed_size
    for place in range(end - 12, end):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged score shard"):
            read_shard(path)


def test_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query_id": ["q"], "margin": [1.0]}), tmp_path / "margins.parquet")
    with pytest.raises(ArtifactError, match=r"not a score shard \(columns query_id, margin\)"):
        read_shard(tmp_path / "margins.parquet")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_refused_with_its_pair(value: float, tmp_path: Path) -> None:
    rows: list[Row] = [("q1", ["a"], [1.0]), ("q2", ["b", "c"], [0.0, value])]
    with pytest.raises(RetrievalKDError, match=r"NaN or infinite scores for 1 .* pairs: 'q2/c'"):
        shard(tmp_path / "shard", rows)
    assert not (tmp_path / "shard").exists()


def test_number_of_scores_must_fit(tmp_path: Path) -> None:
    with pytest.raises(RetrievalKDError, match="gave 1 scores for the 2 candidates of query 'q1'"):
        shard(tmp_path / "shard", [("q1", ["a", "b"], [1.0])])


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores")
    assert [(row.query_id, row.doc_ids, row.scores.tolist()) for row in scores] == ROWS
    assert all(row.scores.dtype == np.float32 for row in scores)
    assert len(scores) == 3 and scores.score_kind == "logit"
    assert scores.problems() == []


def test_tokens_lost_come_back_where_they_are_known(tmp_path: Path) -> None:
    with Plan("scores", {"kind": "made"}, {}).write(tmp_path / "scores") as draft:
        values = [np.array([1.0, 2.0])]
        names = ["shard-00000-of-00002.parquet", "shard-00001-of-00002.parquet"]
        write_shard(draft.path / names[0], ["q1"], [["a", "b"]], values, LOST, [np.array([0, 7])])
        write_shard(draft.path / names[1], ["q2"], [["a", "b"]], values, LOST)
        draft.details["score_kind"] = "logit"
    first, second = Scores.load(tmp_path / "scores")
    assert first.tokens_lost is not None and first.tokens_lost.tolist() == [0, 7]
    assert first.tokens_lost.dtype == np.int32 and second.tokens_lost is None


def test_counts_of_the_shards_add_up() -> None:
    one = {"queries": 2, "pairs": 5, "truncated_pairs": 1, "tokens_lost": 4, "failed_pairs": 1, "windows": 3}
    two = {"queries": 1, "pairs": 2, "truncated_pairs": 0, "tokens_lost": 0, "failed_pairs": 0, "failed": []}
    assert total_counts([{**one, "failed": [["q", "d", "why"]]}, two]) == {
        "queries": 3,
        "pairs": 7,
        "shards": 2,
        "truncated_pairs": 1,
        "tokens_lost": 4,
        "failed_pairs": 1,
        "windows": 3,
    }


def test_arrays(tmp_path: Path) -> None:
    arrays = make_scores(tmp_path / "scores").arrays()
    assert arrays.query_ids == ["q1", "q2", "q3"]
    assert arrays.offsets.tolist() == [0, 3, 4, 6]
    assert arrays.doc_ids == ["a", "b", "c", "b", "c", "a"]
    assert arrays.scores.tolist() == [3.0, 1.0, 1.0, -2.0, 0.5, 7.5]
    assert arrays.scores.dtype == np.float32


def test_planted_faults_are_found(tmp_path: Path) -> None:
    scores = make_scores(tmp_path / "scores")
    plant(
        scores.shards[0],
        [("q1", ["a", "b"], [1.0, float("nan")]), ("q2", ["a", "a"], [1.0, 2.0]), ("q2", ["a"], [1.0, 2.0])],
        [None, [0], None],
    )
    with pytest.raises(ArtifactError, match="shard-00000-of-00002"):
        Scores.load(scores.path)
    assert Scores(scores.path, scores.manifest).problems() == [
        "query 'q1': a score is NaN or infinite",
        "query 'q2': 2 scores but 1 tokens_lost",
        "query 'q2': a document is scored twice",
        "query 'q2' has two rows",
        "query 'q2': 1 documents but 2 scores",
        "the manifest counts 6 pairs, the shards hold 7",
    ]


def test_wrong_counts_are_found(tmp_path: Path) -> None:
    assert make_scores(tmp_path / "scores", queries=4).problems() == [
        "the manifest counts 4 queries, the shards hold 3"
    ]


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Any flipped bit: the file is refused, or what is read is what was written."""
    path = shard(tmp_path / "shard", ROWS)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert verified_statistics(path) == LOST
            found = [(row.query_id, row.doc_ids, row.scores.tolist()) for row in rows_of(read_shard(path))]
            assert found == ROWS
        except ArtifactError as error:
            assert "score shard" in str(error)
