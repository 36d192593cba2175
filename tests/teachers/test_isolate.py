from __future__ import annotations

import numpy as np
import pytest

from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.teachers.isolate import Failures, Outcome, Pair, Task, finish_shard

PAIRS: list[Pair] = [(i, j) for i in range(4) for j in range(8)]


def name(pair: Pair) -> tuple[str, str]:
    """Candidate j of every query is document dj."""
    return f"q{pair[0]}", f"d{pair[1]}"


class Shard:
    """A shard whose pairs can be made to fail; it knows which tasks it was given."""

    def __init__(self, poison: set[Pair] = frozenset(), *, died: bool = False, at_most: int = 99) -> None:  # type: ignore[assignment]
        self.poison, self.died, self.at_most = poison, died, at_most
        self.tasks: list[Task] = []
        self.deaths = 0

    def run(self, task: Task) -> Outcome:
        self.tasks.append(task)
        if self.deaths:
            self.deaths -= 1
            return Outcome("ended by SIGKILL", died=True)
        for piece in task.pieces or [[pair for pair in PAIRS if pair not in task.failed]]:
            if self.poison & set(piece):
                return Outcome("no good", died=self.died)
            if len(piece) > self.at_most:
                return Outcome("out of memory")
        return Outcome(statistics={"pairs": len(PAIRS) - len(task.failed), "pieces": task.pieces})


def test_nothing_wrong_is_one_task() -> None:
    shard, failures = Shard(), Failures(10)
    assert finish_shard(3, PAIRS, name, shard.run, failures)["pairs"] == 32
    assert shard.tasks == [Task(3)] and failures.documents == {}


@pytest.mark.parametrize("died", [False, True])
def test_poison_pairs_are_found_and_the_rest_scored_whole(died: bool) -> None:
    poison = {(0, 5), (2, 1), (3, 1)}
    shard, failures = Shard(poison, died=died), Failures(10)
    statistics = finish_shard(0, PAIRS, name, shard.run, failures)
    assert statistics == {"pairs": 29, "pieces": None}
    assert set(shard.tasks[-1].failed) == poison and not shard.tasks[-1].probe
    assert failures.documents == {"d5": "no good", "d1": "no good"}
    assert set(failures.fatal) == ({"d5", "d1"} if died else set())
    probes = [task for task in shard.tasks if task.probe]
    assert len(probes) < 32, "halving takes fewer tries than asking for each pair"


def test_a_document_that_ends_processes_is_not_tried_again() -> None:
    failures = Failures(10)
    finish_shard(0, PAIRS, name, Shard({(0, 5)}, died=True).run, failures)
    later = Shard({(1, 5)}, died=True)
    assert finish_shard(1, PAIRS, name, later.run, failures)["pairs"] == 28
    assert [set(task.failed) for task in later.tasks] == [{(i, 5) for i in range(4)}]


def test_a_process_killed_by_chance_is_given_the_same_shard_again() -> None:
    for deaths in (1, 2, 4):
        shard, failures = Shard(), Failures(0)
        shard.deaths = deaths
        assert finish_shard(0, PAIRS, name, shard.run, failures) == {"pairs": 32, "pieces": None}
        assert failures.documents == {}


def test_what_fits_only_in_parts_is_scored_in_parts() -> None:
    shard = Shard(at_most=10)
    statistics = finish_shard(0, PAIRS, name, shard.run, Failures(0))
    assert [len(piece) for piece in statistics["pieces"]] == [8, 8, 8, 8]
    assert [pair for piece in statistics["pieces"] for pair in piece] == PAIRS


def test_pairs_that_are_known_to_be_bad_are_left_out_at_once() -> None:
    tasks: list[Task] = []

    def run(task: Task) -> Outcome:
        tasks.append(task)
        return Outcome() if (1, 2) in task.failed else Outcome("NaN", bad=[(1, 2)])

    failures = Failures(1)
    finish_shard(0, PAIRS, name, run, failures)
    assert [set(task.failed) for task in tasks] == [set(), {(1, 2)}] or len(tasks) == 2
    assert failures.documents == {"d2": "NaN"}


def test_too_many_documents_stop_the_run() -> None:
    failures = Failures(2)
    with pytest.raises(RetrievalKDError, match=r"3 documents could not be scored \('d0': no good; 'd1'.*--max-failed"):
        finish_shard(0, PAIRS, name, Shard(set(PAIRS)).run, failures)
    assert len(failures.documents) == 3


def test_a_shard_that_never_succeeds_is_an_error() -> None:
    """Each part can be tried, nothing can be written."""

    def run(task: Task) -> Outcome:
        return Outcome() if task.probe else Outcome("something else")

    with pytest.raises(RetrievalKDError, match="shard 0 cannot be scored: something else"):
        finish_shard(0, PAIRS, name, run, Failures(2))


def test_random_poison_is_found_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        chosen = rng.choice(len(PAIRS), size=int(rng.integers(1, 6)), replace=False)
        poison = {PAIRS[k] for k in chosen.tolist()}
        shard = Shard(poison)
        finish_shard(0, PAIRS, name, shard.run, Failures(99))
        assert set(shard.tasks[-1].failed) == poison
