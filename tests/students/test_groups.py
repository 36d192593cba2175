from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.artifact import Plan
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import Scores, write_shard
from retrieval_kd.errors import InputError
from retrieval_kd.students.base import Groups
from retrieval_kd.students.groups import TrainingQuery, draw, training_queries


def query(relevant: list[int], number: int = 9) -> TrainingQuery:
    """Candidates in rows 100, 101, …, best first; ``relevant`` are positions."""
    scores = np.arange(number, 0, -1, dtype=np.float32)
    return TrainingQuery("q", "text", np.arange(100, 100 + number), scores, np.isin(np.arange(number), relevant))


def drawn(query: TrainingQuery, visits: int = 200, **settings: object) -> np.ndarray:
    return np.array([draw(query, Groups.model_validate(settings), (0, 0, visit)) for visit in range(visits)])


def make_scores(out: Path, rows: dict[str, dict[str, float]]) -> Scores:
    with Plan("scores", {"kind": "made", "name": out.name}, {}).write(out) as draft:
        values = [np.array(list(docs.values())) for docs in rows.values()]
        write_shard(
            draft.path / "shard-00000-of-00001.parquet", list(rows), [list(d) for d in rows.values()], values, {}
        )
    return Scores.load(out)


def test_hardest_by_the_teacher() -> None:
    assert (drawn(query([]), negatives="hardest", documents=4) == [0, 1, 2, 3]).all()


def test_hardest_by_labels_leaves_out_other_relevant_documents() -> None:
    """Relevant are 1 and 4: the positive is either; the three best others are 0, 2, 3."""
    groups = drawn(query([1, 4]), positive="qrels", negatives="hardest", documents=4)
    assert set(groups[:, 0]) == {1, 4}
    assert (groups[:, 1:] == [0, 2, 3]).all()


def test_spread_takes_one_of_each_part() -> None:
    """Others are 1 to 8; in three parts: 1-3, 4-6, 7-8."""
    groups = drawn(query([]), negatives="spread", documents=4)
    assert (groups[:, 0] == 0).all()
    assert [set(column) for column in groups.T[1:]] == [{1, 2, 3}, {4, 5, 6}, {7, 8}]


def test_random_takes_all_alike_and_none_twice() -> None:
    """Relevant 0 and 5; of the 7 others 3 a group: each in 3/7 of 700 groups, 300 of them (σ = 13)."""
    groups = drawn(query([0, 5]), 700, positive="qrels", documents=4)
    assert set(groups[:, 0]) == {0, 5}
    assert all(len(set(group)) == 4 for group in groups)
    counts = np.bincount(groups[:, 1:].ravel(), minlength=9)
    assert counts[[0, 5]].tolist() == [0, 0]
    assert (abs(counts[[1, 2, 3, 4, 6, 7, 8]] - 300) < 60).all()


def test_fewer_candidates_than_asked_for() -> None:
    for negatives in ("random", "hardest", "spread"):
        assert set(map(tuple, np.sort(drawn(query([], 3), 20, negatives=negatives)))) == {(0, 1, 2)}


def test_a_draw_depends_on_seed_query_and_visit_alone() -> None:
    groups = Groups(documents=4)
    one = draw(query([]), groups, (7, 3, 1))
    draw(query([]), groups, (7, 3, 2))
    assert draw(query([]), groups, (7, 3, 1)).tolist() == one.tolist()
    others = {tuple(draw(query([]), groups, seed)) for seed in ((8, 3, 1), (7, 4, 1), (7, 3, 2))}
    assert others != {tuple(one)}


def test_order_and_scores_by_the_teacher(collection: Collection, tmp_path: Path) -> None:
    """The first file's score of d03 stays; a document of the run alone has none and comes last."""
    first = make_scores(tmp_path / "one", {"train-0": {"d03": 1.0, "d01": 5.0}})
    second = make_scores(tmp_path / "two", {"train-0": {"d03": 9.0, "d02": 3.0}, "dev-0": {"d01": 1.0, "d02": 2.0}})
    run = Run.from_hits(["train-0"], [["d09", "d01"]], [np.array([2.0, 1.0])])
    (found,) = training_queries(collection, "train", Groups(), [first, second], run)
    assert (found.query_id, found.text) == ("train-0", "w0 w40")
    assert found.rows.tolist() == [1, 2, 3, 9]
    np.testing.assert_array_equal(found.scores, np.array([5, 3, 1, np.nan], dtype=np.float32))
    assert not found.relevant.any()


def test_relevant_documents_join_their_querys_candidates(collection: Collection) -> None:
    run = Run.from_hits(["train-4"], [["d01", "d02"]], [np.array([2.0, 1.0])])
    (found,) = training_queries(collection, "train", Groups(positive="qrels"), [], run)
    assert found.rows.tolist() == [1, 2, 4]
    assert found.relevant.tolist() == [False, False, True]


def test_queries_left_out_are_counted_and_said(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = make_scores(tmp_path / "scores", {"train-0": {"d00": 1.0, "d01": 5.0}, "train-1": {"d01": 1.0}})
    run = Run.from_hits(["train-2"], [["d01", "d02"]], [np.array([2.0, 1.0])])
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        found = training_queries(collection, "train", Groups(), [scores], run)
    assert [query.query_id for query in found] == ["train-0"]
    assert caplog.messages == [
        "27 of 30 queries of 'train' have no candidates and are left out: 'train-3', 'train-4', 'train-5', …",
        "1 of 30 queries of 'train' have no negative and are left out: 'train-1'",
        "1 of 30 queries of 'train' have no teacher's score and are left out: 'train-2'",
    ]


def test_queries_without_a_negative_by_labels(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.from_hits(["train-0", "train-1"], [["d00"], ["d05"]], [np.array([1.0]), np.array([1.0])])
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        found = training_queries(collection, "train", Groups(positive="qrels"), [], run)
    assert [query.query_id for query in found] == ["train-1"]
    assert "1 of 30 queries of 'train' have no negative and are left out: 'train-0'" in caplog.messages


def test_nothing_to_train_on(collection: Collection, candidates: Path) -> None:
    with pytest.raises(InputError, match=r"no query of split 'dev' can be trained on \(6 queries"):
        training_queries(collection, "dev", Groups(positive="qrels"), [], Run.load(candidates))
