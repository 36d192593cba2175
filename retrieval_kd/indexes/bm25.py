"""BM25 in bm25s: Lucene's formula, exact, memory-mapped, without a JVM."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.data.analyzer import Analyzer, StemmerName, StopWords
from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.indexes.base import Index, IndexRecipe, Shape, Source, write_rows
from retrieval_kd.indexes.hits import best_positive, no_hits
from retrieval_kd.plan import Draft
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection, Documents

_SAMPLE = 1000
"""Documents that an estimate reads."""
_FREQUENCIES = "document_frequencies.npy"
"""Of the terms of the whole collection, in an index that is one shard of it."""
_STEP = 1 << 22
"""Postings that are weighted at a time."""


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
    float32 weights that are computed when the index is built, as bm25s does it; a document without a query term is no
    hit. A shard's weights are those that its documents have in the whole collection.
    """

    Recipe = BM25Recipe
    takes = "text"
    growable: ClassVar[bool] = False

    @classmethod
    def build(cls, recipe: BM25Recipe, source: Source, draft: Draft) -> None:
        """Writes bm25s' own files; text is streamed and only its term numbers are held in memory.

        For a shard the whole collection is read once more, before it, and nothing of it held but frequencies. Raises
        `InputError` when no document has a term.
        """
        collection = _collection(source)
        analyzer = Analyzer(recipe.stemmer, recipe.stop_words)
        whole = None
        if source.whole is not None:
            whole = _counted(_collection(source.whole), analyzer)
            np.save(draft.path / _FREQUENCIES, whole.frequencies)
            draft.details["collection"] = {"documents": whole.documents, "terms": whole.length}
        cls._write(recipe, collection, draft, whole)

    def grow(self, source: Source, draft: Draft) -> None:
        """Writes another shard of the collection that this one is of."""
        frequencies = np.load(self.path / _FREQUENCIES)
        of = self.manifest.details["collection"]
        whole = _Statistics(dict(self._vocabulary), frequencies, of["documents"], of["terms"])
        self._write(self._recipe, _collection(source), draft, whole)

    @classmethod
    def _write(cls, recipe: BM25Recipe, collection: Collection, draft: Draft, whole: _Statistics | None) -> None:
        import bm25s

        documents = collection.documents
        vocabulary = {} if whole is None else whole.vocabulary
        by_term, lengths = _postings(documents, vocabulary, Analyzer(recipe.stemmer, recipe.stop_words))
        if whole is None:
            whole = _Statistics(vocabulary, np.diff(by_term.indptr), len(lengths), int(lengths.sum()))
        if not whole.length:
            raise InputError(f"{collection.path}: none of the {whole.documents} documents has a term to index")
        engine = bm25s.BM25(k1=recipe.k1, b=recipe.b, method="lucene", backend="numpy", csc_backend="numpy")
        engine.scores = {
            "data": _weights(by_term, lengths, whole, recipe),
            "indices": by_term.indices.astype(np.int32, copy=False),
            "indptr": by_term.indptr.astype(np.int64, copy=False),
            "num_docs": len(lengths),
        }
        engine.vocab_dict, engine.nonoccurrence_array = vocabulary, None
        engine.save(draft.path)
        draft.counts["documents"] = write_rows(draft.path, documents.ids)
        draft.counts["postings"] = len(by_term.data)
        draft.counts["documents_without_terms"] = int(np.count_nonzero(lengths == 0))
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
        if isinstance(queries, str):
            raise UsageError("search takes a list of query texts (got one string)")
        analyzer = Analyzer(self._recipe.stemmer, self._recipe.stop_words)
        scores, rows = no_hits(len(queries), len(self), k, allowed)
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


@dataclass(frozen=True)
class _Statistics:
    """What the weight of a term depends on beside its document."""

    vocabulary: dict[str, int]
    """Term → number, in order of first use."""
    frequencies: np.ndarray
    """Documents [terms] int64 that have each term."""
    documents: int
    length: int
    """Terms of all documents together."""


def _collection(source: Source) -> Collection:
    if source.collection is None:
        raise UsageError("a bm25 index is built from a collection")
    return source.collection


def _postings(documents: Documents, vocabulary: dict[str, int], analyzer: Analyzer) -> tuple[Any, np.ndarray]:
    """A ``csc_array`` [documents, terms] of term frequencies, and how many terms each document has.

    New terms get a number in the vocabulary.
    """
    from scipy.sparse import csr_array

    terms = array("i")
    lengths = np.zeros(len(documents), dtype=np.int64)
    with progress(f"indexing {len(documents):,} documents", len(documents)) as advance:
        for row, text in enumerate(documents.iter_texts()):
            before = len(terms)
            terms.extend(vocabulary.setdefault(term, len(vocabulary)) for term in analyzer.terms(text))
            lengths[row] = len(terms) - before
            advance(1)
    # scipy makes all numbers as wide as the widest.
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32 if len(terms) < 2**31 else np.int64)
    ones = np.ones(len(terms), dtype=np.float32)
    matrix = csr_array((ones, np.frombuffer(terms, dtype=np.int32), starts), shape=(len(lengths), len(vocabulary)))
    matrix.sum_duplicates()
    return matrix.tocsc(), lengths


def _counted(collection: Collection, analyzer: Analyzer) -> _Statistics:
    """The statistics of a collection, whose text is streamed."""
    vocabulary: dict[str, int] = {}
    frequencies = array("q")
    documents, length = collection.documents, 0
    with progress(f"counting the terms of {len(documents):,} documents", len(documents)) as advance:
        for text in documents.iter_texts():
            terms = analyzer.terms(text)
            length += len(terms)
            for term in dict.fromkeys(terms):
                number = vocabulary.setdefault(term, len(vocabulary))
                if number == len(frequencies):
                    frequencies.append(0)
                frequencies[number] += 1
            advance(1)
    return _Statistics(vocabulary, np.array(frequencies, dtype=np.int64), len(documents), length)


def _weights(by_term: Any, lengths: np.ndarray, whole: _Statistics, recipe: BM25Recipe) -> np.ndarray:
    """The weight [postings] float32 of each posting of a ``csc_array`` [documents, terms] of term frequencies."""
    average = np.float64(whole.length) / whole.documents
    norms = recipe.k1 * ((1 - recipe.b) + recipe.b * lengths / average)
    inverse = [math.log(1 + (whole.documents - df + 0.5) / (df + 0.5)) for df in whole.frequencies.tolist()]
    idf = np.repeat(np.array(inverse, dtype=np.float32), np.diff(by_term.indptr))
    for start in range(0, len(idf), _STEP):
        part = slice(start, start + _STEP)
        tf = by_term.data[part]
        idf[part] *= tf / (norms[by_term.indices[part]] + tf)
    return idf
