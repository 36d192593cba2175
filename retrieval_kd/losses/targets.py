"""Targets made of a teacher's scores [B, N]: rescaled scores, ranks, distributions, and rows that say nothing.

``mask`` is False where a score is missing. Masked slots take no part, and hold 0 in what comes back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_kd.losses.rows import cleaned, comparable, log_softmax


def transformed(teacher: Tensor, mask: Tensor, transform: str, *, scale: float = 1.0, k: float = 0.0) -> Tensor:
    """The teacher's scores after ``transform``, row by row, times ``scale``.

    ``none``; ``centre`` (minus the row's mean); ``min-max`` (to [0, 1]); ``z-score`` (mean 0, population standard
    deviation 1); ``reciprocal-rank`` (1/(k + r) of the rank r from 1); ``minus-rank`` (-r). A row of equal scores
    becomes 0 by centre, min-max and z-score.
    """
    teacher = cleaned(teacher, mask)
    if transform in ("reciprocal-rank", "minus-rank"):
        ranks = teacher_ranks(teacher, mask)
        teacher = 1 / (k + ranks) if transform == "reciprocal-rank" else -ranks
    elif transform != "none":
        lowest, highest = _extremes(teacher, mask)
        known = mask.sum(dim=1, keepdim=True).clamp(min=1)
        if transform == "min-max":
            offset, spread = lowest, highest - lowest
        else:
            offset = teacher.sum(dim=1, keepdim=True) / known
            spread = torch.ones_like(offset)
            if transform == "z-score":
                spread = (cleaned(teacher - offset, mask).square().sum(dim=1, keepdim=True) / known).sqrt()
        # rounding leaves a constant row near its mean and not at it
        teacher = torch.where(highest > lowest, (teacher - offset) / spread, 0.0)
    return scale * cleaned(teacher, mask)


def teacher_ranks(teacher: Tensor, mask: Tensor) -> Tensor:
    """Each score's rank in its row, from 1 (best), as floats [B, N]; equal scores share the best of their ranks."""
    descending = -cleaned(teacher, mask).masked_fill(~mask, -torch.inf)
    better = torch.searchsorted(descending.sort(dim=1).values, descending.contiguous())
    return (better + 1).to(descending.dtype)


def distribution(
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    ground_truth: float = 0.0,
    positive: Tensor | None = None,
) -> Tensor:
    """The target distribution [B, N] of each row: ``a·onehot(positive) + (1 - a)·softmax(teacher / temperature)``.

    ``a`` is ``ground_truth`` (Borup & Andersen 2021 dampen repeated self-distillation so); ``positive`` [B] is the
    positive's column, slot 0 without it. A row whose positive is masked keeps the teacher's distribution.
    """
    probabilities = cleaned(log_softmax(cleaned(teacher, mask) / temperature, mask).exp(), mask)
    if not ground_truth:
        return probabilities
    if positive is None:
        positive = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    label = torch.nn.functional.one_hot(positive, mask.shape[1]).to(probabilities.dtype)
    share = ground_truth * mask.gather(1, positive.unsqueeze(1)).to(probabilities.dtype)
    return share * label + (1 - share) * probabilities


def no_signal(teacher: Tensor, known: Tensor) -> Tensor:
    """Which rows [B] have fewer than two known scores, or only equal ones: they hold no order to learn."""
    lowest, highest = _extremes(cleaned(teacher, known), known)
    return ~comparable(known) | (highest <= lowest).squeeze(1)


def _extremes(teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    lowest = teacher.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    highest = teacher.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    return lowest, highest
