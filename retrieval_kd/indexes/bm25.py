"""BM25 in bm25s: Lucene's formula, exact, memory-mapped, without a JVM."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import Draft
from retrieval_kd.data.analyzer import Analyzer, StemmerName, StopWords
from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.indexes.base import (
    Index,
    IndexRecipe,
    Shape,
    Source,
    best_positive,
    check_allowed,
    check_k,
    write_rows,
)
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

_SAMPLE = 1000
"""Documents that an estimate reads."""


class BM25Recipe(IndexRecipe):
    """``k1`` and ``b`` of BM25 and how text becomes terms. Nothing can change after the build."""

    kind: Literal["bm25"]
    k1: float = Field(default=0.9, ge=0)
    b: float = Field(default=0.4, ge=0, le=1)
    stemmer: StemmerName = "porter"
    stop_words: StopWords = "en"


class BM25Index(Index):
    """BM25 (Lucene's variant: idf = ln(1 + (N - df + .5) / (df + .5))) over title and text.

    Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009. Scores are summed from
    the float32 weights that bm25s computes when the index is built; a document without a query term is no hit.
    """

    Recipe = BM25Recipe
    takes: ClassVar[str] = "text"
    segmentable: ClassVar[bool] = False

    @classmethod
    def build(cls, recipe: BM25Recipe, source: Source, draft: Draft) -> None:
        """Writes bm25s' own files; text is streamed and only its term numbers are held in memory.

        Raises `InputError` when no document has a term.
        """
        import bm25s

        if source.collection is None:
            raise UsageError("a bm25 index is built from a collection")
        documents = source.collection.documents
        vocabulary, terms = _terms_of(
            documents.iter_texts(), len(documents), Analyzer(recipe.stemmer, recipe.stop_words)
        )
        if not vocabulary:
            raise InputError(f"{source.collection.path}: none of the {len(documents)} documents has a term to index")
        engine = bm25s.BM25(k1=recipe.k1, b=recipe.b, method="lucene", backend="numpy", csc_backend="numpy")
        engine.index((terms, vocabulary), create_empty_token=False, show_progress=False)
        engine.save(draft.path)
        draft.counts["documents"] = write_rows(draft.path, documents.ids)
        draft.counts["terms"] = len(vocabulary)
        draft.counts["documents_without_terms"] = sum(1 for document in terms if not document)
        draft.details["metric"] = "bm25"

    @classmethod
    def estimate(cls, recipe: BM25Recipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document (8 for each distinct term, measured on the first thousand documents); nothing besides."""
        if isinstance(source, Shape):
            raise UsageError("a bm25 index is built from a collection")
        analyzer = Analyzer(recipe.stemmer, recipe.stop_words)
        sample = min(len(source.documents), _SAMPLE)
        distinct = sum(len(set(analyzer.terms(text))) for text in source.documents.iter_texts(0, sample))
        return 8 * distinct / max(sample, 1), 0

    def open(self, recipe: BM25Recipe, search: Any) -> None:
        """Memory-maps bm25s' files."""
        import bm25s

        self._recipe = recipe
        self._engine = bm25s.BM25.load(self.path, mmap=True, show_progress=False)
        self._vocabulary: dict[str, int] = self._engine.vocab_dict

    @property
    def exact(self) -> bool:
        """True: every document that shares a term with the query is scored."""
        return True

    def search(
        self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of the texts; a query without a known term has no hit."""
        check_k(k)
        check_allowed(allowed, len(self))
        if isinstance(queries, str):
            raise UsageError("search takes a list of query texts (got one string)")
        analyzer = Analyzer(self._recipe.stemmer, self._recipe.stop_words)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        for place, query in enumerate(queries):
            known = [self._vocabulary[term] for term in analyzer.terms(query) if term in self._vocabulary]
            if known:
                of_all = self._engine.get_scores_from_ids(known)
                scores[place], rows[place] = best_positive(of_all, self.rank, k, allowed)
        return scores, rows

    def problems(self) -> list[str]:
        """Broken rows, or postings of documents that are not there."""
        found = super().problems()
        if self._engine.scores["num_docs"] != len(self):
            found.append(f"{len(self)} documents but bm25s has {self._engine.scores['num_docs']}")
        return found


def _terms_of(texts: Any, total: int, analyzer: Analyzer) -> tuple[dict[str, int], list[array[int]]]:
    """The vocabulary (term → number, in order of first use) and each document's term numbers."""
    vocabulary: dict[str, int] = {}
    documents = []
    with progress(f"indexing {total:,} documents", total) as advance:
        for text in texts:
            documents.append(array("i", [vocabulary.setdefault(t, len(vocabulary)) for t in analyzer.terms(text)]))
            advance(1)
    return vocabulary, documents
