"""The cross-encoder student: a re-ranker that reads query and document together; fine-tuned, it is a teacher too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from retrieval_kd.losses.terms import LossTerm
from retrieval_kd.students.base import Batch, Student, StudentRecipe

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor

    from retrieval_kd.losses.objective import Outputs


class CrossEncoderStudent(Student):
    """A `CrossEncoder` with one output; every (query, document) pair is a forward pass of its own."""

    class Recipe(StudentRecipe):
        """Keys of ``kind: cross-encoder``; losses over the batch or on embeddings are not possible here."""

        kind: Literal["cross-encoder"]
        max_length: int = Field(default=256, ge=8)

        @field_validator("losses")
        @classmethod
        def _only_over_groups(cls, losses: list[LossTerm]) -> list[LossTerm]:
            for term in losses:
                if term.kind == "embedding" or getattr(term, "over", "group") == "batch":
                    raise ValueError(f"a cross-encoder cannot learn '{term.kind}' over the batch or on embeddings")
            return losses

        @field_validator("query_length", "document_length")
        @classmethod
        def _one_length(cls, value: int | None) -> int | None:
            if value is not None:
                raise ValueError("a cross-encoder reads pairs: give max_length")
            return value

    recipe: Recipe

    def start(self) -> BaseModel:
        """The base network with a new one-output head, cut to ``layers``."""
        import torch
        from sentence_transformers import CrossEncoder

        from retrieval_kd.models.layers import keep_layers
        from retrieval_kd.models.load import find_model

        torch.manual_seed(self.recipe.seed)
        path = find_model(self.recipe.base).path
        model = CrossEncoder(
            str(path), num_labels=1, max_length=self.recipe.max_length, activation_fn=torch.nn.Identity()
        )
        if self.recipe.layers is not None:
            keep_layers(model[0].auto_model, self.recipe.layers)
        return model

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """`CrossEncoderTrainer`."""
        from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

        return CrossEncoderTrainer, CrossEncoderTrainingArguments

    def tokenize(self, model: BaseModel, batch: Batch) -> dict[str, Any]:
        """The present slots as one list of pairs, row by row."""
        slots = np.argwhere(batch.present)
        pairs = [(batch.queries[i], batch.documents[batch.column[i, j]]) for i, j in slots]
        return {"pairs": dict(model.preprocess(pairs))}

    def extra_parameters(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """Logits of the present slots, put back into [B, N]."""
        from retrieval_kd.losses.objective import Outputs

        logits = model(features[0])["scores"].view(-1)
        present, teacher = labels["present"], labels["teacher"]
        scores = logits.new_zeros(present.shape).masked_scatter(present, logits)
        return Outputs(scores=scores, present=present, teacher=teacher, known=present & teacher.isfinite())

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Logits [queries, documents]."""
        pairs = [(query, document) for query in queries for document in documents]
        logits = model.predict(pairs, show_progress_bar=False)
        return np.asarray(logits, dtype=np.float32).reshape(len(queries), len(documents))

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """The pair length."""
        return {"max_length": self.recipe.max_length}
