"""A cross-encoder as teacher: query and document read together, its raw logit kept as float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError
from retrieval_kd.models.encoder import quiet_loading, token_lengths
from retrieval_kd.models.load import find_model
from retrieval_kd.teachers.base import Candidates, Teacher, TeacherRecipe


class CrossEncoderTeacher(Teacher):
    """Scores by the one logit of a sentence-transformers ``CrossEncoder``, without its sigmoid."""

    class Recipe(TeacherRecipe):
        """Keys of ``kind: cross-encoder``."""

        kind: Literal["cross-encoder"]
        max_length: int | None = Field(default=None, ge=8)
        batch_size: int = Field(default=32, ge=1)
        pairs_per_shard: int = Field(default=2048, ge=1)

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.source = find_model(recipe.model, recipe.revision)
        from sentence_transformers import CrossEncoder

        with quiet_loading():
            self.model = CrossEncoder(str(self.source.path), max_length=recipe.max_length)
        if self.model.num_labels != 1:
            raise InputError(
                f"model '{self.source.name}' has {self.model.num_labels} outputs; a cross-encoder teacher has one "
                "(fine-tune one with: retrieval-kd train students/cross-encoder-pydocs.yaml …)"
            )

    @property
    def score_kind(self) -> str:
        """``logit``."""
        return "logit"

    def ref(self) -> InputRef:
        """The model's reference."""
        return self.source.ref()

    def details(self) -> dict[str, Any]:
        """Model, revision and length."""
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "max_length": self.model.max_seq_length,
            "dtype": "float32",
        }

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Raw logits; pairs of similar length share a batch, and no batch crosses the shard."""
        import torch

        queries = [candidates.text for candidates, documents in zip(shard, texts, strict=True) for _ in documents]
        documents = [text for of_query in texts for text in of_query]
        lengths = token_lengths(self.model.tokenizer, queries, documents)
        self.truncation.count(lengths, int(self.model.max_seq_length or 2**31 - 1))
        order = np.argsort([-length for length in lengths], kind="stable")
        logits = np.empty(len(documents), dtype=np.float32)
        for start in range(0, len(order), self.recipe.batch_size):
            batch = order[start : start + self.recipe.batch_size]
            logits[batch] = self.model.predict(
                [(queries[i], documents[i]) for i in batch],
                batch_size=len(batch),
                activation_fn=torch.nn.Identity(),
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        return np.split(logits, np.cumsum([len(of_query) for of_query in texts])[:-1])
