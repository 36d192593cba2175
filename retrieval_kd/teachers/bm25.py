"""BM25 as teacher: what the BM25 index would score, for candidates that come from anywhere."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.atomic import write_atomically
from retrieval_kd.data.analyzer import Analyzer, StemmerName, StopWords
from retrieval_kd.errors import InputError
from retrieval_kd.progress import progress
from retrieval_kd.teachers.base import Candidates, Scored, ScoringJob, Teacher, TeacherRecipe


class BM25Teacher(Teacher):
    """Scores by BM25 (Lucene's variant: idf = ln(1 + (N - df + .5) / (df + .5))), to the last bit as the index does.

    Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009. Document frequencies and the
    average length are those of the whole collection; a document without a term of the query scores 0.
    """

    class Recipe(TeacherRecipe):
        """Keys of ``kind: bm25``, with the meaning and the defaults they have for the index."""

        kind: Literal["bm25"]
        k1: float = Field(default=0.9, ge=0)
        b: float = Field(default=0.4, ge=0, le=1)
        stemmer: StemmerName = "porter"
        stop_words: StopWords = "en"

    recipe: Recipe

    @cached_property
    def _analyzer(self) -> Analyzer:
        return Analyzer(self.recipe.stemmer, self.recipe.stop_words)

    @property
    def score_kind(self) -> str:
        """``bm25``."""
        return "bm25"

    def ref(self) -> InputRef:
        """What stands for a model: the parameters and the version of the analyzer."""
        parameters = self.recipe.model_dump(mode="json", include={"k1", "b", "stemmer", "stop_words"})
        identity = json.dumps({**parameters, "analyzer": Analyzer.version()}, sort_keys=True)
        return InputRef(hashlib.sha256(identity.encode()).hexdigest(), name="bm25")

    def details(self) -> dict[str, Any]:
        """The analyzer's version; the parameters are in the recipe."""
        return {
            "model": "bm25",
            "revision": None,
            "max_length": None,
            "dtype": "float32",
            "analyzer": Analyzer.version(),
        }

    def prepare(self, job: ScoringJob) -> None:
        """Reads the whole collection once for its size, its average length and the frequencies of the queries' terms.

        Memory holds the queries' terms alone. Raises `InputError` when no document has a term.
        """
        path = job.work / "bm25.json"
        if not path.is_file():
            write_atomically(path, json.dumps(self._statistics(job)).encode())
        statistics = json.loads(path.read_text())
        self._average = np.float64(statistics["terms"]) / statistics["documents"]
        self._idf = {
            term: np.float32(math.log(1 + (statistics["documents"] - df + 0.5) / (df + 0.5)))
            for term, df in statistics["frequencies"].items()
        }

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """BM25 of each query with its candidates; nothing is cut off."""
        documents: dict[int, Counter[str]] = {}
        scores = []
        for query, own in zip(shard, texts, strict=True):
            terms = self._analyzer.terms(query.text)
            values = np.zeros(len(query.rows), dtype=np.float32)
            for i, (row, text) in enumerate(zip(query.rows.tolist(), own, strict=True)):
                if row not in documents:
                    documents[row] = Counter(self._analyzer.terms(text))
                values[i] = self._score(terms, documents[row])
            scores.append(values)
        return Scored(scores, [np.zeros(len(query.rows), dtype=np.int32) for query in shard])

    def _score(self, terms: Sequence[str], document: Counter[str]) -> np.float32:
        """The sum in float32, in the order of the query's terms, of weights rounded to float32: as bm25s adds up."""
        score = np.float32(0)
        common = [term for term in terms if term in document]
        if common:
            k1, b = self.recipe.k1, self.recipe.b
            norm = k1 * ((1 - b) + b * document.total() / self._average)
            for term in common:
                tf = np.float32(document[term])
                score += np.float32(self._idf[term] * (tf / (norm + tf)))
        return score

    def _statistics(self, job: ScoringJob) -> dict[str, Any]:
        wanted = {term for candidates in job.candidates for term in self._analyzer.terms(candidates.text)}
        frequencies = dict.fromkeys(sorted(wanted), 0)
        documents = job.collection.documents
        total = 0
        with progress(f"counting the terms of {len(documents):,} documents", len(documents)) as advance:
            for text in documents.iter_texts():
                terms = self._analyzer.terms(text)
                total += len(terms)
                for term in wanted.intersection(terms):
                    frequencies[term] += 1
                advance(1)
        if not total:
            raise InputError(f"{job.collection.path}: none of the {len(documents)} documents has a term")
        return {"documents": len(documents), "terms": total, "frequencies": frequencies}
