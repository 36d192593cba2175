"""Sparse vectors in an inverted file: for each term the documents that have it, exact, memory-mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from retrieval_kd.data.vectors import sparse_rows
from retrieval_kd.errors import UsageError
from retrieval_kd.indexes.base import Index, IndexRecipe, Shape, Source, write_rows
from retrieval_kd.indexes.hits import best_positive, no_hits
from retrieval_kd.indexes.sparse_source import check_sparse_queries, document_weights, query_terms
from retrieval_kd.plan import Draft

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

_PARTS = ("indptr.npy", "documents.npy", "weights.npy")


class SparseExactRecipe(IndexRecipe):
    """No keys: dot product or cosine, as the vectors are to be compared. Nothing can change after the build."""

    kind: Literal["sparse-exact"]


class SparseExactIndex(Index):
    """Exact dot products of learned sparse vectors (SPLADE, inference-free models), or cosines of them.

    A query reads the lists of its own terms, and adds them up in float64 for one query at a time: memory holds 8 bytes
    a document. A document is a hit when its score is above 0, so that one without a term of the query is none.
    """

    Recipe = SparseExactRecipe
    takes = "sparse"

    @classmethod
    def build(cls, recipe: SparseExactRecipe, source: Source, draft: Draft) -> None:
        """Turns rows of documents into lists of terms, which needs the memory of all weights (12 bytes each).

        Raises `InputError` when no document has a term, or for weights that are not finite.
        """
        if source.vectors is None:
            raise UsageError("a sparse-exact index is built from vectors")
        vectors = source.vectors
        _, terms, weights = document_weights(vectors)
        by_term = sparse_rows(vectors.lengths, terms, weights, vectors.dimension).tocsc()
        arrays = (by_term.indptr.astype(np.int64), by_term.indices.astype(np.int32), by_term.data)
        for name, array in zip(_PARTS, arrays, strict=True):
            np.save(draft.path / name, array)
        draft.counts["documents"] = write_rows(draft.path, vectors.arrow_ids)
        draft.counts["postings"] = len(terms)
        draft.counts["documents_without_terms"] = int(np.count_nonzero(vectors.lengths == 0))
        metric = "cosine" if vectors.similarity == "cosine" else "inner_product"
        draft.details.update(metric=metric, dimension=vectors.dimension)

    @classmethod
    def estimate(cls, recipe: SparseExactRecipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document (8 a term) and those of the table of terms."""
        if not isinstance(source, Shape):
            raise UsageError("a sparse-exact index is built from vectors")
        return 8 * source.entries, 8 * (source.dimension + 1)

    def open(self, recipe: SparseExactRecipe, search: Any) -> None:
        """Memory-maps the lists."""
        self._indptr, self._documents, self._weights = (np.load(self.path / part, mmap_mode="r") for part in _PARTS)
        self._cosine = self.manifest.details["metric"] == "cosine"

    @property
    def dimension(self) -> int:
        """The number of terms."""
        return len(self._indptr) - 1

    @property
    def exact(self) -> bool:
        """True: every document that shares a term with the query is scored."""
        return True

    def search(self, queries: Any, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of a ``scipy.sparse.csr_array`` [Q, terms] of queries.

        Scores are float64 sums rounded to float32. Raises `UsageError` for queries of another vocabulary or with NaN
        or infinite weights.
        """
        check_sparse_queries(queries, self.dimension)
        scores, rows = no_hits(queries.shape[0], len(self), k, allowed)
        for place in range(queries.shape[0]):
            of_all = self._dot_products(*query_terms(queries, place, cosine=self._cosine))
            scores[place], rows[place] = best_positive(of_all, self.rank, k, allowed)
        return scores, rows

    def _dot_products(self, terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Scores [documents] float32 of one query."""
        sums = np.zeros(len(self))
        for term, weight in zip(terms.tolist(), weights.tolist(), strict=True):
            part = slice(self._indptr[term], self._indptr[term + 1])
            sums[self._documents[part]] += weight * self._weights[part].astype(np.float64)
        return sums.astype(np.float32)

    def problems(self) -> list[str]:
        """Broken rows, lists that do not fit together, documents that are not there."""
        found = super().problems()
        if not len(self._documents) == len(self._weights) == self._indptr[-1]:
            found.append(f"{self._indptr[-1]} postings but {len(self._documents)} rows, {len(self._weights)} weights")
        if len(self._documents) and not 0 <= self._documents.min() <= self._documents.max() < len(self):
            found.append(f"postings of documents that are not among the {len(self)}")
        return found
