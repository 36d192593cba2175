"""Arrays on disk that grow: rows are appended to .npy files, and a ledger says how far they are valid."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import ArtifactError


class GrowingArrays:
    """The .npy files of a folder, to which blocks of rows are appended; killed work goes on after its last block.

    ``ledger`` is replaced after each block reached the disk. It holds the rows and the type of every file, and
    whatever the caller keeps in ``state``. Whole files are the same bytes however often the work was killed: numpy
    leaves room in a header for any number of rows.
    """

    def __init__(self, folder: Path, ledger: Path, state: Mapping[str, Any]) -> None:
        self._folder, self._ledger = folder, ledger
        saved = json.loads(ledger.read_text(encoding="utf-8")) if ledger.is_file() else {"files": {}, "state": {}}
        self._files: dict[str, dict[str, Any]] = saved["files"]
        self.state: dict[str, Any] = {**state, **saved["state"]}

    def rows(self, name: str) -> int:
        """The number of rows that file ``name`` has; 0 before the first block."""
        return int(self._files[name]["shape"][0]) if name in self._files else 0

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds rows to each named file, on the disk when this returns; ``state`` is saved with them.

        Raises `ArtifactError` when a file is shorter than the ledger says.
        """
        for name, array in arrays.items():
            entry = self._files.setdefault(name, {"descr": array.dtype.str, "shape": [0, *array.shape[1:]]})
            self._write(self._folder / name, array, entry)
            entry["shape"][0] += len(array)
        write_atomically(self._ledger, json.dumps({"files": self._files, "state": self.state}).encode())

    def _write(self, path: Path, array: np.ndarray, entry: Mapping[str, Any]) -> None:
        rows, width = entry["shape"][0], int(np.prod(entry["shape"][1:], dtype=np.int64)) * array.itemsize
        if rows and not path.is_file():
            raise ArtifactError(f"{path}: is gone; delete {path.parent} and start again")
        with path.open("r+b" if rows else "w+b") as file:
            _write_header(file, array, rows + len(array))
            valid = file.tell() + rows * width
            file.flush()
            if path.stat().st_size < valid:
                raise ArtifactError(f"{path}: shorter than its ledger says; delete {path.parent} and start again")
            file.truncate(valid)
            file.seek(valid)
            file.write(np.ascontiguousarray(array).tobytes())
            file.flush()
            os.fsync(file.fileno())


def _write_header(file: Any, array: np.ndarray, rows: int) -> None:
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": (rows, *array.shape[1:])}
    np.lib.format.write_array_header_1_0(file, header)
