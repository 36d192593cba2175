"""Losses on score lists: pure functions of student and teacher scores [B, N] and a mask [B, N].

Slot 0 of a row is its positive. ``mask`` is False where a document or a teacher's score is missing; a masked slot takes
no part and gets no gradient, whatever number stands there. A row with fewer than two usable slots has nothing to
compare and counts 0. The teacher is a constant: no gradient goes there. Every loss is a mean: over margins for
Margin-MSE, over pairs for RankNet, over scores for MSE, over rows for the others. Half-precision scores are computed in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrieval_kd.losses.rows import cleaned, comparable, full_precision, log_softmax, mean_over
from retrieval_kd.losses.targets import distribution, teacher_ranks


def margin_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, pairs: str = "positive") -> Tensor:
    """Mean squared difference between the student's and the teacher's margins (Hofstätter et al. 2020).

    ``pairs="positive"`` takes the margins of slot 0 against every other slot; ``"all"`` takes all ordered pairs of a
    row. Margins cancel an additive offset of the teacher but not its scale.
    """
    difference = cleaned(student, mask) - cleaned(teacher.detach(), mask)
    if pairs == "positive":
        return mean_over((difference[:, :1] - difference[:, 1:]).square(), mask[:, :1] & mask[:, 1:])
    # over ordered pairs of n numbers, the squared differences sum up to 2n times the squares of the centred numbers
    n = mask.sum(dim=1)
    mean = difference.sum(dim=1, keepdim=True) / n.clamp(min=1).unsqueeze(1)
    squares = cleaned(difference - mean, mask).square().sum(dim=1)
    return (2 * n * squares).sum() / (n * (n - 1)).sum().clamp(min=1)


def mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of the scores themselves, for a student on its teacher's scale.

    The one loss here that compares no documents: a row with a single score teaches too.
    """
    return mean_over((cleaned(student, mask) - cleaned(teacher.detach(), mask)).square(), mask)


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    ground_truth: float = 0.0,
    positive: Tensor | None = None,
) -> Tensor:
    """KL(target ‖ student) of the two distributions over a row (Hinton et al. 2015); see `targets.distribution`.

    The sum is multiplied by the square of the student's temperature, so that its weight against other losses does not
    change with the temperature (sentence-transformers' DistillKLDivLoss does the same). Large temperatures turn it
    into Margin-MSE over all pairs; small ones match the top of the list only.
    """
    target = distribution(
        teacher.detach(), mask, temperature=teacher_temperature, ground_truth=ground_truth, positive=positive
    )
    log_student = log_softmax(cleaned(student, mask) / student_temperature, mask)
    divergence = (torch.special.xlogy(target, target) - target * log_student).sum(dim=1)
    return student_temperature**2 * mean_over(divergence, comparable(mask))


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """KL(student ‖ teacher): the student may leave out what the teacher likes, and pays for liking what it does not.

    Multiplied by the square of the student's temperature, as `kl_divergence` is.
    """
    log_student = log_softmax(cleaned(student, mask) / student_temperature, mask)
    log_teacher = log_softmax(cleaned(teacher.detach(), mask) / teacher_temperature, mask)
    divergence = (log_student.exp() * cleaned(log_student - log_teacher, mask)).sum(dim=1)
    return student_temperature**2 * mean_over(divergence, comparable(mask))


def list_net(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    ground_truth: float = 0.0,
    positive: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the student against the target distribution (ListNet's top-one loss, Cao et al. 2007).

    `kl_divergence` plus the target's entropy, so with the same gradient; multiplied by the square of the student's
    temperature, as that is.
    """
    target = distribution(
        teacher.detach(), mask, temperature=teacher_temperature, ground_truth=ground_truth, positive=positive
    )
    log_student = log_softmax(cleaned(student, mask) / student_temperature, mask)
    return student_temperature**2 * mean_over(-(target * log_student).sum(dim=1), comparable(mask))


def taid(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    t: float | Tensor,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """ListNet against ``softmax((1 - t)·student + t·teacher)``, the student's part held constant (Shing et al. 2025).

    The target moves from the student's own distribution (t = 0, no gradient) to the teacher's (t = 1); `MovingTarget`
    moves it. Both scores are divided by their temperatures first, which should bring them to one scale.
    """
    own = cleaned(student, mask) / student_temperature
    between = (1 - t) * own + t * cleaned(teacher, mask) / teacher_temperature
    return list_net(student, between, mask, student_temperature=student_temperature)


def rank_net(student: Tensor, teacher: Tensor, mask: Tensor, *, weights: str = "none") -> Tensor:
    """Mean of ``w·log(1 + exp(s_j - s_i))`` over the pairs whose first the teacher prefers (Burges et al. 2005).

    ``weights``: ``none`` (w = 1), ``gap`` (w = t_i - t_j), ``rank`` (w = 1/(r_i + r_j) with the teacher's ranks from 1,
    as FIRST is trained: Reddy et al. 2024). Equal scores make no pair.
    """
    student, teacher = cleaned(student, mask), cleaned(teacher.detach(), mask)
    gap = teacher.unsqueeze(2) - teacher.unsqueeze(1)
    preferred = (gap > 0) & mask.unsqueeze(2) & mask.unsqueeze(1)
    losses = torch.nn.functional.softplus(student.unsqueeze(1) - student.unsqueeze(2))
    if weights == "gap":
        losses = gap * losses
    elif weights == "rank":
        ranks = teacher_ranks(teacher, mask)
        losses = losses / (ranks.unsqueeze(2) + ranks.unsqueeze(1))
    return mean_over(losses, preferred)


def info_nce(student: Tensor, positive: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of each row's ``positive`` column [B] (int64) among its unmasked columns (van den Oord 2018).

    A row whose positive is masked, or that has nothing to tell it from, is left out of the mean.
    """
    own = positive.unsqueeze(1)
    rows = mask.gather(1, own).squeeze(1) & comparable(mask)
    log_probability = log_softmax(cleaned(student, mask) / temperature, mask)
    return mean_over(-log_probability.gather(1, own).squeeze(1), rows)


def without_false_negatives(
    mask: Tensor,
    teacher: Tensor,
    known: Tensor,
    positive: Tensor,
    *,
    margin: float | None = None,
    relative: float | None = None,
) -> Tensor:
    """``mask`` [B, N] without the negatives that the teacher scores above a bar set by the positive's score p.

    The bar is ``p - margin``, or ``relative·p`` (Moreira et al. 2024, NV-Retriever, with 0.95). The second presumes
    positive scores, as cosines of good documents are; below 0 it is ``p - (1 - relative)·|p|``, which stays under the
    positive but means little where a score's zero does, as a logit's. What the teacher does not know stays, and a row
    whose positive it does not know stays as it is.
    """
    own = positive.unsqueeze(1)
    scores = full_precision(teacher)
    best = scores.gather(1, own)
    if margin is not None:
        bar = best - margin
    elif relative is not None:
        bar = best - (1 - relative) * best.abs()
    else:
        return mask
    false = known & known.gather(1, own) & (scores > bar)
    return mask & ~false.scatter(1, own, False)
