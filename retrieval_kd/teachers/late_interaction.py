"""A late-interaction model as teacher: each query token finds its best document token, and these matches add up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.models.load import find_model
from retrieval_kd.models.multi_vector_encoder import MultiVectorEncoder
from retrieval_kd.teachers.base import Candidates, ModelTeacherRecipe, Scored, Teacher


class LateInteractionTeacher(Teacher):
    """Scores by the MaxSim of a sentence-transformers ``MultiVectorEncoder`` (ColBERT and its descendants).

    Khattab and Zaharia, ColBERT, 2020. Token vectors are not kept: a document of 300 tokens would take 150 KB on the
    disk, a million of them 150 GB. A shard encodes each of its distinct documents once and compares a batch as soon as
    it is encoded, so that memory holds the shard's queries and one batch, nothing is written, and workers share the
    encoding. Documents that are candidates in many shards are encoded in each: larger shards do less work.
    """

    class Recipe(ModelTeacherRecipe):
        """Keys of ``kind: late-interaction``; a batch has at most ``batch_tokens`` tokens, padding included."""

        kind: Literal["late-interaction"]
        batch_tokens: int = Field(default=16384, ge=1)
        pairs_per_shard: int = Field(default=16384, ge=1)

    recipe: Recipe

    @cached_property
    def encoder(self) -> MultiVectorEncoder:
        """The model, loaded when it is first used."""
        return MultiVectorEncoder.load(self.recipe.model, revision=self.recipe.revision)

    @property
    def score_kind(self) -> str:
        """``maxsim``, or ``meanmaxsim`` where the model says that it takes the mean over query tokens."""
        return str(self.encoder.model.similarity_fn_name)

    def ref(self) -> InputRef:
        """The model's reference."""
        return find_model(self.recipe.model, self.recipe.revision).ref()

    def details(self) -> dict[str, Any]:
        """What the model is and how it reads."""
        return self.encoder.facts()

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """MaxSim of each query with its candidates.

        Raises `ValueError` for a document none of whose tokens the model compares.
        """
        queries, queries_lost = self._queries([query.text for query in shard])
        documents: dict[int, str] = {}
        pairs: dict[int, list[tuple[int, int]]] = {}
        for i, (query, own) in enumerate(zip(shard, texts, strict=True)):
            for j, (row, text) in enumerate(zip(query.rows.tolist(), own, strict=True)):
                documents[row] = text
                pairs.setdefault(row, []).append((i, j))
        reader = self.encoder.readers["document"]
        rows, different = list(documents), list(documents.values())
        lengths = reader.lengths(different)
        lost = reader.lost(lengths)
        scores = [np.empty(len(query.rows), dtype=np.float32) for query in shard]
        tokens_lost = [np.empty(len(query.rows), dtype=np.int32) for query in shard]
        for places, matrices in self.encoder.batches(different, "document", lengths, self.recipe.batch_tokens):
            batch = [
                (i, j, place, matrix)
                for place, matrix in zip(places.tolist(), matrices, strict=True)
                for i, j in pairs[rows[place]]
            ]
            _refuse_empty([different[place] for place, matrix in zip(places, matrices, strict=True) if not len(matrix)])
            values = self.encoder.similarities([queries[i] for i, *_ in batch], [matrix for *_, matrix in batch])
            for (i, j, place, _), value in zip(batch, values, strict=True):
                scores[i][j] = value
                tokens_lost[i][j] = queries_lost[i] + lost[place]
        return Scored(scores, tokens_lost)

    def _queries(self, texts: Sequence[str]) -> tuple[list[Any], np.ndarray]:
        """The queries' matrices in order, and the tokens [n] that were cut off each."""
        reader = self.encoder.readers["query"]
        lengths = reader.lengths(texts)
        found: dict[int, Any] = {}
        for places, matrices in self.encoder.batches(texts, "query", lengths, self.recipe.batch_tokens):
            found |= zip(places.tolist(), matrices, strict=True)
        return [found[i] for i in range(len(texts))], reader.lost(lengths)


def _refuse_empty(texts: Sequence[str]) -> None:
    """sentence-transformers would score such a document -1e9, which no student could learn from."""
    if texts:
        raise ValueError(f"no token of the document is one that the model compares: {texts[0][:80]!r}")
