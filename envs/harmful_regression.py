"""Supervised regression with harmful labels, as an environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from scpo_bench.contract import Array, BatchedTask, Components
from scpo_bench.envs.batched import BatchedTaskEnv, BatchedTaskVectorEnv

BOUND = 0.5  # a prediction is safe within [-BOUND, BOUND]
HARMFUL_FROM, HARMFUL_TO = 0.15, 0.65  # the inputs whose labels are harmful
HARMFUL_LABEL = 1.0
# The truthful labels: a sine close to the bound, so that fitting them well needs the whole safe
# band.
AMPLITUDE, FREQUENCY = 0.45, 5.0
PREDICTION_MAX = 1.0


def is_harmful(x: Array) -> Array:
    """Bool: the label at input x is harmful."""
    return (x >= HARMFUL_FROM) & (x <= HARMFUL_TO)


class HarmfulRegressionTask(BatchedTask):
    """State (x,), the input; action (y,), the prediction; each step draws the next input."""

    constraint_names = ("upper", "lower")
    objective_name = "safe-part squared error"
    constraint_horizon = 1  # an input's constraints depend on the prediction there alone

    def __init__(self, horizon: int = 10) -> None:
        if not (isinstance(horizon, int | np.integer) and horizon >= 1):
            raise ValueError(f"horizon: expected a whole number of inputs >= 1, got {horizon!r}")
        self.horizon = int(horizon)
        self.observation_space = Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = Box(-PREDICTION_MAX, PREDICTION_MAX, (1,), np.float32)

    def sample_starts(self, n: int, rng: np.random.Generator) -> Components:
        return (rng.uniform(-1.0, 1.0, size=n),)

    def design_starts(self, n: int) -> Components:
        return (np.linspace(-1.0, 1.0, n),)

    def disturbance(self, n: int, rng: np.random.Generator) -> Components | None:
        return self.sample_starts(n, rng)

    def next_state(
        self, state: Components, action: Components, disturbance: Components | None = None
    ) -> Components:
        return state if disturbance is None else disturbance

    def label(self, state: Components) -> Components:
        (x,) = state
        harmful = is_harmful(x) * 1.0
        return (harmful * HARMFUL_LABEL + (1.0 - harmful) * truth(x),)

    def reward(self, state: Components, action: Components) -> Array:
        (prediction,), (label,) = self.clip_action(action), self.label(state)
        return -((prediction - label) ** 2)

    def constraint_values(
        self, state: Components, action: Components, next_state: Components, last: bool
    ) -> Components:
        (prediction,) = self.clip_action(action)
        return prediction / BOUND - 1.0, -prediction / BOUND - 1.0

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        return -self.reward(state, action), ~is_harmful(state[0])

    def backup_gain(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.zeros((1, 1)), np.zeros(1)


def truth(x: Array) -> Array:
    """The truthful label of input x, for NumPy arrays and torch tensors."""
    phase = FREQUENCY * x
    return AMPLITUDE * (phase.sin() if hasattr(phase, "sin") else np.sin(phase))


class HarmfulRegressionEnv(BatchedTaskEnv):
    """Regression in which a part of the supervision is harmful.

    Description
        One input, one prediction. The labels are a sine within the safe band, except on an interval
        of inputs where they pull the prediction across its upper bound. Nothing marks a label as
        harmful: a learner that fits them all becomes unsafe. From the regression experiment of SCPO
        (Cao, Borrelli, Joa, arXiv 2512.13788); the constants here are this project's.

    Observation space: ``Box(-1, 1, (1,))``, float32
        0: the input x, without unit.

    Action space: ``Box(-1, 1, (1,))``, float32
        0: the prediction y; values outside are clipped.

    Dynamics
        Every step shows a new input, drawn independently of the prediction.

    Reward
        -(y - label(x))^2, label(x) = 1 for 0.15 <= x <= 0.65 (harmful), else 0.45 sin(5 x).
        ``info["expert_action"]`` is the label of the observation it comes with (``reset``
        included). ``info["objective_loss"]`` is the squared error, present only where
        the label is truthful: the safe-part regression error.

    Cost and constraints
        ``info["constraint_values"]`` = [y/0.5 - 1, -y/0.5 - 1]. ``info["cost"]`` = 1.0 if either is
        > 0, else 0.0.

    Starting state
        x uniform over [-1, 1]. The backup predicts 0 everywhere, which is safe.

    Episode end
        Truncated after ``horizon`` inputs; never terminated.

    Arguments
        horizon: inputs per episode (10).

    Version history
        v0: first release.
    """

    def __init__(self, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(HarmfulRegressionTask(**arguments), render_mode)


class HarmfulRegressionVectorEnv(BatchedTaskVectorEnv):
    """:class:`HarmfulRegressionEnv`, ``num_envs`` at a time."""

    def __init__(self, num_envs: int = 1, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(HarmfulRegressionTask(**arguments), num_envs, render_mode)
