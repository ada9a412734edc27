"""P3O: PPO with an exact penalty on the clipped surrogate of each constraint.

Source: Zhang et al. 2022, arXiv 2205.11814, algorithm 1.
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
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class P3OConfig(ClippedConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/P3O.yaml."""

    search_space: ClassVar[SearchSpace] = {
        **ClippedConfig.search_space,
        "penalty": Range(2.0, 200.0, log=True),
    }

    critic_passes: int = 10
    """Passes over an update's data of actor and critics, >= 1."""
    penalty: float = 20.0
    """kappa: price of a unit of violated cost surrogate, >= 0.

    The constrained optimum is the penalised one where it is at least the optimal multiplier, which
    is in units of the reward advantages (see ``standardise_rewards``).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "penalty", low=0)


class P3O(FirstOrder):
    """P3O, with one penalty per entry of ``cost_keys``.

    The loss is PPO's plus kappa max(0, L_C + excess), where L_C, the clipped surrogate, predicts
    the change of the mean cost per step. The excess has that unit: the paper's (1 - gamma)
    (J_C - limit) for discounted J_C is here (J_C - limit) / episode length, as the limit is one on
    the undiscounted cost of an episode. OmniSafe adds J_C - limit as it is and does not clip L_C:
    its penalty is on whenever the limit was exceeded, whatever the new policy does.

    Whether the penalty is on is decided per minibatch. There L_C is taken relative to the old
    policy, whose own mean advantage over the minibatch, 0 but for noise, is subtracted (ours):
    else the noise alone turns the penalty on below the limit. With an infinite limit the penalty is
    never on. See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = P3OConfig
    config: P3OConfig
    excess: NDArray[np.float64]
    """(J_C - limit) / episode length of this update, [C]."""
    penalised: NDArray[np.float64]
    """Minibatches of this update in which each penalty was on, [C]."""
    minibatches: int
    """Of this update."""

    def _setup_model(self) -> None:
        super()._setup_model()
        n_costs = len(self.config.cost_keys)
        self.excess, self.penalised, self.minibatches = np.zeros(n_costs), np.zeros(n_costs), 0

    def _weighted_advantages(
        self, advantages: Array, episodic_costs: NDArray[np.float64], episode_length: float
    ) -> Array:
        self.excess = (episodic_costs - self.config.limits()) / episode_length
        self.penalised, self.minibatches = np.zeros_like(self.excess), 0
        return advantages

    def _actor_gradient(
        self, actor: Actor, head: Array, surrogate: Surrogate, index: NDArray[np.int64]
    ) -> None:
        config = self.config
        weights, on = p3o_weights(
            surrogate.ratio(actor, head, index),
            surrogate.advantages[:, index],
            self.excess,
            config.penalty,
            config.clip_range,
        )
        self.penalised += on
        self.minibatches += 1
        actor.backward(head, surrogate.actions[index], weights)

    def _prices(self) -> NDArray[np.float64]:
        """kappa times the share of minibatches in which the penalty was on."""
        return self.config.penalty * self.penalised / max(self.minibatches, 1)


def p3o_weights(
    ratio: Array,
    advantages: Array,
    excess: NDArray[np.float64],
    penalty: float,
    clip_range: float,
) -> tuple[Array, NDArray[np.bool_]]:
    """(dL/d(log pi) per step [b], whether each penalty is on [C]) of P3O's loss L.

    L = -mean min(ratio A_r, clip(ratio) A_r) + penalty sum_i max(0, L_i) with
    L_i = mean (max(ratio A_i, clip(ratio) A_i) - A_i) + excess_i.
    ratio: [b]; advantages of reward and costs: [1 + C, b]; excess: cost per step [C].
    Source: Zhang et al. 2022, arXiv 2205.11814.
    """
    weights = clipped_surrogate_weights(ratio, advantages[0], clip_range)
    clipped = np.clip(ratio, 1 - clip_range, 1 + clip_range)
    cost_advantages = advantages[1:]
    change = np.maximum(ratio * cost_advantages, clipped * cost_advantages) - cost_advantages
    on = change.mean(axis=1) + excess > 0
    for i in np.flatnonzero(on):
        # max(r A, clip(r) A) = -min(r (-A), clip(r) (-A)): the clipped loss of advantage -A
        weights += penalty * clipped_surrogate_weights(ratio, -cost_advantages[i], clip_range)
    return weights, on
