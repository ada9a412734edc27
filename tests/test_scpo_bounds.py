"""Confidence bounds on means of few, skewed, bounded values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from scpo_bench.scpo import bounds


def two_basins(rng, n, share, cost):
    """Episode costs of which a share is about ``cost`` and the rest 0."""
    return (rng.random(n) < share) * np.maximum(rng.normal(cost, 0.3 * cost, n), 1.0)


@pytest.mark.parametrize(("p", "n"), [(0.03, 8), (0.2, 8), (0.2, 40), (0.9, 15)])
def test_clopper_pearson_covers_every_probability(p, n):
    """The chance that the bound is below p, by adding up all outcomes, is at most the tail."""
    missed = [k for k in range(n + 1) if bounds.clopper_pearson(k, n, 0.05) < p]
    assert stats.binom.pmf(missed, n, p).sum() <= 0.05 + 1e-12
    assert bounds.clopper_pearson(0, n, 0.05) == pytest.approx(1 - 0.05 ** (1 / n))


def test_betting_holds_at_every_look_where_student_does_not():
    """One episode in 40 costs everything: looked at after 8, 16, ... 256, all looks together."""
    mean, looks = 1 / 40, [8, 16, 32, 64, 128, 256]
    missed = {"betting": 0, "student": 0}
    for seed in range(300):
        x = (np.random.default_rng(seed).random(256) < mean).astype(float)
        missed["betting"] += any(bounds.betting(x[:n], 0.05) < mean for n in looks)
        student = [x[:n].mean() + bounds.student(x[:n, None], 0.05)[0] for n in looks]
        missed["student"] += min(student) < mean
    assert missed["betting"] / 300 <= 0.05
    assert missed["student"] / 300 > 0.5


def test_betting_is_tight_enough_to_be_used():
    """300 episodes without cost show a mean of at most 25 in 1000; few values of 0.5 show 0.5."""
    assert bounds.betting(np.zeros(300), 0.002) < 0.025
    assert bounds.betting(np.zeros(100), 0.002) > 0.025
    assert 0.5 < bounds.betting(np.full(400, 0.5), 0.05) < 0.6
    assert bounds.betting(np.zeros(0), 0.05) == 1.0
    with pytest.raises(ValueError, match=r"in \[0, 1\], found 0 to 2"):
        bounds.betting(np.array([0.0, 2.0]), 0.05)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("n", [8, 32])
def test_mixed_covers_costs_with_two_basins(share, n):
    """Costs as on SwimmerVelocity, zero or about 30; Student's bound on 8 of them does not hold.

    Being a heuristic, it is allowed to miss in half as many cases again as its tail says.
    """
    rng = np.random.default_rng(0)
    samples = [two_basins(rng, n, share, 30.0) for _ in range(2000)]
    mean = two_basins(rng, 200_000, share, 30.0).mean()
    missed = np.mean([bounds.mixed(x, 0.02, 25.0) < mean for x in samples])
    assert missed <= 0.03
    if (share, n) == (0.2, 8):
        student = [x.mean() + bounds.student(x[:, None], 0.02)[0] < mean for x in samples]
        assert np.mean(student) > 0.1


def test_mixed_by_hand():
    """Zeros prove nothing by their spread; what costly episodes cost elsewhere counts."""
    share = 1 - 0.01 ** (1 / 8)
    assert bounds.mixed(np.zeros(8), 0.01, 40.0) == pytest.approx(40 * share)
    many = np.r_[np.full(16, 20.0), np.full(16, 24.0)]
    student = 22 + stats.t.ppf(0.99, 31) * many.std(ddof=1) / np.sqrt(32)
    assert bounds.mixed(many, 0.01, 10.0) == pytest.approx(student)


def test_predicted_is_exceeded_as_often_as_stated():
    """Mean of ten further normal values, from 16: above the bound in 5 %."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=(4000, 16, 1))
    further = rng.normal(size=(4000, 10)).mean(axis=1)
    exceeded = [new > bounds.predicted(old, 10, 0.05)[0] for old, new in zip(y, further)]
    assert 0.04 < np.mean(exceeded) < 0.06


def test_shrinkage_removes_outliers_and_keeps_what_is_certain():
    """One outlier of four is no slope; equal differences are; half of the noise is in between."""
    y = np.array([[0.0, 0.0, 0.0, 244.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])[..., None]
    assert bounds.shrunk(y)[:, 0] == pytest.approx([0.0, 3.0, 0.0])
    mixed = np.array([1.0, 3.0, 1.0, 3.0])[:, None]  # mean 2, squared standard error 1/3
    assert bounds.shrunk(mixed) == pytest.approx([2 * (1 - 1 / 12)])
    assert bounds.shrunk(-mixed) == pytest.approx(-bounds.shrunk(mixed))
    noise = np.array([-1.0, 1.0, 1.0, -0.9])[:, None]
    assert bounds.shrunk(noise) == pytest.approx([0.0])
