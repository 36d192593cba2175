"""Losses on representations: what a student's vectors should look like, given a teacher's vectors of the same texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retrieval_kd.errors import UsageError
from retrieval_kd.losses.rows import full_precision, mean_over


def embedding_regression(student: Tensor, teacher: Tensor, *, distance: str = "mse") -> Tensor:
    """Mean distance between student and teacher vectors [M, d] of the same M texts (Reimers & Gurevych 2020).

    ``mse`` is the squared distance summed over the d dimensions, ``cosine`` is one minus the cosine; both averaged over
    texts. For unit vectors the first is twice the second.
    """
    student, teacher = full_precision(student), full_precision(teacher)
    if distance == "cosine":
        return (1 - torch.cosine_similarity(student, teacher, dim=1)).mean()
    return (student - teacher).square().sum(dim=1).mean()


class BilinearCritic(torch.nn.Module):
    """Scores ``f = scale · x̂ᵀ W ŷ`` of unit student vectors x̂ and teacher vectors ŷ, all with all; W and scale learn.

    W starts as the identity, cut or padded where the dimensions differ. ``log_baseline`` is the learned baseline of
    `mi_alpha`.
    """

    def __init__(self, student_dimension: int, teacher_dimension: int, *, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(student_dimension, teacher_dimension))
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))
        self.log_baseline = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Scores [M, M] of student vectors [M, d_s] (rows) and teacher vectors [M, d_t] (columns) of the same texts."""
        x = torch.nn.functional.normalize(full_precision(student), dim=1)
        y = torch.nn.functional.normalize(full_precision(teacher), dim=1)
        scores: Tensor = self.log_scale.exp() * (x @ self.weight.to(x.dtype) @ y.to(x.dtype).T)
        return scores


def mi_alpha(scores: Tensor, log_baseline: Tensor, *, alpha: float = 0.9) -> Tensor:
    """Minus a lower bound of the mutual information of student and teacher vectors (Distiller, He et al. 2021).

    ``scores`` [M, M] are a critic's of student i and teacher j; the pairs (i, i) are of the same text, the other texts
    of the batch are the negatives. With ``b_j = alpha·mean_i(exp f_ij) + (1 - alpha)·exp(log_baseline)`` the bound is
    ``1 + mean_j(f_jj - log b_j) - mean_ij(exp(f_ij) / b_j)``. ``alpha=1`` is InfoNCE (at most log M, low variance),
    ``alpha=0`` is NWJ (no such limit, high variance). 0 for fewer than two texts.
    """
    m = len(scores)
    if m < 2:
        return 0.0 * scores.sum()
    scores = full_precision(scores)
    baseline = scores.logsumexp(dim=0) - math.log(m)
    if alpha < 1:
        fixed = log_baseline.to(scores.dtype).expand(m) + math.log(1 - alpha)
        baseline = torch.logaddexp(baseline + math.log(alpha), fixed) if alpha > 0 else fixed
    joint = (scores.diagonal() - baseline).mean()
    product = (scores - baseline).exp().mean()
    return product - joint - 1


def minilm_relations(relations: list[tuple[Tensor, Tensor]], token_mask: Tensor, *, heads: int) -> Tensor:
    """How far the student's token relations are from the teacher's (MiniLMv2, Wang et al. 2021).

    Each pair is (student [B, S, H_s], teacher [B, S, H_t]) states of the same tokens: the queries, the keys and the
    values of one layer of each. Their heads are joined and split anew into ``heads`` relation heads, so that the two
    networks need neither the same width nor the same number of heads. A relation is ``softmax(X Xᵀ / √d)`` over the
    tokens that ``token_mask`` [B, S] allows; the loss is the mean KL(teacher ‖ student) over heads and tokens, summed
    over the pairs. Raises `UsageError` when a width is no multiple of ``heads``.
    """
    return torch.stack([_relation(student, teacher, token_mask, heads) for student, teacher in relations]).sum()


def _relation(student: Tensor, teacher: Tensor, token_mask: Tensor, heads: int) -> Tensor:
    log_student = _log_relation(student, token_mask, heads)
    log_teacher = _log_relation(teacher.detach(), token_mask, heads)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=3)
    return mean_over(divergence, token_mask.unsqueeze(1).expand_as(divergence))


def _log_relation(states: Tensor, token_mask: Tensor, heads: int) -> Tensor:
    """Log-probabilities [B, heads, S, S]."""
    b, s, width = states.shape
    if width % heads:
        raise UsageError(f"loss 'minilm-relations': {heads} relation heads do not divide a width of {width}")
    states = full_precision(states).masked_fill(~token_mask.unsqueeze(2), 0.0)
    x = states.view(b, s, heads, width // heads).transpose(1, 2)
    scores = x @ x.transpose(2, 3) / math.sqrt(width // heads)
    return torch.log_softmax(scores.masked_fill(~token_mask[:, None, None, :], torch.finfo(x.dtype).min), dim=3)
