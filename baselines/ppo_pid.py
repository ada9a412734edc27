"""PPO-PID: PPO on the Lagrangian, with a PID controller for the multipliers.

Source: Stooke, Achiam, Abbeel 2020, arXiv 2007.03964, algorithm 2; smoothing and delay as in
OmniSafe 0.5.0, common/pid_lagrange.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scpo_bench.baselines.actors import Actor
from scpo_bench.baselines.first_order import (
    ClippedConfig,
    FirstOrder,
    Surrogate,
    clipped_surrogate_weights,
)
from scpo_bench.baselines.multipliers import lagrangian_advantages
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require


@dataclass(frozen=True, kw_only=True)
class PPOPIDConfig(ClippedConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/CPPOPID.yaml.

    The gains are in multiplier per unit of episodic cost.
    """

    search_space: ClassVar[SearchSpace] = {
        "initial_log_std": ClippedConfig.search_space["initial_log_std"],
        "actor_lr": ClippedConfig.search_space["actor_lr"],
        "multiplier_init": Range(0.1, 50.0, log=True),
        "proportional_gain": Range(0.05, 20.0, log=True),
        "integral_gain": Range(0.01, 5.0, log=True),
        "smoothing": (0.0, 0.5, 0.8, 0.95),
    }

    multiplier_init: float = 0.001
    """The controller's integral term at the start, >= 0."""
    proportional_gain: float = 0.1
    """Gain on the smoothed excess of cost over its limit, >= 0."""
    integral_gain: float = 0.01
    """Gain on the sum of all excesses, >= 0."""
    derivative_gain: float = 0.01
    """Gain on the rise of the smoothed cost over the last ``derivative_delay`` updates, >= 0."""
    derivative_delay: int = 10
    """Updates, >= 1."""
    smoothing: float = 0.95
    """Share of the past in the running averages of excess and cost, in [0, 1); 0: no smoothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multiplier_init", "proportional_gain", "integral_gain", "derivative_gain"):
            require(self, name, low=0)
        require(self, "derivative_delay", low=1)
        require(self, "smoothing", low=0, high=0.9999)


@dataclass(frozen=True)
class Controller:
    """State of the controllers of C constraints, all [C]."""

    integral: NDArray[np.float64]
    """Gain included, >= 0."""
    smoothed_excess: NDArray[np.float64]
    smoothed_costs: tuple[NDArray[np.float64], ...]
    """Of the last updates, oldest first, at most ``derivative_delay``; at the start one zero."""
    multipliers: NDArray[np.float64]

    @classmethod
    def start(cls, integral_C: ArrayLike) -> Controller:
        """Controllers before their first update."""
        integral = np.asarray(integral_C, dtype=np.float64)
        zeros = np.zeros_like(integral)
        return cls(integral, zeros, (zeros,), zeros)


def controlled(
    state: Controller,
    costs_C: NDArray[np.float64],
    limits_C: NDArray[np.float64],
    config: PPOPIDConfig,
) -> Controller:
    """The controllers after an update with episodic costs J_C [C].

    lambda = (K_P Delta + I + K_D D)_+ with I the sum of K_I (J_C - limit), kept >= 0 at each
    addition, Delta and J the running averages of J_C - limit and J_C from 0, and D = (J - J some
    updates ago)_+. A constraint with an infinite limit has multiplier exactly 0.
    """
    unconstrained, keep = np.isinf(limits_C), config.smoothing
    excess = np.where(unconstrained, 0.0, costs_C - limits_C)
    integral = np.maximum(state.integral + config.integral_gain * excess, 0.0)
    smoothed_excess = keep * state.smoothed_excess + (1 - keep) * excess
    cost = keep * state.smoothed_costs[-1] + (1 - keep) * costs_C
    rise = np.maximum(cost - state.smoothed_costs[0], 0.0)
    value = config.proportional_gain * smoothed_excess + integral + config.derivative_gain * rise
    return Controller(
        integral,
        smoothed_excess,
        (*state.smoothed_costs, cost)[-config.derivative_delay :],
        np.where(unconstrained, 0.0, np.maximum(value, 0.0)),
    )


class PPOPID(FirstOrder):
    """PPO on the Lagrangian, with one controlled multiplier per entry of ``cost_keys``.

    See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = PPOPIDConfig
    config: PPOPIDConfig
    controller: Controller

    def _setup_model(self) -> None:
        super()._setup_model()
        if not hasattr(self, "controller"):
            n_costs = len(self.config.cost_keys)
            self.controller = Controller.start([self.config.multiplier_init] * n_costs)

    def _weighted_advantages(
        self, advantages: Array, episodic_costs: NDArray[np.float64], episode_length: float
    ) -> Array:
        config = self.config
        self.controller = controlled(self.controller, episodic_costs, config.limits(), config)
        value = self.controller.multipliers
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
        return self.controller.multipliers
