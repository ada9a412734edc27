"""Upper confidence bounds on means of few, skewed, bounded values: pure functions.

What each is worth: :func:`clopper_pearson` and :func:`betting` hold for any distribution (of 0/1
outcomes, of values in [0, 1]). :func:`student` is exact for normal values and approximate
otherwise. :func:`mixed` and :func:`predicted` are heuristics for episode costs of which many are
zero and the others alike; no theorem says that their level holds.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import stats

from scpo_bench.contract import Floats

Bound = Literal["student", "mixed", "betting"]

# Fractions of the capital that :func:`betting` stakes, from timid to bold.
_STAKES = 1.0 - np.geomspace(1.0, 1e-3, 24)[1:]


def clopper_pearson(successes: int, n: int, tail: float) -> float:
    """Upper bound on a probability of which ``successes`` of n trials are known.

    Holds with probability >= 1 - tail for any n. Source: Clopper and Pearson, Biometrika 1934.
    """
    return 1.0 if successes >= n else float(stats.beta.ppf(1 - tail, successes + 1, n - successes))


def student(y: Floats, tail: float) -> Floats:
    """Half width [...] of the one-sided Student interval of the mean over axis -2 of y [..., n, k].

    Infinite for n = 1.
    """
    n = y.shape[-2]
    if n < 2:
        return np.full((*y.shape[:-2], y.shape[-1]), np.inf)
    return stats.t.ppf(1 - tail, n - 1) * y.std(axis=-2, ddof=1) / np.sqrt(n)


def betting(x: Floats, tail: float) -> float:
    """Upper bound on the mean of values x [n] in [0, 1]: for every distribution, and at every n.

    A gambler who holds that the mean is below m bets on every value, a fixed share of the capital:
    with stake phi the capital becomes the product of 1 + phi (m - x_i) / (1 - m). If the mean is m
    or more it does not grow in expectation, and neither does the mean over several stakes; so it
    ever reaches 1 / tail with probability <= tail (Ville's inequality), however often one looks and
    whenever one stops. It grows with m: the bound is the smallest m at which it has reached that.
    Source: Waudby-Smith and Ramdas, JRSS B 2024 (there with stakes that adapt).

    Raises ValueError if a value lies outside of [0, 1].
    """
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"values must lie in [0, 1], found {x.min():.4g} to {x.max():.4g}")
    if not len(x):
        return 1.0
    low, high = float(x.mean()), 1.0
    for _ in range(40):
        m = 0.5 * (low + high)
        gain = np.log1p(_STAKES[:, None] * (m - x) / (1 - m)).sum(axis=1)
        if np.logaddexp.reduce(gain) - np.log(len(_STAKES)) >= -np.log(tail):
            high = m
        else:
            low = m
    return high


def mixed(x: Floats, tail: float, severity: float) -> float:
    """Heuristic upper bound on the mean of costs x [n] >= 0, n >= 2: the larger of two.

    Student's bound, which sees the spread of what was observed; and for what was not, the largest
    share of costly values that is still plausible (Clopper-Pearson) times what a costly value
    costs: its mean in this sample, or ``severity``, what costly values came to elsewhere, if that
    is more. Without the second, a few zeros, which have no spread, would prove that the mean is
    zero.
    """
    costly = x[x > 0]
    cost = max(severity, float(costly.mean()) if len(costly) else 0.0)
    spread = float(x.mean() + student(x[:, None], tail)[0])
    return max(spread, clopper_pearson(len(costly), len(x), tail) * cost)


def predicted(y: Floats, further: int, tail: float) -> Floats:
    """What the mean of ``further`` more values exceeds with probability ``tail``: [k], y [n, k].

    Student's prediction interval: exact for normal values.
    """
    n = len(y)
    spread = y.std(axis=0, ddof=1) * np.sqrt(1 / n + 1 / further)
    return y.mean(axis=0) + stats.t.ppf(1 - tail, n - 1) * spread


def shrunk(y: Floats) -> Floats:
    """Means over axis -2 of y [..., n, k], each moved towards 0 as far as it is noise: [..., k].

    The factor is 1 - e^2 / mean^2, at least 0, with e the standard error: positive-part shrinkage
    (James and Stein 1961), here of one mean at a time. A mean that one outlier of n makes is its
    own standard error, and becomes 0.
    """
    mean, variance = y.mean(axis=-2), y.var(axis=-2, ddof=1) / y.shape[-2]
    return mean * np.clip(1 - variance / np.maximum(mean**2, 1e-300), 0.0, 1.0)
