"""Scoring the pairs of one shard and writing its file; the same code in this process and in a worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.data.scores import BLAMED, FAILED, shard_name, write_shard
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.teachers.base import Candidates, Scored, Teacher
from retrieval_kd.teachers.isolate import Outcome, Pair, ShardPairs, Task

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.teachers.reuse import KnownScores


class BrokenProcessError(RetrievalKDError):
    """The process can score nothing any more, such as after an assertion on a GPU. A worker ends on it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the GPU is of no use to this process any more ({str(error).splitlines()[0]}); finished shards are kept: "
            "run the same command with --workers 1, which starts again and finds the document that causes it"
        )


def shard_pairs(number: int, queries: Sequence[Candidates], collection: Collection, divides: bool) -> ShardPairs:
    """All pairs of a shard, query by query, with their names (looked up when they are asked for)."""
    return ShardPairs(number, _pairs(queries), _Names(queries, collection), divides)


class ShardScorer:
    """A teacher at work on shards. ``shards`` are ranges of ``candidates``."""

    def __init__(
        self,
        teacher: Teacher,
        collection: Collection,
        candidates: Sequence[Candidates],
        shards: Sequence[range],
        out: Path,
        known: KnownScores | None = None,
    ) -> None:
        self.teacher = teacher
        self.collection = collection
        self.candidates = candidates
        self.shards = shards
        self.out = out
        self.known = known

    def queries(self, shard: int) -> list[Candidates]:
        """The queries of a shard with their candidates."""
        return [self.candidates[i] for i in self.shards[shard]]

    def run(self, task: Task) -> Outcome:
        """What came of a task; a `RetrievalKDError` is for the whole run and passes through."""
        queries = self.queries(task.shard)
        scores = [np.full(len(query.rows), np.nan, dtype=np.float32) for query in queries]
        lost = [np.zeros(len(query.rows), dtype=np.int32) for query in queries]
        wanted = [[pair for pair in _pairs(queries) if pair not in task.failed]]
        counts = self.teacher.counts.copy()
        takes_known = self.known is not None and not task.probe and task.pieces is None
        reused = self._take_known(queries, wanted, scores, lost) if takes_known else 0
        for piece in wanted if task.pieces is None else task.pieces:
            if not piece:
                continue
            try:
                bad = self._score(queries, piece, scores, lost)
            except RetrievalKDError:
                raise
            except Exception as error:
                if _breaks_the_process(error):
                    raise BrokenProcessError(error) from error
                return Outcome(f"{type(error).__name__}: {error}"[:500])
            if bad:
                return Outcome("the score is NaN or infinite", bad if self.teacher.independent else [])
        if task.probe:
            return Outcome()
        statistics = _counted(lost, self.teacher.counts - counts)
        if self.known is not None:
            statistics["reused_pairs"] = reused
        return Outcome(statistics=self._write(task, queries, scores, lost, statistics))

    def _score(
        self, queries: Sequence[Candidates], piece: Sequence[Pair], scores: list[np.ndarray], lost: list[np.ndarray]
    ) -> list[Pair]:
        """Scores a piece into the arrays; the pairs whose score is not finite."""
        by_query: dict[int, list[int]] = {}
        for i, j in piece:
            by_query.setdefault(i, []).append(j)
        places = [(i, np.array(positions)) for i, positions in by_query.items()]
        part = [Candidates(queries[i].query_id, queries[i].text, queries[i].rows[js]) for i, js in places]
        scored = self.teacher.score(part, [self.collection.documents.texts(query.rows) for query in part])
        _refuse_wrong_lengths(part, scored)
        for (i, js), values, tokens in zip(places, *scored, strict=True):
            scores[i][js] = values
            lost[i][js] = tokens
        return [(i, j) for i, j in piece if not np.isfinite(scores[i][j])]

    def _take_known(
        self,
        queries: Sequence[Candidates],
        wanted: list[list[Pair]],
        scores: list[np.ndarray],
        lost: list[np.ndarray],
    ) -> int:
        """Fills in what was scored before and takes it off ``wanted``; how many pairs that were."""
        assert self.known is not None
        found: set[Pair] = set()
        for i, query in enumerate(queries):
            doc_ids = self.collection.documents.ids_of(query.rows)
            for j, (value, tokens) in self.known.find(query.query_id, doc_ids).items():
                scores[i][j], lost[i][j] = value, tokens
                found.add((i, j))
        wanted[0] = [pair for pair in wanted[0] if pair not in found]
        return len(found)

    def _write(
        self,
        task: Task,
        queries: Sequence[Candidates],
        scores: list[np.ndarray],
        lost: list[np.ndarray],
        statistics: dict[str, Any],
    ) -> dict[str, Any]:
        ids = [self.collection.documents.ids_of(query.rows) for query in queries]
        kept = [[j for j in range(len(ids[i])) if (i, j) not in task.failed] for i in range(len(queries))]
        failed = [[queries[i].query_id, ids[i][j], reason] for (i, j), reason in sorted(task.failed.items())]
        statistics |= {"pairs": sum(map(len, kept)), "failed_pairs": len(failed)}
        statistics |= {FAILED: failed, BLAMED: task.blamed}
        rows = [i for i in range(len(queries)) if kept[i]]
        statistics["queries"] = len(rows)
        write_shard(
            self.out / shard_name(task.shard, len(self.shards)),
            [queries[i].query_id for i in rows],
            [[ids[i][j] for j in kept[i]] for i in rows],
            [scores[i][kept[i]] for i in rows],
            statistics,
            [lost[i][kept[i]] for i in rows],
        )
        return statistics


class _Names(Mapping[Pair, tuple[str, str]]):
    """Pair → query and document id."""

    def __init__(self, queries: Sequence[Candidates], collection: Collection) -> None:
        self._queries, self._documents = queries, collection.documents

    def __getitem__(self, pair: Pair) -> tuple[str, str]:
        query = self._queries[pair[0]]
        return query.query_id, self._documents.id(int(query.rows[pair[1]]))

    def __iter__(self) -> Iterator[Pair]:
        return iter(_pairs(self._queries))

    def __len__(self) -> int:
        return len(_pairs(self._queries))


def _pairs(queries: Sequence[Candidates]) -> list[Pair]:
    return [(i, j) for i, query in enumerate(queries) for j in range(len(query.rows))]


def _breaks_the_process(error: Exception) -> bool:
    """Whether this is a GPU's error after which every call fails; running out of its memory is not."""
    torch = sys.modules.get("torch")
    if torch is None or isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _counted(lost: Sequence[np.ndarray], counts: Any) -> dict[str, Any]:
    flat = np.concatenate(list(lost))
    return {"truncated_pairs": int((flat > 0).sum()), "tokens_lost": int(flat.sum()), **dict(sorted(counts.items()))}


def _refuse_wrong_lengths(part: Sequence[Candidates], scored: Scored) -> None:
    if not len(part) == len(scored.scores) == len(scored.tokens_lost):
        raise RetrievalKDError(f"the teacher gave {len(scored.scores)} lists of scores for {len(part)} queries")
    for query, values in zip(part, scored.scores, strict=True):
        if len(values) != len(query.rows):
            raise RetrievalKDError(
                f"the teacher gave {len(values)} scores for {len(query.rows)} candidates of query {query.query_id!r}"
            )
