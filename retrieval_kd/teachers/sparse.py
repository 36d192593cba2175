"""A learned sparse model as teacher: the dot product of two vectors over a vocabulary, each text encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.models.load import find_model
from retrieval_kd.models.sparse_encoder import SparseEncoder
from retrieval_kd.teachers.base import Candidates, ModelTeacherRecipe, Scored, ScoringJob, Teacher
from retrieval_kd.teachers.encoded import Encode, EncodedJob


class SparseTeacher(Teacher):
    """Scores by the dot product of a sentence-transformers ``SparseEncoder``'s vectors (SPLADE, inference-free, …).

    Formal et al., SPLADE v2, 2021. Vectors are on disk as terms and weights, 8 bytes a term; memory holds those of one
    query's candidates.
    """

    class Recipe(ModelTeacherRecipe):
        """Keys of ``kind: sparse``; a batch of ``batch_tokens`` tokens takes about 0.25 MB of memory a token."""

        kind: Literal["sparse"]
        batch_tokens: int = Field(default=4096, ge=1)

    recipe: Recipe

    @cached_property
    def encoder(self) -> SparseEncoder:
        """The model, loaded when it is first used."""
        return SparseEncoder.load(self.recipe.model, revision=self.recipe.revision)

    @property
    def score_kind(self) -> str:
        """``dot``."""
        return "dot"

    def ref(self) -> InputRef:
        """The model's reference."""
        return find_model(self.recipe.model, self.recipe.revision).ref()

    def details(self) -> dict[str, Any]:
        """What the model is and how it reads."""
        return self.encoder.facts()

    def prepare(self, job: ScoringJob) -> None:
        """Encodes every query and every candidate once."""
        self._job = EncodedJob(job, self._encode("document"), self._encode("query"))
        self._documents = _Rows(self._job.documents)
        self._queries = _Rows(self._job.queries)

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """Dot products of each query's vector with its candidates' vectors; 0 without a common term."""
        scores = [self._job.without_bad(query.query_id, query.rows, self._dot_products(query)) for query in shard]
        return Scored(scores, [self._job.tokens_lost(query.query_id, query.rows) for query in shard])

    def _dot_products(self, candidates: Candidates) -> np.ndarray:
        _, query_terms, query_weights = self._queries.at([self._job.query_place(candidates.query_id)])
        owners, terms, weights = self._documents.at(self._job.document_places(candidates.rows))
        query = np.zeros(1 + max(query_terms.max(initial=0), terms.max(initial=0)))
        query[query_terms] = query_weights
        return np.bincount(owners, query[terms] * weights, minlength=len(candidates.rows)).astype(np.float32)

    def _encode(self, task: str) -> Encode:
        return lambda texts: self.encoder.encode(texts, task, self.recipe.batch_tokens)._asdict()


class _Rows:
    """Sparse vectors on disk, a slice of ``terms`` and ``weights`` each."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._terms, self._weights = arrays["terms"], arrays["weights"]
        self._bounds = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])

    def at(self, places: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Owner, term and weight of every entry of these vectors; an owner is a position in ``places``."""
        slices = [slice(self._bounds[place], self._bounds[place + 1]) for place in places]
        terms = np.concatenate([self._terms[part] for part in slices])
        weights = np.concatenate([self._weights[part] for part in slices])
        return np.repeat(np.arange(len(slices)), [part.stop - part.start for part in slices]), terms, weights
