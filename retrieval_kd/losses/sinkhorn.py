"""Sinkhorn distillation: a batch of student distributions is moved onto the teacher's by optimal transport."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retrieval_kd.losses.rows import cleaned, comparable
from retrieval_kd.losses.targets import distribution


def sinkhorn(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    columns: str = "ranks",
    regularisation: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """The transport cost ``sum(P·D)`` between the batch's teacher and student rows (SinKD, Cui et al. 2024).

    ``D[i, j]`` is the L1 distance between teacher row i and student row j, both softmax distributions over N; P is the
    entropy-regularised plan with row and column sums 1/B after ``iterations`` normalisations. Rows are compared column
    by column, so columns must mean the same in each: ``columns="documents"`` for documents that the whole batch shares;
    ``"ranks"`` sorts private lists by the teacher first (ties in the order of the slots), so that column r is rank r.
    Rows with fewer than two usable slots are left out. Its gradient does not fall with the square of the temperature,
    so nothing is multiplied.
    """
    rows = comparable(mask)
    student, teacher, mask = student[rows], teacher[rows].detach(), mask[rows]
    if not len(mask):
        return student.sum()
    if columns == "ranks":
        order = cleaned(teacher, mask).masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        student, teacher, mask = (values.gather(1, order) for values in (student, teacher, mask))
    p = distribution(teacher, mask, temperature=teacher_temperature)
    q = distribution(student, mask, temperature=student_temperature)
    cost = torch.cdist(p.to(q.dtype), q, p=1.0)
    plan = _log_plan(cost, regularisation, iterations).exp()
    return (plan * cost).sum()


def _log_plan(cost: Tensor, regularisation: float, iterations: int) -> Tensor:
    """Logarithms of the plan [B, B]; in logarithms, because a small regularisation would underflow."""
    share = math.log(len(cost))
    plan = -cost / regularisation
    for _ in range(iterations):
        plan = plan - plan.logsumexp(dim=1, keepdim=True) - share
        plan = plan - plan.logsumexp(dim=0, keepdim=True) - share
    return plan
