"""Lines of text files, gzipped or not: read in blocks, written with exact float32 decimals."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.data.score_formats.pairs import Integer, Number
from retrieval_kd.errors import DataError, InputError

if TYPE_CHECKING:
    from retrieval_kd.data.score_formats.pairs import Source

_BLOCK_BYTES = 2**20


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unpacked when its name ends in ``.gz``.

    Raises `InputError` when it cannot be read and `DataError` when the gzip data is damaged.
    """
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def blocks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """The number of a block's first line, counted from 1, and its lines without their line feeds."""
    number, rest = 1, b""
    with opened(path) as file:
        while chunk := file.read(_BLOCK_BYTES):
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            if lines:
                yield number, _without_mark(number, lines)
                number += len(lines)
        if rest:
            yield number, _without_mark(number, [rest])


def columns(source: Source, names: str, *, tabs: bool) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """The line numbers [n] and the columns (Arrow strings [n]) of each block; blank lines are skipped.

    ``names`` are those of the columns, for the message about another number of them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = len(names.split())
    for first, lines in blocks(source.path):
        numbers = np.arange(first, first + len(lines))
        text = _strings(source, first, lines)
        text = pc.ascii_rtrim(text, "\r") if tabs else pc.ascii_trim_whitespace(text)
        filled = pc.not_equal(text, "")
        text, numbers = text.filter(filled), numbers[filled.to_numpy(zero_copy_only=False)]
        parts = pc.split_pattern(text, "\t") if tabs else pc.ascii_split_whitespace(text)
        counts = pc.list_value_length(parts).to_numpy()
        wrong = np.flatnonzero(counts != wanted)
        if len(wrong):
            i = int(wrong[0])
            hint = "; one margin for two documents is not two scores" if tabs and counts[i] == 4 else ""
            raise DataError(
                f"{source.place(int(numbers[i]))}: {counts[i]} columns; a line has {wanted} ({names}){hint}"
            )
        flat = parts.flatten()
        yield numbers, [flat.take(pa.array(np.arange(i, len(flat), wanted))) for i in range(wanted)]


def json_objects(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a JSON Lines file; numbers stay `Number` texts."""
    for first, lines in blocks(source.path):
        for number, line in enumerate(lines, start=first):
            if not line.strip():
                continue
            try:
                found = parsed(line.decode())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{source.place(number)}: not valid JSON ({error})") from error
            if not isinstance(found, dict):
                raise DataError(f"{source.place(number)}: {line[:40]!r} is not a JSON object")
            yield number, found


def parsed(text: str) -> Any:
    """The value of a JSON text; its numbers are `Number` texts. Raises `ValueError`."""
    return json.loads(text, parse_float=Number, parse_int=Integer, parse_constant=Number)


@contextmanager
def writing(path: Path) -> Iterator[BufferedIOBase]:
    """A new file, packed when its name ends in ``.gz``; the same content gives the same bytes."""
    with path.open("wb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                yield packed
        else:
            yield file


def json_line(record: dict[str, Any]) -> bytes:
    """One line of JSON; float32 values are the shortest decimals that read back as the same float32."""
    return (_json(record) + "\n").encode()


def _json(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, np.ndarray):
        return "[" + ", ".join(value.astype(np.float32).astype(str).tolist()) + "]"
    if isinstance(value, np.float32):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _strings(source: Source, first: int, lines: list[bytes]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(lines, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        for number, line in enumerate(lines, start=first):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{source.place(number)}: not valid UTF-8 ({error.reason})") from error
        raise


def _without_mark(number: int, lines: list[bytes]) -> list[bytes]:
    """The lines without the byte order mark of a file's first."""
    return [lines[0].removeprefix(codecs.BOM_UTF8), *lines[1:]] if number == 1 else lines
