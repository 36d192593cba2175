"""A job's documents and queries, each encoded once: arrays on disk, written block by block and looked up by place."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.atomic import write_atomically, writing_to
from retrieval_kd.errors import ArtifactError, RetrievalKDError
from retrieval_kd.models.encoder import BadVectorsError
from retrieval_kd.progress import progress
from retrieval_kd.teachers.base import ScoringJob

log = logging.getLogger("retrieval_kd")

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
        self.documents, self._bad_documents = encoded_once(
            job.work / names[0], len(self.rows), lambda start, stop: texts(self.rows[start:stop]), documents
        )
        self.queries, self._bad_queries = encoded_once(
            job.work / names[1],
            len(job.candidates),
            lambda start, stop: [job.candidates[i].text for i in range(start, stop)],
            queries,
        )

    def document_places(self, rows: np.ndarray) -> np.ndarray:
        """Where the documents of these rows are among the encoded ones."""
        return np.asarray(np.searchsorted(self.rows, rows))

    def query_place(self, query_id: str) -> int:
        """Where a query is among the encoded ones."""
        return self._query_place[query_id]

    def without_bad(self, query_id: str, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """``scores`` [n] float32 of these rows, NaN where the document or the query could not be encoded."""
        bad = np.isin(self.document_places(rows), self._bad_documents)
        bad |= self.query_place(query_id) in self._bad_queries
        return np.where(bad, np.float32("nan"), scores)

    def tokens_lost(self, query_id: str, rows: np.ndarray) -> np.ndarray:
        """Tokens [n] int32 that were cut off the query and off each of the documents of these rows."""
        of_query = self.queries["tokens_lost"][self.query_place(query_id)]
        return np.asarray(self.documents["tokens_lost"][self.document_places(rows)] + of_query, dtype=np.int32)


def encoded_once(
    folder: Path, total: int, texts: Callable[[int, int], list[str]], encode: Encode
) -> tuple[dict[str, np.ndarray], list[int]]:
    """What ``encode`` gives for all of ``total`` texts, joined, memory-mapped from ``folder``; and which could not be.

    ``texts(start, stop)`` gives some of them. Blocks are appended to one raw file an array. ``blocks.json``, replaced
    after each block reached the disk, says how far every file is valid: killed work goes on there, and finished work is
    only opened. A text that cannot be encoded (NaN, an exception) is said in the log; an empty one stands in its place.
    """
    ledger = folder / "blocks.json"
    state: dict[str, Any] = {"done": 0, "arrays": {}, "bad": []}
    if ledger.is_file():
        state = json.loads(ledger.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    with progress(f"{folder.name} of {total:,} texts", total, done=state["done"]) as advance, writing_to(folder):
        for start in range(state["done"], total, BLOCK):
            stop = min(start + BLOCK, total)
            arrays, bad = _encoded(encode, texts(start, stop))
            for name, array in arrays.items():
                entry = state["arrays"].setdefault(name, {"type": array.dtype.str, "shape": [0, *array.shape[1:]]})
                _append(folder / name, array, entry)
                entry["shape"][0] += len(array)
            state["bad"] += [start + place for place in sorted(bad)]
            state["done"] = stop
            write_atomically(ledger, json.dumps(state).encode())
            advance(stop - start)
    return {name: _opened(folder / name, entry) for name, entry in state["arrays"].items()}, state["bad"]


def _encoded(encode: Encode, texts: list[str]) -> tuple[dict[str, np.ndarray], set[int]]:
    """The arrays of a block, and the places of its texts that cannot be encoded."""
    bad: dict[int, str] = {}
    while True:
        shown = ["" if i in bad else text for i, text in enumerate(texts)]
        failure = _failure(encode, shown)
        if not isinstance(failure, Exception):
            for place, reason in bad.items():
                log.warning("a text cannot be encoded: %s: %r", reason, texts[place][:80])
            return failure, set(bad)
        found = _causes(encode, shown, failure)
        if not found or any(not shown[i] for i in found):  # even an empty text fails: the model is to blame
            raise failure
        bad |= found


def _failure(encode: Encode, texts: list[str]) -> dict[str, np.ndarray] | Exception:
    try:
        return encode(texts)
    except BadVectorsError as error:
        return error
    except RetrievalKDError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model raises is held against these texts
        return error


def _causes(encode: Encode, texts: list[str], failure: Exception) -> dict[int, str]:
    """Place → reason of the texts that make ``encode`` fail; other failures than NaN are found by halving."""
    if isinstance(failure, BadVectorsError):
        return {i: "NaN or infinite values" for i, text in enumerate(texts) if text in set(failure.texts)}
    if len(texts) == 1:
        return {0: f"{type(failure).__name__}: {failure}"}
    found: dict[int, str] = {}
    half = len(texts) // 2
    for start, part in ((0, texts[:half]), (half, texts[half:])):
        of_part = _failure(encode, part)
        if isinstance(of_part, Exception):
            found |= {start + i: reason for i, reason in _causes(encode, part, of_part).items()}
    return found


def _append(path: Path, array: np.ndarray, entry: dict[str, Any]) -> None:
    """Writes ``array`` behind the valid bytes of ``entry``; what a killed attempt left there goes."""
    valid = _bytes(entry)
    if valid:
        _refuse_shorter(path, valid)
    with path.open("r+b" if path.is_file() else "w+b") as file:
        file.truncate(valid)
        file.seek(valid)
        file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _refuse_shorter(path: Path, valid: int) -> None:
    if not path.is_file() or path.stat().st_size < valid:
        raise ArtifactError(f"{path}: shorter than its blocks.json says; delete {path.parent} and score again")


def _opened(path: Path, entry: dict[str, Any]) -> np.ndarray:
    if not _bytes(entry):
        return np.zeros(entry["shape"], dtype=entry["type"])
    _refuse_shorter(path, _bytes(entry))
    return np.asarray(np.memmap(path, dtype=entry["type"], mode="r", shape=tuple(entry["shape"])))


def _bytes(entry: dict[str, Any]) -> int:
    return int(math.prod(entry["shape"]) * np.dtype(entry["type"]).itemsize)
