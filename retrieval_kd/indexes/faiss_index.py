"""Dense vectors in FAISS: any factory string, stored as the stock CPU index ``index.faiss``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import Draft
from retrieval_kd.errors import InputError, RecipeError, RetrievalKDError, UsageError, first
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Index, IndexRecipe, Shape, Source, check_k, ordered, write_rows
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.progress import progress
from retrieval_kd.recipe import Section

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

NATIVE = "index.faiss"
_BATCH = 65536
_POINTS_PER_CENTROID = 39
"""With fewer training vectors a centroid than this (FAISS's own limit) the centroids are poor."""


class FaissSearch(Section):
    """What can change after the build; null leaves FAISS's own value."""

    nprobe: int | None = Field(default=None, ge=1)
    ef_search: int | None = Field(default=None, ge=1)
    quantizer_ef_search: int | None = Field(default=None, ge=1)
    k_factor: float | None = Field(default=None, ge=1)


class FaissRecipe(IndexRecipe):
    """A FAISS factory string, how it is trained, and its search parameters."""

    kind: Literal["faiss"]
    factory: str = Field(min_length=1)
    metric: Literal["auto", "inner_product", "cosine"] = "auto"
    """``auto``: the vectors' own similarity. ``cosine`` normalises documents when added and queries when searched."""
    train_sample: int = Field(default=262144, ge=1)
    """At most so many documents, drawn with ``seed``, train centroids and codebooks."""
    seed: int = Field(default=1234, ge=0, lt=2**31)
    ef_construction: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """Threads of the build; null: all, but one for a graph, whose links depend on the order threads come in."""
    search: FaissSearch = FaissSearch()


class FaissIndex(Index):
    """Maximum inner product search by any index of FAISS (Douze et al., The Faiss library, 2024)."""

    Recipe = FaissRecipe
    takes: ClassVar[str] = "dense"

    @classmethod
    def build(cls, recipe: FaissRecipe, source: Source, draft: Draft) -> None:
        """Trains on a seeded sample, adds the memory-mapped vectors in batches and writes ``index.faiss``.

        The same recipe and vectors give the same bytes. Raises `RecipeError` for a factory string or parameter
        that does not fit, `InputError` for too few vectors or for NaN and infinite values.
        """
        if source.vectors is None:
            raise UsageError("a faiss index is built from vectors")
        faiss = import_faiss()
        vectors = source.vectors
        matrix = vectors.matrix
        if not len(matrix):
            raise InputError(f"{vectors.path}: holds no vectors")
        cosine = _is_cosine(recipe.metric, vectors.similarity)
        index = structure.new_index(recipe.factory, matrix.shape[1])
        structure.set_parameters(index, recipe.factory, recipe.search.model_dump(exclude_none=True))
        if recipe.ef_construction is not None:
            _set_ef_construction(index, recipe)
        structure.prepare_training(index, recipe.seed)
        with _threads(recipe.threads or (1 if structure.is_graph(index) else None)), _faiss_errors(vectors):
            _train(index, vectors, recipe, cosine=cosine)
            zeros = _add(index, vectors, cosine=cosine)
            faiss.write_index(index, str(draft.path / NATIVE))
        if zeros and cosine:
            log.warning("%s of %s vectors are zero and have no direction: their cosine is 0", zeros, len(matrix))
        draft.counts["documents"] = write_rows(draft.path, vectors.ids)
        draft.details.update(
            metric="cosine" if cosine else "inner_product", dimension=int(matrix.shape[1]), zero_vectors=zeros
        )

    @classmethod
    def estimate(cls, recipe: FaissRecipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a vector of this dimension, and the bytes of centroids and codebooks."""
        if not isinstance(source, Shape):
            raise UsageError("a faiss index is built from vectors")
        index = structure.new_index(recipe.factory, source.dimension)
        structure.set_parameters(index, recipe.factory, recipe.search.model_dump(exclude_none=True))
        return structure.bytes_per_vector(index), structure.fixed_bytes(index)

    def open(self, recipe: FaissRecipe, search: FaissSearch) -> None:
        """Reads ``index.faiss`` into memory and sets its search parameters."""
        faiss = import_faiss()
        self._index = faiss.read_index(str(self.path / NATIVE))
        structure.set_parameters(self._index, recipe.factory, search.model_dump(exclude_none=True))
        self._cosine = self.manifest.details["metric"] == "cosine"
        self._stored: np.ndarray | None = None
        if isinstance(self._index, faiss.IndexFlat):
            shape = (self._index.ntotal, self._index.d)
            self._stored = faiss.rev_swig_ptr(self._index.get_xb(), shape[0] * shape[1]).reshape(shape)

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return int(self._index.d)

    @property
    def exact(self) -> bool:
        """True for ``Flat``: it compares the query with every vector."""
        return self._stored is not None

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of query vectors [Q, d] float32.

        A tie at the k-th hit is fetched whole before it is ordered by id. ``Flat`` gives the inner products as
        float64 sums rounded to float32, whatever the batch; the others give the scores FAISS computes from its codes.
        Raises `UsageError` for vectors of another dimension or with NaN or infinite values.
        """
        check_k(k)
        queries = self._prepared(queries)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        waiting = np.arange(len(queries))
        extra = 16 if self.exact else 1
        while len(waiting):
            fetch = min(k + extra, self._index.ntotal)
            found_scores, found_rows = self._index.search(queries[waiting], fetch)
            complete = np.ones(len(waiting), dtype=bool)
            for i, place in enumerate(waiting):
                hit = found_rows[i] >= 0
                candidates, hit_rows = found_scores[i][hit], found_rows[i][hit]
                slack = 0.0
                last = candidates[-1] if len(candidates) else -np.inf
                if self._stored is not None:
                    candidates, slack = _exact_scores(self._stored[hit_rows], queries[place])
                scores[place], rows[place] = ordered(candidates, hit_rows, self.rank, k)
                complete[i] = len(hit_rows) < fetch or fetch == self._index.ntotal or last < scores[place, -1] - slack
            waiting = waiting[~complete]
            extra *= 4
        return scores, rows

    def problems(self) -> list[str]:
        """Broken rows, or another number of vectors in FAISS."""
        found = super().problems()
        if self._index.ntotal != len(self):
            found.append(f"{len(self)} documents but FAISS has {self._index.ntotal} vectors")
        return found

    def _prepared(self, queries: np.ndarray) -> np.ndarray:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise UsageError(
                f"query vectors have shape {list(queries.shape)}, this index takes [queries, {self._index.d}]; "
                "encode queries with the model of the index"
            )
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if len(bad):
            raise UsageError(
                f"{len(bad)} query vectors have NaN or infinite values (first: query {first(bad.tolist())})"
            )
        return _normalised(queries) if self._cosine else queries


def _exact_scores(vectors: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, float]:
    """Inner products [n] as float64 sums rounded to float32, and how far FAISS's float32 sums can be from them.

    FAISS's sums depend on a vector's place in the batch, so that equal vectors would not tie.
    """
    scores = np.einsum("ij,j->i", vectors.astype(np.float64), query.astype(np.float64)).astype(np.float32)
    largest = float(np.linalg.norm(vectors, axis=1).max(initial=0.0)) * float(np.linalg.norm(query))
    return scores, len(query) * 2.0**-23 * largest


def _normalised(matrix: np.ndarray) -> np.ndarray:
    """A copy with rows of length 1; zero rows stay zero."""
    copy = np.array(matrix, dtype=np.float32, order="C")
    import_faiss().normalize_L2(copy)
    return copy


def _is_cosine(metric: str, similarity: str) -> bool:
    return metric == "cosine" or (metric == "auto" and similarity == "cosine")


def _set_ef_construction(index: Any, recipe: FaissRecipe) -> None:
    try:
        import_faiss().ParameterSpace().set_index_parameter(index, "efConstruction", float(recipe.ef_construction or 0))
    except RuntimeError as error:
        raise RecipeError(f"factory '{recipe.factory}' has no ef_construction (only HNSW graphs have)") from error


def _train(index: Any, vectors: Vectors, recipe: FaissRecipe, *, cosine: bool) -> None:
    if index.is_trained:
        return
    total = len(vectors.matrix)
    sample = min(total, recipe.train_sample)
    needed = structure.vectors_needed(index)
    if sample < needed:
        mend = "raise train_sample" if total >= needed else "choose a smaller factory or add documents"
        raise InputError(
            f"{vectors.path}: factory '{recipe.factory}' needs at least {needed} vectors to train "
            f"({_POINTS_PER_CENTROID * needed} for good centroids) and gets {sample} of {total}; {mend}"
        )
    if sample < _POINTS_PER_CENTROID * needed:
        log.warning(
            "training on %s vectors; %s are advised for '%s'", sample, _POINTS_PER_CENTROID * needed, recipe.factory
        )
    chosen = np.sort(np.random.default_rng(recipe.seed).choice(total, sample, replace=False))
    training = np.ascontiguousarray(vectors.matrix[chosen], dtype=np.float32)
    _check_finite(training, chosen, vectors)
    index.train(_normalised(training) if cosine else training)


def _add(index: Any, vectors: Vectors, *, cosine: bool) -> int:
    """The number of zero vectors, after all were added in batches."""
    zeros = 0
    total = len(vectors.matrix)
    with progress(f"adding {total:,} vectors", total) as advance:
        for start in range(0, total, _BATCH):
            batch = np.ascontiguousarray(vectors.matrix[start : start + _BATCH], dtype=np.float32)
            _check_finite(batch, np.arange(start, start + len(batch)), vectors)
            zeros += int((~batch.any(axis=1)).sum())
            index.add(_normalised(batch) if cosine else batch)
            advance(len(batch))
    return zeros


def _check_finite(batch: np.ndarray, rows: np.ndarray, vectors: Vectors) -> None:
    bad = rows[~np.isfinite(batch).all(axis=1)]
    if len(bad):
        ids = first(vectors.ids[row] for row in bad)
        raise InputError(
            f"{vectors.path}: {len(bad)} vectors have NaN or infinite values (documents {ids}); encode again"
        )


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Runs FAISS with ``number`` threads and restores the former number."""
    faiss = import_faiss()
    former = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number or former)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(former)


@contextmanager
def _faiss_errors(vectors: Vectors) -> Iterator[None]:
    """Turns an exception of FAISS into ours."""
    try:
        yield
    except RuntimeError as error:
        raise RetrievalKDError(f"{vectors.path}: FAISS failed: {structure.faiss_words(error)}") from error
