"""What every engine's format shares: its limits, vectors as JSON, the lines of a document, an example of a query."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from retrieval_kd.data.engine_formats.fields import ID, VECTOR, Fields
from retrieval_kd.data.engine_formats.json_rows import dense_json, matrices_json
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import DataError, UsageError, first

SCALE = 100
"""The usual number that weights are multiplied with where they become whole."""
_NUMBERS = 1_048_576
"""Numbers of vectors that memory holds at a time."""
_SMALLEST = float(np.finfo(np.float32).tiny)
"""The smallest weight that Lucene takes; smaller ones have less precision."""


@dataclass(frozen=True)
class Contents:
    """What is exported: vectors of documents, their fields, and vectors of queries if there are any."""

    vectors: Vectors
    fields: Fields
    queries: Vectors | None = None
    scale: int = SCALE
    """What weights are multiplied with before they are rounded, where they become whole."""


class EngineFormat(ABC):
    """The files of one engine. A subclass says what it can hold and writes a document, settings and instructions."""

    name: ClassVar[str]
    """What ``--format`` calls it."""
    layouts: ClassVar[Mapping[str, int]]
    """Layout of vectors → the greatest dimension that the engine takes."""
    ids: ClassVar[str] = "any"
    """Which ids of documents it can hold, for a message."""
    parts: ClassVar[str] = "rows-{:05d}.jsonl"
    """The names of the files with documents."""
    takes_negative: ClassVar[bool] = False
    """Whether weights of sparse vectors may be below 0."""
    quantised: ClassVar[bool] = False
    """Whether weights become whole numbers, by a scale."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.vectors = contents.vectors
        self.counts: Counter[str] = Counter()
        self._refuse_unfit()

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """Rows read and the records to write of them, a batch at a time.

        Raises `DataError` for numbers that are not finite, and for weights that the engine does not take.
        """
        ids = self.vectors.ids
        mean = max(1.0, float(self.vectors.lengths.mean())) if len(self.vectors) else 1.0
        width = 1 if self.vectors.layout == "sparse" else self.vectors.dimension
        step = max(1, int(_NUMBERS / (mean * width)))
        for start in range(0, len(ids), step):
            stop = min(start + step, len(ids))
            texts = self.vector_texts(self.vectors, start, stop)
            columns = self.contents.fields.rows(start, stop)
            records = []
            for doc_id, text, fields in zip(ids[start:stop], texts, columns, strict=True):
                record = self.record(doc_id, {ID: doc_id, **fields}, text)
                self.counts["documents" if record is not None else "left_out"] += 1
                if record is not None:
                    self.counts["without_vector"] += text is None
                    records.append(record)
            yield stop - start, records

    @abstractmethod
    def record(self, doc_id: str, fields: dict[str, Any], vector: str | None) -> str | None:
        """The lines of one document, without the last line feed; None leaves it out.

        ``vector`` is JSON, or None when the document has no vector that the engine takes.
        """

    @abstractmethod
    def files(self) -> dict[str, Any]:
        """Name → content of the other files: text, or what is written as JSON."""

    @abstractmethod
    def sparse_texts(self, lengths: np.ndarray, terms: np.ndarray, weights: np.ndarray) -> list[str]:
        """The JSON of sparse vectors, of which the i-th has the next ``lengths[i]`` terms and weights."""

    def holds_id(self, doc_id: str) -> bool:
        """Whether the engine takes this id of a document."""
        return True

    def takes_zero(self) -> bool:
        """Whether a dense vector of zeros can be loaded."""
        return True

    def vector_texts(self, vectors: Vectors, start: int, stop: int) -> list[str | None]:
        """The JSON of some vectors, of documents or queries; None for one that the engine does not take."""
        if vectors.layout == "dense":
            matrix = np.asarray(vectors.matrix[start:stop])
            self.refuse_rows(vectors, start, ~np.isfinite(matrix).all(axis=1), "NaN or infinite values")
            kept: np.ndarray = np.full(len(matrix), self.takes_zero()) | matrix.any(axis=1)
            texts = dense_json(matrix)
        elif vectors.layout == "multi-vector":
            offsets, tokens = vectors.multi_vector
            rows = np.asarray(tokens[offsets[start] : offsets[stop]])
            lengths = np.diff(offsets[start : stop + 1])
            bad = _any_of(lengths, ~np.isfinite(rows).all(axis=1))
            self.refuse_rows(vectors, start, bad, "NaN or infinite values")
            kept, texts = lengths > 0, matrices_json(lengths, rows.astype(np.float32, copy=False))
        else:
            lengths, terms, weights = self.sparse_part(vectors, start, stop)
            kept, texts = lengths > 0, self.sparse_texts(lengths, terms, weights)
        return [text if keep else None for text, keep in zip(texts, kept, strict=True)]

    def sparse_part(self, vectors: Vectors, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths, terms and weights of some sparse vectors; of unit length when their similarity is cosine.

        Engines only know the dot product of sparse vectors.
        """
        indptr, all_terms, all_weights = vectors.sparse
        part = slice(int(indptr[start]), int(indptr[stop]))
        lengths = np.diff(indptr[start : stop + 1])
        terms, weights = np.asarray(all_terms[part]), np.asarray(all_weights[part])
        self.refuse_rows(vectors, start, _any_of(lengths, ~np.isfinite(weights)), "NaN or infinite weights")
        if not self.takes_negative:
            bad = _any_of(lengths, weights < _SMALLEST)
            self.refuse_rows(vectors, start, bad, "weights below 1.2e-38, which it cannot hold")
        if vectors.similarity == "cosine":
            rows = np.repeat(np.arange(len(lengths)), lengths)
            norms = np.sqrt(np.bincount(rows, weights.astype(np.float64) ** 2, minlength=len(lengths)))
            weights = (weights / norms[rows]).astype(np.float32)
        return lengths, terms, weights

    @property
    def cosine(self) -> bool:
        """Whether the model compares vectors by their cosine."""
        return self.vectors.similarity == "cosine"

    def instructions(self, text: str) -> str:
        """``text`` and what its reader must know of the scores, where they are not the model's own."""
        if self.vectors.layout == "sparse" and self.cosine:
            remark = "The vectors were brought to unit length, and those of queries must be for equal scores."
        elif self.vectors.similarity == "meanmaxsim":
            remark = "A score is the sum over the tokens of a query; the model divides it by their number."
        else:
            return text
        return f"{text}\n{remark}\n"

    @cached_property
    def example(self) -> Any:
        """The first vector of the queries, or of the documents without any, as JSON; `DataError` if there is none."""
        vectors = self.contents.queries or self.vectors
        for row in range(len(vectors)):
            (text,) = self.vector_texts(vectors, row, row + 1)
            if text is not None:
                return json.loads(text)
        raise DataError(f"{vectors.path}: none of the {len(vectors)} vectors has anything but zeros")

    def _refuse_unfit(self) -> None:
        vectors = self.vectors
        limit = self.layouts[vectors.layout]
        if vectors.dimension > limit:
            raise UsageError(
                f"{vectors.path}: vectors of {vectors.dimension:,} dimensions; {self.name} takes {limit:,} at most"
            )
        unfit = [doc_id for doc_id in vectors.ids if not self.holds_id(doc_id)]
        if unfit:
            shown = first(one if len(one) <= 40 else f"{one[:40]}…" for one in unfit)
            raise DataError(
                f"{vectors.path}: {len(unfit)} document ids cannot be written as {self.name} ({self.ids}): {shown}; "
                "give these documents other ids"
            )

    def refuse_rows(self, vectors: Vectors, start: int, bad: np.ndarray, what: str) -> None:
        """Raises `DataError` with the ids of the rows from ``start`` on that are ``bad`` [n], if there are any."""
        if bad.any():
            rows = np.flatnonzero(bad) + start
            ids = first(vectors.ids[row] for row in rows)
            raise DataError(f"{vectors.path}: {len(rows)} of the vectors for {self.name} have {what}: {ids}")


def with_vector(fields: Mapping[str, Any], vector: str | None) -> str:
    """A JSON object of ``fields`` and, unless it is None, ``vector`` (JSON already)."""
    text = json_text(fields)
    return text if vector is None else f'{text[:-1]},"{VECTOR}":{vector}}}'


def json_text(value: Any) -> str:
    """``value`` as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _any_of(lengths: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """For each of n lists [n] whether one of its next ``lengths[i]`` entries is bad."""
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths)[bad], minlength=len(lengths)) > 0
