"""TRPO-Lagrangian: natural-gradient steps on reward minus multiplier times cost.

Source: Ray, Achiam, Amodei 2019 (Benchmarking Safe Exploration in Deep Reinforcement Learning).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.baselines.multipliers import Multipliers, projected_adam_ascent
from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.baselines.trust_region import TrustRegionConfig, WeightedTRPO
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class TRPOLagrangianConfig(TrustRegionConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/TRPOLag.yaml."""

    search_space: ClassVar[SearchSpace] = {
        **TrustRegionConfig.search_space,
        "multiplier_init": Range(0.01, 300.0, log=True),
        "multiplier_lr": Range(0.01, 10.0, log=True),
    }

    standardise_rewards: bool = True
    """Whether reward advantages are divided by their standard deviation; cost advantages never are.

    The reference does; see ``PPOLagrangianConfig``.
    """
    multiplier_init: float = 0.001
    """Multiplier of every constraint at the start, >= 0."""
    multiplier_lr: float = 0.035
    """Adam step size of the multipliers, >= 0: close to the largest change per update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multiplier_init", "multiplier_lr"):
            require(self, name, low=0)


class TRPOLagrangian(WeightedTRPO):
    """TRPO on (A_r - sum_i lambda_i A_ci) / (1 + sum_i lambda_i).

    Each lambda_i follows J_Ci - limit_i by projected ascent before the step. There is one per entry
    of ``cost_keys``; with an infinite limit it is exactly 0 and the update is TRPO's. See
    ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = TRPOLagrangianConfig
    config: TRPOLagrangianConfig
    multipliers: Multipliers

    def _setup_model(self) -> None:
        super()._setup_model()
        if not hasattr(self, "multipliers"):
            config = self.config
            self.multipliers = Multipliers.start([config.multiplier_init] * len(config.cost_keys))

    def _standardise(self) -> bool:
        return self.config.standardise_rewards

    def _weights(self, excess: NDArray[np.float64]) -> tuple[NDArray[np.float64], dict[str, float]]:
        config = self.config
        self.multipliers = projected_adam_ascent(self.multipliers, excess, config.multiplier_lr)
        value = self.multipliers.value
        diagnostics = {f"multiplier{s}": v for s, v in zip(config.key_suffixes(), value)}
        return np.concatenate([[1.0], -value]) / (1.0 + value.sum()), diagnostics
