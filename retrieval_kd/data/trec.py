"""The text forms of TREC: reads and writes the 6-column run file."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import DataError, InputError, OutputExistsError, first

TAG = "retrieval-kd"
_ROWS_AT_ONCE = 65_536
_BREAKS_A_COLUMN = r"^$|[\s\x0b]"


class TrecRun(NamedTuple):
    """The rows of a run file in the file's order."""

    query_ids: list[str]
    """The queries in the order they first appear."""
    queries: np.ndarray
    """[n] int64: each row's position in ``query_ids``."""
    doc_ids: Any
    """[n]: a `pyarrow.ChunkedArray` of strings."""
    scores: np.ndarray
    """[n] float32."""
    lines: np.ndarray
    """[n] int64: each row's line in the file, counted from 1."""


def read_trec_run(path: Path) -> TrecRun:
    """The rows of ``query Q0 document rank score tag`` lines; ranks and tags are ignored, blank lines are skipped.

    Raises `DataError` with file and line for a wrong number of columns and for a score that is no finite float32.
    """
    import pyarrow as pa

    positions: dict[bytes, int] = {}
    queries, lines, scores = array("q"), array("q"), array("d")
    chunks: list[Any] = []
    doc_ids: list[bytes] = []
    for number, line in enumerate(_lines(path), start=1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 6:
            raise DataError(
                f"{path}:{number}: {len(columns)} columns; a run line has 6 (query Q0 document rank score tag)"
            )
        queries.append(positions.setdefault(columns[0], len(positions)))
        scores.append(_score(columns[4], path, number))
        lines.append(number)
        doc_ids.append(columns[2])
        if len(doc_ids) == _ROWS_AT_ONCE:
            chunks.append(_strings(doc_ids, path, number))
            doc_ids = []
    chunks.append(_strings(doc_ids, path, lines[-1] if lines else 1))
    return TrecRun(
        _strings(list(positions), path, 1).to_pylist(),
        np.frombuffer(queries, dtype=np.int64),
        pa.chunked_array(chunks, type=pa.string()),
        np.frombuffer(scores, dtype=np.float64).astype(np.float32),
        np.frombuffer(lines, dtype=np.int64),
    )


def write_trec_run(
    path: Path, query_ids: list[str], offsets: np.ndarray, doc_ids: Any, scores: np.ndarray, *, force: bool = False
) -> None:
    """Writes rows that are in rank order; the rows of query i are ``offsets[i]:offsets[i + 1]``.

    Scores are the shortest decimals that read back as the same float32. Raises `DataError` for ids that are empty or
    hold white space, which this form cannot express, and `OutputExistsError` for a file with other content.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for ids in (pa.array(query_ids, pa.string()), doc_ids):
        unfit = ids.filter(pc.match_substring_regex(ids, _BREAKS_A_COLUMN)).to_pylist()
        if unfit:
            raise DataError(
                f"{path}: {len(unfit)} ids are empty or hold white space, which a TREC file cannot express: "
                f"{first(unfit)}; write a run artifact instead (an --out that does not end in .trec)"
            )
    blocks = []
    for query_id, start, stop in zip(query_ids, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        ids = doc_ids.slice(start, stop - start).to_pylist()
        texts = scores[start:stop].astype(str).tolist()
        rows = enumerate(zip(ids, texts, strict=True), start=1)
        blocks.append("".join(f"{query_id} Q0 {doc_id} {rank} {score} {TAG}\n" for rank, (doc_id, score) in rows))
    data = "".join(blocks).encode()
    if path.exists() and not force:
        if not path.is_file() or path.read_bytes() != data:
            raise OutputExistsError(f"{path} exists and has other content; choose another --out or pass --force")
        return
    write_atomically(path, data)


def _lines(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def _score(text: bytes, path: Path, number: int) -> float:
    try:
        score = float(text)
    except ValueError:
        score = np.nan
    if not abs(score) < _TOO_LARGE:
        shown = text.decode("utf-8", errors="replace")
        raise DataError(f"{path}:{number}: score {shown!r} is not a finite number that float32 can hold")
    return score


_TOO_LARGE = float(np.finfo(np.float32).max) + 2.0**103
"""The smallest number that float32 rounds to infinity: half a step above its largest."""


def _strings(values: list[bytes], path: Path, last_line: int) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: an id up to line {last_line} is not valid UTF-8 ({error})") from error
