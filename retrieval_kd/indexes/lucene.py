"""Lucene, as pyserini brings it: BM25 over text with its analyzers, and learned sparse vectors as whole impacts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.errors import InputError, RecipeError, UsageError, did_you_mean
from retrieval_kd.indexes.base import IndexRecipe, Shape, Source
from retrieval_kd.indexes.hits import no_hits
from retrieval_kd.indexes.java import in_turn, java_class
from retrieval_kd.indexes.lucene_index import CONTENTS, LuceneIndex
from retrieval_kd.indexes.sparse_source import check_sparse_queries, document_weights, query_terms
from retrieval_kd.plan import Draft
from retrieval_kd.recipe import Section

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

_SAMPLE = 1000
"""Documents that an estimate reads."""
_MOST = 2**31 - 1
"""The greatest sum of a document's impacts that Lucene can hold."""


class LuceneSearch(Section):
    """What can change after the build."""

    k1: float = Field(default=0.9, ge=0, allow_inf_nan=False)
    b: float = Field(default=0.4, ge=0, le=1)


class LuceneBM25Recipe(IndexRecipe):
    """How text becomes terms, of documents and queries alike; ``k1`` and ``b`` of BM25 are of the search."""

    kind: Literal["lucene"]
    language: str = "en"
    """``en``, or a language that Anserini has an analyzer for (``de``, ``zh``, ``ar`` …), with its own stemmer."""
    stemmer: Literal["porter", "krovetz", "none"] = "porter"
    """Of English."""
    stop_words: Literal["en", "none"] = "en"
    """Of English."""
    search: LuceneSearch = LuceneSearch()


class LuceneBM25Index(LuceneIndex):
    """BM25 over title and text as Lucene computes it: idf tf / (tf + k1 (1 - b + b length / average length)).

    A document's length is rounded as Lucene stores it, in one byte. The hits are exact for these scores.
    """

    Recipe = LuceneBM25Recipe
    takes = "text"

    @classmethod
    def similarity(cls, search: LuceneSearch) -> Any:
        """BM25 with ``k1`` and ``b``."""
        return java_class("org.apache.lucene.search.similarities.BM25Similarity")(search.k1, search.b)

    @classmethod
    def build(cls, recipe: LuceneBM25Recipe, source: Source, draft: Draft) -> None:
        """Writes Lucene's files; text is streamed. Raises `InputError` when no document has a term."""
        cls._write_texts(recipe, source, draft)
        if draft.counts["documents_without_terms"] == draft.counts["documents"]:
            _check_terms(_collection(source if source.whole is None else source.whole), recipe)

    def grow(self, source: Source, draft: Draft) -> None:
        """Writes another segment, whose documents may all be without terms."""
        assert isinstance(self.recipe, LuceneBM25Recipe)
        self._write_texts(self.recipe, source, draft)

    @classmethod
    def _write_texts(cls, recipe: LuceneBM25Recipe, source: Source, draft: Draft) -> None:
        documents = _collection(source).documents
        cls.write(draft, documents.ids, documents.text, _analyzer(recipe), recipe.search)
        draft.details["metric"] = "bm25"

    @classmethod
    def estimate(cls, recipe: LuceneBM25Recipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document: about 2.4 for each distinct term, measured on the first thousand documents."""
        if isinstance(source, Shape):
            raise UsageError("a lucene index is built from a collection")
        analyzer = _analyzer(recipe)
        terms = java_class("io.anserini.analysis.AnalyzerUtils").analyze
        sample = min(len(source.documents), _SAMPLE)
        distinct = sum(len(set(terms(analyzer, text))) for text in source.documents.iter_texts(0, sample))
        return 2.4 * distinct / max(sample, 1), 0

    @in_turn
    def open(self, recipe: LuceneBM25Recipe, search: LuceneSearch) -> None:
        """Opens Lucene's files and the recipe's analyzer."""
        super().open(recipe, search)
        self._analyzer = _analyzer(recipe)

    @property
    def exact(self) -> bool:
        """True: what Lucene skips could not be among the best."""
        return True

    def search(
        self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of the texts; a query without a known term has no hit."""
        if isinstance(queries, str):
            raise UsageError("search takes a list of query texts (got one string)")
        scores, rows = no_hits(len(queries), len(self), k, allowed)
        for place, query in enumerate(queries):
            parsed = self._generator.buildQuery(CONTENTS, self._analyzer, query)
            scores[place], rows[place] = self.hits(parsed, k, allowed)
        return scores, rows


class LuceneImpactRecipe(IndexRecipe):
    """How weights become whole numbers."""

    kind: Literal["lucene-impact"]
    scale: float = Field(default=100, gt=0, allow_inf_nan=False)
    """A weight times this, rounded, is the impact; what becomes 0 is left out and counted."""


class LuceneImpactIndex(LuceneIndex):
    """Dot products of learned sparse vectors whose document weights are rounded to multiples of 1 / scale, or cosines.

    Mackenzie, Trotman and Lin, Wacky Weights in Learned Sparse Representations, 2021. A term of Lucene's is the number
    of the vocabulary's term, which needs no escape whatever a token has in it, and its frequency is the impact: what
    Anserini's indexer makes of impacts in JSONL, without the file and without a word for each unit. Query weights are
    not rounded. Lucene finds the exact best of the rounded scores, which are divided by the scale again.
    """

    Recipe = LuceneImpactRecipe
    takes = "sparse"

    @classmethod
    def similarity(cls, search: Any) -> Any:
        """The impact itself."""
        return java_class("io.anserini.search.similarity.ImpactSimilarity")()

    @classmethod
    def build(cls, recipe: LuceneImpactRecipe, source: Source, draft: Draft) -> None:
        """Writes Lucene's files. Raises `InputError` for weights below 0, or when no impact above 0 is left."""
        if source.vectors is None:
            raise UsageError("a lucene-impact index is built from vectors")
        vectors = source.vectors
        indptr, terms, weights = document_weights(vectors)
        if weights.min() < 0:
            raise InputError(f"{vectors.path}: has weights below 0, which Lucene cannot hold; use sparse-exact")
        impacts = np.rint(weights.astype(np.float64) * recipe.scale).astype(np.int64)
        if not impacts.any():
            raise InputError(f"{vectors.path}: all weights round to 0 at scale {recipe.scale:g}; raise the scale")
        longest = float(np.add.reduceat(np.append(impacts, 0), indptr[:-1])[np.diff(indptr) > 0].max())
        if longest > _MOST:
            raise InputError(
                f"{vectors.path}: the impacts of a document add up to {longest:.0f} at scale {recipe.scale:g}, Lucene "
                f"holds {_MOST}; lower the scale"
            )

        def text(row: int) -> str:
            part = slice(indptr[row], indptr[row + 1])
            pairs = zip(terms[part].tolist(), impacts[part].tolist(), strict=True)
            return " ".join(f"{term}|{impact}" for term, impact in pairs if impact)

        cls.write(draft, vectors.arrow_ids, text, _impact_analyzer(), recipe.search)
        draft.counts["impacts_of_0"] = int(np.count_nonzero(impacts == 0))
        if draft.counts["impacts_of_0"]:
            log.info(
                "%s: %s of %s weights are below half of 1 / %g and left out",
                *(vectors.path, f"{draft.counts['impacts_of_0']:,}", f"{len(impacts):,}", recipe.scale),
            )
        metric = "cosine" if vectors.similarity == "cosine" else "inner_product"
        draft.details.update(metric=metric, dimension=vectors.dimension)

    @classmethod
    def estimate(cls, recipe: LuceneImpactRecipe, source: Collection | Shape) -> tuple[float, int]:
        """Bytes a document: about 2.5 a term."""
        if not isinstance(source, Shape):
            raise UsageError("a lucene-impact index is built from vectors")
        return 2.5 * source.entries, 0

    @in_turn
    def open(self, recipe: LuceneImpactRecipe, search: Any) -> None:
        """Opens Lucene's files."""
        super().open(recipe, search)
        self._scale = recipe.scale
        self._cosine = self.manifest.details["metric"] == "cosine"
        number = java_class("java.lang.Class").forName("java.lang.Float")
        self._weights = self._json.readerForMapOf(number)

    @property
    def dimension(self) -> int:
        """The number of terms."""
        return int(self.manifest.details["dimension"])

    def search(self, queries: Any, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, k] and rows [Q, k] of a ``scipy.sparse.csr_array`` [Q, terms] of queries.

        Raises `UsageError` for queries of another vocabulary, with NaN or infinite weights, or with weights below 0.
        """
        check_sparse_queries(queries, self.dimension)
        if (queries.data < 0).any():
            raise UsageError("queries have weights below 0, which Lucene cannot add up; use a sparse-exact index")
        scores, rows = no_hits(queries.shape[0], len(self), k, allowed)
        for place in range(queries.shape[0]):
            terms, weights = query_terms(queries, place, cosine=self._cosine)
            given = dict(zip(map(str, terms.tolist()), weights.tolist(), strict=True))
            weighted = self._weights.readValue(json.dumps(given))
            query = self._generator.buildQuery(CONTENTS, weighted)
            sums, found = self.hits(query, k, allowed)
            above = int(np.count_nonzero(sums > 0))  # Lucene finds documents by terms of weight 0 too
            scores[place, :above], rows[place, :above] = sums[:above] / self._scale, found[:above]
        return scores, rows


def _collection(source: Source) -> Collection:
    if source.collection is None:
        raise UsageError("a lucene index is built from a collection")
    return source.collection


def _check_terms(collection: Collection, recipe: LuceneBM25Recipe) -> None:
    """Raises `InputError` when no document has a term."""
    terms, analyzer = java_class("io.anserini.analysis.AnalyzerUtils").analyze, _analyzer(recipe)
    documents = collection.documents
    if not any(len(terms(analyzer, text)) for text in documents.iter_texts()):
        raise InputError(f"{collection.path}: none of the {len(documents)} documents has a term to index")


@in_turn
def _analyzer(recipe: LuceneBM25Recipe) -> Any:
    """Anserini's analyzer of the recipe; `RecipeError` for a language that it has none for."""
    if recipe.language == "en":
        english = java_class("io.anserini.analysis.DefaultEnglishAnalyzer")
        words = java_class("org.apache.lucene.analysis.CharArraySet")
        stop_words = [words.EMPTY_SET] if recipe.stop_words == "none" else []
        if recipe.stemmer == "none":
            return english.newNonStemmingInstance(*stop_words)
        return english.newStemmingInstance(recipe.stemmer, *stop_words)
    languages = java_class("io.anserini.analysis.AnalyzerMap")
    if not languages.analyzerMap.containsKey(recipe.language):
        known = re.findall(r"(\w+)=", languages.analyzerMap.toString())
        raise RecipeError(
            f"language: Lucene has no analyzer for '{recipe.language}'{did_you_mean(recipe.language, [*known, 'en'])}"
        )
    return languages.getLanguageSpecificAnalyzer(recipe.language)


@in_turn
def _impact_analyzer() -> Any:
    """Splits at spaces; a term's frequency is what follows its ``|``."""
    none = java_class("java.util.HashMap")
    builder = java_class("org.apache.lucene.analysis.custom.CustomAnalyzer").builder()
    builder = builder.withTokenizer("whitespace", none())
    return builder.addTokenFilter("delimitedTermFrequency", none()).build()
