"""Rows of scores [B, N] with missing slots: what every loss on them does first and last."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(values: Tensor) -> Tensor:
    """``values`` as float32 when they are half or bfloat16, else as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def cleaned(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` in full precision with 0 in masked slots, which get no gradient (whatever was there, NaN included)."""
    return full_precision(values).masked_fill(~mask, 0.0)


def log_softmax(values: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities over each row's unmasked slots; masked slots hold a very negative, finite number."""
    return torch.log_softmax(values.masked_fill(~mask, torch.finfo(values.dtype).min), dim=1)


def comparable(mask: Tensor) -> Tensor:
    """Which rows [B] have two usable slots, so that there is something to compare."""
    return mask.sum(dim=1) >= 2


def mean_over(values: Tensor, usable: Tensor) -> Tensor:
    """The mean of the usable values; 0, with a graph, when there are none."""
    return torch.where(usable, values, 0.0).sum() / usable.sum().clamp(min=1)
