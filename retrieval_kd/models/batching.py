"""Batches by a budget of tokens instead of a number of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def token_batches(lengths: Sequence[int], budget: int) -> list[np.ndarray]:
    """Positions of texts in batches of similar length, longest first; a batch padded to its longest text has at most
    ``budget`` tokens (a single longer text is a batch of its own).

    Equal lengths keep their order, so that the same texts always make the same batches.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches
