"""Vectors on disk, one a text: dense, sparse, or a matrix of token vectors; all of them memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from retrieval_kd.artifact import Artifact, InputRef, Plan
from retrieval_kd.errors import ArtifactError, DataError, UsageError

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


def write_vectors(
    out: str | Path,
    values: Any,
    ids: Sequence[str],
    *,
    of: str,
    split: str | None,
    similarity: str,
    model: InputRef,
    collection: InputRef,
    vocabulary: Sequence[str | None] | None = None,
    force: bool = False,
) -> Vectors:
    """The vectors artifact of vectors that were made elsewhere.

    ``values`` is a matrix [n, d]; or a sparse matrix of scipy [n, terms], with its ``vocabulary``; or a list of n
    matrices [tokens, d].
    """
    import scipy.sparse

    out = Path(out)
    if scipy.sparse.issparse(values):
        layout, dimension = "sparse", int(values.shape[1])
        if vocabulary is None or len(vocabulary) != dimension:
            raise UsageError(f"sparse vectors of {dimension} terms need a vocabulary of as many tokens")
    elif isinstance(values, list):
        layout, dimension = "multi-vector", int(values[0].shape[1])
    else:
        layout, dimension = "dense", int(values.shape[1])
    number = len(values) if isinstance(values, list) else int(values.shape[0])
    if number != len(ids):
        raise UsageError(f"{number} vectors but {len(ids)} ids")
    recipe: dict[str, Any] = {"kind": "import", "of": of, "split": split}
    plan = Plan("vectors", recipe, {"model": model, "collection": collection})
    if plan.finished(out, force=force):
        return Vectors.load(out)
    with plan.write(out, force=force) as draft:
        if layout == "sparse":
            csr = scipy.sparse.csr_array(values, dtype=np.float32)
            csr.eliminate_zeros()
            csr.sort_indices()
            arrays = {"indptr.npy": csr.indptr.astype(np.int64), "terms.npy": csr.indices.astype(np.int32)}
            arrays["weights.npy"] = csr.data
            write_vocabulary(draft.path, cast(Sequence[str | None], vocabulary))
        elif layout == "multi-vector":
            offsets = np.cumsum([0, *(len(matrix) for matrix in values)], dtype=np.int64)
            arrays = {"offsets.npy": offsets, "tokens.npy": np.concatenate(values).astype(np.float32)}
        else:
            arrays = {"vectors.npy": np.ascontiguousarray(values, dtype=np.float32)}
        for name, array in arrays.items():
            np.save(draft.path / name, array)
        write_ids(draft.path / "ids.arrow", ids)
        draft.counts["vectors"] = len(ids)
        draft.details.update({**recipe, "similarity": similarity})
        draft.details.update(layout_details(draft.path, layout, dimension))
    return Vectors.load(out)


def layout_details(folder: Path, layout: str, dimension: int) -> dict[str, Any]:
    """What a manifest says of the arrays in ``folder``: layout, dimension, bytes a vector, and how long vectors are."""
    details: dict[str, Any] = {"layout": layout, "dimension": dimension}
    if layout == "dense":
        return {**details, "bytes_per_vector": 4 * dimension}
    name, what = ("indptr.npy", "nonzeros") if layout == "sparse" else ("offsets.npy", "tokens")
    lengths = np.diff(np.load(folder / name))
    mean = float(lengths.mean()) if len(lengths) else 0.0
    each = 8
    if layout == "multi-vector":
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        details["dtype"] = tokens.dtype.name
        each = tokens.dtype.itemsize * dimension
    return {
        **details,
        f"mean_{what}": round(mean, 2),
        "empty_vectors": int(np.count_nonzero(lengths == 0)),
        "bytes_per_vector": round(each * mean + 8, 1),
    }


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


def write_vocabulary(folder: Path, tokens: Sequence[str | None]) -> None:
    """Writes ``vocabulary.json``: the token of each term, null where a term is no token."""
    (folder / VOCABULARY).write_text(json.dumps(list(tokens), ensure_ascii=False), encoding="utf-8")


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _STEP] for start in range(0, len(array), _STEP))


def _not_finite(array: np.ndarray, what: str) -> list[str]:
    bad = sum(int((~np.isfinite(part.reshape(len(part), -1)).all(axis=1)).sum()) for part in _blocks(array))
    return [f"{bad} {what} have NaN or infinite values"] if bad else []


def write_ids(path: Path, ids: Any) -> None:
    """Writes ids (strings, or an Arrow array of them) as an Arrow file with the one column ``id``."""
    import pyarrow as pa

    chunks = (
        ids.chunks
        if isinstance(ids, pa.ChunkedArray)
        else [ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())]
    )
    schema = pa.schema([("id", pa.string())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in chunks:
            writer.write_batch(pa.record_batch([chunk.cast(pa.string())], schema=schema))


def read_ids(path: Path) -> list[str]:
    """The ids that `write_ids` wrote."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        ids: list[str] = pa.ipc.open_file(source).read_all()["id"].to_pylist()
    return ids
