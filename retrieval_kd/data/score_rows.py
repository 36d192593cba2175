"""Random access to a score file by query, with few shards in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from retrieval_kd.data.scores import ScoredQuery, Scores, read_shard, rows_of

_SHARDS_IN_MEMORY = 2


class ScoreRows:
    """The rows of a score file by query id. Memory: the query ids, and the shards that were read last."""

    def __init__(self, scores: Scores) -> None:
        import pyarrow.parquet as pq

        self.scores = scores
        self._place: dict[str, tuple[int, int]] = {}
        self._tables: OrderedDict[int, Any] = OrderedDict()
        for shard, path in enumerate(scores.shards):
            for row, query_id in enumerate(pq.read_table(path, columns=["query_id"])["query_id"].to_pylist()):
                self._place[query_id] = (shard, row)

    def __contains__(self, query_id: str) -> bool:
        return query_id in self._place

    def __iter__(self) -> Iterator[str]:
        """The query ids, in the file's order."""
        return iter(self._place)

    def find(self, query_id: str) -> ScoredQuery | None:
        """The row of a query, None when the file has none."""
        place = self._place.get(query_id)
        if place is None:
            return None
        shard, row = place
        if shard not in self._tables:
            self._tables[shard] = read_shard(self.scores.shards[shard])
            if len(self._tables) > _SHARDS_IN_MEMORY:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return next(rows_of(self._tables[shard].slice(row, 1)))
