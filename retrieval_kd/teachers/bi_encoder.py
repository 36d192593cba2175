"""A bi-encoder as teacher: the cosine or dot product of two vectors, each text encoded once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from retrieval_kd.artifact import InputRef, write_atomically
from retrieval_kd.models.encode import encode_resumably
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.teachers.base import Candidates, ScoringJob, Teacher, TeacherRecipe


class BiEncoderTeacher(Teacher):
    """Scores by the similarity of a sentence-transformers model (cosine or dot, the model's own unless given)."""

    class Recipe(TeacherRecipe):
        """Keys of ``kind: bi-encoder``."""

        kind: Literal["bi-encoder"]
        similarity: Literal["model", "cosine", "dot"] = "model"

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.encoder = DenseEncoder.load(recipe.model, revision=recipe.revision)
        self.truncation = self.encoder.truncation

    @property
    def score_kind(self) -> str:
        """``cosine`` or ``dot``."""
        return self.encoder.similarity if self.recipe.similarity == "model" else self.recipe.similarity

    def ref(self) -> InputRef:
        """The model's reference."""
        return self.encoder.ref()

    def details(self) -> dict[str, Any]:
        """Model, revision, length and similarity."""
        return {
            "model": self.encoder.source.name,
            "revision": self.encoder.source.revision,
            "max_length": self.encoder.model.max_seq_length,
            "dtype": "float32",
        }

    def prepare(self, job: ScoringJob) -> None:
        """Encodes every query and every candidate once; ``job.vectors`` of the same model are used as they are."""
        self._row_of_query = {candidates.query_id: i for i, candidates in enumerate(job.candidates)}
        rows = np.unique(np.concatenate([candidates.rows for candidates in job.candidates]))
        ready = {vectors.of: vectors for vectors in job.vectors if vectors.of == "documents"}
        if "documents" in ready:
            ready["documents"].check_rows(job.collection.documents.ids)
            self._rows = np.arange(len(job.collection.documents))
            self._documents = ready["documents"].matrix
            self._take_truncation(ready["documents"].manifest.details)
        else:
            self._rows = rows
            self._documents = self._encoded(
                job.work / "documents.npy",
                len(rows),
                lambda start, stop: job.collection.documents.texts(rows[start:stop]),
                self.encoder.encode_documents,
                f"encoding {len(rows):,} documents",
            )
        queries = [candidates.text for candidates in job.candidates]
        known = {
            query_id: vectors.matrix[i]
            for vectors in job.vectors
            if vectors.of == "queries"
            for i, query_id in enumerate(vectors.ids)
        }
        if all(candidates.query_id in known for candidates in job.candidates):
            self._queries = np.stack([known[candidates.query_id] for candidates in job.candidates])
        else:
            self._queries = self._encoded(
                job.work / "queries.npy",
                len(queries),
                lambda start, stop: queries[start:stop],
                self.encoder.encode_queries,
                f"encoding {len(queries):,} queries",
            )

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Similarities of each query's vector with its candidates' vectors."""
        return [self._similarity(candidates) for candidates in shard]

    def _similarity(self, candidates: Candidates) -> np.ndarray:
        query = self._queries[self._row_of_query[candidates.query_id]]
        documents = self._documents[np.searchsorted(self._rows, candidates.rows)]
        if self.score_kind == "cosine":
            query = query / max(float(np.linalg.norm(query)), 1e-12)
            documents = documents / np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-12)
        return np.asarray(documents @ query, dtype=np.float32)

    def _encoded(self, path: Path, total: int, texts: Any, encode: Any, what: str) -> np.ndarray:
        facts = path.with_suffix(".json")
        if facts.is_file():
            self._take_truncation(json.loads(facts.read_text()))
            return np.asarray(np.load(path, mmap_mode="r"))
        before = (self.truncation.texts, self.truncation.tokens)
        encode_resumably(path, total, texts, encode, self.encoder.dimension, self.truncation, what=what)
        lost = {"truncated_texts": self.truncation.texts - before[0], "tokens_lost": self.truncation.tokens - before[1]}
        write_atomically(facts, json.dumps(lost).encode())
        return np.asarray(np.load(path, mmap_mode="r"))

    def _take_truncation(self, facts: dict[str, Any]) -> None:
        self.truncation.texts += int(facts.get("truncated_texts", 0))
        self.truncation.tokens += int(facts.get("tokens_lost", 0))
