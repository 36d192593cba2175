"""The recipe's ``losses:`` list as one objective: weighted terms over the tensors a student's forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval_kd.errors import UsageError
from retrieval_kd.losses.on_representations import embedding_regression
from retrieval_kd.losses.on_scores import info_nce, kl_divergence, margin_mse
from retrieval_kd.losses.terms import KL, InfoNCE, LossTerm, MarginMSE


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gives the losses. B queries, N documents a group, U distinct documents in the batch.

    ``scores`` [B, N], ``present`` [B, N] (the slot holds a document), ``teacher`` [B, N] with ``known`` [B, N] (its
    score is known). Over the whole batch: ``batch_scores`` [B, U], ``batch_allowed`` [B, U] (not another relevant
    document of the query), ``positive`` [B] (column of slot 0), ``batch_teacher`` [B, U]. ``vectors`` and
    ``teacher_vectors`` [B+U, d].
    """

    scores: Tensor
    present: Tensor
    teacher: Tensor
    known: Tensor
    batch_scores: Tensor | None = None
    batch_allowed: Tensor | None = None
    positive: Tensor | None = None
    batch_teacher: Tensor | None = None
    vectors: Tensor | None = None
    teacher_vectors: Tensor | None = None


def weighted_losses(terms: list[LossTerm], outputs: Outputs) -> dict[str, Tensor]:
    """Each term's weighted value by its kind; the objective is their sum."""
    return {term.kind: term.weight * _loss(term, outputs) for term in terms}


def _loss(term: LossTerm, outputs: Outputs) -> Tensor:
    if isinstance(term, MarginMSE):
        return margin_mse(outputs.scores, term.teacher_scale * outputs.teacher, outputs.known, pairs=term.pairs)
    if isinstance(term, KL):
        temperatures = {
            "student_temperature": term.student_temperature,
            "teacher_temperature": term.teacher_temperature,
        }
        if term.over == "group":
            return kl_divergence(outputs.scores, outputs.teacher, outputs.known, **temperatures)
        scores, teacher = _need(outputs.batch_scores, term.kind), _need(outputs.batch_teacher, term.kind)
        return kl_divergence(scores, teacher, teacher.isfinite(), **temperatures)
    if isinstance(term, InfoNCE):
        if term.over == "group":
            slot0 = outputs.present.new_zeros(len(outputs.present), dtype=torch.int64)
            return info_nce(outputs.scores, slot0, outputs.present, temperature=term.temperature)
        scores, allowed = _need(outputs.batch_scores, term.kind), _need(outputs.batch_allowed, term.kind)
        return info_nce(scores, _need(outputs.positive, term.kind), allowed, temperature=term.temperature)
    return embedding_regression(
        _need(outputs.vectors, term.kind), _need(outputs.teacher_vectors, term.kind), distance=term.distance
    )


def _need(tensor: Tensor | None, kind: str) -> Tensor:
    if tensor is None:
        raise UsageError(f"loss '{kind}' over the batch or on embeddings is not possible with this kind of student")
    return tensor
