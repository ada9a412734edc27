"""Statistics over seeds: what a handful of runs says about an agent, with intervals.

Pure functions of arrays. Scores of one agent are a list with one array per task (strata), each
with one score per seed: ``[array(seeds of task 1), ...]``. Definitions follow Agarwal et al., "Deep
Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264 (IQM, stratified
bootstrap, probability of improvement, performance profiles). Every interval repeats exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from scpo_bench.contract import Floats

SEED = 20251213
"""Of all resampling. A constant, so that a leaderboard is a function of its records."""
RESAMPLES = 2000
PRELIMINARY_BELOW = 10
"""Seeds. With fewer, percentile intervals cover too little: nominal 95 % are 77 % with 3 seeds."""


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval; the ends are nan where there is too little to tell."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        """Whether the data leave open which is larger; an unknown interval leaves it open."""
        if any(map(math.isnan, (self.low, self.high, other.low, other.high))):
            return True
        return self.low <= other.high and other.low <= self.high


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def iqm(scores: npt.ArrayLike) -> float:
    """Interquartile mean: without the floor(n / 4) lowest and highest scores. nan if empty."""
    flat = np.asarray(scores, dtype=float).ravel()
    return float(stats.trim_mean(flat, 0.25)) if flat.size else math.nan


def _iqm_of_strata(*strata: Floats, axis: int = -1) -> Any:
    return stats.trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def _interval(
    samples: Sequence[Floats], statistic: Any, seed: int, level: float, resamples: int
) -> tuple[float, float]:
    """Percentile interval of ``statistic``, resampling each of ``samples`` on its own.

    nan if one of them has a single score.
    """
    if any(len(sample) < 2 for sample in samples):
        return math.nan, math.nan
    result = stats.bootstrap(
        tuple(samples),
        statistic,
        n_resamples=resamples,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _strata(scores: Sequence[npt.ArrayLike]) -> list[Floats]:
    strata = [np.asarray(s, dtype=float) for s in scores]
    if any(s.ndim != 1 for s in strata):
        raise ValueError("scores: expected one array [seeds] per task")
    if any(np.isnan(s).any() for s in strata):
        raise ValueError("scores: nan is no score; put failed runs at the floor")
    return [s for s in strata if s.size]


def iqm_interval(
    scores: Sequence[npt.ArrayLike],
    *,
    seed: int = SEED,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Estimate:
    """IQM of all scores of all tasks, with a bootstrap interval stratified by task.

    scores: per task [seeds]. Raises ValueError for nan. UNKNOWN without scores; the interval is nan
    where a task has a single seed.
    """
    strata = _strata(scores)
    if not strata:
        return UNKNOWN
    return Estimate(
        iqm(np.concatenate(strata)), *_interval(strata, _iqm_of_strata, seed, level, resamples)
    )


def _improvement(x: Floats, y: Floats) -> Any:
    """P(X > Y) + P(X = Y) / 2 over all pairs: the Mann-Whitney statistic divided by n m.

    x: [..., n], y: [..., m] -> [...].
    """
    u = stats.mannwhitneyu(x, y, axis=-1, method="asymptotic").statistic
    return u / (x.shape[-1] * y.shape[-1])


def probability_of_improvement(
    x: Sequence[npt.ArrayLike], y: Sequence[npt.ArrayLike], *, level: float = 0.95
) -> Estimate:
    """Chance that a run of X scores higher than one of Y on a random task (ties count half).

    x, y: per task [seeds], same tasks. Raises ValueError for nan or where the numbers of tasks
    differ. UNKNOWN without scores.
    """
    xs, ys = _strata(x), _strata(y)
    if len(xs) != len(ys):
        raise ValueError(f"probability of improvement: {len(xs)} tasks against {len(ys)}")
    if not xs:
        return UNKNOWN

    def statistic(*samples: Floats, axis: int = -1) -> Any:
        pairs = zip(samples[: len(xs)], samples[len(xs) :])
        return np.mean([_improvement(a, b) for a, b in pairs], axis=0)

    interval = _interval([*xs, *ys], statistic, SEED, level, RESAMPLES)
    return Estimate(float(statistic(*xs, *ys)), *interval)


@dataclass(frozen=True)
class Profile:
    """At each threshold the share of runs that score above it, with a pointwise interval.

    Lists are [thresholds]; low and high are nan where a task has a single seed.
    """

    thresholds: list[float]
    share: list[float]
    low: list[float]
    high: list[float]


def performance_profile(
    scores: Sequence[npt.ArrayLike], thresholds: npt.ArrayLike, *, level: float = 0.95
) -> Profile:
    """Share of runs, averaged over tasks, that score above each threshold.

    The band is a percentile interval of the bootstrap stratified by task. scores: per task [seeds];
    thresholds: [thresholds]. Raises ValueError for nan. Shares are nan without scores.
    """
    strata, tau = _strata(scores), np.asarray(thresholds, dtype=float)
    share = low = high = np.full(tau.shape, math.nan)
    above = [(s[:, None] > tau).astype(float) for s in strata]  # per task [seeds, thresholds]
    if above:
        share = np.mean([a.mean(axis=0) for a in above], axis=0)
    if above and all(len(a) > 1 for a in above):
        rng = np.random.default_rng(SEED)
        # How often each seed is drawn is all that a resample is.
        drawn = [
            rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=RESAMPLES) @ a / len(a)
            for a in above
        ]
        low, high = np.quantile(np.mean(drawn, axis=0), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Profile(tau.tolist(), share.tolist(), low.tolist(), high.tolist())


def wilson(successes: int, trials: int) -> Estimate:
    """A share with Wilson's 95 % score interval (JASA 22, 1927), sensible at 0 and at all too.

    UNKNOWN without trials.
    """
    if not trials:
        return UNKNOWN
    ends = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return Estimate(successes / trials, float(ends.low), float(ends.high))


def mean_interval(values: npt.ArrayLike) -> Estimate:
    """Mean with Student's 95 % interval; its ends are nan for fewer than two values.

    With few seeds it is wider than a bootstrap, and so safer to base a verdict on.
    """
    flat = np.asarray(values, dtype=float).ravel()
    if not flat.size:
        return UNKNOWN
    mean = float(flat.mean())
    if flat.size < 2:
        return Estimate(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, flat.size - 1) * stats.sem(flat))
    return Estimate(mean, mean - half, mean + half)


def cvar(values: npt.ArrayLike, level: float = 0.95, weights: npt.ArrayLike | None = None) -> float:
    """Mean of the largest share 1 - level of the distribution. nan if empty.

    The value at the boundary counts in part. values: [n]; weights: [n], not negative, relative
    frequencies (equal by default).
    Source: Rockafellar and Uryasev, "Conditional value-at-risk for general loss distributions",
    2002, for discrete distributions.
    """
    x = np.asarray(values, dtype=float)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=float)
    if not 0 <= level < 1:
        raise ValueError(f"cvar: level: expected a number in [0, 1), got {level}")
    if not w.sum() > 0:
        return math.nan
    order = np.argsort(-x, kind="stable")
    x, w = x[order], w[order] / w.sum()
    tail = 1.0 - level
    before = np.concatenate([[0.0], np.cumsum(w)[:-1]])
    return float((x * np.clip(tail - before, 0.0, w)).sum() / tail)


def censored_quantile(times: npt.ArrayLike, q: float) -> float:
    """The smallest time by which a share q of the runs had reached an event; inf if fewer ever did.

    times: [runs], inf where the run ended first, nan where it was not measured (nan if none was).
    Runs share one budget, so the empirical distribution is Kaplan and Meier's estimate, and no
    average of censored times is ever taken.
    """
    known = np.asarray(times, dtype=float)
    known = known[~np.isnan(known)]
    return float(np.quantile(known, q, method="inverted_cdf")) if known.size else math.nan
