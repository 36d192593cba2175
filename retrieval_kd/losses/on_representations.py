"""Losses on representations: what a student's vectors should look like, given a teacher's vectors of the same texts."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_regression(student: Tensor, teacher: Tensor, *, distance: str = "mse") -> Tensor:
    """Mean distance between student and teacher vectors [M, d] of the same M texts (Reimers & Gurevych 2020).

    ``mse`` is the squared distance summed over the d dimensions, ``cosine`` is one minus the cosine; both averaged over
    texts. For unit vectors the first is twice the second.
    """
    if distance == "cosine":
        return (1 - torch.cosine_similarity(student, teacher, dim=1)).mean()
    return (student - teacher).square().sum(dim=1).mean()
