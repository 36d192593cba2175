from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from retrieval_kd.teachers.base import Candidates
from retrieval_kd.teachers.windows import Window, WindowKeys, parse_permutation, rank_scores, window_bounds


def candidates(*sizes: int) -> list[Candidates]:
    return [Candidates(f"q{i}", f"text {i}", np.arange(n)) for i, n in enumerate(sizes)]


def by_gain(gains: list[np.ndarray]) -> Callable[[list[Window]], list[list[int]]]:
    """A perfect ranker: highest gain first."""
    return lambda windows: [
        np.argsort([-gains[window.list][member] for member in window.members], kind="stable").tolist()
        for window in windows
    ]


def test_bounds() -> None:
    assert window_bounds(100, 20, 10) == [(start, start + 20) for start in range(80, -1, -10)]
    assert window_bounds(25, 20, 10) == [(5, 25), (0, 15)]
    assert window_bounds(7, 3, 2) == [(4, 7), (2, 5), (0, 3)]
    assert window_bounds(4, 3, 2) == [(1, 4), (0, 2)]
    assert window_bounds(20, 20, 10) == window_bounds(20, 30, 10) == [(0, 20)]
    assert [window_bounds(n, 20, 10) for n in (2, 1, 0)] == [[(0, 2)], [(0, 1)], []]


def test_a_perfect_ranker_by_hand() -> None:
    """abcdef with gains 1 4 2 6 3 5, windows of 4, stride 2: ``cdef`` → d f e c, then ``abdf`` → d f b a."""
    (scores,) = rank_scores(candidates(6), WindowKeys(window=4, stride=2), by_gain([np.array([1, 4, 2, 6, 3, 5])]))
    assert scores.tolist() == [-4, -3, -6, -1, -5, -2]
    assert scores.dtype == np.float32


@pytest.mark.parametrize(("n", "size", "stride"), [(100, 20, 10), (57, 20, 10), (33, 8, 3), (9, 10, 5)])
def test_a_perfect_ranker_sorts_the_top(n: int, size: int, stride: int) -> None:
    """The best ``size - stride`` of the whole list reach the top, in order; within one window all are in order."""
    gains = np.random.default_rng(n).permutation(n)
    (scores,) = rank_scores(candidates(n), WindowKeys(window=size, stride=stride), by_gain([gains]))
    carried = n if n <= size else size - stride
    assert np.argsort(-scores).tolist()[:carried] == np.argsort(-gains).tolist()[:carried]
    assert sorted(scores.tolist()) == list(range(-n, 0))


def test_windows_of_all_lists_are_asked_together() -> None:
    """Lists of 6, 1 and 3: their last windows together, then the second one of the first list alone."""
    asked: list[list[tuple[int, list[int]]]] = []

    def reverse(windows: list[Window]) -> list[list[int]]:
        asked.append([(window.list, list(window.members)) for window in windows])
        return [list(range(len(window.members)))[::-1] for window in windows]

    scores = rank_scores(candidates(6, 1, 3), WindowKeys(window=4, stride=2), reverse)
    assert asked == [[(0, [2, 3, 4, 5]), (2, [0, 1, 2])], [(0, [0, 1, 5, 4])]]
    assert [of_query.tolist() for of_query in scores] == [[-4, -3, -6, -5, -1, -2], [-1], [-3, -2, -1]]


def test_a_list_of_one_is_shown_when_asked() -> None:
    """It has its rank in any case; a ranker that is paid for is not asked."""
    asked: list[Window] = []

    def note(windows: list[Window]) -> list[list[int]]:
        asked.extend(windows)
        return [list(range(len(window.members))) for window in windows]

    assert [rank_scores(candidates(1, 0), WindowKeys(), note)[0].tolist(), asked] == [[-1], []]
    assert rank_scores(candidates(1, 0), WindowKeys(), note, show_single=True)[0].tolist() == [-1]
    assert asked == [Window(0, [0])]


def test_shuffles_are_averaged() -> None:
    """A ranker that keeps what it is shown: the mean of the places in the shuffled orders."""
    shown: list[list[int]] = []

    def keep(windows: list[Window]) -> list[list[int]]:
        shown.extend(list(window.members) for window in windows)
        return [list(range(len(window.members))) for window in windows]

    (scores,) = rank_scores(candidates(5), WindowKeys(shuffles=3), keep)
    assert len({tuple(order) for order in shown}) > 1 and all(sorted(order) == list(range(5)) for order in shown)
    expected = [-sum(order.index(document) + 1 for order in shown) / 3 for document in range(5)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_querys_shuffles_depend_on_seed_and_query_alone() -> None:
    def keep(windows: list[Window]) -> list[list[int]]:
        return [list(range(len(window.members))) for window in windows]

    first, second = candidates(8, 8)
    keys = WindowKeys(shuffles=2, seed=3)
    together = rank_scores([first, second], keys, keep)
    assert rank_scores([second], keys, keep)[0].tolist() == together[1].tolist() != together[0].tolist()
    assert rank_scores([first], WindowKeys(shuffles=2, seed=4), keep)[0].tolist() != together[0].tolist()


def test_shuffles_do_not_change_what_a_perfect_ranker_says() -> None:
    gains = np.random.default_rng(0).permutation(15)
    plain, shuffled = (
        rank_scores(candidates(15), WindowKeys(shuffles=shuffles), by_gain([gains]))[0] for shuffles in (0, 4)
    )
    assert plain.tolist() == shuffled.tolist() == (gains - 15.0).tolist()


@pytest.mark.parametrize("answer", [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 3]])
def test_an_order_that_is_no_permutation(answer: list[int]) -> None:
    with pytest.raises(ValueError, match="not a permutation of 3 passages"):
        rank_scores(candidates(3), WindowKeys(), lambda _: [answer])


def test_windows_must_overlap() -> None:
    with pytest.raises(ValidationError, match="stride 10 must be smaller than window 10"):
        WindowKeys(window=10, stride=10)


@pytest.mark.parametrize(
    ("answer", "order", "repaired"),
    [
        ("[2] > [3] > [1]", [1, 2, 0], False),
        ("[2]>[3]\n>[ 1 ]", [1, 2, 0], False),
        ("Sure! [2] > [3] > [1].", [1, 2, 0], False),
        ("[2] > [2] > [3] > [1]", [1, 2, 0], True),
        ("[3]", [2, 0, 1], True),
        ("[9] > [3] > [1] > [2]", [2, 0, 1], True),
        ("[A] > [02]", [0, 1, 2], True),
        ("", [0, 1, 2], True),
        ("[2] > [3] > [1", [1, 2, 0], True),
    ],
)
def test_answers_are_repaired(answer: str, order: list[int], repaired: bool) -> None:
    """Unknown and repeated identifiers are dropped, missing ones follow in their present order."""
    assert parse_permutation(answer, ["1", "2", "3"]) == (order, repaired)


def test_letters_are_parsed() -> None:
    assert parse_permutation("[B] > [A]", ["A", "B"]) == ([1, 0], False)
    assert parse_permutation("[b] > [A]", ["A", "B"]) == ([0, 1], True)
