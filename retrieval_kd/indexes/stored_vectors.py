"""Vectors on disk beside an index, memory-mapped, that its best candidates are scored with again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from retrieval_kd.errors import InputError

Precision = Literal["float32", "float16", "int8"]

_VECTORS = "rerank.npy"
_SCALES = "rerank-scales.npy"
_NUMBERS = 1 << 22
"""Numbers that are scored at a time: 32 MB of float64."""


class StoredVectors:
    """Vectors [n, d] as float32, float16, or int8 with a scale for each vector."""

    def __init__(self, vectors: np.ndarray, scales: np.ndarray | None = None) -> None:
        self._vectors = vectors
        self._scales = scales

    @classmethod
    def open(cls, folder: Path) -> StoredVectors | None:
        """Those that `StoredVectorsWriter` wrote to ``folder``, memory-mapped; None when it has none."""
        if not (folder / _VECTORS).is_file():
            return None
        vectors = np.load(folder / _VECTORS, mmap_mode="r")
        scales = np.load(folder / _SCALES, mmap_mode="r") if vectors.dtype == np.int8 else None
        return cls(np.asarray(vectors), scales)

    def __len__(self) -> int:
        return len(self._vectors)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The stored values of ``rows`` [...] as float64 [..., d]."""
        values: np.ndarray = self._vectors[rows].astype(np.float64)
        if self._scales is not None:
            values *= self._scales[rows][..., None]
        return values

    def scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Inner products [Q, c] of each query with its ``rows`` [Q, c]: float64 sums rounded to float32.

        They are the same in any company, so that equal vectors tie. Row -1 scores -inf.
        """
        scores = np.empty(rows.shape, dtype=np.float32)
        step = max(1, _NUMBERS // max(1, rows.shape[1] * queries.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scores[part] = np.einsum("qcd,qd->qc", self.of(rows[part]), queries[part].astype(np.float64))
        scores[rows < 0] = -np.inf
        return scores


class StoredVectorsWriter:
    """Writes vectors for `StoredVectors` and measures what rounding them costs."""

    def __init__(self, folder: Path, shape: tuple[int, int], precision: Precision) -> None:
        create = np.lib.format.open_memmap
        self._precision = precision
        self._vectors = create(folder / _VECTORS, mode="w+", dtype=np.dtype(precision), shape=shape)
        self._scales = None
        if precision == "int8":
            self._scales = create(folder / _SCALES, mode="w+", dtype=np.dtype(np.float32), shape=shape[:1])
        self._squares = 0.0
        self._squared_error = 0.0

    def write(self, start: int, batch: np.ndarray) -> None:
        """Stores the rows from ``start`` on; `InputError` for values that float16 does not reach."""
        rows = slice(start, start + len(batch))
        if self._scales is not None:
            scales = np.abs(batch).max(axis=1, initial=0.0) / 127
            self._scales[rows] = scales
            self._vectors[rows] = np.rint(batch / np.where(scales > 0, scales, 1)[:, None])
            restored = self._vectors[rows] * scales[:, None]
        else:
            with np.errstate(over="ignore"):
                self._vectors[rows] = batch
            restored = self._vectors[rows].astype(np.float32)
        if not np.isfinite(restored).all():
            raise InputError(
                f"store {self._precision}: a vector has the value {np.abs(batch).max():g}, {self._precision} "
                f"ends at {np.finfo(np.float16).max:g}; store float32"
            )
        self._squares += float(np.square(batch, dtype=np.float64).sum())
        self._squared_error += float(np.square(restored - batch, dtype=np.float64).sum())

    def close(self) -> float:
        """The length of the rounding errors as a share of the vectors' length (root of the mean squares)."""
        self._vectors.flush()
        if self._scales is not None:
            self._scales.flush()
        return float(np.sqrt(self._squared_error / self._squares)) if self._squares else 0.0


def stored_bytes(dimension: int, precision: Precision) -> int:
    """Bytes of one stored vector."""
    return dimension * np.dtype(precision).itemsize + (4 if precision == "int8" else 0)
