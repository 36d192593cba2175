"""Some rows of vectors as vectors: a range of them without a copy, or chosen ones of several artifacts in new files."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.data.vector_writer import write_ids
from retrieval_kd.data.vectors import VOCABULARY, SparseArrays, TokenArrays, Vectors

_STEP = 65536
"""Rows that are copied at a time."""


class VectorRange(Vectors):
    """The rows ``start`` to ``stop`` of other vectors, still memory-mapped."""

    def __init__(self, whole: Vectors, start: int, stop: int) -> None:
        super().__init__(whole.path, whole.manifest)
        self._whole, self._part = whole, slice(start, stop)

    @property
    def fingerprint(self) -> str:
        """A hash of the whole's fingerprint and the range."""
        text = f"{self._whole.fingerprint}[{self._part.start}:{self._part.stop}]"
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._part.stop - self._part.start)

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row."""
        return self._whole.ids[self._part]

    @cached_property
    def arrow_ids(self) -> Any:
        """The id of each row: an Arrow array of strings."""
        return self._whole.arrow_ids.slice(self._part.start, len(self))

    @cached_property
    def matrix(self) -> np.ndarray:
        """Dense vectors [n, d] float32."""
        return self._whole.matrix[self._part]

    @cached_property
    def sparse(self) -> SparseArrays:
        """Sparse vectors as three arrays."""
        indptr, terms, weights = self._whole.sparse
        bounds, entries = self._bounds(indptr)
        return SparseArrays(bounds, terms[entries], weights[entries])

    @cached_property
    def multi_vector(self) -> TokenArrays:
        """Token vectors and where each text's begin."""
        offsets, tokens = self._whole.multi_vector
        bounds, entries = self._bounds(offsets)
        return TokenArrays(bounds, tokens[entries])

    def _bounds(self, bounds: np.ndarray) -> tuple[np.ndarray, slice]:
        """The bounds of this range, from 0 on, and its entries in the whole."""
        own = np.asarray(bounds[self._part.start : self._part.stop + 1])
        return own - own[0], slice(int(own[0]), int(own[-1]))


def gather_vectors(folder: Path, parts: Sequence[Vectors], part_of: np.ndarray, row_of: np.ndarray) -> Vectors:
    """Vectors in ``folder`` whose row i is row ``row_of[i]`` of ``parts[part_of[i]]``; copied in blocks.

    The parts are of one model and layout. What comes back is no finished artifact: it is read and thrown away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number, layout = len(part_of), parts[0].layout
    if layout == "dense":
        dense = {"vectors.npy": [part.matrix for part in parts]}
        _gather(folder, dense, part_of, row_of, [np.arange(len(part) + 1) for part in parts])
    elif layout == "sparse":
        arrays = {name: [getattr(part.sparse, name[:-4]) for part in parts] for name in ("terms.npy", "weights.npy")}
        bounds = [part.sparse.indptr for part in parts]
        np.save(folder / "indptr.npy", _gather(folder, arrays, part_of, row_of, bounds))
        shutil.copyfile(parts[0].path / VOCABULARY, folder / VOCABULARY)
    else:
        tokens = {"tokens.npy": [part.multi_vector.tokens for part in parts]}
        bounds = [part.multi_vector.offsets for part in parts]
        np.save(folder / "offsets.npy", _gather(folder, tokens, part_of, row_of, bounds))
    ids = np.empty(number, dtype=object)
    for i, part in enumerate(parts):
        mine = part_of == i
        ids[mine] = np.array(part.ids, dtype=object)[row_of[mine]]
    write_ids(folder / "ids.arrow", ids.tolist())
    whole = hashlib.sha256(b"".join(part.fingerprint.encode() for part in parts))
    whole.update(np.stack([part_of, row_of]).astype(np.int64).tobytes())
    return Vectors(folder, replace(parts[0].manifest, counts={"vectors": number}, fingerprint=whole.hexdigest()))


def last_rows(parts: Sequence[Any], ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each id the last part (a list or an Arrow array of ids) that has it (-1: none), and its row there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(ids, pa.string())
    part_of = np.full(len(ids), -1, dtype=np.int64)
    row_of = np.zeros(len(ids), dtype=np.int64)
    for number, part in enumerate(parts):
        known = part if isinstance(part, pa.Array | pa.ChunkedArray) else pa.array(part, pa.string())
        rows = pc.index_in(wanted, value_set=known).fill_null(-1).to_numpy()
        part_of[rows >= 0] = number
        row_of[rows >= 0] = rows[rows >= 0]
    return part_of, row_of


def _gather(
    folder: Path,
    arrays: dict[str, list[np.ndarray]],
    part_of: np.ndarray,
    row_of: np.ndarray,
    bounds: Sequence[np.ndarray],
) -> np.ndarray:
    """The bounds [n + 1] of the rows in the files that were written of ``arrays`` (file → the array of each part)."""
    lengths = np.zeros(len(part_of), dtype=np.int64)
    for i, of_part in enumerate(bounds):
        mine = part_of == i
        lengths[mine] = (np.asarray(of_part)[1:] - np.asarray(of_part)[:-1])[row_of[mine]]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for name, sources in arrays.items():
        shape = (int(ends[-1]), *sources[0].shape[1:])
        dtype = np.result_type(*(source.dtype for source in sources))
        target = np.lib.format.open_memmap(folder / name, "w+", dtype, shape)
        for first in range(0, len(part_of), _STEP):
            last = min(first + _STEP, len(part_of))
            for i, source in enumerate(sources):
                rows = first + np.flatnonzero(part_of[first:last] == i)
                starts = np.asarray(bounds[i])[row_of[rows]]
                target[_entries(ends[rows], lengths[rows])] = source[_entries(starts, lengths[rows])]
        target.flush()
    return ends


def _entries(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of all entries of rows that begin at ``starts``."""
    before = np.cumsum(lengths) - lengths
    return np.asarray(np.repeat(starts - before, lengths) + np.arange(int(lengths.sum())))
