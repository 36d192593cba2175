"""The candidates of a scoring run: the union of runs and judged documents, on disk, read a query at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from retrieval_kd.artifact import InputRef, Manifest, is_artifact, resolve
from retrieval_kd.data.run import RunArtifact, stream_run
from retrieval_kd.data.scores import Scores
from retrieval_kd.errors import DataError, InputError, UsageError, first
from retrieval_kd.fingerprint import file_sha256
from retrieval_kd.progress import progress
from retrieval_kd.teachers.base import Candidates

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

JUDGED = "qrels:"
"""Prefix of the pseudo-run that holds a split's judged relevant documents: ``qrels:train``."""

_QUERIES_AT_ONCE = 1024


class CandidateTable(Sequence[Candidates]):
    """The queries and candidate rows in a file that `gather_candidates` wrote, memory-mapped."""

    def __init__(self, path: Path, collection: Collection) -> None:
        import pyarrow as pa

        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._ids, self._rows = table["query_id"], table["rows"]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._ids.chunks)])
        self._texts = collection.queries("all")
        self.lengths: np.ndarray = np.concatenate(
            [np.diff(chunk.offsets.to_numpy()) for chunk in self._rows.chunks] or [np.empty(0, dtype=np.int32)]
        )
        """int32 [queries]: the number of candidates of each query."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Candidates: ...
    @overload
    def __getitem__(self, index: slice) -> list[Candidates]: ...
    def __getitem__(self, index: int | slice) -> Candidates | list[Candidates]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(range(len(self))[index])

    def _at(self, index: int) -> Candidates:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = index - int(self._starts[chunk])
        query_id = self._ids.chunk(chunk)[place].as_py()
        rows = self._rows.chunk(chunk)[place].values.to_numpy()
        return Candidates(query_id, self._texts[query_id], rows)


Source = tuple[str, Iterable[tuple[str, list[str]]]]
"""The name of a source, and its queries with their documents."""


class Sources:
    """Candidate sources: runs (artifacts or TREC files), score files, and ``qrels:SPLIT``."""

    def __init__(self, collection: Collection, given: Sequence[str | Path]) -> None:
        if not given:
            raise UsageError("give at least one --candidates RUN (or qrels:SPLIT)")
        self.given = [str(source) for source in given]
        """The sources as they were named."""
        self.judged = [source for source in self.given if source.startswith(JUDGED)]
        """The sources that come from the collection itself."""
        for source in self.judged:
            collection.qrels(source.removeprefix(JUDGED))  # an unknown split is said before anything is done
        runs = [source for source in self.given if not source.startswith(JUDGED)]
        names = ["candidates" if not i else f"candidates_{i + 1}" for i in range(len(runs))]
        self.refs: dict[str, InputRef] = {name: _ref(source) for name, source in zip(names, runs, strict=True)}

    def open(self, collection: Collection, depth: int | None) -> list[Source]:
        """Name, queries and documents of each source; ``depth`` cuts runs, never judged documents."""
        return [
            (source, _judged(collection, source.removeprefix(JUDGED)) if source in self.judged else _cut(source, depth))
            for source in self.given
        ]


def gather_candidates(collection: Collection, sources: Sequence[Source], path: Path) -> CandidateTable:
    """Each query of the sources with the union of its documents, in the order in which the sources have them.

    Written to ``path``; memory grows with the number of queries, not of pairs. Raises `InputError` for unknown ids
    (how many, the first three) and when there is no candidate at all.
    """
    parts = [path.with_name(f"{path.stem}-{i}.arrow") for i in range(len(sources))]
    order: dict[str, dict[int, int]] = {}  # query → source → its place there; needed for a union only
    known = collection.queries("all")
    for i, ((name, source), part) in enumerate(zip(sources, parts, strict=True)):
        unknown = _Unknown(name)
        without: list[str] = []
        with _Writer(part) as writer, progress(f"reading candidates {i + 1} of {len(sources)}", None) as advance:
            for query_id, doc_ids in source:
                if not doc_ids:
                    without.append(query_id)
                    continue
                if query_id not in known:
                    unknown.queries.append(query_id)
                    continue
                if len(parts) > 1:
                    order.setdefault(query_id, {})[i] = writer.queries
                writer.add(query_id, _rows(collection, doc_ids, unknown))
                advance(len(doc_ids))
        unknown.refuse()
        if without:
            log.warning("%s: %d queries have no candidates: %s", name, len(without), first(without))
    tables = [CandidateTable(part, collection) for part in parts]
    if not any(len(table) for table in tables):
        names = ", ".join(name for name, _ in sources)
        raise InputError(f"{names}: no candidates in the runs; search an index over a split first")
    if len(parts) == 1:
        parts[0].replace(path)
        return tables[0]
    with _Writer(path) as writer:
        for query_id, places in order.items():
            rows = np.concatenate([tables[i][place].rows for i, place in places.items()])
            writer.add(query_id, rows[np.sort(np.unique(rows, return_index=True)[1])])
    for part in parts:
        part.unlink()
    return CandidateTable(path, collection)


def plan_shards(lengths: Sequence[int] | np.ndarray, pairs_per_shard: int) -> list[range]:
    """Consecutive queries in shards of at most ``pairs_per_shard`` pairs (a query is never divided)."""
    shards: list[range] = []
    start = pairs = 0
    for i, length in enumerate(np.asarray(lengths).tolist()):
        if i > start and pairs + length > pairs_per_shard:
            shards.append(range(start, i))
            start, pairs = i, 0
        pairs += length
    return [*shards, range(start, len(lengths))] if len(lengths) else []


class _Unknown:
    """Ids that the collection does not have, gathered so that an error can say how many there are."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.queries: list[str] = []
        self.documents: dict[str, None] = {}

    def refuse(self) -> None:
        if self.queries:
            raise InputError(
                f"{self.source}: {len(self.queries)} queries are not in the collection: {first(self.queries)}; "
                "was it made from another collection?"
            )
        if self.documents:
            raise DataError(
                f"{self.source}: {len(self.documents)} documents are not in the collection: "
                f"{first(self.documents)}; was it made from another collection?"
            )


class _Writer:
    """Writes queries and rows to an Arrow file, some at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.queries = 0
        self._path = path
        self._schema = pa.schema([("query_id", pa.string()), ("rows", pa.list_(pa.int32()))])
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._ids: list[str] = []
        self._rows: list[np.ndarray] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._flush()
        self._writer.close()
        self._file.close()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def add(self, query_id: str, rows: np.ndarray) -> None:
        self.queries += 1
        self._ids.append(query_id)
        self._rows.append(rows)
        if len(self._ids) == _QUERIES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._ids:
            self._writer.write(pa.record_batch([pa.array(self._ids), self._lists()], schema=self._schema))
            self._ids, self._rows = [], []

    def _lists(self) -> Any:
        import pyarrow as pa

        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in self._rows])]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, np.concatenate(self._rows).astype(np.int32))


def _rows(collection: Collection, doc_ids: list[str], unknown: _Unknown) -> np.ndarray:
    """The rows of a query's documents, each once."""
    try:
        rows = collection.documents.rows(doc_ids)
    except DataError:
        missing = [doc_id for doc_id in doc_ids if not collection.documents.known(doc_id)]
        unknown.documents.update(dict.fromkeys(missing))
        return np.empty(0, dtype=np.int64)
    return np.asarray(rows, dtype=np.int64)


def _cut(source: str, depth: int | None) -> Iterator[tuple[str, list[str]]]:
    for query_id, doc_ids in stream_run(source):
        yield query_id, doc_ids[:depth]


def _judged(collection: Collection, split: str) -> Iterator[tuple[str, list[str]]]:
    for query_id, judged in collection.qrels(split).items():
        yield query_id, [doc_id for doc_id, relevance in judged.items() if relevance > 0]


def _ref(source: str) -> InputRef:
    path = Path(source)
    if path.is_file():
        return InputRef(file_sha256(path), name=str(path.resolve()))
    if is_artifact(path) and Manifest.read(resolve(path)).artifact == "scores":
        return Scores.load(path).ref()
    return RunArtifact.load(path).ref()
