"""Writing a score file row by row, when the number of shards is not known beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.atomic import write_atomically
from retrieval_kd.data.scores import FAILED, ScoredQuery, shard_name, write_shard

PAIRS_PER_SHARD = 8192


class ShardWriter:
    """Gathers rows and writes a shard whenever there are enough pairs; a query is never divided."""

    def __init__(self, folder: Path, pairs_per_shard: int = PAIRS_PER_SHARD) -> None:
        self._folder = folder
        self._pairs_per_shard = pairs_per_shard
        self._rows: list[ScoredQuery] = []
        self._pairs = 0
        self._statistics: list[dict[str, Any]] = []

    def add(self, row: ScoredQuery) -> None:
        """Takes the next query."""
        if self._rows and self._pairs + len(row.doc_ids) > self._pairs_per_shard:
            self._flush()
        self._rows.append(row)
        self._pairs += len(row.doc_ids)

    def close(self) -> list[dict[str, Any]]:
        """The statistics of all shards, after the last was written and all got their names."""
        self._flush()
        shards = len(self._statistics)
        for i in range(shards):
            self._unnamed(i).rename(self._folder / shard_name(i, shards))
        return self._statistics

    def _flush(self) -> None:
        if not self._rows:
            return
        lost = [row.tokens_lost for row in self._rows]
        flat = np.concatenate([np.empty(0, dtype=np.int32), *(of_row for of_row in lost if of_row is not None)])
        statistics = {
            "queries": len(self._rows),
            "pairs": self._pairs,
            "truncated_pairs": int((flat > 0).sum()),
            "tokens_lost": int(flat.sum()),
            "failed_pairs": 0,
            FAILED: [],
        }
        rows = self._rows
        path = self._unnamed(len(self._statistics))
        write_shard(
            path, [r.query_id for r in rows], [r.doc_ids for r in rows], [r.scores for r in rows], statistics, lost
        )
        self._statistics.append(statistics)
        self._rows, self._pairs = [], 0

    def _unnamed(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:05d}.parquet"


def write_failed(folder: Path, failed: Sequence[Sequence[str]]) -> None:
    """Writes ``failed.jsonl``: query, document and reason of each pair that could not be scored, if there is any."""
    if failed:
        names = ("query_id", "doc_id", "reason")
        lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in failed]
        write_atomically(folder / "failed.jsonl", "".join(f"{line}\n" for line in lines).encode())
