"""Losses on score lists: pure functions of student and teacher scores [B, N] and a mask [B, N].

Slot 0 of a row is its positive. ``mask`` is False where a document or a teacher's score is missing; a masked slot takes
no part and gets no gradient. A row with fewer than two usable slots has nothing to teach and counts 0. Every loss is a
mean: over margins for Margin-MSE, over rows for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def margin_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, pairs: str = "positive") -> Tensor:
    """Mean squared difference between the student's and the teacher's margins (Hofstätter et al. 2020).

    ``pairs="positive"`` takes the margins of slot 0 against every other slot; ``"all"`` takes all ordered pairs of a
    row. Margins cancel an additive offset of the teacher but not its scale.
    """
    difference = torch.where(mask, student - teacher.masked_fill(~mask, 0.0), 0.0)
    if pairs == "positive":
        margins = difference[:, :1] - difference[:, 1:]
        usable = mask[:, :1] & mask[:, 1:]
    else:
        margins = difference.unsqueeze(2) - difference.unsqueeze(1)
        usable = mask.unsqueeze(2) & mask.unsqueeze(1) & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return (margins.square() * usable).sum() / usable.sum().clamp(min=1)


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """KL(teacher ‖ student) of the two softmax distributions over a row, averaged over rows with two usable slots.

    The sum is multiplied by the square of the student's temperature, so that its weight against other losses does not
    change with the temperature (Hinton et al. 2015; sentence-transformers' DistillKLDivLoss does the same).
    """
    rows = mask.sum(dim=1) >= 2
    low = torch.finfo(student.dtype).min
    log_student = torch.log_softmax((student / student_temperature).masked_fill(~mask, low), dim=1)
    log_teacher = torch.log_softmax((teacher / teacher_temperature).masked_fill(~mask, low), dim=1)
    terms = torch.where(mask, log_teacher.exp() * (log_teacher - log_student), 0.0)
    return student_temperature**2 * (terms.sum(dim=1) * rows).sum() / rows.sum().clamp(min=1)


def info_nce(student: Tensor, positive: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of each row's ``positive`` column [B] (int64) among its unmasked columns (van den Oord 2018).

    A row whose positive is masked, or that has nothing to tell it from, is left out of the mean.
    """
    own = positive.unsqueeze(1)
    rows = mask.gather(1, own).squeeze(1) & (mask.sum(dim=1) >= 2)
    low = torch.finfo(student.dtype).min
    log_probability = torch.log_softmax((student / temperature).masked_fill(~mask, low), dim=1)
    losses = torch.where(rows, -log_probability.gather(1, own).squeeze(1), 0.0)
    return losses.sum() / rows.sum().clamp(min=1)
