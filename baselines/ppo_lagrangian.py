"""PPO-Lagrangian: clipped policy gradient on reward minus multiplier times cost.

Sources: Schulman et al. 2017 (PPO, arXiv 1707.06347); Ray, Achiam, Amodei 2019 (Benchmarking Safe
Exploration in Deep Reinforcement Learning).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.baselines.actors import Actor
from scpo_bench.baselines.first_order import (
    ClippedConfig,
    FirstOrder,
    Surrogate,
    clipped_surrogate_weights,
)
from scpo_bench.baselines.multipliers import (
    Multipliers,
    lagrangian_advantages,
    projected_adam_ascent,
)
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class PPOLagrangianConfig(ClippedConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/PPOLag.yaml."""

    search_space: ClassVar[SearchSpace] = {
        **ClippedConfig.search_space,
        "multiplier_init": Range(0.01, 300.0, log=True),
        "multiplier_lr": Range(0.01, 10.0, log=True),
    }

    multiplier_init: float = 0.001
    """Multiplier of every constraint at the start, >= 0."""
    multiplier_lr: float = 0.035
    """Adam step size of the multipliers, >= 0.

    It is close to the largest change per update, whatever the cost's unit.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multiplier_init", "multiplier_lr"):
            require(self, name, low=0)


class PPOLagrangian(FirstOrder):
    """PPO on the Lagrangian, with one multiplier per entry of ``cost_keys``.

    With an infinite limit the multiplier is exactly 0 and the update is PPO's. Unlike OmniSafe's,
    it responds to the episodes of this update, not to the last hundred, and drops a momentum that
    points outside where it is projected. See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = PPOLagrangianConfig
    config: PPOLagrangianConfig
    multipliers: Multipliers

    def _setup_model(self) -> None:
        super()._setup_model()
        if not hasattr(self, "multipliers"):
            n_costs = len(self.config.cost_keys)
            self.multipliers = Multipliers.start([self.config.multiplier_init] * n_costs)

    def _weighted_advantages(
        self, advantages: Array, episodic_costs: NDArray[np.float64], episode_length: float
    ) -> Array:
        excess = episodic_costs - self.config.limits()
        self.multipliers = projected_adam_ascent(
            self.multipliers, excess, self.config.multiplier_lr
        )
        value = self.multipliers.value
        return lagrangian_advantages(advantages[0], advantages[1:], value).astype(np.float32)

    def _actor_gradient(
        self, actor: Actor, head: Array, surrogate: Surrogate, index: NDArray[np.int64]
    ) -> None:
        ratio = surrogate.ratio(actor, head, index)
        weights = clipped_surrogate_weights(
            ratio, surrogate.advantages[index], self.config.clip_range
        )
        actor.backward(head, surrogate.actions[index], weights)

    def _prices(self) -> NDArray[np.float64]:
        return self.multipliers.value
