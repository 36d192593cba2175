"""Codebooks, centroids and rotation as arrays: codes of documents, documents of codes, to and from a FAISS index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retrieval_kd.indexes.distill_vq.layout import Layout
from retrieval_kd.indexes.faiss_package import import_faiss

_BATCH = 8192


@dataclass(frozen=True)
class Codebooks:
    """What an index has learned. Documents and queries are in the rotated space [h] unless it is said otherwise."""

    words: np.ndarray
    """Codewords [M, 2**bits, h/M] of a product, [M, 2**bits, h] to be added; M is 0 for lists of whole vectors."""
    centroids: np.ndarray | None
    """[L, h], or None without lists."""
    rotation: np.ndarray | None
    """[h, d] of documents, or None."""
    query_map: np.ndarray | None = None
    """[h, d] of queries, where it is another than that of documents."""
    product: bool = True
    residual: bool = True
    """Whether codes are of what a centroid leaves of a document."""

    @classmethod
    def of(cls, index: Any, layout: Layout, *, residual: bool) -> Codebooks:
        """What a trained FAISS index of this layout holds."""
        faiss = import_faiss()
        rotation = None
        if isinstance(index, faiss.IndexPreTransform):
            step = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation = faiss.vector_to_array(step.A).reshape(step.d_out, step.d_in).copy()
        inner = _inner(index)
        words = np.empty((0, 0, inner.d), dtype=np.float32)
        if layout.parts:
            values = inner.pq.centroids if layout.product else inner.rq.codebooks
            words = faiss.vector_to_array(values).reshape(layout.parts, 1 << layout.bits, -1).copy()
        centroids = None
        if layout.lists:
            flat = faiss.downcast_index(inner.quantizer)
            centroids = faiss.rev_swig_ptr(flat.get_xb(), layout.lists * inner.d).reshape(layout.lists, -1).copy()
        return cls(words, centroids, rotation, product=layout.product, residual=residual)

    def rotated(self, documents: np.ndarray) -> np.ndarray:
        """Documents [n, d] in the space of the codebooks [n, h]."""
        return documents if self.rotation is None else documents @ self.rotation.T

    def nearest_lists(self, rotated: np.ndarray) -> np.ndarray:
        """The list [n] int64 that FAISS would add each document to: that of the greatest inner product."""
        if self.centroids is None:
            return np.zeros(len(rotated), dtype=np.int64)
        faiss = import_faiss()
        _, found = faiss.knn(rotated, self.centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)
        return np.asarray(found[:, 0], dtype=np.int64)

    def base(self, lists: np.ndarray) -> np.ndarray | float:
        """What the lists [n] alone say of the documents in them [n, h]; 0 where codes say all."""
        return self.centroids[lists] if self.centroids is not None and self.residual else 0.0

    def encode(self, rotated: np.ndarray, lists: np.ndarray, codes: np.ndarray | None = None) -> np.ndarray:
        """Codes [n, M] uint8 of documents in their lists.

        Of a product: the nearest codewords. Of codewords that are added: greedily from the first codebook to the last,
        then each again given all others; or only the latter, from ``codes``.
        """
        left = rotated - self.base(lists)
        parts = len(self.words)
        if self.product:
            pieces = left.reshape(len(left), parts, -1)
            found = [_nearest(pieces[:, m], self.words[m]) for m in range(parts)]
            return np.stack(found, axis=1) if found else np.empty((len(left), 0), dtype=np.uint8)
        if codes is None:
            codes = np.empty((len(left), parts), dtype=np.uint8)
            for m in range(parts):
                codes[:, m] = _nearest(left, self.words[m])
                left = left - self.words[m][codes[:, m]]
        else:
            codes = codes.copy()
            left = left - self.decoded(codes)
        for m in range(parts):
            left = left + self.words[m][codes[:, m]]
            codes[:, m] = _nearest(left, self.words[m])
            left = left - self.words[m][codes[:, m]]
        return codes

    def decoded(self, codes: np.ndarray) -> np.ndarray:
        """What the codes [n, M] say of the documents [n, h], without their centroids."""
        if self.product:
            return np.concatenate([self.words[m][codes[:, m]] for m in range(len(self.words))], axis=1)
        total = np.zeros((len(codes), self.words.shape[2]), dtype=np.float32)
        for m in range(len(self.words)):
            total += self.words[m][codes[:, m]]
        return total

    def refined(self, rotated: np.ndarray, lists: np.ndarray, rounds: int) -> Codebooks:
        """Codebooks with a smaller squared error on these documents: codewords and codes in turns, one at a time.

        A codeword becomes the mean of what the others leave of its documents. One without documents stays.
        """
        words = self.words.copy()
        book = replace(self, words=words)
        codes = book.encode(rotated, lists)
        left = rotated - book.base(lists) - book.decoded(codes)
        for _ in range(rounds):
            for m in range(len(words)):
                left += words[m][codes[:, m]]
                order = np.argsort(codes[:, m], kind="stable")
                used, starts = np.unique(codes[order, m], return_index=True)
                counts = np.diff(np.append(starts, len(order)))[:, None]
                words[m][used] = np.add.reduceat(left[order], starts, axis=0) / counts
                codes[:, m] = _nearest(left, words[m])
                left -= words[m][codes[:, m]]
        return book


def filled(template: Any, layout: Layout, book: Codebooks, added: Iterable[tuple[np.ndarray, np.ndarray]]) -> Any:
    """A FAISS index of these codebooks and documents, of the kind of ``template`` (one without documents).

    ``added`` are lists [n] int64 and codes [n, M] (whole vectors [n, h] where M is 0) in batches, in the order of rows.
    """
    faiss = import_faiss()
    index = faiss.clone_index(template)
    if layout.rotated or book.query_map is not None:
        matrix = book.rotation if book.query_map is None else book.query_map
        assert matrix is not None
        if not layout.rotated:
            index = faiss.IndexPreTransform(faiss.LinearTransform(matrix.shape[1], matrix.shape[0], False), index)
        step = faiss.downcast_VectorTransform(index.chain.at(0))
        faiss.copy_array_to_vector(np.ascontiguousarray(matrix, dtype=np.float32).ravel(), step.A)
        step.is_trained = True
    inner = _inner(index)
    if layout.parts:
        values = inner.pq.centroids if layout.product else inner.rq.codebooks
        faiss.copy_array_to_vector(np.ascontiguousarray(book.words, dtype=np.float32).ravel(), values)
    if book.centroids is not None:
        quantizer = faiss.downcast_index(inner.quantizer)
        quantizer.reset()
        quantizer.add(np.ascontiguousarray(book.centroids, dtype=np.float32))
    if layout.parts and not layout.product:
        inner.rq.is_trained = True
    inner.is_trained = index.is_trained = True
    total = 0
    for lists, codes in added:
        _append(inner, layout, lists, _packed(codes, layout), total)
        total += len(codes)
    inner.ntotal = index.ntotal = total
    return fast_scan(index, layout)


def _append(inner: Any, layout: Layout, lists: np.ndarray, codes: np.ndarray, start: int) -> None:
    faiss = import_faiss()
    if not layout.lists:
        inner.add_sa_codes(codes)
        return
    order = np.argsort(lists, kind="stable")
    numbers, starts = np.unique(lists[order], return_index=True)
    for number, rows in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        ids = np.ascontiguousarray(rows + start, dtype=np.int64)
        of_list = np.ascontiguousarray(codes[rows])
        inner.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(of_list))


def _packed(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """Codes as FAISS stores them: bytes; two 4-bit ones a byte, the first in the lower half; vectors as they are."""
    if not layout.parts:
        return np.ascontiguousarray(codes, dtype=np.float32).view(np.uint8)
    if layout.bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return np.ascontiguousarray(codes, dtype=np.uint8)


def fast_scan(index: Any, layout: Layout) -> Any:
    """``index`` with its 4-bit codes in FastScan's blocks, where the layout asks for it."""
    if not layout.fast:
        return index
    faiss = import_faiss()
    inner = _inner(index)
    packed = faiss.IndexIVFPQFastScan(inner) if layout.lists else faiss.IndexPQFastScan(inner)
    if layout.lists:  # both have the same quantizer: the one that lives on owns it
        packed.own_fields, inner.own_fields = True, False
    if not isinstance(index, faiss.IndexPreTransform):
        return packed
    first = faiss.downcast_VectorTransform(index.chain.at(0))
    step = faiss.LinearTransform(first.d_in, first.d_out, False)
    faiss.copy_array_to_vector(faiss.vector_to_array(first.A), step.A)
    step.is_trained = True
    return faiss.IndexPreTransform(step, packed)


def _inner(index: Any) -> Any:
    """The index behind the rotation."""
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    return faiss.downcast_index(part.index) if isinstance(part, faiss.IndexPreTransform) else part


def _nearest(points: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The nearest codeword [n] uint8 of each point."""
    found = np.empty(len(points), dtype=np.uint8)
    half = (words * words).sum(axis=1) / 2
    for start in range(0, len(points), _BATCH):
        found[start : start + _BATCH] = (points[start : start + _BATCH] @ words.T - half).argmax(axis=1)
    return found
