"""Vectors on disk, one a text: dense, sparse, or a matrix of token vectors; all of them memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from retrieval_kd.artifact import Artifact, InputRef
from retrieval_kd.errors import ArtifactError, DataError

LAYOUTS = ("dense", "sparse", "multi-vector")
VOCABULARY = "vocabulary.json"
_STEP = 65536
"""Rows that a check reads at a time."""


class SparseArrays(NamedTuple):
    """Text i has ``terms[indptr[i]:indptr[i+1]]`` (int32, ascending) with ``weights`` (float32, none of them 0)."""

    indptr: np.ndarray
    terms: np.ndarray
    weights: np.ndarray


class TokenArrays(NamedTuple):
    """Text i has the rows ``offsets[i]`` to ``offsets[i+1]`` of ``tokens`` [T, d] (float32 or float16)."""

    offsets: np.ndarray
    tokens: np.ndarray


class Vectors(Artifact):
    """Vectors of a collection's documents or of a split's queries, made by one model, in one of three layouts."""

    kind = "vectors"

    @property
    def layout(self) -> str:
        """``dense``, ``sparse`` or ``multi-vector``."""
        return str(self.manifest.details.get("layout", "dense"))

    @cached_property
    def matrix(self) -> np.ndarray:
        """Dense vectors [n, d] float32; `ArtifactError` for another layout."""
        self._expect("dense")
        return self._array("vectors.npy")

    @cached_property
    def sparse(self) -> SparseArrays:
        """Sparse vectors as three arrays; `ArtifactError` for another layout."""
        self._expect("sparse")
        return SparseArrays(self._array("indptr.npy"), self._array("terms.npy"), self._array("weights.npy"))

    @cached_property
    def multi_vector(self) -> TokenArrays:
        """Token vectors and where each text's begin; `ArtifactError` for another layout."""
        self._expect("multi-vector")
        return TokenArrays(self._array("offsets.npy"), self._array("tokens.npy"))

    @cached_property
    def vocabulary(self) -> list[str | None]:
        """The token of each term of sparse vectors; None where a term is no token."""
        self._expect("sparse")
        return cast(list[str | None], json.loads((self.path / VOCABULARY).read_text(encoding="utf-8")))

    def rows(self, start: int, stop: int) -> Any:
        """Some vectors as an index takes them for queries.

        A float32 array [n, d], a ``scipy.sparse.csr_array`` [n, terms], or a list of float32 arrays [tokens, d].
        """
        stop = min(stop, len(self))
        if self.layout == "dense":
            return self.matrix[start:stop]
        if self.layout == "sparse":
            indptr, terms, weights = self.sparse
            part = slice(indptr[start], indptr[stop])
            lengths = np.diff(indptr[start : stop + 1])
            return sparse_rows(lengths, terms[part], weights[part], self.dimension)
        offsets, tokens = self.multi_vector
        bounds = offsets[start : stop + 1].tolist()
        return [np.asarray(tokens[a:b], dtype=np.float32) for a, b in pairwise(bounds)]

    def __len__(self) -> int:
        return int(self.manifest.counts["vectors"])

    @cached_property
    def lengths(self) -> np.ndarray:
        """The entries [n] int64 of each vector: terms that are not 0, tokens, or 1 for a dense one."""
        if self.layout == "dense":
            return np.ones(len(self.matrix), dtype=np.int64)
        return np.diff(self.sparse.indptr if self.layout == "sparse" else self.multi_vector.offsets)

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row."""
        return read_ids(self.path / "ids.arrow")

    @cached_property
    def arrow_ids(self) -> Any:
        """The id of each row: an Arrow array of strings, memory-mapped, for as many as no list should hold."""
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self.path / "ids.arrow"))).read_all()["id"]

    @property
    def of(self) -> str:
        """``documents`` or ``queries``."""
        return str(self.manifest.details["of"])

    @property
    def split(self) -> str | None:
        """The split of the queries; None for documents."""
        split = self.manifest.details.get("split")
        return None if split is None else str(split)

    @property
    def similarity(self) -> str:
        """How the model compares its vectors: ``cosine``, ``dot``, ``maxsim`` or ``meanmaxsim``."""
        return str(self.manifest.details["similarity"])

    @property
    def decoded(self) -> bool:
        """Whether these are what the codes of an index stand for, and not what the model made."""
        return self.manifest.details.get("kind") == "decode"

    @property
    def dimension(self) -> int:
        """The length of a vector: numbers of a dense one or of a token's, terms of the vocabulary of a sparse one."""
        return int(self.manifest.details["dimension"])

    @property
    def model_ref(self) -> InputRef:
        """The model that made the vectors."""
        entry = self.manifest.inputs["model"]
        path = Path(entry["absolute"]) if "absolute" in entry else None
        return InputRef(entry["fingerprint"], path, entry.get("name"))

    @property
    def stands_for(self) -> set[str]:
        """The fingerprints of the models whose indexes these vectors may search: their own model's, and what it serves.

        An exported model serves the one that it was made from, a query tower its teacher.
        """
        return {self.model_ref.fingerprint, *self.manifest.details.get("stands_for", ())}

    def check_rows(self, ids: Any) -> None:
        """Raises `ArtifactError` unless row i is ``ids[i]`` (Arrow strings: a collection's ids in row order)."""
        if self.ids != ids.to_pylist():
            raise ArtifactError(
                f"{self.path}: its {len(self.ids):,} rows are not the collection's {len(ids):,} documents in their "
                "order; encode the collection again"
            )

    def problems(self) -> list[str]:
        """Rows without an id, values that are not finite, bounds and terms that cannot be."""
        found = self._bad_bounds()
        if len(self.ids) != len(self.lengths):
            found.append(f"{len(self.lengths)} rows but {len(self.ids)} ids")
        if len(set(self.ids)) != len(self.ids):
            found.append("ids are not unique")
        if self.layout == "dense":
            return found + _not_finite(self.matrix, "vectors")
        if self.layout == "multi-vector":
            return found + _not_finite(self.multi_vector.tokens, "token vectors")
        return found + _not_finite(self.sparse.weights, "weights") + self._bad_terms()

    def _bad_bounds(self) -> list[str]:
        if self.layout == "dense":
            return []
        if self.layout == "sparse":
            name, bounds, entries = "indptr.npy", self.sparse.indptr, self.sparse.terms
            if len(self.sparse.weights) != len(entries):
                return [f"{len(entries)} terms but {len(self.sparse.weights)} weights"]
        else:
            name, bounds, entries = "offsets.npy", *self.multi_vector
        rising = bool((np.diff(bounds) >= 0).all())
        whole = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == len(entries)
        return [] if rising and whole else [f"{name} does not divide the {len(entries)} entries into vectors"]

    def _bad_terms(self) -> list[str]:
        indptr, terms, weights = self.sparse
        found = []
        if len(self.vocabulary) != self.dimension:
            found.append(f"{VOCABULARY} has {len(self.vocabulary)} terms, the vectors {self.dimension}")
        outside = sum(int(((part < 0) | (part >= self.dimension)).sum()) for part in _blocks(terms))
        zero = sum(int((part == 0).sum()) for part in _blocks(weights))
        falls = np.flatnonzero(np.diff(terms) <= 0) + 1
        unordered = int((~np.isin(falls, indptr)).sum())
        for number, what in ((outside, "outside the vocabulary"), (unordered, "out of order"), (zero, "of weight 0")):
            if number:
                found.append(f"{number} terms are {what}")
        return found

    def _array(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.path / name, mmap_mode="r"))

    def _expect(self, layout: str) -> None:
        if self.layout != layout:
            raise ArtifactError(f"{self.path}: these are {self.layout} vectors; {layout} ones are needed here")


def sparse_rows(lengths: np.ndarray, terms: np.ndarray, weights: np.ndarray, dimension: int) -> Any:
    """A ``scipy.sparse.csr_array`` [n, dimension] whose row i has the next ``lengths[i]`` terms and weights.

    Raises `DataError` for arrays that do not fit: scipy would read and write beyond them.
    """
    from scipy.sparse import csr_array

    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    whole = indptr[-1] == len(terms) == len(weights) and (lengths >= 0).all()
    if not whole or (len(terms) and not 0 <= terms.min() <= terms.max() < dimension):
        raise DataError(f"sparse vectors over {dimension} terms have damaged bounds or terms outside the vocabulary")
    return csr_array((weights, terms, indptr), shape=(len(lengths), dimension))


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _STEP] for start in range(0, len(array), _STEP))


def _not_finite(array: np.ndarray, what: str) -> list[str]:
    bad = sum(int((~np.isfinite(part.reshape(len(part), -1)).all(axis=1)).sum()) for part in _blocks(array))
    return [f"{bad} {what} have NaN or infinite values"] if bad else []


def read_ids(path: Path) -> list[str]:
    """The ids that `vector_writer.write_ids` wrote."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        ids: list[str] = pa.ipc.open_file(source).read_all()["id"].to_pylist()
    return ids
