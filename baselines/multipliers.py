"""Updates of Lagrange multipliers by projected ascent, and the Lagrangian's advantages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Multipliers:
    """Multipliers of C constraints and the Adam moments of their ascent, all [C].

    ``step`` counts updates.
    """

    value: NDArray[np.float64]
    first_moment: NDArray[np.float64]
    second_moment: NDArray[np.float64]
    step: int = 0

    @classmethod
    def start(cls, value_C: ArrayLike) -> Multipliers:
        """Multipliers before their first update."""
        value = np.asarray(value_C, dtype=np.float64)
        return cls(value, np.zeros_like(value), np.zeros_like(value))


def projected_adam_ascent(
    multipliers: Multipliers,
    excess_C: ArrayLike,
    lr: float,
    highest: float = np.inf,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> Multipliers:
    """One Adam step of lambda along ``excess`` = J_C - limit [C], projected onto [0, highest].

    A constraint with an infinite limit (excess -inf) has multiplier exactly 0. Where the projection
    acts, a first moment that still points outside is dropped: kept, it would delay the response to
    the next change of sign (wind-up).
    Source: Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Ray, Achiam, Amodei 2019, appendix.
    """
    excess = np.asarray(excess_C, dtype=np.float64)
    unconstrained = np.isneginf(excess)
    gradient = np.where(unconstrained, 0.0, excess)
    step = multipliers.step + 1
    first = beta1 * multipliers.first_moment + (1 - beta1) * gradient
    second = beta2 * multipliers.second_moment + (1 - beta2) * gradient**2
    move = lr * (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + 1e-8)
    value = multipliers.value + move
    wound = ((value <= 0.0) & (first < 0.0)) | ((value >= highest) & (first > 0.0))
    return Multipliers(
        np.where(unconstrained, 0.0, np.clip(value, 0.0, highest)),
        np.where(wound, 0.0, first),
        second,
        step,
    )


def projected_ascent(value: float, excess: float, lr: float, highest: float) -> float:
    """value + lr * excess, kept in [0, highest]."""
    return float(np.clip(value + lr * excess, 0.0, highest))


def lagrangian_advantages(
    advantages_B: NDArray[np.floating],
    cost_advantages_CB: NDArray[np.floating],
    multipliers_C: NDArray[np.floating],
) -> NDArray[np.float64]:
    """(A_r - sum_i lambda_i A_ci) / (1 + sum_i lambda_i): [B].

    advantages: [B]; cost_advantages: [C, B]; multipliers: [C]. With all lambda = 0 it is A_r.
    Source: Ray, Achiam, Amodei 2019, appendix.
    """
    return (advantages_B - multipliers_C @ cost_advantages_CB) / (1.0 + multipliers_C.sum())
