"""Groups pairs by query out of core: a file may name a query anywhere, and need not fit into memory.

Pairs are spilled to one temporary file, divided by the CRC-32 of their query id; a part that is still too large is
divided again by the next bits. So memory does not grow with the file, unless one query alone is that large.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from retrieval_kd.data.scores import ScoredQuery
from retrieval_kd.errors import DataError

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Pairs, Source

_ROWS_IN_MEMORY = 131_072
_BITS = 8
_HASH_BITS = 32


class Spill:
    """Pairs on disk, to be read back query by query. A context manager: leaving it deletes the file."""

    def __init__(self, folder: Path, bits_used: int = 0) -> None:
        self._folder = folder
        self._bits_used = bits_used
        self._path = folder / f"pairs-{bits_used}"
        self._file = self._path.open("w+b")
        self._blocks: list[list[tuple[int, int]]] = [[] for _ in range(2**_BITS)]
        self._rows = np.zeros(2**_BITS, dtype=np.int64)
        self._waiting: list[Any] = []
        self._waiting_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink()

    @property
    def rows(self) -> int:
        """How many pairs were added."""
        return int(self._rows.sum()) + self._waiting_rows

    def add(self, pairs: Pairs) -> None:
        """Adds a batch; batches come in the order of the file."""
        import pyarrow as pa

        columns = [pairs.query_ids, pairs.doc_ids, pa.array(pairs.scores), pa.array(pairs.places)]
        queries = pairs.query_ids.dictionary_encode()
        hashes = np.array([query_hash(query_id) for query_id in queries.dictionary.to_pylist()], dtype=np.uint32)
        columns.append(pa.array(hashes[queries.indices.to_numpy()]))
        self._add_rows(pa.RecordBatch.from_arrays(columns, schema=_schema()))

    def queries(self, source: Source, counts: Counter[str]) -> Iterator[ScoredQuery]:
        """Every query once, in the order of the CRC-32 of its id, then of the id; its documents as first read.

        Adds to ``counts`` the ``repeated_pairs``. Raises `DataError` for a pair that has two different scores.
        """
        self._write()
        for part in range(2**_BITS):
            if self._rows[part] <= _ROWS_IN_MEMORY or self._bits_used + _BITS == _HASH_BITS:
                yield from _grouped(self._read(part), source, counts)
                continue
            with Spill(self._folder, self._bits_used + _BITS) as finer:
                for batch in self._read(part):
                    finer._add_rows(batch)
                yield from finer.queries(source, counts)

    def _add_rows(self, batch: Any) -> None:
        if not len(batch):
            return
        self._waiting.append(batch)
        self._waiting_rows += len(batch)
        if self._waiting_rows >= _ROWS_IN_MEMORY:
            self._write()

    def _write(self) -> None:
        """Appends the waiting rows to the file, a block for each part."""
        import pyarrow as pa

        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting).combine_chunks()
        self._waiting, self._waiting_rows = [], 0
        part_of = (table["hash"].to_numpy() >> (_HASH_BITS - _BITS - self._bits_used)) & (2**_BITS - 1)
        order = np.argsort(part_of, kind="stable")
        counts = np.bincount(part_of, minlength=2**_BITS)
        starts = np.concatenate([[0], np.cumsum(counts)])
        (sorted_rows,) = table.take(order).combine_chunks().to_batches()
        self._file.seek(0, 2)
        for part in np.flatnonzero(counts).tolist():
            block = sorted_rows.slice(starts[part], counts[part]).serialize()
            self._blocks[part].append((self._file.tell(), block.size))
            self._file.write(block)
        self._rows += counts

    def _read(self, part: int) -> Iterator[Any]:
        import pyarrow as pa

        for offset, size in self._blocks[part]:
            self._file.seek(offset)
            yield pa.ipc.read_record_batch(pa.py_buffer(self._file.read(size)), _schema())


def query_hash(query_id: str) -> int:
    """The CRC-32 of a query id."""
    return zlib.crc32(query_id.encode())


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("query_id", pa.string()),
            ("doc_id", pa.string()),
            ("score", pa.float32()),
            ("place", pa.int64()),
            ("hash", pa.uint32()),
        ]
    )


def _grouped(batches: Iterator[Any], source: Source, counts: Counter[str]) -> Iterator[ScoredQuery]:
    """The queries of one part, which is in memory."""
    import pyarrow as pa

    table = pa.Table.from_batches(batches, _schema()).combine_chunks()
    if not len(table):
        return
    queries = table["query_id"].combine_chunks().dictionary_encode()
    documents = table["doc_id"].combine_chunks().dictionary_encode()
    scores = table["score"].to_numpy()
    ids = queries.dictionary.to_pylist()
    in_order = sorted(range(len(ids)), key=lambda i: (query_hash(ids[i]), ids[i]))
    position = np.empty(len(ids), dtype=np.int64)
    position[in_order] = np.arange(len(ids))
    query = position[queries.indices.to_numpy()]
    pair = query * len(documents.dictionary) + documents.indices.to_numpy()
    _, first, pair = np.unique(pair, return_index=True, return_inverse=True)
    _refuse_conflicts(table, scores, first[pair], source)
    counts["repeated_pairs"] += len(table) - len(first)
    kept = np.sort(first)
    kept = kept[np.argsort(query[kept], kind="stable")]
    ends = np.cumsum(np.bincount(query[kept], minlength=len(ids))).tolist()
    doc_ids = table["doc_id"].take(kept).to_pylist()
    start = 0
    for i, end in zip(in_order, ends, strict=True):
        yield ScoredQuery(ids[i], doc_ids[start:end], scores[kept[start:end]])
        start = end


def _refuse_conflicts(table: Any, scores: np.ndarray, first: np.ndarray, source: Source) -> None:
    """Raises `DataError` when row i and the first row of its pair, ``first[i]``, have different scores."""
    conflicts = np.flatnonzero(scores != scores[first])
    if len(conflicts):
        i = int(conflicts[0])
        earlier = int(first[i])
        places = [source.place(table["place"][row].as_py()) for row in (earlier, i)]
        raise DataError(
            f"{places[0]} and {places[1]}: query {table['query_id'][i].as_py()!r}, document "
            f"{table['doc_id'][i].as_py()!r} has two scores, {scores[earlier]!s} and {scores[i]!s}; one is needed"
        )
