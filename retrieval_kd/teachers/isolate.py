"""Finishing a shard although something in it cannot be scored: it is found by halving, named, and left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

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
    blamed: dict[str, str] = field(default_factory=dict)
    """The documents and queries that made them fail, with the reason."""
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


Run = Callable[[Task], Outcome]


class Failures:
    """What could not be scored in the whole run. Safe for several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.suspects: set[str] = set()
        """Documents that failed on their own: where they come again, they are tried first."""
        self._blamed: dict[int, dict[str, str]] = {}
        self._lock = Lock()

    def blame(self, shard: int, blamed: Mapping[str, str]) -> None:
        """Notes what made pairs of a shard fail. Raises `RetrievalKDError` for more than ``limit`` in all shards."""
        with self._lock:
            self._blamed[shard] = dict(blamed)
            found = {name: reason for of_shard in self._blamed.values() for name, reason in of_shard.items()}
        if len(found) > self.limit:
            named = "; ".join(f"{name}: {reason}" for name, reason in list(found.items())[:3])
            raise RetrievalKDError(
                f"{len(found)} documents or queries could not be scored ({named}{'; …' * (len(found) > 3)}), "
                f"--max-failed allows {self.limit}; finished shards are kept: allow more and run the same command "
                "again. Mending the documents or the model (float32 weights, another checkpoint) makes it a new run"
            )


class ShardPairs(NamedTuple):
    """The pairs of a shard and what they are called."""

    number: int
    pairs: list[Pair]
    names: Mapping[Pair, tuple[str, str]]
    """Pair → query and document id."""
    divides: bool = True
    """A query's documents may be scored apart (not those of a listwise teacher, whose scores hold in one list)."""


def finish_shard(shard: ShardPairs, run: Run, failures: Failures) -> dict[str, Any]:
    """The statistics of a shard after it was written, without the pairs that cannot be scored.

    A process that died is given the shard once more; what fails again is halved until single pairs are left. The shard
    is then scored as a whole without these, so that its bytes do not depend on how they were found.
    """
    search = _Search(shard, run, failures)
    search.try_suspects()
    for attempt in range(_ATTEMPTS):
        outcome = search.whole()
        if outcome.reason is None:
            return search.finished(outcome)
        log.warning("shard %d: %s; looking for what causes it", shard.number, outcome.reason)
        before = len(search.failed)
        pieces = search.narrow(search.left(), outcome)
        if len(search.failed) == before and (attempt or not outcome.died):
            # Each piece alone can be done, all together cannot: out of memory, most likely.
            outcome = run(search.task(pieces=_undivided(pieces) if not shard.divides else pieces))
            if outcome.reason is None:
                return search.finished(outcome)
    raise RetrievalKDError(f"shard {shard.number} cannot be scored: {outcome.reason}; finished shards are kept")


class _Search:
    """What is known about the pairs of one shard."""

    def __init__(self, shard: ShardPairs, run: Run, failures: Failures) -> None:
        self.shard, self.run, self.failures = shard, run, failures
        self.failed: dict[Pair, str] = {}
        self._good: set[int] = set()
        """Queries of which some pair could be scored."""

    def left(self) -> list[Pair]:
        return [pair for pair in self.shard.pairs if pair not in self.failed]

    def task(self, pieces: list[list[Pair]] | None = None) -> Task:
        good = {i for i, _ in self.left()}
        return Task(self.shard.number, dict(self.failed), self._blamed(good), pieces)

    def finished(self, outcome: Outcome) -> dict[str, Any]:
        """The statistics of the shard that was written, after what was left out is said."""
        for name, reason in self.task().blamed.items():
            log.warning("shard %d: %s cannot be scored: %s; left out", self.shard.number, name, reason)
        return outcome.statistics

    def try_suspects(self) -> None:
        """Finds out alone what has failed in other shards, so that it need not be looked for again."""
        for pair in self.shard.pairs if self.failures.suspects else ():
            if self.shard.names[pair][1] in self.failures.suspects:
                self._tried([pair])

    def whole(self) -> Outcome:
        """What came of the whole shard, without the pairs whose own scores are not finite."""
        outcome = self.run(self.task())
        if outcome.died:
            log.warning("shard %d: %s; scoring it again", self.shard.number, outcome.reason)
            outcome = self.run(self.task())
        while outcome.bad:
            self._good |= {pair[0] for pair in self.left()} - _wholly(outcome.bad, self.left())
            self._note(outcome.bad, str(outcome.reason))
            outcome = self.run(self.task())
        return outcome

    def narrow(self, pairs: list[Pair], failure: Outcome) -> list[list[Pair]]:
        """The largest pieces of ``pairs`` that can be scored; a pair that fails alone is noted."""
        if failure.bad:
            self._note(failure.bad, str(failure.reason))
            bad = set(failure.bad)
            rest = [pair for pair in pairs if pair not in bad]
            return self._tried(rest) if rest else []
        if len(pairs) == 1:
            if failure.died:  # a process may be killed for reasons of its own
                failure = self._probe(pairs)
                if failure.reason is None:
                    return [pairs]
            self.failures.suspects.add(self.shard.names[pairs[0]][1])
            self._note(pairs, str(failure.reason))
            return []
        half = len(pairs) // 2
        return self._tried(pairs[:half]) + self._tried(pairs[half:])

    def _tried(self, pairs: list[Pair]) -> list[list[Pair]]:
        outcome = self._probe(pairs)
        if outcome.reason is None:
            self._good |= {i for i, _ in pairs}
            return [pairs]
        return self.narrow(pairs, outcome)

    def _probe(self, pairs: list[Pair]) -> Outcome:
        return self.run(Task(self.shard.number, pieces=[pairs], probe=True))

    def _note(self, pairs: Sequence[Pair], reason: str) -> None:
        self.failed.update(dict.fromkeys(pairs, reason))
        self.failures.blame(self.shard.number, self._blamed(self._good))

    def _blamed(self, good: set[int]) -> dict[str, str]:
        """Documents; but a query that is not ``good``, with two failed documents at least, is to blame itself."""
        by_query: dict[int, list[Pair]] = {}
        for pair in self.failed:
            by_query.setdefault(pair[0], []).append(pair)
        blamed = {}
        for i, pairs in by_query.items():
            for pair in pairs:
                query_id, doc_id = self.shard.names[pair]
                alone = len(pairs) == 1 or i in good
                blamed[f"document {doc_id!r}" if alone else f"query {query_id!r}"] = self.failed[pair]
        return dict(sorted(blamed.items()))


def _wholly(bad: Sequence[Pair], pairs: Sequence[Pair]) -> set[int]:
    """The queries all of whose ``pairs`` are ``bad``."""
    missing = set(bad)
    return {i for i, _ in bad} - {pair[0] for pair in pairs if pair not in missing}


def _undivided(pieces: Sequence[Sequence[Pair]]) -> list[list[Pair]]:
    """``pieces`` with each query's pairs together: the queries one by one."""
    by_query: dict[int, list[Pair]] = {}
    for piece in pieces:
        for pair in piece:
            by_query.setdefault(pair[0], []).append(pair)
    return [sorted(pairs) for _, pairs in sorted(by_query.items())]
