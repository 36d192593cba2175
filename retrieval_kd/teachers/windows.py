"""Ranking long lists with a ranker that reads a few passages at a time: sliding windows, shuffles, repair of answers.

Sun et al. 2023 (RankGPT, arXiv 2304.09542): windows slide from the end of the list to its start, and what is best in
one window is carried into the next.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.recipe import Section
from retrieval_kd.teachers.base import Candidates


class WindowKeys(Section):
    """The recipe keys of every listwise teacher."""

    window: int = Field(default=20, ge=2)
    stride: int = Field(default=10, ge=1)
    shuffles: int = Field(default=0, ge=0)
    """0: the list is ranked once, in the order of the candidates. N: N times in seeded random orders, and averaged."""
    seed: int = 0

    @model_validator(mode="after")
    def _windows_overlap(self) -> WindowKeys:
        if self.stride >= self.window:
            raise ValueError(
                f"stride {self.stride} must be smaller than window {self.window}: nothing would be carried"
            )
        return self


class Window(NamedTuple):
    """Some documents of one list, to be put in order: positions in the list's candidates, in their present order."""

    list: int
    members: Sequence[int]


OrderWindows = Callable[[list[Window]], list[list[int]]]
"""Gives for each window the new order of its members: a permutation of ``0 … len(members) - 1``, best first."""


def window_bounds(n: int, size: int, stride: int) -> list[tuple[int, int]]:
    """The windows (start, stop) over a list of ``n``, from its end to its start."""
    if not n:
        return []
    bounds = [(max(0, n - size), n)]
    while bounds[-1][0] > 0:
        start, stop = bounds[-1]
        bounds.append((max(0, start - stride), stop - stride))
    return bounds


def rank_scores(
    shard: Sequence[Candidates], keys: WindowKeys, order_windows: OrderWindows, *, show_single: bool = False
) -> list[np.ndarray]:
    """Scores [n] float32 for each list: minus its 1-based rank, or minus the mean of its ranks over the shuffles.

    The windows of all lists and shuffles that can be put in order at the same time go to ``order_windows`` together.
    A list of one document has its order already; ``show_single`` makes a window of it all the same, so that a ranker
    that cannot read the document fails over it.
    """
    starts = [
        (i, order) for i, query in enumerate(shard) for order in _starting_orders(query.query_id, len(query.rows), keys)
    ]
    orders = [list(order) for _, order in starts]
    shown = [order if show_single or len(order) > 1 else [] for order in orders]
    bounds = [window_bounds(len(order), keys.window, keys.stride) for order in shown]
    for turn in range(max((len(of_list) for of_list in bounds), default=0)):
        active = [j for j in range(len(orders)) if turn < len(bounds[j])]
        windows = [Window(starts[j][0], orders[j][slice(*bounds[j][turn])]) for j in active]
        for j, window, new in zip(active, windows, order_windows(windows), strict=True):
            if sorted(new) != list(range(len(window.members))):
                raise ValueError(f"not a permutation of {len(window.members)} passages: {new}")
            orders[j][slice(*bounds[j][turn])] = [window.members[k] for k in new]
    ranks = [np.zeros(len(query.rows)) for query in shard]
    for (i, _), order in zip(starts, orders, strict=True):
        ranks[i][order] += np.arange(1, len(order) + 1)
    return [np.asarray(-total / max(1, keys.shuffles), dtype=np.float32) for total in ranks]


def parse_permutation(answer: str, identifiers: Sequence[str]) -> tuple[list[int], bool]:
    """The order an answer such as ``[2] > [1]`` gives, and whether it had to be repaired.

    Unknown and repeated identifiers are dropped; those that are missing follow in their present order.
    """
    position = {name: i for i, name in enumerate(identifiers)}
    named = re.findall(r"\[\s*(\w+)\s*\]", answer)
    order = list(dict.fromkeys(position[name] for name in named if name in position))
    repaired = len(order) != len(identifiers) or len(named) != len(order)
    return order + [i for i in range(len(identifiers)) if i not in set(order)], repaired


def _starting_orders(query_id: str, n: int, keys: WindowKeys) -> list[list[int]]:
    """The orders in which a list is shown; a query's shuffles depend on the seed and its id alone."""
    if not keys.shuffles:
        return [list(range(n))]
    seed = int.from_bytes(hashlib.blake2b(f"{keys.seed}\x00{query_id}".encode(), digest_size=8).digest(), "little")
    rng = np.random.default_rng(seed)
    return [rng.permutation(n).tolist() for _ in range(keys.shuffles)]
