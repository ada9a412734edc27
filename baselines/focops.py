"""FOCOPS: first-order steps towards the optimal policy of the constrained trust-region problem.

Source: Zhang, Vuong, Ross 2020, arXiv 2002.06506, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.baselines.actors import Actor
from scpo_bench.baselines.first_order import FirstOrder, FirstOrderConfig, Surrogate
from scpo_bench.baselines.multipliers import (
    Multipliers,
    lagrangian_advantages,
    projected_adam_ascent,
)
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class FOCOPSConfig(FirstOrderConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/FOCOPS.yaml."""

    search_space: ClassVar[SearchSpace] = {
        "initial_log_std": FirstOrderConfig.search_space["initial_log_std"],
        "actor_lr": FirstOrderConfig.search_space["actor_lr"],
        "multiplier_init": Range(0.1, 50.0, log=True),
        "multiplier_lr": Range(0.02, 5.0, log=True),
        "multiplier_max": Range(2.0, 200.0, log=True),
        "temperature": Range(0.05, 5.0, log=True),
    }

    multiplier_init: float = 0.001
    """Multiplier nu of every constraint at the start, >= 0."""
    multiplier_lr: float = 0.035
    """Adam step size of the multipliers, >= 0; the paper has plain ascent."""
    multiplier_max: float = 2.0
    """Upper bound nu_max of every multiplier, >= 0 or infinite."""
    temperature: float = 1.5
    """lambda: how much KL divergence a unit of advantage is worth, > 0; small is greedy."""
    state_kl_bound: float = 0.02
    """States where KL(new || old) exceeds this are left alone, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multiplier_init", "multiplier_lr", "multiplier_max"):
            require(self, name, low=0)
        for name in ("temperature", "state_kl_bound"):
            require(self, name, above=0)


class FOCOPS(FirstOrder):
    """FOCOPS with one multiplier per entry of ``cost_keys``.

    The advantages are (A_r - nu A_c) / (1 + nu), as in OmniSafe; the paper does not divide, which
    is another ``temperature``. With an infinite limit nu is exactly 0. See ``ConstrainedOnPolicy``
    for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = FOCOPSConfig
    config: FOCOPSConfig
    multipliers: Multipliers

    def _setup_model(self) -> None:
        super()._setup_model()
        if not hasattr(self, "multipliers"):
            n_costs = len(self.config.cost_keys)
            self.multipliers = Multipliers.start([self.config.multiplier_init] * n_costs)

    def _weighted_advantages(
        self, advantages: Array, episodic_costs: NDArray[np.float64], episode_length: float
    ) -> Array:
        config = self.config
        excess = episodic_costs - config.limits()
        self.multipliers = projected_adam_ascent(
            self.multipliers, excess, config.multiplier_lr, config.multiplier_max
        )
        value = self.multipliers.value
        return lagrangian_advantages(advantages[0], advantages[1:], value).astype(np.float32)

    def _actor_gradient(
        self, actor: Actor, head: Array, surrogate: Surrogate, index: NDArray[np.int64]
    ) -> None:
        config = self.config
        old = (surrogate.old_head[index], surrogate.old_extra)
        ratio, kl = surrogate.ratio(actor, head, index), actor.kl_to(*old, head)
        of_log_prob, of_kl = focops_weights(
            ratio, surrogate.advantages[index], kl, config.temperature, config.state_kl_bound
        )
        d_head, d_extra = actor.log_prob_gradient(head, surrogate.actions[index], of_log_prob)
        kl_d_head, kl_d_extra = actor.kl_to_gradient(*old, head, of_kl)
        actor.backpropagate(d_head + kl_d_head, d_extra + kl_d_extra)

    def _prices(self) -> NDArray[np.float64]:
        return self.multipliers.value


def focops_weights(
    ratio: Array, advantages: Array, kl: Array, temperature: float, kl_bound: float
) -> tuple[Array, Array]:
    """dL/d(log pi) and dL/d(KL) per step, [b] each, of L = mean 1{KL <= bound} (KL - ratio A / T).

    ratio, advantages: [b]; kl: KL(new || old) at each state [b]. The indicator is a constant.
    Source: Zhang, Vuong, Ross 2020, arXiv 2002.06506, corollary 1 and algorithm 1.
    """
    weight = np.where(kl <= kl_bound, 1.0 / len(ratio), 0.0).astype(ratio.dtype)
    return -weight * ratio * advantages / np.float32(temperature), weight
