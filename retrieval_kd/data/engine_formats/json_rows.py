"""Vectors as JSON text, a batch at a time, and the parts that lines of it are divided into."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

PART_BYTES = 10_000_000
"""What one part may hold: small clusters refuse requests of more than 10 MiB. A longer record is a part of its own."""


def dense_json(matrix: np.ndarray) -> list[str]:
    """``[0.1,0.2]`` for each row of a matrix [n, d]; a number reads back as the same float32."""
    lengths = np.full(len(matrix), matrix.shape[1])
    return _enclosed("[", _joined(lengths, number_texts(matrix.ravel())), "]")


def lists_json(lengths: np.ndarray, numbers: np.ndarray) -> list[str]:
    """``[3,7]`` for each of n lists: the next ``lengths[i]`` numbers (float32 or whole)."""
    return _enclosed("[", _joined(lengths, number_texts(numbers)), "]")


def matrices_json(lengths: np.ndarray, rows: np.ndarray) -> list[str]:
    """``[[0.1,0.2],[0.3,0.4]]`` for each of n matrices: the next ``lengths[i]`` of the rows [T, d]."""
    import pyarrow as pa

    return _enclosed("[", _joined(lengths, pa.array(dense_json(rows), pa.string())), "]")


def maps_json(lengths: np.ndarray, keys: Any, numbers: np.ndarray) -> list[str]:
    """``{"a":0.5}`` for each of n maps: the next ``lengths[i]`` keys (Arrow strings, as JSON) and numbers."""
    import pyarrow.compute as pc

    entries = pc.binary_join_element_wise(keys, number_texts(numbers), ":")
    return _enclosed("{", _joined(lengths, entries), "}")


def number_texts(numbers: np.ndarray) -> Any:
    """Arrow strings: the shortest decimals that read back as the same float32 (or whole) numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.cast(pa.array(numbers), pa.string())


def _joined(lengths: np.ndarray, texts: Any) -> list[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(bounds), texts)
    joined: list[str] = pc.binary_join(lists, ",").to_pylist()
    return joined


def _enclosed(before: str, texts: list[str], after: str) -> list[str]:
    return [f"{before}{text}{after}" for text in texts]


class Parts:
    """Writes records to ``NAME-00001.jsonl``, ``NAME-00002.jsonl``, …; a record is never divided."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder, self.pattern = folder, pattern
        self.number = 0
        self._file: BinaryIO | None = None
        self._size = 0

    def write(self, record: str) -> None:
        """Appends a record (its lines without the last line feed)."""
        data = record.encode() + b"\n"
        if self._file is None or (self._size and self._size + len(data) > PART_BYTES):
            self._next()
        assert self._file is not None
        self._file.write(data)
        self._size += len(data)

    def _next(self) -> None:
        self.close()
        self.number += 1
        path = self.folder / self.pattern.format(self.number)
        path.parent.mkdir(exist_ok=True)
        self._file, self._size = path.open("wb"), 0

    def close(self) -> None:
        """Closes the last part."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
