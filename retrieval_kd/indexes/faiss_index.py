"""Dense vectors in FAISS: any factory string, stored as the stock CPU index ``index.faiss``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import ArtifactError, InputError, RecipeError, RetrievalKDError, UsageError, first
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Index, Shape, Source, write_rows
from retrieval_kd.indexes.faiss_build import BATCH, add, faiss_errors, normalised, threads, train
from retrieval_kd.indexes.faiss_device import CagraGraph, builder, placement, to_cpu, to_gpus
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.indexes.faiss_recipe import FaissRecipe, FaissSearch, Rerank
from retrieval_kd.indexes.faiss_search import NativeSearch, in_order, padded
from retrieval_kd.indexes.hits import check_allowed, check_k
from retrieval_kd.indexes.stored_vectors import StoredVectors, StoredVectorsWriter, stored_bytes
from retrieval_kd.plan import Draft

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

NATIVE = "index.faiss"
_CANDIDATES = 100
"""Candidates that are scored again unless ``candidates`` says otherwise."""


class FaissIndex(Index):
    """Maximum inner product search by any index of FAISS (Douze et al., The Faiss library, 2024)."""

    Recipe = FaissRecipe
    takes = "dense"

    @classmethod
    def build(cls, recipe: FaissRecipe, source: Source, draft: Draft) -> None:
        """Trains on a seeded sample, adds the memory-mapped vectors in batches and writes ``index.faiss``.

        The same recipe and vectors give the same bytes on the CPU. Raises `RecipeError` for a factory string or
        parameter that does not fit, `InputError` for too few vectors or for NaN and infinite values.
        """
        vectors = _vectors_of(source)
        cosine = recipe.metric == "cosine" or (recipe.metric == "auto" and vectors.similarity == "cosine")
        index = structure.new_index(recipe.factory, vectors.dimension)
        structure.set_parameters(index, recipe.factory, recipe.search.of_faiss())
        if recipe.ef_construction is not None:
            _set_ef_construction(index, recipe)
        structure.prepare_training(index, recipe.seed)
        with threads(recipe.threads or (1 if structure.is_graph(index) else None)), faiss_errors(vectors.path):
            gpu = builder(index, recipe.factory, placement(recipe.device))
            sample = {"sample": recipe.train_sample, "seed": recipe.seed}
            train(index, source.training or vectors, recipe.factory, draft.work, **sample, cosine=cosine, gpu=gpu)
            _fill(index, vectors, draft, recipe.rerank, cosine=cosine, gpu=gpu)

    def grow(self, source: Source, draft: Draft) -> None:
        """Writes an index of ``source`` with the centroids, codebooks and rotations of this one."""
        vectors = _vectors_of(source)
        if vectors.dimension != self.dimension:
            raise UsageError(f"{vectors.path}: vectors of {vectors.dimension} numbers, the index has {self.dimension}")
        index = import_faiss().read_index(str(self.path / NATIVE))
        index.reset()
        number = getattr(self.recipe, "threads", None)
        with threads(number or (1 if structure.is_graph(index) else None)), faiss_errors(vectors.path):
            _fill(index, vectors, draft, getattr(self.recipe, "rerank", None), cosine=self._cosine)

    @classmethod
    def estimate(cls, recipe: FaissRecipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a vector of this dimension (with the one stored for re-ranking), and those of what is trained."""
        if not isinstance(source, Shape):
            raise UsageError("a faiss index is built from vectors")
        index = structure.new_index(recipe.factory, source.dimension)
        structure.set_parameters(index, recipe.factory, recipe.search.of_faiss())
        stored = 0 if recipe.rerank is None else stored_bytes(source.dimension, recipe.rerank.store)
        return structure.bytes_per_vector(index) + stored, structure.fixed_bytes(index)

    def open(self, recipe: FaissRecipe, search: FaissSearch) -> None:
        """Reads (or maps) ``index.faiss``, sets its search parameters and copies it to the GPUs it is to use."""
        faiss = import_faiss()
        path = self.path / NATIVE
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if search.memory_map else 0)
        except RuntimeError as error:
            raise ArtifactError(
                f"{path}: damaged ({structure.faiss_words(error)}); restore it or build again"
            ) from error
        self._index = index
        self.dimension = int(index.d)
        """The length of a vector."""
        self._cosine = self.manifest.details["metric"] == "cosine"
        self._stored = StoredVectors.open(self.path)
        self._whole: np.ndarray | None = None
        if isinstance(index, faiss.IndexFlat):
            shape = (index.ntotal, index.d)
            self._whole = faiss.rev_swig_ptr(index.get_xb(), shape[0] * shape[1]).reshape(shape)
        self._set(recipe, search)

    @classmethod
    def search_overrides(cls, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given``, where ``tuned`` stands for the parameters that were found for this generation."""
        if not isinstance(given.get("tuned"), bool):
            return dict(given)
        from retrieval_kd.indexes.tune import tuned_search

        others = {name: value for name, value in given.items() if name != "tuned"}
        return {**tuned_search(path), **others} if given["tuned"] else others

    def set_search(self, values: Mapping[str, Any]) -> None:
        """Changes search parameters of an open index (the others stay); not while another thread searches."""
        self._set(self.recipe, self.search_parameters(self.recipe, values))

    def _set(self, recipe: Any, search: Any) -> None:
        structure.set_parameters(self._index, recipe.factory, search.of_faiss())
        where = placement(search.device or "cpu", search.shard or "replicated")
        copy = to_gpus(self._index, where, float16=self._stored is not None) if where.gpus else None
        self._native = NativeSearch(self._index, copy)
        self._candidates = search.candidates or _CANDIDATES

    @property
    def exact(self) -> bool:
        """True for ``Flat``: it compares the query with every vector."""
        return self._whole is not None

    @property
    def native(self) -> Any:
        """The FAISS index on the CPU."""
        return self._index

    @property
    def tunable(self) -> list[str]:
        """The search parameters that trade time for recall."""
        return structure.supported_parameters(self._index) + (["candidates"] if self._stored is not None else [])

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of query vectors [Q, d] float32.

        A tie at the k-th hit is fetched whole before it is ordered by id. ``Flat``, and ``rerank`` among its
        candidates, give the inner products as float64 sums rounded to float32, whatever the batch; the others give
        the scores FAISS computes from its codes. Allowed rows are selected inside FAISS where the index can, with the
        same effort (nprobe, k_factor, candidates); a graph scans them when they are few and searches longer when they
        are many. Raises `UsageError` for vectors of another dimension or with NaN or infinite values.
        """
        check_k(k)
        queries = self._prepared(queries)
        reach = len(self)
        if allowed is not None:
            check_allowed(allowed, reach)
            reach = int(np.count_nonzero(allowed))
            allowed = None if reach == len(self) else allowed
        if not reach or not len(queries):
            return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)
        wanted = min(k, reach)
        try:
            if self._whole is not None:
                found = self._of_all(queries, wanted, reach, allowed)
            elif self._stored is not None:
                found = self._reranked(queries, wanted, reach, allowed)
            else:
                found = self._hits(queries, wanted, reach, allowed)
        except RuntimeError as error:
            raise RetrievalKDError(f"{self.path}: FAISS failed: {structure.faiss_words(error)}") from error
        return padded(*found, k)

    def _hits(
        self, queries: np.ndarray, k: int, reach: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's best ``k`` by its own scores."""
        scores, rows = self._native.best(queries, min(k + 1, reach), allowed)
        falling = scores[:, 1:] < scores[:, :-1]  # not so between two missing hits: one can only be the last
        if k < reach and np.count_nonzero(falling) == falling.size:
            return scores[:, :k], rows[:, :k]
        best_scores = np.empty((len(queries), k), dtype=np.float32)
        best_rows = np.empty((len(queries), k), dtype=np.int64)
        waiting, extra = np.arange(len(queries)), 1
        while True:
            ordered_scores, ordered_rows = in_order(scores, rows, self.rank)
            best_scores[waiting], best_rows[waiting] = ordered_scores[:, :k], ordered_rows[:, :k]
            if rows.shape[1] == reach:
                return best_scores, best_rows
            cut = (ordered_rows[:, -1] >= 0) & (ordered_scores[:, -1] == ordered_scores[:, k - 1])
            waiting = waiting[cut]
            if not len(waiting):
                return best_scores, best_rows
            extra *= 4
            scores, rows = self._native.best(queries[waiting], min(k + extra, reach), allowed)

    def _of_all(
        self, queries: np.ndarray, k: int, reach: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` by exact inner products: FAISS's float32 sums depend on a vector's place in the batch."""
        assert self._whole is not None
        whole = StoredVectors(self._whole)
        best_scores = np.empty((len(queries), k), dtype=np.float32)
        best_rows = np.empty((len(queries), k), dtype=np.int64)
        waiting, extra = np.arange(len(queries)), 16
        while len(waiting):
            asked = queries[waiting]
            fetch = min(k + extra, reach)
            near, rows = self._native.best(asked, fetch, allowed)
            scores, rows = in_order(whole.scores(asked, rows), rows, self.rank)
            best_scores[waiting], best_rows[waiting] = scores[:, :k], rows[:, :k]
            # No float32 sum is farther from the true one than this.
            slack = asked.shape[1] * 2.0**-23 * self._longest * np.linalg.norm(asked, axis=1)
            waiting = waiting[(near[:, -1] >= scores[:, k - 1] - slack) & (fetch < reach)]
            extra *= 4
        return best_scores, best_rows

    def _reranked(
        self, queries: np.ndarray, k: int, reach: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` of FAISS's best candidates by the stored vectors."""
        assert self._stored is not None
        _, rows = self._hits(queries, min(max(k, self._candidates), reach), reach, allowed)
        scores, rows = in_order(self._stored.scores(queries, rows), rows, self.rank)
        return scores[:, :k], rows[:, :k]

    @cached_property
    def _longest(self) -> float:
        """The length of the longest vector of ``Flat``."""
        assert self._whole is not None
        parts = (self._whole[start : start + BATCH] for start in range(0, len(self._whole), BATCH))
        return max(float(np.linalg.norm(part, axis=1).max()) for part in parts)

    def problems(self) -> list[str]:
        """Broken rows, or another number of vectors in FAISS or stored for re-ranking."""
        found = super().problems()
        if self._index.ntotal != len(self):
            found.append(f"{len(self)} documents but FAISS has {self._index.ntotal} vectors")
        if self._stored is not None and len(self._stored) != len(self):
            found.append(f"{len(self)} documents but {len(self._stored)} vectors are stored for re-ranking")
        return found

    def _prepared(self, queries: np.ndarray) -> np.ndarray:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise UsageError(
                f"query vectors have shape {list(queries.shape)}, this index takes [queries, {self.dimension}]; "
                "encode queries with the model of the index"
            )
        if not math.isfinite(np.vdot(queries, queries)):  # a fast look before the exact one
            bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
            if len(bad):
                raise UsageError(
                    f"{len(bad)} query vectors have NaN or infinite values (first: query {first(bad.tolist())})"
                )
        return normalised(queries) if self._cosine else queries


def _vectors_of(source: Source) -> Vectors:
    """The vectors to index; `UsageError` without them, `InputError` when there are none of them."""
    if source.vectors is None:
        raise UsageError("a faiss index is built from vectors")
    if not len(source.vectors.matrix):
        raise InputError(f"{source.vectors.path}: holds no vectors")
    return source.vectors


def _fill(
    index: Any, vectors: Vectors, draft: Draft, rerank: Rerank | None, *, cosine: bool, gpu: Any | None = None
) -> None:
    """Adds ``vectors`` to a trained index (or its ``gpu`` copy) and writes it, the rows, and what re-ranking needs."""
    shape = vectors.matrix.shape
    store = None if rerank is None else StoredVectorsWriter(draft.path, (shape[0], shape[1]), rerank.store)
    at_once = structure.adds_at_once(index) or isinstance(gpu, CagraGraph)
    zeros = add(index if gpu is None else gpu, vectors, cosine=cosine, at_once=at_once, store=store)
    import_faiss().write_index(index if gpu is None else to_cpu(gpu), str(draft.path / NATIVE))
    if zeros and cosine:
        log.warning("%s of %s vectors are zero and have no direction: their cosine is 0", zeros, shape[0])
    draft.counts["documents"] = write_rows(draft.path, vectors.arrow_ids)
    draft.details.update(metric="cosine" if cosine else "inner_product", dimension=int(shape[1]), zero_vectors=zeros)
    if store is not None:
        draft.details["rerank_error"] = round(store.close(), 6)


def _set_ef_construction(index: Any, recipe: FaissRecipe) -> None:
    try:
        import_faiss().ParameterSpace().set_index_parameter(index, "efConstruction", float(recipe.ef_construction or 0))
    except RuntimeError as error:
        raise RecipeError(f"factory '{recipe.factory}' has no ef_construction (only HNSW graphs have)") from error
