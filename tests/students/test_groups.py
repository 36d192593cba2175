from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from retrieval_kd.students.base import Groups
from retrieval_kd.students.groups import TrainingQuery, draw

GROUPS_BY_LABELS = Groups.model_validate({"positive": "qrels", "false_negatives": {"margin": 0}, "documents": 8})
DRAWN = [[0, 7, 5, 8], [0, 4, 3, 5]]


def query(relevant: list[int], number: int = 9, scores: Sequence[float] | None = None) -> TrainingQuery:
    """Candidates in rows 100, 101, …, best first; ``relevant`` are positions, and the positives if there are any."""
    values = np.array(range(number, 0, -1) if scores is None else scores, dtype=np.float32)
    places = np.arange(len(values))
    return TrainingQuery("q", "text", 100 + places, values, np.isin(places, relevant), np.array(relevant or [0]))


def drawn(query: TrainingQuery, visits: int = 200, **settings: object) -> np.ndarray:
    return np.array([draw(query, Groups.model_validate(settings), (0, 0, visit)) for visit in range(visits)])


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


def test_draws_stay_what_they_were() -> None:
    """A seed's draws are part of what makes a student: these were made before lists could be mixed and filtered."""
    groups = Groups(documents=4)
    assert [draw(query([]), groups, (7, 3, visit)).tolist() for visit in (0, 1)] == DRAWN


def test_top_random_draws_from_the_pool() -> None:
    """The best three others are 1, 2 and 3: each pair of them is drawn."""
    groups = drawn(query([]), negatives="top-random", pool=3, documents=3)
    assert set(map(tuple, np.sort(groups[:, 1:]))) == {(1, 2), (1, 3), (2, 3)}


def test_range_is_of_ranks() -> None:
    """Ranks 3 to 5 are positions 2 to 4; fewer than asked for are all drawn."""
    assert set(map(tuple, np.sort(drawn(query([]), range=[3, 5], documents=8)))) == {(0, 2, 3, 4)}
    assert (drawn(query([]), range=[3, 5], negatives="hardest", documents=3) == [0, 2, 3]).all()


def test_margin_bins_are_equally_wide() -> None:
    """Of scores 9.9, 9.8, …, 9.1 and 0 in two bins, 0 is alone in its bin: drawn half of the time."""
    values = [10, *(9.9 - 0.1 * i for i in range(9)), 0]
    groups = drawn(query([], scores=values), 1000, negatives="margin-bins", bins=2, documents=2)
    assert (groups[:, 0] == 0).all()
    assert abs((groups[:, 1] == 10).mean() - 0.5) < 0.05
    assert set(groups[:, 1]) == set(range(1, 11))
    whole = drawn(query([], scores=[*values, np.nan]), 20, negatives="margin-bins", bins=2, documents=20)
    assert set(map(tuple, np.sort(whole))) == {tuple(range(11))}  # without the unscored one, none twice


def test_margin_bins_of_equal_scores() -> None:
    assert set(drawn(query([], scores=[1, 1, 1]), negatives="margin-bins", documents=2)[:, 1]) == {1, 2}


@pytest.mark.parametrize(("rule", "kept"), [({"margin": 1.5}, [2, 3]), ({"relative": 0.5}, [3])])
def test_false_negatives_are_never_drawn(rule: dict[str, float], kept: list[int]) -> None:
    """The positive has 10: with margin 1.5 those above 8.5 go, with half of it those above 5, and the unscored one."""
    values = [10, 9, 8.5, 5, np.nan]
    groups = drawn(query([], scores=values), 20, false_negatives=rule, documents=8)
    assert set(map(tuple, np.sort(groups))) == {(0, *kept)}


def test_false_negatives_follow_the_positive() -> None:
    """Relevant are the scores 9 and 3: beside 9 both others are drawn, beside 3 only 1."""
    groups = [draw(query([0, 2], scores=[9, 5, 3, 1]), GROUPS_BY_LABELS, (0, 0, visit)).tolist() for visit in range(30)]
    assert {tuple(sorted(group)) for group in groups} == {(0, 1, 3), (2, 3)}


def test_labels_are_avoided_with_the_teachers_positive() -> None:
    """Judged relevant are 1 and 4, neither is drawn; 0 stays the positive."""
    places = np.arange(6)
    judged = TrainingQuery("q", "t", places, 9.0 - places, np.isin(places, [1, 4]))
    groups = drawn(judged, 20, labels="avoid", documents=6)
    assert (groups[:, 0] == 0).all() and set(map(tuple, np.sort(groups))) == {(0, 2, 3, 5)}


def test_a_positive_alone() -> None:
    assert drawn(query([], 1), 3, documents=4).tolist() == [[0]] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"range": [5, 2]}, r"range: \[5, 2\] ends before it starts"),
        ({"range": [0, 2]}, "greater than or equal to 1"),
        ({"pool": 5}, "pool belongs to 'negatives: top-random', not to 'random'"),
        ({"bins": 5, "negatives": "spread"}, "bins belongs to 'negatives: margin-bins'"),
        ({"positives": "all"}, "positives: all needs 'positive: qrels'"),
        ({"reweight": {}}, r"give what they start with, as mix: \[1, 1\]"),
        ({"mix": [1, 0]}, "greater than 0"),
        ({"false_negatives": {}}, "give one of margin and relative"),
    ],
)
def test_groups_that_cannot_be(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Groups.model_validate(values)
