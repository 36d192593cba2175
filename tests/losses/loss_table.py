"""Every loss on scores with a reference in plain loops of float64 numbers, and the invariances it has.

A new loss is covered by `test_on_scores.py` when it has a row in `LOSSES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retrieval_kd.losses import on_scores
from retrieval_kd.losses.sinkhorn import sinkhorn


def _rows(s, t, m):
    """The usable (student, teacher) numbers of each row."""
    return [([float(x) for x in s[b, m[b]]], [float(x) for x in t[b, m[b]]]) for b in range(len(s))]


def softmax(values, temperature=1.0):
    e = [math.exp(x / temperature) for x in values]
    return [x / sum(e) for x in e]


def margin_mse(s, t, m):
    values = []
    for b in range(len(s)):
        for n in range(1, s.shape[1]):
            if m[b, 0] and m[b, n]:
                values.append(((s[b, 0] - s[b, n]) - (t[b, 0] - t[b, n])) ** 2)
    return np.mean(values)


def margin_mse_all(s, t, m):
    values = []
    for sr, tr in _rows(s, t, m):
        n = len(sr)
        values += [(sr[i] - sr[j] - tr[i] + tr[j]) ** 2 for i in range(n) for j in range(n) if i != j]
    return np.mean(values)


def mse(s, t, m):
    return np.mean([(x - y) ** 2 for sr, tr in _rows(s, t, m) for x, y in zip(sr, tr, strict=True)])


def kl(s, t, m, ts=1.0, tt=1.0, reverse=False, entropy=True, truth=0.0):
    values = []
    for sr, tr in _rows(s, t, m):
        q, p = softmax(sr, ts), softmax(tr, tt)
        if truth:  # the rows of `random_rows` keep slot 0
            p = [truth * (i == 0) + (1 - truth) * x for i, x in enumerate(p)]
        if reverse:
            p, q = q, p
        values.append(sum(x * ((math.log(x) if entropy else 0.0) - math.log(y)) for x, y in zip(p, q, strict=True)))
    return ts**2 * np.mean(values)


def rank_net(s, t, m, weights="none"):
    values = []
    for sr, tr in _rows(s, t, m):
        rank = [1 + sum(y > x for y in tr) for x in tr]
        for i in range(len(sr)):
            for j in range(len(sr)):
                if tr[i] > tr[j]:
                    w = {"none": 1.0, "gap": tr[i] - tr[j], "rank": 1 / (rank[i] + rank[j])}[weights]
                    values.append(w * math.log(1 + math.exp(sr[j] - sr[i])))
    return np.mean(values)


def info_nce(s, t, m, temperature):
    return np.mean([-math.log(softmax(sr, temperature)[0]) for sr, _ in _rows(s, t, m)])


def taid(s, t, m, share, ts, tt):
    between = (1 - share) * s / ts + share * t / tt
    return kl(s, between, m, ts=ts, entropy=False)


def sinkhorn_cost(s, t, m, ts, tt, ranks, regularisation, iterations=20):
    width = s.shape[1]
    p, q = [], []
    for b in range(len(s)):
        kept = [n for n in range(width) if m[b, n]]
        ps, qs = softmax([t[b, n] for n in kept], tt), softmax([s[b, n] for n in kept], ts)
        if ranks:
            order = sorted(range(len(kept)), key=lambda i, ps=ps: -ps[i])
            kept, ps, qs = list(range(len(kept))), [ps[i] for i in order], [qs[i] for i in order]
        for rows, values in ((p, ps), (q, qs)):
            row = [0.0] * width
            for n, value in zip(kept, values, strict=True):
                row[n] = value
            rows.append(row)
    cost = np.array([[sum(abs(x - y) for x, y in zip(a, b, strict=True)) for b in q] for a in p])
    plan = np.exp(-cost / regularisation)
    for _ in range(iterations):
        plan = plan / plan.sum(axis=1, keepdims=True) / len(plan)
        plan = plan / plan.sum(axis=0, keepdims=True) / len(plan)
    return (plan * cost).sum()


@dataclass(frozen=True)
class Loss:
    """A loss, its reference, and what changes it.

    ``order``: which slots may change places without changing it. ``shift``: it ignores a constant added to a row of
    scores. ``single``: one score alone teaches. ``still``: its target does not follow the student, so that numerical
    differences are its gradient.
    """

    name: str
    call: Callable[[Any, Any, Any], Any]
    reference: Callable[[Any, Any, Any], float]
    order: str = "all"
    shift: bool = True
    single: bool = False
    still: bool = True


def _positive(s):
    return torch.zeros(len(s), dtype=torch.int64)


WARM = {"student_temperature": 3.0, "teacher_temperature": 2.0}

LOSSES = [
    Loss("margin-mse", on_scores.margin_mse, margin_mse, order="rest"),
    Loss("margin-mse all", lambda s, t, m: on_scores.margin_mse(s, t, m, pairs="all"), margin_mse_all),
    Loss("mse", on_scores.mse, mse, shift=False, single=True),
    Loss("kl", on_scores.kl_divergence, kl),
    Loss("kl warm", lambda s, t, m: on_scores.kl_divergence(s, t, m, **WARM), lambda s, t, m: kl(s, t, m, 3.0, 2.0)),
    Loss(
        "kl ground truth",
        lambda s, t, m: on_scores.kl_divergence(s, t, m, ground_truth=0.3, **WARM),
        lambda s, t, m: kl(s, t, m, 3.0, 2.0, truth=0.3),
        order="rest",
    ),
    Loss(
        "reverse-kl",
        lambda s, t, m: on_scores.reverse_kl(s, t, m, **WARM),
        lambda s, t, m: kl(s, t, m, 3.0, 2.0, reverse=True),
    ),
    Loss(
        "listnet",
        lambda s, t, m: on_scores.list_net(s, t, m, **WARM),
        lambda s, t, m: kl(s, t, m, 3.0, 2.0, entropy=False),
    ),
    Loss(
        "listnet ground truth",
        lambda s, t, m: on_scores.list_net(s, t, m, ground_truth=0.2),
        lambda s, t, m: kl(s, t, m, entropy=False, truth=0.2),
        order="rest",
    ),
    Loss(
        "taid",
        lambda s, t, m: on_scores.taid(s, t, m, t=0.4, **WARM),
        lambda s, t, m: taid(s, t, m, 0.4, 3.0, 2.0),
        still=False,
    ),
    *(
        Loss(
            f"ranknet {weights}",
            lambda s, t, m, weights=weights: on_scores.rank_net(s, t, m, weights=weights),
            lambda s, t, m, weights=weights: rank_net(s, t, m, weights),
        )
        for weights in ("none", "gap", "rank")
    ),
    Loss(
        "info-nce",
        lambda s, t, m: on_scores.info_nce(s, _positive(s), m, temperature=0.5),
        lambda s, t, m: info_nce(s, t, m, 0.5),
        order="rest",
    ),
    *(
        Loss(
            f"sinkhorn {columns}",
            lambda s, t, m, columns=columns: sinkhorn(s, t, m, columns=columns, regularisation=0.3, **WARM),
            lambda s, t, m, columns=columns: sinkhorn_cost(s, t, m, 3.0, 2.0, columns == "ranks", 0.3),
        )
        for columns in ("ranks", "documents")
    ),
]


def random_rows(seed, rows=5, columns=7):
    """Student, teacher and mask [rows, columns] in float64; the first two slots of a row are there."""
    rng = np.random.default_rng(seed)
    student = torch.tensor(rng.normal(size=(rows, columns)) * 3)
    teacher = torch.tensor(rng.normal(size=(rows, columns)) * 4)
    mask = torch.tensor(rng.random((rows, columns)) < 0.7)
    mask[:, :2] = True
    return student, teacher, mask
