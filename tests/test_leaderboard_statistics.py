"""Statistics against hand-computed examples, published definitions, and simulated coverage."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scpo_bench.leaderboard.statistics import (
    Estimate,
    censored_quantile,
    cvar,
    iqm,
    iqm_interval,
    mean_interval,
    performance_profile,
    probability_of_improvement,
    wilson,
)

COVERAGE_RUNS = int(os.environ.get("SCPO_BENCH_COVERAGE_RUNS", "1000"))
"""Simulated experiments per distribution; the full check takes 20000."""


def test_iqm_by_hand():
    """Eight scores: two fall at each end. Five: one at each end. Three: none."""
    assert iqm([100, 1, 2, 3, 4, 5, 6, -100]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm([10, 1, 2, 3, -50]) == pytest.approx(2.0)
    assert iqm([1, 2, 6]) == pytest.approx(3.0)
    assert math.isnan(iqm([]))


def test_iqm_is_of_all_scores_together():
    """rliable's aggregate_iqm trims the scores of all tasks together, not task by task."""
    tasks = [np.array([0.0, 0.0, 0.0, 0.0]), np.array([10.0, 10.0, 10.0, 10.0])]
    assert iqm_interval(tasks).value == pytest.approx(5.0)
    uneven = [np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0, 100.0])]
    assert iqm_interval(uneven).value == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_intervals_repeat_exactly_and_depend_on_the_seed():
    """A leaderboard is a function of its records: same scores, same interval, to the last bit."""
    scores = [np.random.default_rng(3).normal(size=10), np.random.default_rng(4).normal(size=7)]
    assert iqm_interval(scores) == iqm_interval([s.copy() for s in scores])
    assert iqm_interval(scores) != iqm_interval(scores, seed=1)
    assert probability_of_improvement(scores, scores[::-1]) == probability_of_improvement(
        scores, scores[::-1]
    )


def test_bootstrap_is_stratified():
    """Tasks on different scales: resampling within tasks leaves the interval of constant tasks at a
    point.
    """
    estimate = iqm_interval([np.full(5, 1.0), np.full(5, 9.0)])
    assert (estimate.low, estimate.high) == (5.0, 5.0)
    mixed = iqm_interval([np.full(5, 1.0), np.array([8.0, 9.0, 9.5, 10.0, 11.0])])
    assert 1.0 < mixed.low <= mixed.value <= mixed.high < 11.0


def test_interval_against_exact_bootstrap_distribution():
    """Two scores 0 and 1: a resample has IQM 0, 1/2, 1/2 or 1, a quarter each, so the 95 % interval
    is [0, 1] and the 40 % one 1/2.
    """
    assert iqm_interval([[0.0, 1.0]]) == Estimate(0.5, 0.0, 1.0)
    assert iqm_interval([[0.0, 1.0]], level=0.4) == Estimate(0.5, 0.5, 0.5)


def test_too_little_to_tell():
    """A single seed has no interval, and overlaps with everything."""
    single = iqm_interval([[1.0]])
    assert single.value == 1.0
    assert math.isnan(single.low)
    assert single.overlaps(Estimate(9, 8, 10))
    assert math.isnan(iqm_interval([]).value)
    with pytest.raises(ValueError, match="floor"):
        iqm_interval([[1.0, math.nan]])
    with pytest.raises(ValueError, match="per task"):
        iqm_interval([[[1.0, 2.0]]])  # type: ignore[list-item]


def test_overlap():
    """Touching intervals leave the order open; separated ones do not."""
    assert Estimate(1, 0, 2).overlaps(Estimate(3, 2, 4))
    assert not Estimate(1, 0, 2).overlaps(Estimate(3, 2.1, 4))


def test_probability_of_improvement_by_hand():
    """Task 1: 3 > 1, 3 > 2, 2 > 1, 2 = 2 -> 3.5 of 4.

    Task 2: 0 against 5 -> 0 of 2. Mean of the two.
    """
    x, y = [[3.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [5.0]]
    assert probability_of_improvement(x, y).value == pytest.approx((3.5 / 4 + 0) / 2)


def test_probability_of_improvement_counts_pairs():
    """It is the share of pairs that X wins, ties half, per task, averaged over tasks."""
    rng = np.random.default_rng(0)
    x, y = (
        [rng.integers(0, 6, n).astype(float) for n in sizes] for sizes in ((8, 5, 12), (6, 9, 3))
    )
    wins = [np.mean([(p > q) + 0.5 * (p == q) for p in a for q in b]) for a, b in zip(x, y)]
    found = probability_of_improvement(x, y)
    assert found.value == pytest.approx(np.mean(wins), abs=1e-12)
    assert found.low <= found.value <= found.high
    constant = [[1.0, 1.0, 1.0]]
    assert probability_of_improvement(constant, constant) == Estimate(0.5, 0.5, 0.5)


def test_probability_of_improvement_edges():
    """Complete separation is certain; different numbers of tasks are a mistake."""
    assert probability_of_improvement([[5.0, 6.0]], [[1.0, 2.0]]) == Estimate(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="1 tasks against 2"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_performance_profile_by_hand():
    """Share strictly above, per task, then averaged: tasks with more seeds weigh no more."""
    profile = performance_profile([[0.0, 1.0], [0.5, 0.5, 2.0, 2.0]], [0.0, 0.5, 1.0, 3.0])
    assert profile.thresholds == [0.0, 0.5, 1.0, 3.0]
    assert profile.share == pytest.approx([(0.5 + 1) / 2, (0.5 + 0.5) / 2, (0 + 0.5) / 2, 0.0])


def test_performance_profile_band_by_hand():
    """Two seeds, of which one scores above: a resample holds 0, 1 or 2 of it with chances 1/4, 1/2,
    1/4, so the 95 % interval is everything and the 40 % one a single point. Where all seeds agree
    there is no spread.
    """
    scores, thresholds = [[0.0, 1.0]], [-1.0, 0.5, 2.0]
    wide = performance_profile(scores, thresholds)
    assert (wide.share, wide.low, wide.high) == ([1.0, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    narrow = performance_profile(scores, thresholds, level=0.4)
    assert (narrow.low, narrow.high) == ([1.0, 0.5, 0.0], [1.0, 0.5, 0.0])
    assert performance_profile(scores, thresholds) == wide  # and repeats exactly
    # Twenty seeds: the binomial distribution's quantiles; 12 of 20 above, so 0.6 -+ about 1.96
    # sqrt(0.6 0.4 / 20).
    twenty = performance_profile([[0.0] * 8 + [1.0] * 12], [0.5])
    assert twenty.low == pytest.approx([0.4], abs=0.051)
    assert twenty.high == pytest.approx([0.8], abs=0.051)
    # Stratified: a task whose seeds agree keeps its half of the average.
    assert performance_profile([[0.0, 1.0], [1.0, 1.0]], [0.5]).low == [0.5]
    single = performance_profile([[0.0]], [0.5])
    assert single.share == [0.0]
    assert np.isnan([*single.low, *single.high]).all()
    assert np.isnan(performance_profile([], [0.5]).share).all()


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (5, 10), (19, 20), (1, 3)])
def test_wilson_by_its_definition(successes, trials):
    """The bounds are the shares p with |x/n - p| = z sqrt(p (1 - p) / n): roots of (n + z^2) p^2 -
    (2 x + z^2) p + x^2 / n.
    """
    z2 = 1.959963984540054**2
    low, high = sorted(np.roots([trials + z2, -(2 * successes + z2), successes**2 / trials]))
    estimate = wilson(successes, trials)
    assert estimate.value == successes / trials
    assert (estimate.low, estimate.high) == (
        pytest.approx(low, abs=1e-9),
        pytest.approx(high, abs=1e-9),
    )


def test_wilson_by_hand():
    """0 of 10 does not prove that it never happens: z^2 / (n + z^2) = 3.841459 / 13.841459."""
    assert wilson(0, 10).high == pytest.approx(0.2775328, abs=1e-6)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0


def test_wilson_edges():
    """No trials, no share; impossible counts are refused."""
    assert math.isnan(wilson(0, 0).value)
    with pytest.raises(ValueError, match="must not be greater"):
        wilson(3, 2)


def test_mean_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653."""
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert estimate.value == pytest.approx(2.0)
    assert estimate.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(mean_interval([1.0]).high)


def test_cvar_by_hand():
    """Worst tenth of 1..20 is 19 and 20; the worst twentieth of ten values is half of the largest
    one's weight.
    """
    assert cvar(np.arange(1, 21), 0.9) == pytest.approx(19.5)
    assert cvar(np.arange(1, 11), 0.95) == pytest.approx(10.0)
    assert cvar([1.0, 5.0], 0.25) == pytest.approx((5 * 0.5 + 1 * 0.25) / 0.75)
    assert cvar([1.0, 5.0], 0.95, [99.0, 1.0]) == pytest.approx((5 * 0.01 + 1 * 0.04) / 0.05)
    assert cvar([1.0, 5.0], 0.0) == pytest.approx(3.0)
    assert math.isnan(cvar([]))
    with pytest.raises(ValueError, match="level"):
        cvar([1.0], 1.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 0.99))
def test_cvar_lies_between_mean_and_maximum(values, level):
    """Whatever the values: at least the mean, at most the largest."""
    found = cvar(values, level)
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert np.mean(values) - slack <= found <= max(values) + slack


def test_censored_quantile_by_hand():
    """Never is larger than any time; a median beyond half is never, not an average with a made-up
    number.
    """
    never = math.inf
    assert censored_quantile([5, never, 3], 0.5) == 5
    assert censored_quantile([5, never, never], 0.5) == never
    assert censored_quantile([5, never, never, 7], 0.5) == 7
    assert censored_quantile([5.0, 1.0, 3.0], 0.0) == 1.0
    assert math.isnan(censored_quantile([], 0.5))


@pytest.mark.parametrize("distribution", ["gaussian", "heavy-tailed"])
def test_coverage_with_ten_seeds(distribution):
    """The 95 % interval of 10 seeds must contain the true IQM in 90 to 97 % of experiments, or ties
    are called wrongly.

    Both distributions are symmetric about 0, so their true IQM is 0. Student's t with 3 degrees of
    freedom has infinite fourth moment.
    """
    rng = np.random.default_rng(7)
    draws = (
        rng.normal(size=(COVERAGE_RUNS, 10))
        if distribution == "gaussian"
        else rng.standard_t(3, (COVERAGE_RUNS, 10))
    )
    covered = 0
    for scores in draws:
        estimate = iqm_interval([scores], resamples=1000)
        covered += estimate.low <= 0 <= estimate.high
    # Sampling error of the estimate itself: 1.4 points (two standard errors) at 1000 experiments.
    slack = 2 * math.sqrt(0.05 * 0.95 / COVERAGE_RUNS)
    assert 0.90 - slack <= covered / COVERAGE_RUNS <= 0.97 + slack, covered / COVERAGE_RUNS
