"""The recipe's losses as one loss module: on a student's forward pass, or on embeddings that a wrapper computed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import RetrievalKDError, UsageError, first
from retrieval_kd.losses.objective import WeightedLosses

if TYPE_CHECKING:
    from retrieval_kd.losses.objective import Outputs
    from retrieval_kd.students.base import TrainerStudent

STATE = "objective.pt"
"""The last file of a checkpoint: one without it was cut short."""


class DivergedError(RetrievalKDError):
    """A loss became NaN or infinite."""


class LossModule(torch.nn.Module):
    """The losses of a training run; what they learn or remember beside ``model`` is kept with the checkpoints."""

    model: Any
    query_ids: Sequence[str] = ()
    """The ids of the lists that are trained on, to name those of a batch."""

    def checked(self, losses: dict[str, Tensor], lists: Tensor) -> dict[str, Tensor]:
        """``losses`` of a batch of these ``lists`` [B]. Raises `DivergedError` when one is no number."""
        bad = [key for key, value in losses.items() if not bool(value.isfinite())]
        if bad:
            ids = [self.query_ids[i] for i in lists.tolist()] if len(self.query_ids) else []
            raise DivergedError(
                f"training diverged: loss {first(bad)} is NaN or infinite in a batch of {len(lists)} queries "
                f"({first(ids)}); lower learning_rate or the loss's weight, raise its temperature, or look at the "
                "scores of these queries"
            )
        return losses

    def check_weights(self, step: int) -> None:
        """Raises `DivergedError` when a weight is no number: a loss would show it only in the next batch."""
        bad = [name for name, weight in self.named_parameters() if not bool(weight.isfinite().all())]
        if bad:
            raise DivergedError(
                f"training diverged: {len(bad)} weights are NaN or infinite after step {step} ({first(bad)}); lower "
                "learning_rate or the loss's weight, or raise its temperature"
            )

    def own_state(self) -> dict[str, Tensor]:
        """Everything learned or kept here that is not the model's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def save(self, folder: Path) -> None:
        """Writes `own_state` beside a checkpoint, as a whole or not at all."""
        content = io.BytesIO()
        torch.save(self.own_state(), content)
        write_atomically(folder / STATE, content.getvalue())

    def load(self, folder: Path) -> None:
        """Takes over the state saved beside a checkpoint."""
        self.load_state_dict(torch.load(folder / STATE, weights_only=True), strict=False)


class Objective(LossModule):
    """The recipe's losses; holds learned parameters that are not the model's (a scale, a critic, a moving target).

    It has what the wrappers of sentence-transformers ask for (SpladeLoss, MatryoshkaLoss, AdaptiveLayerLoss and the
    cached ones): ``model``, ``forward`` on features, and ``compute_loss_from_embeddings``.
    """

    def __init__(
        self, student: TrainerStudent, model: Any, losses: WeightedLosses, query_ids: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.student = student
        self.model = model
        self.losses = losses
        self.query_ids = query_ids
        self.extra = torch.nn.ParameterDict(student.extra_parameters())

    def forward(self, features: Any, labels: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Each loss by its key, weighted; the trainer adds them up and logs each."""
        return self._losses(self.student.outputs(self.model, self.extra, list(features), labels), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same on the embeddings of queries [B, …] and of the batch's documents [U, …]."""
        from retrieval_kd.students.bi_encoder import BiEncoderStudent

        if not isinstance(self.student, BiEncoderStudent):
            raise UsageError(f"a {self.student.recipe.kind} has no embeddings")
        return self._losses(self.student.outputs_of(embeddings, self.extra, labels), labels)

    def _losses(self, outputs: Outputs, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.checked(self.losses(outputs), labels["query"])

    def values(self) -> dict[str, float]:
        """The student's own parameters as numbers."""
        return {name: float(value.detach()) for name, value in self.extra.items()}


class Summed(torch.nn.Module):
    """An objective as one number, for wrappers that multiply and add their inner loss.

    As the losses of sentence-transformers do, it calls ``model`` (the objective's, or `InParts`) once a column of
    features, because wrappers put something in place of its forward pass (MatryoshkaLoss, AdaptiveLayerLoss).
    """

    def __init__(self, objective: Objective, model: Any = None) -> None:
        super().__init__()
        self.objective = objective
        self.model = objective.model if model is None else model

    def forward(self, features: Any, labels: dict[str, Tensor]) -> Tensor:
        """The sum of the weighted losses."""
        embeddings = [self.model(column)["sentence_embedding"] for column in features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: dict[str, Tensor]) -> Tensor:
        """The same on embeddings."""
        return torch.stack(list(self.objective.compute_loss_from_embeddings(embeddings, labels).values())).sum()


class InParts(torch.nn.Module):
    """A model as wrappers see one, which encodes as its student does: in parts of similar length, with recompute."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.dimension = int(objective.model.get_embedding_dimension())

    def forward(self, features: Any) -> dict[str, Tensor]:
        """``sentence_embedding`` [n, d] of n texts."""
        return {"sentence_embedding": self.objective.student.embed(self.objective.model, features)}  # type: ignore[attr-defined]

    def get_embedding_dimension(self) -> int:
        """The length of a vector."""
        return self.dimension
