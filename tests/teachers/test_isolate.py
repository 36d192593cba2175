from __future__ import annotations

import numpy as np
import pytest

from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.teachers.isolate import Failures, Outcome, Pair, ShardPairs, Task, finish_shard

PAIRS: list[Pair] = [(i, j) for i in range(4) for j in range(8)]
NAMES = {(i, j): (f"q{i}", f"d{j}") for i, j in PAIRS}
"""Candidate j of every query is document dj."""


class Shard:
    """A shard whose pairs can be made to fail; it knows which tasks it was given."""

    def __init__(
        self, poison: frozenset[Pair] = frozenset(), *, died: bool = False, nan: bool = False, at_most: int = 99
    ) -> None:
        self.poison, self.died, self.nan, self.at_most = poison, died, nan, at_most
        self.tasks: list[Task] = []
        self.deaths = 0

    def run(self, task: Task) -> Outcome:
        self.tasks.append(task)
        if self.deaths:
            self.deaths -= 1
            return Outcome("ended by SIGKILL", died=True)
        for piece in task.pieces or [[pair for pair in PAIRS if pair not in task.failed]]:
            if bad := sorted(self.poison & set(piece)):
                return Outcome("no good", died=self.died, bad=bad if self.nan else [])
            if len(piece) > self.at_most:
                return Outcome("out of memory")
        return Outcome(statistics={"pairs": len(PAIRS) - len(task.failed), "pieces": task.pieces})

    def finish(self, failures: Failures, number: int = 0, *, divides: bool = True) -> dict[str, object]:
        return finish_shard(ShardPairs(number, PAIRS, NAMES, divides), self.run, failures)


def query(i: int) -> frozenset[Pair]:
    return frozenset(pair for pair in PAIRS if pair[0] == i)


def test_nothing_wrong_is_one_task() -> None:
    shard = Shard()
    assert shard.finish(Failures(0), 3)["pairs"] == 32
    assert shard.tasks == [Task(3)]


@pytest.mark.parametrize("how", ["raises", "died", "nan"])
def test_poison_pairs_are_found_and_the_rest_scored_whole(how: str) -> None:
    poison = frozenset({(0, 5), (2, 1), (3, 1)})
    shard = Shard(poison, died=how == "died", nan=how == "nan")
    assert shard.finish(Failures(2)) == {"pairs": 29, "pieces": None}
    last = shard.tasks[-1]
    assert set(last.failed) == poison and not last.probe
    assert last.blamed == {"document 'd1'": "no good", "document 'd5'": "no good"}
    assert len([task for task in shard.tasks if task.probe]) < 32, "halving takes fewer tries than asking for each pair"


@pytest.mark.parametrize("how", ["raises", "died", "nan"])
def test_a_query_that_fails_with_every_document_is_to_blame_itself(how: str) -> None:
    """Its documents are innocent: the same document of another query is scored."""
    shard = Shard(query(2) | {(1, 3)}, died=how == "died", nan=how == "nan")
    assert shard.finish(Failures(2))["pairs"] == 23
    assert shard.tasks[-1].blamed == {"document 'd3'": "no good", "query 'q2'": "no good"}


def test_what_failed_before_is_tried_first_and_only_then_believed() -> None:
    """In the second shard d5 fails with q1 alone, and kills its process: two tries, each a new process, find it."""
    failures = Failures(1)
    Shard(frozenset({(0, 5)}), died=True).finish(failures)
    later = Shard(frozenset({(1, 5)}), died=True)
    assert later.finish(failures, 1)["pairs"] == 31
    probed = [(0, 5), (1, 5), (1, 5), (2, 5), (3, 5)]
    assert [task.pieces for task in later.tasks[:-1]] == [[[pair]] for pair in probed]
    assert later.tasks[-1] == Task(1, {(1, 5): "no good"}, {"document 'd5'": "no good"})


def test_a_process_killed_by_chance_is_given_the_same_shard_again() -> None:
    for deaths in (1, 2, 4):
        shard = Shard()
        shard.deaths = deaths
        assert shard.finish(Failures(0)) == {"pairs": 32, "pieces": None}


def test_what_fits_only_in_parts_is_scored_in_parts() -> None:
    statistics = Shard(at_most=10).finish(Failures(0))
    pieces = statistics["pieces"]
    assert isinstance(pieces, list)
    assert [len(piece) for piece in pieces] == [8, 8, 8, 8]
    assert [pair for piece in pieces for pair in piece] == PAIRS


def test_a_list_is_never_scored_in_parts() -> None:
    """Ranks of two halves of a list cannot be compared: the parts are whole queries, or there are none."""
    pieces = Shard(at_most=8).finish(Failures(0), divides=False)["pieces"]
    assert pieces == [sorted(query(i)) for i in range(4)]
    with pytest.raises(RetrievalKDError, match="shard 0 cannot be scored: out of memory"):
        Shard(at_most=7).finish(Failures(0), divides=False)


def test_too_much_that_fails_stops_the_run() -> None:
    """Every query fails as a whole: the third one is too many, and the others are not looked at."""
    shard = Shard(frozenset(PAIRS))
    with pytest.raises(RetrievalKDError, match=r"3 documents or queries could not be scored \(.*query 'q0': no good; "):
        shard.finish(Failures(2))
    assert not any((3, 0) in (task.pieces or [[]])[0] for task in shard.tasks[-3:])


def test_failures_are_counted_over_all_shards() -> None:
    failures = Failures(2)
    failures.blame(0, {"document 'a'": "x"})
    failures.blame(1, {"document 'a'": "x", "document 'b'": "y"})
    with pytest.raises(RetrievalKDError, match=r"3 documents .*document 'a': x; document 'b': y; query 'c': z"):
        failures.blame(2, {"query 'c'": "z"})


def test_a_shard_that_never_succeeds_is_an_error() -> None:
    """Each part can be tried, nothing can be written."""

    def run(task: Task) -> Outcome:
        return Outcome() if task.probe else Outcome("something else")

    with pytest.raises(RetrievalKDError, match="shard 0 cannot be scored: something else"):
        finish_shard(ShardPairs(0, PAIRS, NAMES), run, Failures(2))


def test_random_poison_is_found_exactly() -> None:
    rng = np.random.default_rng(0)
    for turn in range(60):
        chosen = rng.choice(len(PAIRS), size=int(rng.integers(1, 6)), replace=False)
        poison = frozenset(PAIRS[k] for k in chosen.tolist())
        shard = Shard(poison, nan=turn % 3 == 0, died=turn % 3 == 1)
        shard.finish(Failures(99))
        assert set(shard.tasks[-1].failed) == poison
