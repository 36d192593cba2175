"""The index kind ``distill-vq``: trained here, then an ordinary FAISS index that is opened and searched as one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Shape, Source, write_rows
from retrieval_kd.indexes.distill_vq.codebooks import Codebooks, fast_scan, filled
from retrieval_kd.indexes.distill_vq.distillation import Course
from retrieval_kd.indexes.distill_vq.layout import Layout, layout_of
from retrieval_kd.indexes.distill_vq.recipe import DistillVQRecipe
from retrieval_kd.indexes.distill_vq.teaching import Documents, Pupils, pseudo_queries, real_queries, split
from retrieval_kd.indexes.faiss_build import add, faiss_errors, threads, train
from retrieval_kd.indexes.faiss_index import NATIVE, FaissIndex
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.plan import Draft

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

ROTATION = "document_rotation.npy"
"""Beside an index whose own rotation is that of queries, because these learned another than documents have."""


class DistillVQIndex(FaissIndex):
    """Maximum inner product search by codes that learned a teacher's relevance (Xiao et al., Distill-VQ, 2022).

    ``index.faiss`` is a stock index: FAISS alone reads and searches it, and its scores are inner products of the
    query with decoded documents.
    """

    Recipe = DistillVQRecipe
    learns_from: ClassVar[frozenset[str]] = frozenset({"queries", "scores"})
    resumable: ClassVar[bool] = True

    @classmethod
    def build(cls, recipe: DistillVQRecipe, source: Source, draft: Draft) -> None:  # type: ignore[override]
        """Trains FAISS's own index, distils it, and writes the best of all epochs, or FAISS's own if none was better.

        The same recipe and inputs give the same bytes on the CPU, also when the build was interrupted. Raises
        `RecipeError` for a factory string that does not fit, `InputError` for too few vectors or for NaN and infinite
        values, `ArtifactError` for score files of other queries or documents.
        """
        vectors = _vectors(source)
        learned = vectors if source.training is None else source.training
        if source.scores and source.queries is None:
            raise UsageError("score files teach by their queries: give the vectors of these queries too (--queries)")
        cosine = recipe.metric == "cosine" or (recipe.metric == "auto" and vectors.similarity == "cosine")
        layout = layout_of(recipe.factory)
        words = 0 if layout.product else layout.parts << layout.bits
        if 2 * words > len(vectors.matrix):
            log.warning(
                "factory '%s' keeps %s whole vectors as codewords for %s documents: bytes a document say little here",
                recipe.factory, words, len(vectors.matrix),
            )  # fmt: skip
        with threads(recipe.threads), faiss_errors(vectors.path):
            template, own, zeros = _by_faiss(recipe, layout, learned, draft.work, cosine=cosine)
            documents = Documents(learned.matrix, cosine=cosine)
            real, pseudo, held_out = _pupils(recipe, source, documents, learned)
            course = Course(recipe, layout, documents, template, real, pseudo, held_out, draft.work)
            course.run(own)
        best = course.best
        shutil.copyfile(draft.work / best["index"], draft.path / NATIVE)
        rotation = (draft.work / best["index"]).with_suffix(".npy")
        if rotation.is_file():
            shutil.copyfile(rotation, draft.path / ROTATION)
        if learned is not vectors:
            zeros = _refill(draft.path, recipe, vectors, cosine=cosine)
        if zeros and cosine:
            log.warning(
                "%s of %s vectors are zero and have no direction: their cosine is 0", zeros, len(vectors.matrix)
            )
        before = course.history[0]["reassigned"]
        if best["epoch"] is None:
            log.warning("training gained nothing on %s held-out queries: FAISS's own index is kept", len(held_out))
        else:
            log.info(
                "overlap@10 with the teacher on %s held-out queries: %.4f by FAISS, %.4f after epoch %s (%s lists)",
                len(held_out), before, best["overlap"], best["epoch"], best["lists"],
            )  # fmt: skip
        draft.counts["documents"] = write_rows(draft.path, vectors.arrow_ids)
        draft.counts["training_queries"] = sum(len(pupils) for pupils in (real, pseudo) if pupils is not None)
        draft.counts["held_out_queries"] = len(held_out)
        draft.details.update(
            metric="cosine" if cosine else "inner_product",
            dimension=vectors.dimension,
            zero_vectors=zeros,
            shipped="faiss" if best["epoch"] is None else "distilled",
            shipped_epoch=best["epoch"],
            shipped_lists=best["lists"] if layout.lists else None,
            overlap_before=before,
            overlap_after=best["overlap"],
            history=course.history,
        )

    def grow(self, source: Source, draft: Draft) -> None:
        """Writes an index of ``source`` with the codebooks, centroids and rotation of this one."""
        vectors = _vectors(source, least=1)
        if vectors.dimension != self.dimension:
            raise UsageError(f"{vectors.path}: vectors of {vectors.dimension} numbers, the index has {self.dimension}")
        assert isinstance(self.recipe, DistillVQRecipe)
        for name in (NATIVE, ROTATION):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, draft.path / name)
        with faiss_errors(vectors.path):
            zeros = _refill(draft.path, self.recipe, vectors, cosine=self._cosine)
        draft.counts["documents"] = write_rows(draft.path, vectors.arrow_ids)
        metric = "cosine" if self._cosine else "inner_product"
        draft.details.update(metric=metric, dimension=self.dimension, zero_vectors=zeros)

    @classmethod
    def estimate(cls, recipe: DistillVQRecipe, source: Collection | Shape) -> tuple[float, int]:  # type: ignore[override]
        """Bytes a vector (its code, and 8 for its id in a list), and those of codebooks, centroids and rotation."""
        if not isinstance(source, Shape):
            raise UsageError("a distill-vq index is built from vectors")
        index = structure.new_index(recipe.factory, source.dimension)
        structure.set_parameters(index, recipe.factory, recipe.search.of_faiss())
        return structure.bytes_per_vector(index), structure.fixed_bytes(index)


def _vectors(source: Source, *, least: int = 2) -> Vectors:
    if source.vectors is None:
        raise UsageError("a distill-vq index is built from vectors")
    number = len(source.vectors.matrix)
    if number < least:
        raise InputError(f"{source.vectors.path}: {number} vectors; at least {least} are needed")
    return source.vectors


def _untrained(recipe: DistillVQRecipe, layout: Layout, dimension: int) -> Any:
    structure.new_index(recipe.factory, dimension)  # with FAISS's words about the recipe's own string
    index = structure.new_index(layout.factory, dimension)
    faiss = import_faiss()
    for part in structure.parts(index):
        if isinstance(part, faiss.IndexIVF) and layout.parts:
            part.by_residual = recipe.residual
        if hasattr(part, "rq"):
            part.rq.max_beam_size = 1  # codes are searched for again, given all others, where it matters
    return index


def _by_faiss(
    recipe: DistillVQRecipe, layout: Layout, vectors: Vectors, work: Path, *, cosine: bool
) -> tuple[Any, Path, int]:
    """What FAISS trains by itself: the index without documents, the file of that with them, and zero vectors."""
    faiss = import_faiss()
    empty, full = work / "template.faiss", work / "faiss.faiss"
    if full.is_file():  # a former attempt trained it
        zeros = int(np.load(work / "zeros.npy"))
        return faiss.read_index(str(empty)), full, zeros
    index = _untrained(recipe, layout, vectors.dimension)
    structure.set_parameters(index, recipe.factory, recipe.search.of_faiss())
    structure.prepare_training(index, recipe.seed)
    train(index, vectors, recipe.factory, work, sample=recipe.train_sample, seed=recipe.seed, cosine=cosine)
    faiss.write_index(index, str(empty))
    zeros = add(index, vectors, cosine=cosine)
    np.save(work / "zeros.npy", zeros)
    faiss.write_index(fast_scan(index, layout), str(full.with_suffix(".tmp")))
    full.with_suffix(".tmp").replace(full)
    return faiss.read_index(str(empty)), full, zeros


def _refill(folder: Path, recipe: DistillVQRecipe, vectors: Vectors, *, cosine: bool) -> int:
    """Replaces the documents of the index in ``folder``, by the nearest lists and codes; the number of zero vectors."""
    faiss = import_faiss()
    layout = layout_of(recipe.factory)
    template = _untrained(recipe, layout, vectors.dimension)
    book = Codebooks.of(faiss.read_index(str(folder / NATIVE)), layout, residual=recipe.residual)
    if book.rotation is not None and not layout.rotated:
        book = replace(book, rotation=None, query_map=book.rotation)
    if (folder / ROTATION).is_file():
        book = replace(book, rotation=np.load(folder / ROTATION), query_map=book.rotation)
    documents = Documents(vectors.matrix, cosine=cosine)
    bad = zeros = 0
    for _, part in documents.batches():
        bad += int((~np.isfinite(part).all(axis=1)).sum())
        zeros += int((~part.any(axis=1)).sum())
    if bad:
        raise InputError(f"{vectors.path}: {bad} vectors have NaN or infinite values; encode again")
    index = filled(template, layout, book, _coded(book, documents))
    faiss.write_index(index, str(folder / NATIVE))
    return zeros


def _coded(book: Codebooks, documents: Documents) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lists and codes (whole vectors where there are no codebooks) of documents, as these codebooks have them."""
    for _, part in documents.batches():
        rotated = book.rotated(part)
        lists = book.nearest_lists(rotated)
        yield lists, book.encode(rotated, lists) if len(book.words) else rotated


def _pupils(
    recipe: DistillVQRecipe, source: Source, documents: Documents, learned: Vectors
) -> tuple[Pupils | None, Pupils | None, Pupils]:
    """Real and pseudo-queries to train on, and those held out (real ones where there are any)."""
    keys = recipe.training
    real = None
    if source.queries is not None:
        if len(source.queries) < 2:
            raise InputError(f"{source.queries.path}: holds {len(source.queries)} queries; at least 2 are needed")
        files = list(source.scores)
        real = real_queries(source.queries, documents, keys.top, files, learned.ids if files else ())
    pseudo = None
    if keys.pseudo_queries and (real is None or keys.pseudo_share):
        number = min(keys.pseudo_queries, len(documents))
        pseudo = pseudo_queries(documents, number, keys.top, recipe.seed, own_document=keys.own_document)
    if real is not None:
        real, held_out = split(real, keys.held_out, recipe.seed)
    elif pseudo is not None:
        pseudo, held_out = split(pseudo, keys.held_out, recipe.seed)
    else:
        raise UsageError(
            "a distill-vq index learns from queries: give --queries, or set training.pseudo_queries above 0"
        )
    return real, pseudo, held_out
