"""How far a difference between systems can be trusted: bootstrap intervals, paired tests, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_COUNTS_AT_ONCE = 2_000_000


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


def resampled_means(values: Floats, samples: int, seed: int) -> Floats:
    """Means ``[samples, S]`` of each row of ``values`` ``[S, Q]`` over queries drawn with replacement.

    A draw is the same for every system, so the difference of two columns is the resampled mean of their paired
    difference.
    """
    rng = np.random.default_rng(seed)
    queries = values.shape[1]
    means = np.empty((samples, values.shape[0]))
    step = max(1, _COUNTS_AT_ONCE // queries)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = rng.integers(queries, size=(rows, queries)) + np.arange(rows)[:, None] * queries
        times = np.bincount(drawn.ravel(), minlength=rows * queries).reshape(rows, queries)
        means[start : start + rows] = times @ values.T / queries
    return means


def percentile_interval(means: Floats, confidence: float) -> Interval:
    """The percentile bootstrap interval of resampled means ``[samples]`` (Efron & Tibshirani 1993, chapter 13)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def paired_p_value(a: Floats, b: Floats) -> float:
    """The two-sided p-value of Student's paired t-test that ``a`` and ``b`` ``[Q]`` have the same mean.

    1 when no query differs, and for a single query, which can show nothing. When all differences are the same t is
    infinite whatever their number; the exact sign-flip test answers instead: 2 of its 2^Q sign patterns are as extreme.
    """
    differences = a - b
    if len(differences) < 2 or not differences.any():
        return 1.0
    if np.allclose(differences, differences[0], rtol=1e-9, atol=0):
        return float(2.0 ** (1 - len(differences)))
    from scipy import stats

    return float(stats.ttest_rel(a, b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979): compare them with the level itself."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = highest
    return adjusted


class Comparison(NamedTuple):
    """Two systems on one measure: ``difference`` is the mean of ``a`` minus that of ``b``; ``p_holm`` is corrected."""

    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float


def compare_systems(
    names: Sequence[str], values: Floats, means: Floats, confidence: float, baseline: str | None = None
) -> list[Comparison]:
    """The paired comparison of every two systems, or of each with ``baseline``; they are one family for Holm.

    ``values`` ``[S, Q]`` are the systems' values a query and ``means`` ``[samples, S]`` their `resampled_means`.
    """
    order = range(len(names))
    if baseline is None:
        pairs = [(i, j) for i in order for j in order if i < j]
    else:
        pairs = [(i, names.index(baseline)) for i in order if names[i] != baseline]
    p_values = [paired_p_value(values[i], values[j]) for i, j in pairs]
    comparisons = []
    for (i, j), p, p_holm in zip(pairs, p_values, holm(p_values), strict=True):
        interval = percentile_interval(means[:, i] - means[:, j], confidence)
        difference = float((values[i] - values[j]).mean())
        comparisons.append(Comparison(names[i], names[j], difference, *interval, p, p_holm))
    return comparisons
