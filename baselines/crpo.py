"""CRPO, constraint-rectified policy optimisation: steps on the reward or on a violated cost.

Source: Xu, Liang, Lan 2021, arXiv 2011.05869, algorithm 1. The paper's natural-gradient steps have
a given size; here, as in OmniSafe 0.5.0 (OnCRPO), they are TRPO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.baselines.trust_region import TrustRegionConfig, WeightedTRPO
from scpo_bench.configuration import require


@dataclass(frozen=True, kw_only=True)
class CRPOConfig(TrustRegionConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/OnCRPO.yaml."""

    tolerance: float = 2.0
    """eta: how far above its limit a cost may be before a step lowers it, per episode, >= 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "tolerance", low=0)


class CRPO(WeightedTRPO):
    """TRPO on A_r if J_Ci <= limit_i + eta for all costs i, else on -A_ci of the worst one.

    The paper takes any violated constraint; here it is the one of largest excess. With an infinite
    limit every step is on the reward. See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = CRPOConfig
    config: CRPOConfig
    reward_updates: int = 0
    """Updates so far on the reward."""
    cost_updates: int = 0
    """Updates so far on a cost."""

    def _weights(self, excess: NDArray[np.float64]) -> tuple[NDArray[np.float64], dict[str, float]]:
        weights = np.zeros(1 + len(excess))
        worst = int(np.argmax(excess))
        if excess[worst] <= self.config.tolerance:
            weights[0] = 1.0
            self.reward_updates += 1
        else:
            weights[1 + worst] = -1.0
            self.cost_updates += 1
        return weights, {
            "on_cost": float(weights[0] == 0),
            "updates_on_reward": self.reward_updates,
            "updates_on_cost": self.cost_updates,
        }
