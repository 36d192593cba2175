"""How a FAISS index is filled: trained on a sample, then added to in batches of the memory-mapped vectors."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import InputError, RetrievalKDError, first
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.vectors import Vectors
    from retrieval_kd.indexes.stored_vectors import StoredVectorsWriter

log = logging.getLogger("retrieval_kd")

BATCH = 65536
"""Vectors that are in memory at a time."""
_POINTS_PER_CENTROID = 39
"""With fewer training vectors a centroid than this (FAISS's own limit) the centroids are poor."""


def train(
    index: Any,
    vectors: Vectors,
    factory: str,
    work: Path,
    *,
    sample: int,
    seed: int,
    cosine: bool,
    gpu: Any | None = None,
) -> None:
    """Trains ``index`` (or its ``gpu`` copy) on at most ``sample`` of the vectors, drawn with ``seed``.

    The sample is a memory-mapped file in the folder ``work``, which is gone afterwards: no memory needs to hold it.
    Raises `InputError` for fewer vectors than centroids (or than dimensions of a PCA), and for NaN and infinite values
    among those drawn.
    """
    if index.is_trained:
        return
    total = len(vectors.matrix)
    drawn = min(total, sample)
    needed = structure.vectors_needed(index)
    advised = max(needed, _POINTS_PER_CENTROID * structure.most_centroids(index))
    if drawn < needed:
        mend = "raise train_sample" if total >= needed else "choose a smaller factory or add documents"
        raise InputError(
            f"{vectors.path}: factory '{factory}' needs at least {needed} vectors to train "
            f"({advised} are advised) and gets {drawn} of {total}; {mend}"
        )
    if drawn < advised:
        log.warning("training on %s vectors; %s are advised for '%s'", drawn, advised, factory)
    chosen = np.sort(np.random.default_rng(seed).choice(total, drawn, replace=False))
    (index if gpu is None else gpu).train(_gathered(vectors, chosen, work, cosine=cosine))


def add(
    index: Any, vectors: Vectors, *, cosine: bool, at_once: bool = False, store: StoredVectorsWriter | None = None
) -> int:
    """The number of zero vectors, after all were added to ``index`` in batches (and written to ``store``).

    ``at_once``: in a single batch, for a graph that cannot grow. Raises `InputError` for NaN and infinite values.
    """
    zeros = 0
    total = len(vectors.matrix)
    step = total if at_once else BATCH
    with progress(f"adding {total:,} vectors", total) as advance:
        for start in range(0, total, step):
            batch = _batch(vectors, slice(start, start + step), cosine=cosine)
            zeros += int((~batch.any(axis=1)).sum())
            index.add(batch)
            if store is not None:
                store.write(start, batch)
            _release(vectors.matrix)
            advance(len(batch))
    return zeros


def normalised(matrix: np.ndarray) -> np.ndarray:
    """A copy with rows of length 1; zero rows stay zero."""
    copy = np.array(matrix, dtype=np.float32, order="C")
    import_faiss().normalize_L2(copy)
    return copy


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Runs FAISS with ``number`` threads (None: as many as it has) and restores the former number."""
    faiss = import_faiss()
    former = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number or former)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(former)


@contextmanager
def faiss_errors(what: object) -> Iterator[None]:
    """Turns an exception of FAISS into a `RetrievalKDError` about ``what``."""
    try:
        yield
    except RuntimeError as error:
        raise RetrievalKDError(f"{what}: FAISS failed: {structure.faiss_words(error)}") from error


def _gathered(vectors: Vectors, chosen: np.ndarray, work: Path, *, cosine: bool) -> np.ndarray:
    """The rows ``chosen`` (ascending) as one array, in a file that is deleted when nothing refers to the array."""
    with TemporaryFile(dir=work) as file:
        for start in range(0, len(chosen), BATCH):
            file.write(_batch(vectors, chosen[start : start + BATCH], cosine=cosine).data)
            _release(vectors.matrix)
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r", shape=(len(chosen), vectors.matrix.shape[1]))


def _batch(vectors: Vectors, rows: slice | np.ndarray, *, cosine: bool) -> np.ndarray:
    batch = np.ascontiguousarray(vectors.matrix[rows], dtype=np.float32)
    finite = np.isfinite(batch).all(axis=1)
    if not finite.all():
        bad = np.arange(len(vectors.matrix))[rows][~finite]
        raise InputError(
            f"{vectors.path}: {len(bad)} vectors have NaN or infinite values "
            f"(documents {first(vectors.ids[row] for row in bad)}); encode again"
        )
    return normalised(batch) if cosine else batch


def _release(matrix: np.ndarray) -> None:
    """Lets go of the memory that holds what was read of a memory-mapped array: it is read again when needed."""
    base: Any = matrix
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)
