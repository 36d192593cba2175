"""LambdaLoss on score lists: the weighted pairs of sentence-transformers, on tensors that are there already."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from retrieval_kd.losses.rows import cleaned

SCHEMES = {
    "none": "NoWeightingScheme",
    "ndcg-loss1": "NDCGLoss1Scheme",
    "ndcg-loss2": "NDCGLoss2Scheme",
    "ndcg-loss2++": "NDCGLoss2PPScheme",
    "lambda-rank": "LambdaRankScheme",
}
"""Scheme → the class of sentence-transformers that computes its pairs' weights."""


def lambda_loss(
    student: Tensor, teacher: Tensor, mask: Tensor, *, scheme: str = "ndcg-loss2++", k: int | None = None
) -> Tensor:
    """Mean of ``-w·log2 σ(s_i - s_j)`` over the pairs whose first the teacher prefers (Wang et al. 2018).

    Student, teacher and mask are [B, N]. The weights ``w`` come from the gains ``2^t - 1``, so the teacher should say
    0 for a useless document and a few units for the best; what is below 0 gains nothing, but keeps its order. ``k``
    leaves out the pairs that have neither document among the student's best k. Raises `ValueError` for a scheme that
    is not in `SCHEMES`.
    """
    from sentence_transformers.cross_encoder import losses

    if scheme not in SCHEMES:
        raise ValueError(f"scheme: '{scheme}' (valid: {', '.join(SCHEMES)})")
    rows = mask.sum(dim=1) >= 2
    if not bool(rows.any()):
        return cleaned(student, mask).sum() * 0.0
    lists = [[""] * n for n in mask[rows].sum(dim=1).tolist()]
    levels = [own[known] for own, known in zip(cleaned(teacher.detach(), mask)[rows], mask[rows], strict=True)]
    weights = getattr(losses, SCHEMES[scheme])()
    loss = losses.LambdaLoss(_Given(student[rows][mask[rows]]), weights, k=k, mini_batch_size=-1)
    value: Tensor = loss([[""] * len(lists), lists], levels)
    return value


class _Given:
    """A cross-encoder, as far as LambdaLoss uses one, whose logits [n] are given."""

    num_labels = 1

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.device = logits.device

    def preprocess(self, pairs: list[Any], **_: Any) -> dict[str, Tensor]:
        """Nothing: the pairs have been scored."""
        return {}

    def __call__(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The given logits."""
        return {"scores": self.logits}
