"""The score file: Parquet shards with one row a query, holding a teacher's raw scores and nothing derived from them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrieval_kd.artifact import Artifact
from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import ArtifactError, RetrievalKDError, first

if TYPE_CHECKING:
    import pyarrow as pa

STATISTICS_KEY = b"retrieval_kd"
CHECKSUM_KEY = b"retrieval_kd_crc32"
LOST = ("truncated_pairs", "tokens_lost")
BLAMED = "blamed"
"""In a shard's statistics: what made pairs fail (``document 'd7'``, ``query 'q3'``) and why."""
FAILED = "failed"
"""In a shard's statistics: query, document and reason of each pair that could not be scored."""

_LAYOUT = {"candidates", "slice", "depth", "pairs_per_shard", "batch_tokens"}
"""Keys of a recipe that say which pairs are scored and in which portions."""


def teacher_identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a score file's recipe that decides what a pair's score is."""
    return {key: value for key, value in recipe.items() if key not in _LAYOUT}


class ScoredQuery(NamedTuple):
    """One row: a query, the documents its teacher scored, and their raw scores (float32, higher is better)."""

    query_id: str
    doc_ids: list[str]
    scores: np.ndarray
    tokens_lost: np.ndarray | None = None
    """int32: tokens of each pair that the teacher cut off; None where that is not known (an imported file)."""


@dataclass(frozen=True)
class ScoreArrays:
    """A score file as flat arrays: query i owns ``rows[offsets[i]:offsets[i+1]]`` and the same slice of ``scores``."""

    query_ids: list[str]
    offsets: np.ndarray
    doc_ids: list[str]
    scores: np.ndarray


class Scores(Artifact):
    """A finished score file."""

    kind = "scores"

    @cached_property
    def shards(self) -> list[Path]:
        """The shard files, in order."""
        names = [name for name in self.manifest.files if name.endswith(".parquet")]
        return [self.path / name for name in sorted(names, key=lambda name: (len(name), name))]

    @property
    def score_kind(self) -> str:
        """What a score is: ``logit``, ``log_odds``, ``cosine``, ``dot``, ``rank`` and so on."""
        return str(self.manifest.details["score_kind"])

    def __len__(self) -> int:
        return self.manifest.counts["queries"]

    def __iter__(self) -> Iterator[ScoredQuery]:
        for shard in self.shards:
            yield from rows_of(read_shard(shard))

    def arrays(self) -> ScoreArrays:
        """The whole file as flat arrays."""
        query_ids: list[str] = []
        doc_ids: list[str] = []
        lengths: list[int] = []
        scores = []
        for row in self:
            query_ids.append(row.query_id)
            doc_ids += row.doc_ids
            lengths.append(len(row.doc_ids))
            scores.append(row.scores)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return ScoreArrays(query_ids, offsets, doc_ids, np.concatenate(scores).astype(np.float32))

    def problems(self) -> list[str]:
        """Duplicate queries or documents, scores that are not finite, lists of unequal length, wrong counts."""
        found: list[str] = []
        seen: set[str] = set()
        pairs = 0
        for row in self:
            pairs += len(row.doc_ids)
            if row.query_id in seen:
                found.append(f"query {row.query_id!r} has two rows")
            seen.add(row.query_id)
            if len(row.doc_ids) != len(row.scores):
                found.append(f"query {row.query_id!r}: {len(row.doc_ids)} documents but {len(row.scores)} scores")
            elif row.tokens_lost is not None and len(row.tokens_lost) != len(row.scores):
                found.append(f"query {row.query_id!r}: {len(row.scores)} scores but {len(row.tokens_lost)} tokens_lost")
            elif not np.isfinite(row.scores).all():
                found.append(f"query {row.query_id!r}: a score is NaN or infinite")
            if len(set(row.doc_ids)) != len(row.doc_ids):
                found.append(f"query {row.query_id!r}: a document is scored twice")
        for name, value in (("queries", len(seen)), ("pairs", pairs)):
            if self.manifest.counts.get(name) != value:
                found.append(f"the manifest counts {self.manifest.counts.get(name)} {name}, the shards hold {value}")
        return found


def shard_name(shard: int, shards: int) -> str:
    """The file name of a shard."""
    return f"shard-{shard:05d}-of-{shards:05d}.parquet"


def schema() -> pa.Schema:
    """The columns of a shard."""
    import pyarrow as pa

    return pa.schema(
        [
            ("query_id", pa.string()),
            ("doc_ids", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float32())),
            ("tokens_lost", pa.list_(pa.int32())),
        ]
    )


def write_shard(
    path: Path,
    query_ids: Sequence[str],
    doc_ids: Sequence[Sequence[str]],
    scores: Sequence[np.ndarray],
    statistics: Mapping[str, Any],
    tokens_lost: Sequence[np.ndarray | None] | None = None,
) -> None:
    """Writes one shard whole or not at all. The same rows give the same bytes.

    ``statistics`` (counts, and what failed) travel in the file, so that a resumed run can add them up.
    ``tokens_lost`` is None for what is not known, a row or all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_bad_scores(query_ids, doc_ids, scores)
    known: Sequence[np.ndarray | None] = [None] * len(query_ids) if tokens_lost is None else tokens_lost
    said = json.dumps(statistics, sort_keys=True).encode()
    table = pa.table(
        [
            pa.array(query_ids, pa.string()),
            pa.array([list(ids) for ids in doc_ids], pa.list_(pa.string())),
            pa.array([np.asarray(values, dtype=np.float32) for values in scores], pa.list_(pa.float32())),
            pa.array([None if lost is None else np.asarray(lost, dtype=np.int32) for lost in known], schema()[3].type),
        ],
        schema=schema().with_metadata({STATISTICS_KEY: said, CHECKSUM_KEY: _checksum(said)}),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_shard(path: Path) -> pa.Table:
    """A shard's table, its page checksums verified. Raises `ArtifactError` when the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        names = ", ".join(table.column_names)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise ArtifactError(f"{path}: damaged score shard ({(str(error).splitlines() or [''])[0]})") from error
    if table.schema.remove_metadata() != schema():
        raise ArtifactError(f"{path}: not a score shard (columns {names})")
    return table


def rows_of(table: pa.Table) -> Iterator[ScoredQuery]:
    """The rows of a shard's table."""
    for query_id, doc_ids, scores, lost in zip(
        table["query_id"].to_pylist(), table["doc_ids"].to_pylist(), table["scores"], table["tokens_lost"], strict=True
    ):
        tokens_lost = lost.values.to_numpy(zero_copy_only=False) if lost.is_valid else None
        yield ScoredQuery(query_id, doc_ids, scores.values.to_numpy(zero_copy_only=False), tokens_lost)


def shard_statistics(table: pa.Table) -> dict[str, Any]:
    """The statistics `write_shard` put into the file. Raises `ArtifactError` when they are damaged."""
    metadata = table.schema.metadata or {}
    said = metadata.get(STATISTICS_KEY, b"")
    if metadata.get(CHECKSUM_KEY) != _checksum(said):
        raise ArtifactError("damaged score shard (its statistics differ from their checksum)")
    statistics: dict[str, Any] = json.loads(said)
    return statistics


def verified_statistics(path: Path) -> dict[str, Any]:
    """The statistics of a shard that is read whole. Raises `ArtifactError` when anything in it is damaged.

    A Parquet footer has no checksum: the rows are counted, because a damaged one may hide some.
    """
    table = read_shard(path)
    statistics = shard_statistics(table)
    pairs = sum(len(row.doc_ids) for row in rows_of(table))
    if (len(table), pairs) != (statistics["queries"], statistics["pairs"]):
        raise ArtifactError(f"{path}: damaged score shard ({len(table)} queries and {pairs} pairs were read)")
    return statistics


def _checksum(said: bytes) -> bytes:
    return f"{zlib.crc32(said):08x}".encode()


def total_counts(statistics: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The counts of a score file from the statistics of its shards."""
    totals: dict[str, int] = dict.fromkeys(("queries", "pairs", "shards", *LOST, "failed_pairs"), 0)
    for of_shard in statistics:
        totals["shards"] += 1
        for name, value in of_shard.items():
            if name not in (FAILED, BLAMED):
                totals[name] = totals.get(name, 0) + int(value)
    return totals


def _refuse_bad_scores(
    query_ids: Sequence[str], doc_ids: Sequence[Sequence[str]], scores: Sequence[np.ndarray]
) -> None:
    bad: list[str] = []
    for query_id, ids, values in zip(query_ids, doc_ids, scores, strict=True):
        if len(ids) != len(values):
            raise RetrievalKDError(
                f"the teacher gave {len(values)} scores for the {len(ids)} candidates of query {query_id!r}"
            )
        bad += [f"{query_id}/{ids[i]}" for i in np.flatnonzero(~np.isfinite(values)).tolist()]
    if bad:
        raise RetrievalKDError(
            f"the teacher gave NaN or infinite scores for {len(bad)} (query/document) pairs: {first(bad)}; "
            "nothing of this shard was written; finished shards are kept (try float32 weights or another checkpoint)"
        )
