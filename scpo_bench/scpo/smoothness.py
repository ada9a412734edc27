"""The smoothness constants L_i of the constraints: declared, sampled, or adapted."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats

Rule = Literal["apriori", "sampled", "adaptive"]

SHRINK = 0.8  # adaptive: after a step that kept its certificate
GROW = 2.0  # adaptive, and retries of `verified` mode: after a breach
FLOOR = 1e-2  # no smaller L is believed: a constraint that looked linear so far may still curve


def second_differences(values: Floats, plus: Floats, minus: Floats, rho: float) -> Floats:
    """max_j |g_i(theta + rho q_j) - 2 g_i(theta) + g_i(theta - rho q_j)| / rho^2, the curvature.

    values: [k]; plus, minus: [m, k]. Returns [k]: a lower bound on any valid L_i, up to rounding.
    """
    return np.abs(plus - 2.0 * values + minus).max(axis=0) / rho**2


def after_success(L: Floats) -> Floats:
    """L [k] after a step whose realised constraints stayed within the certificate: a bit lower."""
    return np.maximum(L * SHRINK, FLOOR)


def after_breach(
    L: Floats,
    breached: NDArray[np.bool_],
    realised: Floats,
    linear: Floats,
    squared_length: float,
) -> Floats:
    """L [k], raised where the certificate was breached: to GROW * L, or to what the step showed.

    breached: [k]; realised: [k] g_i(theta + Q z); linear: [k] g_i + s_i . z; squared_length:
    |z|^2 > 0. The larger of the two counts.
    """
    shown = 2.0 * (realised - linear) / squared_length
    return np.where(breached, np.maximum(GROW * L, shown), L)
