"""Finishing a shard although some document in it cannot be scored: it is found by halving, named, and left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from retrieval_kd.errors import RetrievalKDError

log = logging.getLogger("retrieval_kd")

Pair = tuple[int, int]
"""The query's and the candidate's position within a shard."""

_ATTEMPTS = 3


@dataclass(frozen=True)
class Task:
    """Some work on one shard: all its pairs but those that failed, in one piece or in several."""

    shard: int
    failed: dict[Pair, str] = field(default_factory=dict)
    """Pairs to leave out, with the reason."""
    pieces: list[list[Pair]] | None = None
    """The pairs to score, one batch of work after another; None: all that did not fail, together."""
    probe: bool = False
    """Only find out whether it can be done; write nothing."""


@dataclass(frozen=True)
class Outcome:
    """What came of a task. It succeeded when there is no ``reason``."""

    reason: str | None = None
    bad: list[Pair] = field(default_factory=list)
    """The pairs that are to blame, where that is known (their scores are not finite)."""
    died: bool = False
    """The process ended."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Counts of a shard that was written."""


class Failures:
    """The documents of the whole run that cannot be scored. Safe for several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.documents: dict[str, str] = {}
        self.fatal: dict[str, str] = {}
        """Documents that ended a process on their own, twice: they are not tried again."""
        self._lock = Lock()

    def add(self, doc_id: str, query_id: str, reason: str, *, fatal: bool = False) -> None:
        """Notes a pair that failed. Raises `RetrievalKDError` when more than ``limit`` documents have."""
        with self._lock:
            if doc_id not in self.documents:
                log.warning(
                    "document %r cannot be scored (query %r): %s; going on without it", doc_id, query_id, reason
                )
            self.documents[doc_id] = reason
            if fatal:
                self.fatal[doc_id] = reason
            if len(self.documents) > self.limit:
                named = "; ".join(f"{name!r}: {why}" for name, why in list(self.documents.items())[:3])
                raise RetrievalKDError(
                    f"{len(self.documents)} documents could not be scored ({named}{'; …' * (self.limit > 2)}), "
                    f"--max-failed allows {self.limit}; finished shards are kept. Mend the documents or the model (try "
                    "float32 weights or another checkpoint), or allow more, and run the same command again"
                )


def finish_shard(
    shard: int,
    pairs: Sequence[Pair],
    name: Callable[[Pair], tuple[str, str]],
    run: Callable[[Task], Outcome],
    failures: Failures,
) -> dict[str, Any]:
    """The statistics of a shard after it was written, without the pairs that cannot be scored.

    ``name`` gives a pair's query and document id. A process that died is given the shard once more; what fails again is
    halved until single pairs are left. The shard is then scored as a whole without these, so that its bytes do not
    depend on how they were found.
    """
    failed = {pair: failures.fatal[doc_id] for pair in pairs if (doc_id := name(pair)[1]) in failures.fatal}

    def note(pair: Pair, reason: str, *, fatal: bool = False) -> None:
        query_id, doc_id = name(pair)
        failures.add(doc_id, query_id, reason, fatal=fatal)
        failed[pair] = reason

    for attempt in range(_ATTEMPTS):
        outcome = _whole(Task(shard, failed), run, note)
        if outcome.reason is None:
            return outcome.statistics
        log.warning("shard %d: %s; looking for the document that causes it", shard, outcome.reason)
        before = len(failed)
        pieces = _narrow([pair for pair in pairs if pair not in failed], outcome, Task(shard, probe=True), run, note)
        if len(failed) == before and attempt:
            # Each piece alone can be done, all together cannot: out of memory, most likely.
            outcome = run(Task(shard, failed, pieces))
            if outcome.reason is None:
                return outcome.statistics
    raise RetrievalKDError(f"shard {shard} cannot be scored: {outcome.reason}; finished shards are kept")


def _whole(task: Task, run: Callable[[Task], Outcome], note: Callable[[Pair, str], None]) -> Outcome:
    """What came of the whole shard, without the pairs whose own scores are not finite."""
    outcome = run(task)
    if outcome.died:
        log.warning("shard %d: %s; scoring it again", task.shard, outcome.reason)
        outcome = run(task)
    while outcome.bad:
        for pair in outcome.bad:
            note(pair, str(outcome.reason))
        outcome = run(task)
    return outcome


def _narrow(
    pairs: list[Pair], failure: Outcome, probe: Task, run: Callable[[Task], Outcome], note: Callable[..., None]
) -> list[list[Pair]]:
    """The largest pieces of ``pairs`` that can be scored; a pair that fails alone is noted."""
    if failure.bad:
        for pair in failure.bad:
            note(pair, str(failure.reason))
        rest = [pair for pair in pairs if pair not in set(failure.bad)]
        return _tried(rest, probe, run, note) if rest else []
    if len(pairs) == 1:
        if failure.died:  # a process may be killed for reasons of its own
            again = run(_of(probe, pairs))
            if again.reason is None:
                return [pairs]
            failure = again
        note(pairs[0], str(failure.reason), fatal=failure.died)
        return []
    half = len(pairs) // 2
    return _tried(pairs[:half], probe, run, note) + _tried(pairs[half:], probe, run, note)


def _tried(
    pairs: list[Pair], probe: Task, run: Callable[[Task], Outcome], note: Callable[..., None]
) -> list[list[Pair]]:
    outcome = run(_of(probe, pairs))
    return [pairs] if outcome.reason is None else _narrow(pairs, outcome, probe, run, note)


def _of(probe: Task, pairs: list[Pair]) -> Task:
    return Task(probe.shard, pieces=[pairs], probe=True)
