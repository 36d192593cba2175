"""Scored pairs on their way from a foreign file to a score file: batches with the place each pair was read at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retrieval_kd.data.collection import ALL
from retrieval_kd.data.score_formats.texts import TextLookup
from retrieval_kd.errors import DataError, UsageError

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

_PAIRS_AT_ONCE = 16_384


class Number(str):
    """A number as a JSON text wrote it, so that it is rounded once, to float32."""


class Integer(Number):
    """A whole number as a JSON text wrote it."""


class Row(NamedTuple):
    """One record of a file: a query and scores of some of its documents."""

    place: int
    query_id: str
    doc_ids: list[str]
    scores: Sequence[Any]
    """`Number` texts or floats."""


class Pairs(NamedTuple):
    """A batch of n scored pairs in the order of the file."""

    query_ids: Any
    """[n]: a `pyarrow.Array` of strings."""
    doc_ids: Any
    """[n]: a `pyarrow.Array` of strings."""
    scores: np.ndarray
    """[n] float32."""
    places: np.ndarray
    """[n] int64: the line, row or entry of the file; `Source.place` puts it into words."""


@dataclass(frozen=True)
class Source:
    """A foreign file that is being read."""

    path: Path
    collection: Collection | None = None
    entries: bool = False
    """The file has neither lines nor rows (a pickle)."""
    empty: dict[str, None] = field(default_factory=dict)
    """The queries with an empty list of documents, as they were read; they may have documents elsewhere."""

    def place(self, number: int) -> str:
        """Where a pair was read, for messages: lines from 1, rows of a Parquet file and entries from 0."""
        if self.entries:
            return f"{self.path}, entry {number}"
        return f"{self.path}, row {number}" if self.path.suffix.lower() == ".parquet" else f"{self.path}:{number}"

    @cached_property
    def texts(self) -> TextLookup:
        """The ids of texts; `UsageError` without a collection."""
        if self.collection is None:
            raise UsageError(f"{self.path} holds texts and no ids; name the collection they are from with --collection")
        return TextLookup(self.collection)

    @cached_property
    def known_queries(self) -> frozenset[str]:
        """The ids of the collection's queries; empty without a collection."""
        return frozenset() if self.collection is None else frozenset(self.collection.queries(ALL))


def batches(source: Source, rows: Iterable[Row]) -> Iterator[Pairs]:
    """The pairs of records; queries without documents are noted in ``source.empty``.

    Raises `DataError` for lists of unequal length and scores that are no numbers.
    """
    pending: list[Row] = []
    size = 0
    for row in rows:
        if len(row.doc_ids) != len(row.scores):
            raise DataError(f"{source.place(row.place)}: {len(row.doc_ids)} documents but {len(row.scores)} scores")
        for score in row.scores:
            if not isinstance(score, Number | float | int) or isinstance(score, bool):
                raise DataError(f"{source.place(row.place)}: score {score!r} is not a number")
        if not row.doc_ids:
            source.empty[row.query_id] = None
            continue
        pending.append(row)
        size += len(row.scores)
        if size >= _PAIRS_AT_ONCE:
            yield _joined(source, pending)
            pending, size = [], 0
    if pending:
        yield _joined(source, pending)


def _joined(source: Source, rows: Sequence[Row]) -> Pairs:
    import pyarrow as pa

    lengths = [len(row.doc_ids) for row in rows]
    places = np.repeat(np.array([row.place for row in rows], dtype=np.int64), lengths)
    values = [score for row in rows for score in row.scores]
    if values and isinstance(values[0], Number):
        scores = float32_of(pa.array(values, pa.string()), lambda i: source.place(int(places[i])))
    else:
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            scores = np.array([_float(value) for value in values], dtype=np.float64).astype(np.float32)
    queries = pa.array([row.query_id for row in rows], pa.string()).take(np.repeat(np.arange(len(rows)), lengths))
    return Pairs(queries, pa.array([doc for row in rows for doc in row.doc_ids], pa.string()), scores, places)


def _float(value: float | int) -> float:
    try:
        return float(value)
    except OverflowError:
        return np.inf


def float32_of(texts: Any, place: Callable[[int], str]) -> np.ndarray:
    """The nearest float32 [n] of decimal texts, rounded once (numpy and Python go through float64 and round twice).

    Raises `DataError` with ``place(i)`` for a text that is not a number or that float32 cannot hold.
    """
    import pyarrow as pa

    try:
        values: np.ndarray = texts.cast(pa.float32()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        for i, text in enumerate(texts):
            try:
                text.cast(pa.float32())
            except pa.ArrowInvalid:
                raise DataError(f"{place(i)}: score {text.as_py()!r} is not a number") from None
        raise
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        text = texts[int(bad[0])].as_py()
        raise DataError(f"{place(int(bad[0]))}: score {str(text)!r} is not a finite number that float32 can hold")
    return values


def identifier(value: Any, what: str, place: str) -> str:
    """An id as text; whole numbers become their decimal digits. Raises `DataError` for anything else."""
    if isinstance(value, Integer) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    if isinstance(value, str) and not isinstance(value, Number):
        return string(value, what, place)
    raise DataError(f"{place}: {what} {value!r} is neither a string nor a whole number")


def string(value: Any, what: str, place: str) -> str:
    """A text; `DataError` for anything else, and for one that is not Unicode (half of a surrogate pair)."""
    if not isinstance(value, str) or isinstance(value, Number):
        raise DataError(f"{place}: {what} is {value!r:.40}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {what} {value!r:.40} is not valid Unicode ({error.reason})") from error
    return value


def items(record: dict[str, Any], key: str, place: str) -> list[Any]:
    """The list under a key; `DataError` when it is missing or no list."""
    if key not in record:
        raise DataError(f"{place}: no '{key}' (it has {', '.join(record)})")
    if not isinstance(record[key], list):
        raise DataError(f"{place}: '{key}' is {record[key]!r:.40}, not a list")
    return list(record[key])


def refuse_bad_pairs(pairs: Pairs, source: Source) -> None:
    """Raises `DataError` for an empty id, a score that is not finite, or an id that the collection does not have."""
    import pyarrow.compute as pc

    for what, ids in (("query", pairs.query_ids), ("document", pairs.doc_ids)):
        empty = np.flatnonzero(pc.equal(ids, "").to_numpy(zero_copy_only=False))
        if len(empty):
            raise DataError(f"{source.place(int(pairs.places[empty[0]]))}: the {what} id is empty")
    bad = np.flatnonzero(~np.isfinite(pairs.scores))
    if len(bad):
        i = int(bad[0])
        raise DataError(
            f"{source.place(int(pairs.places[i]))}: query {pairs.query_ids[i].as_py()!r}, document "
            f"{pairs.doc_ids[i].as_py()!r}: score {pairs.scores[i]} is not finite as float32"
        )
    if source.collection is not None:
        knows = {"query": source.known_queries.__contains__, "document": source.collection.documents.known}
        for what, ids in (("query", pairs.query_ids), ("document", pairs.doc_ids)):
            for one in ids.unique().to_pylist():
                if not knows[what](one):
                    place = source.place(int(pairs.places[ids.index(one).as_py()]))
                    raise DataError(f"{place}: {what} id {one!r} is not in the collection {source.collection.path}")
