"""The recipe's ``losses:`` list as one objective: weighted terms over the tensors a student's forward pass gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from retrieval_kd.errors import UsageError
from retrieval_kd.losses.lambda_loss import lambda_loss
from retrieval_kd.losses.moving_target import MovingTarget
from retrieval_kd.losses.on_representations import BilinearCritic, embedding_regression, mi_alpha, minilm_relations
from retrieval_kd.losses.on_scores import (
    info_nce,
    kl_divergence,
    list_net,
    margin_mse,
    mse,
    rank_net,
    reverse_kl,
    taid,
    without_false_negatives,
)
from retrieval_kd.losses.sinkhorn import sinkhorn
from retrieval_kd.losses.targets import transformed
from retrieval_kd.losses.terms import (
    KL,
    MSE,
    TAID,
    Embedding,
    InfoNCE,
    LambdaLoss,
    ListNet,
    MarginMSE,
    MIAlpha,
    MiniLMRelations,
    OnDistributions,
    OnScores,
    RankNet,
    ReverseKL,
    Sinkhorn,
    Term,
    term_keys,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gives the losses. B queries, N documents a group, U distinct documents in the batch.

    ``scores`` [B, N], ``present`` [B, N] (the slot holds a document), ``teacher`` [B, N] with ``known`` [B, N] (its
    score is known). Over the whole batch: ``batch_scores`` [B, U], ``batch_allowed`` [B, U] (not another relevant
    document of the query), ``positive`` [B] (column of slot 0), ``batch_teacher`` [B, U] (NaN unknown), ``column``
    [B, N] (each slot's document among the U). ``vectors`` [B+U, d] and ``teacher_vectors`` [B+U, d_t]. ``relations``
    are pairs of the student's and the teacher's states [T, S, …] of the same tokens, ``token_mask`` [T, S].
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
    column: Tensor | None = None
    relations: list[tuple[Tensor, Tensor]] | None = None
    token_mask: Tensor | None = None


class WeightedLosses(torch.nn.Module):
    """A recipe's loss terms, and what they learn or remember (critics, TAID's t), which its ``state_dict`` holds.

    ``passes`` is the number of forward passes of the whole training, for `TAID`; ``dimensions`` are the student's and
    the teacher's, for `MIAlpha`. Raises `UsageError` when a term lacks them.
    """

    def __init__(
        self, terms: Sequence[Term], *, passes: int | None = None, dimensions: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.terms = dict(zip(term_keys(terms), terms, strict=True))
        self.states = torch.nn.ModuleDict()
        for key, term in self.terms.items():
            if isinstance(term, TAID):
                if not passes:
                    raise UsageError(f"loss '{key}' needs the length of the training (passes)")
                self.states[key] = MovingTarget(
                    passes, start=term.start, end=term.end, adaptation=term.adaptation, momentum=term.momentum
                )
            elif isinstance(term, MIAlpha):
                if dimensions is None:
                    raise UsageError(f"loss '{key}' needs the dimensions of the student's and the teacher's vectors")
                self.states[key] = BilinearCritic(*dimensions, scale=term.scale)

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        """Each term's weighted value by its key (`term_keys`); the objective is their sum.

        Computed in float32 at least, also inside autocast. In training mode every pass moves TAID's t. Raises
        `UsageError` when ``outputs`` lacks what a term needs.
        """
        with torch.autocast(outputs.scores.device.type, enabled=False):
            return {key: term.weight * self._loss(key, term, outputs) for key, term in self.terms.items()}

    def _loss(self, key: str, term: Term, outputs: Outputs) -> Tensor:
        if isinstance(term, OnScores):
            return self._on_scores(key, term, _rows(key, term, outputs))
        if isinstance(term, InfoNCE):
            return _info_nce(key, term, outputs)
        if isinstance(term, Embedding):
            return embedding_regression(*_vectors(key, outputs), distance=term.distance)
        if isinstance(term, MIAlpha):
            critic = self.states[key]
            return mi_alpha(critic(*_vectors(key, outputs)), critic.log_baseline, alpha=term.alpha)
        if isinstance(term, MiniLMRelations):
            relations = _need(outputs.relations, key, "relations")
            return minilm_relations(relations, _need(outputs.token_mask, key, "token_mask"), heads=term.heads)
        raise NotImplementedError(f"loss '{term.kind}'")

    def _on_scores(self, key: str, term: OnScores, rows: _Rows) -> Tensor:
        student, teacher, known, positive = rows
        if isinstance(term, MarginMSE):
            return margin_mse(student, teacher, known, pairs=term.pairs)
        if isinstance(term, MSE):
            return mse(student, teacher, known)
        if isinstance(term, RankNet):
            return rank_net(student, teacher, known, weights=term.weights)
        if isinstance(term, LambdaLoss):
            return lambda_loss(student, teacher, known, scheme=term.scheme, k=term.k)
        if isinstance(term, KL | ListNet):
            loss = kl_divergence if isinstance(term, KL) else list_net
            return loss(student, teacher, known, ground_truth=term.ground_truth, positive=positive, **term.temperatures)
        if isinstance(term, ReverseKL):
            return reverse_kl(student, teacher, known, **term.temperatures)
        if isinstance(term, Sinkhorn):
            return sinkhorn(
                student,
                teacher,
                known,
                columns="documents" if term.over == "batch" else "ranks",
                regularisation=term.regularisation,
                iterations=term.iterations,
                **term.temperatures,
            )
        if isinstance(term, TAID):
            moving = self.states[key]
            value = taid(student, teacher, known, t=moving.t, **term.temperatures)
            if self.training and torch.is_grad_enabled():
                moving.update(value)
            return value
        raise NotImplementedError(f"loss '{term.kind}'")


class _Rows(NamedTuple):
    """Student and teacher scores [B, N] (or [B, U]), which are known, and the positive's column [B] (None: slot 0)."""

    student: Tensor
    teacher: Tensor
    known: Tensor
    positive: Tensor | None


def _rows(key: str, term: OnScores, outputs: Outputs) -> _Rows:
    """The scores that the term compares, with its target."""
    student, teacher, known, positive = outputs.scores, outputs.teacher, outputs.known, None
    if isinstance(term, OnDistributions) and term.over == "batch":
        student = _need(outputs.batch_scores, key, "batch_scores")
        teacher = _need(outputs.batch_teacher, key, "batch_teacher")
        known, positive = teacher.isfinite(), _need(outputs.positive, key, "positive")
    target = term.target
    return _Rows(
        student, transformed(teacher, known, target.transform, scale=target.scale, k=target.k), known, positive
    )


def _info_nce(key: str, term: InfoNCE, outputs: Outputs) -> Tensor:
    if term.over == "batch":
        scores = _need(outputs.batch_scores, key, "batch_scores")
        mask = _need(outputs.batch_allowed, key, "batch_allowed")
        positive = _need(outputs.positive, key, "positive")
    else:
        scores, mask = outputs.scores, outputs.present
        positive = mask.new_zeros(len(mask), dtype=torch.int64)
    if term.false_negatives is not None:
        teacher = outputs.teacher.masked_fill(~outputs.known, torch.nan)
        if term.over == "batch":
            teacher = _over_batch(key, teacher, outputs)
        rule = term.false_negatives
        mask = without_false_negatives(
            mask, teacher, teacher.isfinite(), positive, margin=rule.margin, relative=rule.relative
        )
    return info_nce(scores, positive, mask, temperature=term.temperature)


def _over_batch(key: str, teacher: Tensor, outputs: Outputs) -> Tensor:
    """Scores [B, U] to find false negatives by: the teacher's of the batch, or else of each query's own documents."""
    if outputs.batch_teacher is not None:
        return outputs.batch_teacher
    column = _need(outputs.column, key, "column")
    documents = _need(outputs.batch_scores, key, "batch_scores").shape[1]
    # slots without a score share a column of their own, which is cut off
    column = column.masked_fill(teacher.isnan(), documents)
    return teacher.new_full((len(teacher), documents + 1), torch.nan).scatter(1, column, teacher)[:, :documents]


def _vectors(key: str, outputs: Outputs) -> tuple[Tensor, Tensor]:
    return _need(outputs.vectors, key, "vectors"), _need(outputs.teacher_vectors, key, "teacher_vectors")


def _need(value: T | None, key: str, name: str) -> T:
    if value is None:
        raise UsageError(f"loss '{key}' needs {name}, which this student and its inputs do not give")
    return value
