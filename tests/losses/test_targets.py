"""What targets are made of teacher scores, by hand."""

import math

import pytest
import torch

from retrieval_kd.losses.targets import distribution, no_signal, teacher_ranks, transformed

# three scores and a missing one; equal ones; one; none
TEACHER = torch.tensor(
    [[2.0, 6.0, math.nan, 4.0], [0.1, 0.1, 0.1, math.nan], [math.nan, 7.0, 9.0, 9.0], [math.nan] * 4]
)
KNOWN = torch.tensor([[True, True, False, True], [True, True, True, False], [False, True, False, False], [False] * 4])
NOTHING = [0.0] * 4
Z = math.sqrt(1.5)  # 2 over the population standard deviation, √(8/3)


@pytest.mark.parametrize(
    ("transform", "rows"),
    [
        ("none", [[2, 6, 0, 4], [0.1, 0.1, 0.1, 0], [0, 7, 0, 0], NOTHING]),
        ("centre", [[-2, 2, 0, 0], NOTHING, NOTHING, NOTHING]),
        ("min-max", [[0, 1, 0, 0.5], NOTHING, NOTHING, NOTHING]),
        ("z-score", [[-Z, Z, 0, 0], NOTHING, NOTHING, NOTHING]),
        ("reciprocal-rank", [[1 / 3, 1, 0, 1 / 2], [1, 1, 1, 0], [0, 1, 0, 0], NOTHING]),
        ("minus-rank", [[-3, -1, 0, -2], [-1, -1, -1, 0], [0, -1, 0, 0], NOTHING]),
    ],
)
def test_transforms_by_hand(transform, rows):
    expected = torch.tensor(rows, dtype=torch.float32)
    torch.testing.assert_close(transformed(TEACHER, KNOWN, transform), expected)
    torch.testing.assert_close(transformed(TEACHER, KNOWN, transform, scale=3.0), 3 * expected)


def test_reciprocal_rank_with_an_offset():
    assert transformed(TEACHER, KNOWN, "reciprocal-rank", k=60.0)[0].tolist() == pytest.approx(
        [1 / 63, 1 / 61, 0, 1 / 62]
    )


@pytest.mark.parametrize("transform", ["centre", "z-score"])
def test_rounding_makes_no_differences_among_equal_scores(transform):
    equal = torch.full((1, 7), 0.1)
    assert equal.sum() / 7 != equal[0, 0]  # the mean is rounded
    assert transformed(equal, torch.ones(1, 7, dtype=torch.bool), transform).tolist() == [[0.0] * 7]


def test_half_precision_scores_become_float32():
    target = transformed(TEACHER.half(), KNOWN, "z-score")
    assert target.dtype is torch.float32
    assert target[0].tolist() == pytest.approx([-Z, Z, 0, 0])


def test_ranks_share_the_best_place():
    scores = torch.tensor([[3.0, 8.0, 3.0, 1.0, 8.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    assert teacher_ranks(scores, mask)[0, :5].tolist() == [3, 1, 3, 5, 1]


def test_distribution_by_hand():
    known = KNOWN[:1]
    e = [math.exp(-2), 1.0, math.exp(-1)]  # 2, 6, 4 at temperature 2
    softmax = [x / sum(e) for x in e]
    assert distribution(TEACHER[:1], known, temperature=2.0)[0].tolist() == pytest.approx(
        [softmax[0], softmax[1], 0, softmax[2]]
    )
    mixed = distribution(TEACHER[:1], known, temperature=2.0, ground_truth=0.25, positive=torch.tensor([3]))
    assert mixed[0].tolist() == pytest.approx([0.75 * softmax[0], 0.75 * softmax[1], 0, 0.25 + 0.75 * softmax[2]])


def test_rows_without_signal():
    assert no_signal(TEACHER, KNOWN).tolist() == [False, True, True, True]
    assert no_signal(torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)).tolist() == [True, True]
