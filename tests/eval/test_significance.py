import numpy as np
import pytest
from scipy import stats

from retrieval_kd.eval.significance import (
    compare_systems,
    holm,
    paired_p_value,
    percentile_interval,
    resampled_means,
)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    # Sorted: .005×4 = .02, .01×3 = .03, .03×2 = .06, .04×1 = .04 → raised to .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_t_test_is_worked_out_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1/√3, t = 2√3 with 2 degrees: p = 1 − t/√(t² + 2) = 1 − √(12/14).
    a, b = np.array([1.0, 3.0, 5.0]), np.array([0.0, 1.0, 2.0])
    assert paired_p_value(a, b) == pytest.approx(1 - np.sqrt(12 / 14))
    assert paired_p_value(b, a) == paired_p_value(a, b)


def test_the_t_test_is_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.random(40), rng.random(40)
    assert paired_p_value(a, b) == stats.ttest_rel(a, b).pvalue


def test_no_difference_and_a_single_query_show_nothing():
    same = np.array([0.2, 0.4, 0.9])
    assert paired_p_value(same, same.copy()) == 1.0
    assert paired_p_value(np.array([1.0]), np.array([0.0])) == 1.0


def test_equal_differences_are_tested_by_their_signs():
    # Four queries, each better by about the same: of 16 sign patterns the 2 with one sign throughout are as extreme.
    a = np.array([0.3, 0.4, 0.5, 0.6])
    assert paired_p_value(a, a - 0.1) == 2 / 16


def test_resampling_two_queries_gives_their_binomial_means():
    # Two queries with 0 and 1: the mean is 0, ½ or 1 with the chances ¼, ½ and ¼.
    means = resampled_means(np.array([[0.0, 1.0]]), 40_000, seed=0)[:, 0]
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert counts / 40_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    assert percentile_interval(means, 0.4) == (0.5, 0.5)
    assert percentile_interval(means, 0.6) == (0.0, 1.0)


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(2).beta(0.5, 0.7, size=120)
    ours = percentile_interval(resampled_means(values[None], 10_000, seed=3)[:, 0], 0.95)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=4).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)
    # A normal approximation agrees too: mean ± 1.96 standard errors.
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert ours == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.01)


def test_draws_are_shared_by_systems_seeded_and_the_same_in_any_block_size(monkeypatch):
    values = np.random.default_rng(5).random((2, 7))
    means = resampled_means(np.vstack([values, values[0] - values[1]]), 500, seed=6)
    assert means[:, 0] - means[:, 1] == pytest.approx(means[:, 2])
    assert np.array_equal(means[:, :2], resampled_means(values, 500, seed=6))
    assert not np.array_equal(means[:, :2], resampled_means(values, 500, seed=7))
    monkeypatch.setattr("retrieval_kd.eval.significance._COUNTS_AT_ONCE", 70)
    assert resampled_means(values, 500, seed=6) == pytest.approx(means[:, :2])


def test_every_pair_or_each_with_the_baseline():
    values = np.array([[0.0, 0.2, 0.4, 0.9], [0.1, 0.2, 0.7, 0.9], [0.1, 0.2, 0.7, 0.9]])
    means = resampled_means(values, 200, seed=0)
    pairs = compare_systems(["x", "y", "z"], values, means, 0.95)
    assert [(one.a, one.b) for one in pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
    assert pairs[0].difference == pytest.approx(-0.1)
    assert pairs[2][2:] == (0.0, 0.0, 0.0, 1.0, 1.0)
    p = stats.ttest_rel(values[0], values[1]).pvalue
    assert [one.p_holm for one in pairs] == pytest.approx([3 * p, 3 * p, 1.0])
    against = compare_systems(["x", "y", "z"], values, means, 0.95, baseline="x")
    assert [(one.a, one.b) for one in against] == [("y", "x"), ("z", "x")]
    assert against[0].difference == pytest.approx(0.1)
    assert [one.p_holm for one in against] == pytest.approx([2 * p, 2 * p])
