"""A bi-encoder as teacher: the cosine or dot product of two vectors, each text encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.models.load import find_model
from retrieval_kd.teachers.base import Candidates, ModelTeacherRecipe, Scored, ScoringJob, Teacher
from retrieval_kd.teachers.encoded import Encode, EncodedJob


class BiEncoderTeacher(Teacher):
    """Scores by the similarity of a sentence-transformers model (cosine or dot, the model's own unless given)."""

    class Recipe(ModelTeacherRecipe):
        """Keys of ``kind: bi-encoder``."""

        kind: Literal["bi-encoder"]
        similarity: Literal["model", "cosine", "dot"] = "model"

    recipe: Recipe

    @cached_property
    def encoder(self) -> DenseEncoder:
        """The model, loaded when it is first used."""
        return DenseEncoder.load(self.recipe.model, revision=self.recipe.revision)

    @cached_property
    def score_kind(self) -> str:
        """``cosine`` or ``dot``."""
        return self.encoder.similarity if self.recipe.similarity == "model" else self.recipe.similarity

    def ref(self) -> InputRef:
        """The model's reference."""
        return find_model(self.recipe.model, self.recipe.revision).ref()

    def details(self) -> dict[str, Any]:
        """What the model is and how it reads."""
        return self.encoder.facts()

    def prepare(self, job: ScoringJob) -> None:
        """Encodes every query and every candidate once; ``job.vectors`` of the same model are used as they are.

        Ready vectors spare the network, not the tokenizer: it still says what of each text the model did not read.
        """
        documents = next((vectors for vectors in job.vectors if vectors.of == "documents"), None)
        if documents is not None:
            documents.check_rows(job.collection.documents.ids)
        queries = {
            query_id: (vectors.matrix, i)
            for vectors in job.vectors
            if vectors.of == "queries"
            for i, query_id in enumerate(vectors.ids)
        }
        complete = bool(queries) and all(candidates.query_id in queries for candidates in job.candidates)
        self._ready_documents = None if documents is None else documents.matrix
        self._ready_queries = queries if complete else None
        self._job = EncodedJob(
            job,
            self._vectors("document") if documents is None else self._lengths("document"),
            self._lengths("query") if complete else self._vectors("query"),
            ("documents" if documents is None else "document-lengths", "query-lengths" if complete else "queries"),
        )

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """Similarities of each query's vector with its candidates' vectors."""
        scores = [self._job.without_bad(query.query_id, query.rows, self._similarities(query)) for query in shard]
        return Scored(scores, [self._job.tokens_lost(query.query_id, query.rows) for query in shard])

    def _similarities(self, candidates: Candidates) -> np.ndarray:
        query = self._query_vector(candidates.query_id)
        documents = self._document_vectors(candidates.rows)
        if self.score_kind == "cosine":
            query = query / max(float(np.linalg.norm(query)), 1e-12)
            documents = documents / np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-12)
        return np.asarray(documents @ query, dtype=np.float32)

    def _query_vector(self, query_id: str) -> np.ndarray:
        if self._ready_queries is None:
            return np.asarray(self._job.queries["vectors"][self._job.query_place(query_id)])
        matrix, row = self._ready_queries[query_id]
        return np.asarray(matrix[row])

    def _document_vectors(self, rows: np.ndarray) -> np.ndarray:
        if self._ready_documents is None:
            return np.asarray(self._job.documents["vectors"][self._job.document_places(rows)])
        return np.asarray(self._ready_documents[rows])

    def _vectors(self, task: str) -> Encode:
        return lambda texts: self.encoder.encode(texts, task)._asdict()

    def _lengths(self, task: str) -> Encode:
        return lambda texts: {"tokens_lost": self.encoder.readers[task].tokens_lost(texts)}
