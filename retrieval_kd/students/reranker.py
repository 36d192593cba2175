"""What students that re-rank share: (query, document) pairs of one ``CrossEncoder``, in parts of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from retrieval_kd.losses.terms import LossTerm
from retrieval_kd.students.base import Batch, StudentRecipe, TrainerStudent

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor, nn

    from retrieval_kd.losses.objective import Outputs
    from retrieval_kd.models.lora import Lora


class RerankerRecipe(StudentRecipe):
    """The keys of every re-ranker; losses over the batch or on embeddings are not possible."""

    @field_validator("losses")
    @classmethod
    def _only_over_groups(cls, losses: list[LossTerm]) -> list[LossTerm]:
        for term in losses:
            if term.needs & {"batch", "vectors", "relations"}:
                raise ValueError(f"a re-ranker cannot learn '{term.kind}' over the batch or on embeddings")
        return losses


class OwnNetworkRecipe(RerankerRecipe):
    """The keys of a re-ranker whose network is this package's own; its texts have a length each."""

    query_length: int = Field(default=32, ge=4)
    document_length: int = Field(default=200, ge=4)

    @field_validator("lora")
    @classmethod
    def _whole(cls, value: Lora | None) -> Lora | None:
        if value is not None:
            raise ValueError("this student is trained as a whole; take a cross-encoder for lora")
        return value


class Reranker(TrainerStudent):
    """A student that is a `CrossEncoder` with one output."""

    reranks = True

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """`CrossEncoderTrainer`."""
        from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

        return CrossEncoderTrainer, CrossEncoderTrainingArguments

    def tokenize(self, model: BaseModel, batch: Batch) -> dict[str, Any]:
        """The present slots as one list of pairs, row by row."""
        slots = np.argwhere(batch.present)
        pairs = [(batch.queries[i], batch.documents[batch.column[i, j]]) for i, j in slots]
        return {"pairs": dict(model.preprocess(pairs))}

    def outputs(self, model: Any, parameters: Any, features: Any, labels: dict[str, Tensor]) -> Outputs:
        """Logits of the present slots, put back into [B, N]."""
        from retrieval_kd.losses.objective import Outputs
        from retrieval_kd.students.parts import in_parts

        (pairs,) = features
        logits = in_parts(
            lambda part: model(part)["scores"].view(-1),
            pairs,
            pairs["attention_mask"].sum(dim=1),
            self.recipe.texts_at_once,
            recompute=self.recipe.recompute,
        )
        present, teacher = labels["present"], labels["teacher"]
        scores = logits.new_zeros(present.shape).masked_scatter(present, logits)
        return Outputs(scores=scores, present=present, teacher=teacher, known=present & teacher.isfinite())

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Logits [queries, documents]."""
        pairs = [(query, document) for query in queries for document in documents]
        logits = model.predict(pairs, show_progress_bar=False)
        return np.asarray(logits, dtype=np.float32).reshape(len(queries), len(documents))


class OwnNetwork(Reranker):
    """A re-ranker whose network is this package's own."""

    def wrapped(self, network: nn.Module) -> BaseModel:
        """The `CrossEncoder` of ``network``, which gives raw scores."""
        import torch
        from sentence_transformers import CrossEncoder

        return CrossEncoder(modules=[network], activation_fn=torch.nn.Identity())

    def notes(self) -> list[str]:
        """How it is loaded, as it needs this package."""
        return [
            "Its network is a module of retrieval_kd: where that is installed, "
            "`CrossEncoder(PATH, trust_remote_code=True)` loads it.",
            "`retrieval-kd score teachers/cross-encoder --set model=MODEL --set max_length=null` scores with it.",
        ]
