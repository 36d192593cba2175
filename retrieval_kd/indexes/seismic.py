"""Sparse vectors in Seismic: lists cut into blocks with summaries, approximate; hits get their exact scores."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.errors import ArtifactError, InputError, MissingExtraError, UsageError
from retrieval_kd.indexes.base import Index, IndexRecipe, Shape, Source, write_rows
from retrieval_kd.indexes.hits import no_hits, ordered
from retrieval_kd.indexes.sparse_source import check_sparse_queries, document_weights, query_terms
from retrieval_kd.plan import Draft
from retrieval_kd.progress import progress
from retrieval_kd.recipe import Section

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

NATIVE = "index.seismic"
_PARTS = ("indptr.npy", "terms.npy", "weights.npy")
_LARGEST_WEIGHT = float(np.finfo(np.float16).max)
_LOST_WEIGHT = 2.0**-25
_ROUNDING = 2.0**-10
"""How far one of Seismic's scores can be from the exact one, relative to it: its weights are float16."""
_SCANNED = 2000
"""Where so few documents are allowed, all of them are scored."""
_BLOCK = 8192


class SeismicSearch(Section):
    """What can change after the build: recall against time."""

    query_cut: int = Field(default=10, ge=1)
    """The query's heaviest terms whose lists are read."""
    heap_factor: float = Field(default=0.8, gt=0, le=1)
    """A block is skipped when its summary promises less than the k-th score divided by this; lower finds more."""


class SeismicRecipe(IndexRecipe):
    """Parameters of the build, as Seismic names them, and of the search."""

    kind: Literal["seismic"]
    n_postings: int = Field(default=3500, ge=1)
    """Documents that a term's list keeps, on average over terms: those with the greatest weights."""
    max_fraction: float = Field(default=1.5, ge=1)
    """The longest list, in multiples of ``n_postings``."""
    centroid_fraction: float = Field(default=0.05, gt=0, le=1)
    """Blocks of a list, as a share of its documents."""
    min_cluster_size: int = Field(default=2, ge=1)
    summary_energy: float = Field(default=0.6, gt=0, le=1)
    """The share of a block's weight that its summary keeps. Short queries find more with 1, for more bytes."""
    doc_cut: int = Field(default=15, ge=1)
    """The heaviest terms of a document that decide which block it is put into."""
    search: SeismicSearch = SeismicSearch()


class SeismicIndex(Index):
    """Approximate inner products of learned sparse vectors, or cosines of them.

    Bruch, Nardini, Rulli and Venturini, Efficient Inverted Indexes for Approximate Retrieval over Learned Sparse
    Representations, SIGIR 2024. Seismic holds float16 weights in memory and proposes documents; these are ordered by
    their float32 weights, which stay on disk, so that a hit's score is the one that a sparse-exact index gives it. A
    block is never read when its summary has none of the query's terms, whatever the search parameters are.
    """

    Recipe = SeismicRecipe
    takes = "sparse"

    @classmethod
    def build(cls, recipe: SeismicRecipe, source: Source, draft: Draft) -> None:
        """Writes Seismic's file and the weights by document; the same bytes with any number of threads.

        Seismic uses all cores, or as many as RAYON_NUM_THREADS says, and reports no progress of its own. Raises
        `InputError` when no document has a term, or for weights that are not finite, too large or all too small for
        float16.
        """
        if source.vectors is None:
            raise UsageError("a seismic index is built from vectors")
        vectors = source.vectors
        indptr, terms, weights = document_weights(vectors)
        sizes = np.abs(weights)
        if sizes.max() > _LARGEST_WEIGHT:
            raise InputError(f"{vectors.path}: has weights above {_LARGEST_WEIGHT:.0f}, the most that Seismic can hold")
        lost = int(np.count_nonzero(sizes <= _LOST_WEIGHT))
        if lost == len(weights):
            raise InputError(f"{vectors.path}: all weights are at most {_LOST_WEIGHT:.0g}, which is 0 for Seismic")
        if lost:
            draft.counts["weights_of_0"] = lost
            log.warning("%s: %s weights are too small for Seismic's float16, where they are 0", vectors.path, lost)
        small = vectors.dimension <= 2**16
        arrays = (indptr, terms.astype(np.uint16 if small else np.uint32), weights)
        for name, array in zip(_PARTS, arrays, strict=True):
            np.save(draft.path / name, array)
        given = draft.work / "documents.bin"
        _write_documents(given, indptr, terms, weights)
        keys = recipe.model_dump(include=set(SeismicRecipe.model_fields) - set(IndexRecipe.model_fields))
        with _no_output():
            _engine(small).build(str(given), **keys).save(str(draft.path / NATIVE))
        given.unlink()
        draft.counts["documents"] = write_rows(draft.path, vectors.arrow_ids)
        draft.counts["postings"] = len(terms)
        draft.counts["documents_without_terms"] = int(np.count_nonzero(np.diff(indptr) == 0))
        metric = "cosine" if vectors.similarity == "cosine" else "inner_product"
        draft.details.update(metric=metric, dimension=vectors.dimension)

    @classmethod
    def estimate(cls, recipe: SeismicRecipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document, at most 65 a term (10 where ``n_postings`` leaves it out of a list), and 170 a list.

        Measured with the shipped recipe: most of it are summaries, of which a larger ``summary_energy`` keeps more.
        """
        if not isinstance(source, Shape):
            raise UsageError("a seismic index is built from vectors")
        return 65 * source.entries + 8, 170 * source.dimension

    def open(self, recipe: SeismicRecipe, search: SeismicSearch) -> None:
        """Loads Seismic's file into memory and memory-maps the weights by document."""
        self._indptr, self._terms, self._weights = (np.load(self.path / part, mmap_mode="r") for part in _PARTS)
        self._cosine = self.manifest.details["metric"] == "cosine"
        self._search = search
        try:
            self._engine = _engine(self.dimension <= 2**16).load(str(self.path / NATIVE))
        except OSError as error:
            raise ArtifactError(f"{self.path / NATIVE}: Seismic cannot read it ({error}); build it again") from error

    @property
    def dimension(self) -> int:
        """The number of terms."""
        return int(self.manifest.details["dimension"])

    def search(self, queries: Any, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of a ``scipy.sparse.csr_array`` [Q, terms] of queries.

        Scores are those of a sparse-exact index, and so is the order; a document can be missed. One whose score is not
        above 0 is no hit. Where 2,000 documents or fewer are ``allowed``, the hits are exact; where more are, the
        search is widened until ``k`` of them are found. Raises `UsageError` for queries of another vocabulary or with
        NaN or infinite weights.
        """
        check_sparse_queries(queries, self.dimension)
        scores, rows = no_hits(queries.shape[0], len(self), k, allowed)
        few = None if allowed is None else np.flatnonzero(allowed)
        for place in range(queries.shape[0]):
            terms, weights = query_terms(queries, place, cosine=self._cosine)
            query = np.zeros(self.dimension)
            query[terms] = weights
            if few is not None and len(few) <= _SCANNED:
                scores[place], rows[place] = self._best(query, few, k)
            else:
                scores[place], rows[place] = self._hits(query, terms, k, allowed)
        return scores, rows

    def _hits(
        self, query: np.ndarray, terms: np.ndarray, k: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` of what Seismic proposes: so much that rounding and ties cannot hide one from it.

        Lists of all the query's terms are read where those of its heaviest terms have less than ``k`` documents.
        """
        known = terms[terms < self._engine.dim].astype(np.int32)
        weights = query[known].astype(np.float32)
        share = 1.0 if allowed is None else np.count_nonzero(allowed) / len(self)
        wanted = int((k + max(10, k // 4)) / share)
        cut = self._search.query_cut
        while True:
            wanted = min(wanted, len(self))
            found = self._engine.search(known, weights, wanted, cut, self._search.heap_factor, 0, True)
            rows = np.array([row for _, row in found], dtype=np.int64)
            if allowed is not None:
                rows = rows[allowed[rows]]
            scores, best = self._best(query, rows, k)
            if len(found) < wanted or wanted == len(self):
                if best[-1] >= 0 or cut >= len(known):
                    return scores, best
                cut = len(known)
            elif best[-1] >= 0 and scores[-1] > found[-1][0] * (1 + _ROUNDING):
                return scores, best
            wanted *= 4

    def _best(self, query: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` of some documents by their exact scores, those above 0 only."""
        scores = self._exact(query, rows)
        return ordered(scores[scores > 0], rows[scores > 0], self.rank, k)

    def _exact(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Scores [n] float32: float64 sums in the order of terms, as a sparse-exact index adds them up."""
        sums = np.zeros(len(rows))
        for first in range(0, len(rows), _BLOCK):
            block = rows[first : first + _BLOCK]
            starts, lengths = self._indptr[block], self._indptr[block + 1] - self._indptr[block]
            owners = np.repeat(np.arange(len(block)), lengths)
            entries = np.arange(len(owners)) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
            products = query[self._terms[entries]] * self._weights[entries]
            sums[first : first + _BLOCK] = np.bincount(owners, products, minlength=len(block))
        return sums.astype(np.float32)

    def problems(self) -> list[str]:
        """Broken rows, or a file of Seismic's with other documents than the weights."""
        found = super().problems()
        if self._engine.len != len(self):
            found.append(f"{len(self)} documents but Seismic has {self._engine.len}")
        if not self._indptr[-1] == len(self._terms) == len(self._weights) == self._engine.nnz:
            found.append(
                f"{self._indptr[-1]} postings but {len(self._terms)} terms, {len(self._weights)} weights, "
                f"{self._engine.nnz} in Seismic"
            )
        return found


def _engine(small: bool) -> Any:
    """Seismic's class for vocabularies of up to 65,536 terms, or for larger ones."""
    try:
        import seismic
    except ModuleNotFoundError as error:
        raise MissingExtraError("a seismic index needs the package 'pyseismic-lsr'", "seismic") from error
    return seismic.SeismicIndexRaw if small else seismic.SeismicIndexRawLV


def _write_documents(path: Path, indptr: np.ndarray, terms: np.ndarray, weights: np.ndarray) -> None:
    """Writes what Seismic builds from: the number of documents; of each its length, terms (uint32), weights."""
    documents = len(indptr) - 1
    with path.open("wb") as file, progress(f"indexing {documents:,} documents", documents) as advance:
        file.write(np.uint32(documents).tobytes())
        for row in range(documents):
            part = slice(indptr[row], indptr[row + 1])
            length = np.uint32(indptr[row + 1] - indptr[row])
            file.write(length.tobytes() + terms[part].astype(np.uint32).tobytes() + weights[part].tobytes())
            advance(1)


@contextmanager
def _no_output() -> Iterator[None]:
    """Keeps Seismic's report, which it prints, out of stdout: that holds results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
