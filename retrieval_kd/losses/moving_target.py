"""TAID's interpolation t between the student's own distribution and the teacher's, as state that checkpoints keep."""

from __future__ import annotations

import torch
from torch import Tensor


class MovingTarget(torch.nn.Module):
    """Moves t from ``start`` to ``end`` while training goes on, faster while the loss falls (Shing et al. 2025).

    t follows a line over ``passes`` forward passes, and never falls behind it; above it t grows by
    ``adaptation·sigmoid(m)·(1 - t)`` a pass, with m the moving average (``momentum``) of the loss's relative fall.
    Several processes each move t by their own batches, and the driver takes the mean of theirs after every step.
    """

    t: Tensor
    fall: Tensor
    previous: Tensor
    passed: Tensor

    def __init__(self, passes: int, *, start: float, end: float, adaptation: float, momentum: float) -> None:
        super().__init__()
        self.passes, self.start, self.end = passes, start, end
        self.adaptation, self.momentum = adaptation, momentum
        self.register_buffer("t", torch.tensor(start))
        self.register_buffer("fall", torch.tensor(0.0))
        self.register_buffer("previous", torch.tensor(torch.nan))
        self.register_buffer("passed", torch.tensor(0))

    def update(self, loss: Tensor) -> None:
        """Takes the loss of a pass and moves t for the next one."""
        loss = loss.detach()
        change = torch.where(self.previous > 0, (self.previous - loss) / self.previous, 0.0)
        self.fall = self.momentum * self.fall + (1 - self.momentum) * change.to(self.fall)
        self.previous = loss.to(self.previous)
        self.passed = self.passed + 1
        line = self.start + (self.end - self.start) * self.passed / self.passes
        faster = self.t + self.adaptation * self.fall.sigmoid() * (1 - self.t)
        self.t = torch.maximum(line, faster).clamp(max=self.end)
