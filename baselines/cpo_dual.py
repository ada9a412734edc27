"""CPO's trust-region subproblem in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Case(IntEnum):
    """Which part of the trust region satisfies the linearised constraint."""

    UNCONSTRAINED = 1
    """The cost's gradient is negligible and the constraint holds: a plain TRPO step."""
    ALL_FEASIBLE = 2
    """All of the trust region: a plain TRPO step."""
    FROM_INSIDE = 3
    """Part of it, and the current policy is inside."""
    FROM_OUTSIDE = 4
    """Part of it, and the current policy is outside."""
    RECOVERY = 5
    """None of it: reduce the cost as fast as the trust region allows."""


@dataclass(frozen=True)
class TrustRegionStep:
    """The step x = on_reward H^-1 g + on_cost H^-1 b, and the multipliers at the optimum."""

    case: Case
    on_reward: float
    on_cost: float
    kl_multiplier: float
    """lambda >= 0 of the trust region; 0 in a recovery step and where g is parallel to b."""
    cost_multiplier: float
    """nu >= 0 of the constraint; 0 in a recovery step."""


def trust_region_step(
    q: float, r: float, s: float, c: float, delta: float, negligible: float = 1e-12
) -> TrustRegionStep:
    """Solve max g.x subject to c + b.x <= 0 and x'Hx/2 <= delta.

    q = g'H^-1 g, r = g'H^-1 b, s = b'H^-1 b; c: constraint value now (feasible <= 0), in the unit
    of b.x; delta > 0: KL bound. negligible: s at or below it counts as b = 0; with c > 0 nothing
    can then be done, and the step is a recovery of length zero.
    Source: Achiam et al. 2017, arXiv 1705.10528, theorem 2 and appendix 10.2.
    """
    trpo_lambda = np.sqrt(q / (2 * delta))
    trpo_scale = 1.0 / trpo_lambda if trpo_lambda > 0 else 0.0
    if s <= negligible:
        if c <= 0:
            return TrustRegionStep(Case.UNCONSTRAINED, trpo_scale, 0.0, trpo_lambda, 0.0)
        return TrustRegionStep(Case.RECOVERY, 0.0, 0.0, 0.0, 0.0)
    slack = 2 * delta - c * c / s  # >= 0: the constraint's boundary cuts the trust region
    if slack < 0 and c < 0:
        return TrustRegionStep(Case.ALL_FEASIBLE, trpo_scale, 0.0, trpo_lambda, 0.0)
    if slack < 0:
        return TrustRegionStep(Case.RECOVERY, 0.0, -np.sqrt(2 * delta / s), 0.0, 0.0)
    case = Case.FROM_INSIDE if c < 0 else Case.FROM_OUTSIDE
    # The TRPO step is optimal if it keeps the constraint.
    if c + r * trpo_scale <= 0:
        return TrustRegionStep(case, trpo_scale, 0.0, trpo_lambda, 0.0)
    # Else the constraint is active: x = (-c/s) H^-1 b plus the part of g that is H^-1-orthogonal to
    # b, as long as the trust region allows.
    orthogonal = q - r * r / s
    if orthogonal <= 1e-12 * q or slack == 0:
        return TrustRegionStep(case, 0.0, -c / s, 0.0, r / s)
    kl_multiplier = np.sqrt(orthogonal / slack)
    cost_multiplier = max((kl_multiplier * c + r) / s, 0.0)
    on_reward = 1.0 / kl_multiplier
    on_cost = -c / s - on_reward * r / s
    return TrustRegionStep(case, on_reward, on_cost, kl_multiplier, cost_multiplier)
