"""A job's documents and queries, each encoded once: arrays on disk, written block by block and looked up by place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifact import write_atomically
from retrieval_kd.errors import ArtifactError
from retrieval_kd.progress import progress
from retrieval_kd.teachers.base import ScoringJob

BLOCK = 2048
"""Texts between two points from which killed work goes on; batches never cross a block."""

Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]
"""Texts → named arrays, in the order of the texts; an array may have any number of rows a text."""


class EncodedJob:
    """The distinct documents and the queries of a job, encoded by ``documents`` and ``queries``.

    The files are in ``job.work``: whoever comes second finds them there and encodes nothing. ``names`` are the folders
    of documents and queries, one a way to encode them.
    """

    def __init__(
        self, job: ScoringJob, documents: Encode, queries: Encode, names: tuple[str, str] = ("documents", "queries")
    ) -> None:
        wanted = np.zeros(len(job.collection.documents), dtype=bool)
        for candidates in job.candidates:
            wanted[candidates.rows] = True
        self.rows = np.flatnonzero(wanted)
        """The collection's rows of the documents, ascending: document i of the arrays is row ``rows[i]``."""
        self._query_place = {candidates.query_id: i for i, candidates in enumerate(job.candidates)}
        texts = job.collection.documents.texts
        self.documents = encoded_once(
            job.work / names[0], len(self.rows), lambda start, stop: documents(texts(self.rows[start:stop]))
        )
        self.queries = encoded_once(
            job.work / names[1],
            len(job.candidates),
            lambda start, stop: queries([job.candidates[i].text for i in range(start, stop)]),
        )

    def document_places(self, rows: np.ndarray) -> np.ndarray:
        """Where the documents of these rows are among the encoded ones."""
        return np.asarray(np.searchsorted(self.rows, rows))

    def query_place(self, query_id: str) -> int:
        """Where a query is among the encoded ones."""
        return self._query_place[query_id]

    def tokens_lost(self, query_id: str, rows: np.ndarray) -> np.ndarray:
        """Tokens [n] int32 that were cut off the query and off each of the documents of these rows."""
        of_query = self.queries["tokens_lost"][self.query_place(query_id)]
        return np.asarray(self.documents["tokens_lost"][self.document_places(rows)] + of_query, dtype=np.int32)


def encoded_once(
    folder: Path, total: int, encode: Callable[[int, int], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that ``encode(start, stop)`` gives for all of ``total`` texts, joined, memory-mapped from ``folder``.

    Blocks are appended to one raw file an array. ``blocks.json``, replaced after each block reached the disk, says how
    far every file is valid: killed work goes on there, and finished work is only opened.
    """
    ledger = folder / "blocks.json"
    state: dict[str, Any] = json.loads(ledger.read_text()) if ledger.is_file() else {"done": 0, "arrays": {}}
    folder.mkdir(parents=True, exist_ok=True)
    with progress(f"{folder.name} of {total:,} texts", total, done=state["done"]) as advance:
        for start in range(state["done"], total, BLOCK):
            stop = min(start + BLOCK, total)
            for name, array in encode(start, stop).items():
                entry = state["arrays"].setdefault(name, {"type": array.dtype.str, "shape": [0, *array.shape[1:]]})
                _append(folder / name, array, valid=_bytes(entry))
                entry["shape"][0] += len(array)
            state["done"] = stop
            write_atomically(ledger, json.dumps(state).encode())
            advance(stop - start)
    return {name: _opened(folder / name, entry) for name, entry in state["arrays"].items()}


def _append(path: Path, array: np.ndarray, valid: int) -> None:
    """Writes ``array`` behind the ``valid`` bytes; what a killed attempt left there goes."""
    with path.open("r+b" if path.is_file() else "w+b") as file:
        file.truncate(valid)
        file.seek(valid)
        file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _opened(path: Path, entry: dict[str, Any]) -> np.ndarray:
    if not _bytes(entry):
        return np.zeros(entry["shape"], dtype=entry["type"])
    if path.stat().st_size < _bytes(entry):
        raise ArtifactError(f"{path}: shorter than its blocks.json says; delete {path.parent} and score again")
    return np.asarray(np.memmap(path, dtype=entry["type"], mode="r", shape=tuple(entry["shape"])))


def _bytes(entry: dict[str, Any]) -> int:
    return int(math.prod(entry["shape"]) * np.dtype(entry["type"]).itemsize)
