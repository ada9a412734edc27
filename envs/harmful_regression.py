"""Supervised regression with harmful labels, as an environment.

Version 1 is the paper's experiment, version 0 one of this project's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from scpo_bench.contract import Array, BatchedTask, Components
from scpo_bench.envs.batched import BatchedTaskEnv, BatchedTaskVectorEnv

# Version 0. A prediction is safe within [-BOUND, BOUND].
BOUND = 0.5
HARMFUL_FROM, HARMFUL_TO = 0.15, 0.65  # the inputs whose labels are harmful
HARMFUL_LABEL = 1.0
# The truthful labels: a sine close to the bound, so that fitting them well needs the whole safe
# band.
AMPLITUDE, FREQUENCY = 0.45, 5.0
PREDICTION_MAX = 1.0

# Version 1, from the paper's Figure 2.
PAPER_BOUND = 1.4
PAPER_INPUT_MAX = 3.0
PAPER_FREQUENCIES = (1.0, 3.0, 7.0)
# Ours: |f| is at most 1.95, so every label can be predicted, with room beyond it.
PAPER_PREDICTION_MAX = 3.0


def is_harmful(x: Array) -> Array:
    """Bool: the label of version 0 at input x is harmful."""
    return (x >= HARMFUL_FROM) & (x <= HARMFUL_TO)


def truth(x: Array) -> Array:
    """The truthful label of version 0 at input x."""
    return AMPLITUDE * _sine(FREQUENCY * x)


def paper_label(x: Array) -> Array:
    """f(x) = sin x + sin 3x + sin 7x."""
    return sum(_sine(frequency * x) for frequency in PAPER_FREQUENCIES)


def _sine(phase: Array) -> Array:
    """For NumPy arrays and torch tensors."""
    return phase.sin() if hasattr(phase, "sin") else np.sin(phase)


class RegressionTask(BatchedTask):
    """State (x,), the input; action (y,), the prediction; each step draws the next input.

    Inputs are uniform over [-input_max, input_max]; a prediction is safe within [-bound, bound].
    """

    constraint_names = ("upper", "lower")
    constraint_horizon = 1  # an input's constraints depend on the prediction there alone

    def __init__(self, horizon: int, input_max: float, bound: float, prediction_max: float) -> None:
        if not (isinstance(horizon, int | np.integer) and horizon >= 1):
            raise ValueError(f"horizon: expected a whole number of inputs >= 1, got {horizon!r}")
        self.horizon = int(horizon)
        self.input_max, self.bound = input_max, bound
        self.observation_space = Box(-input_max, input_max, (1,), np.float32)
        self.action_space = Box(-prediction_max, prediction_max, (1,), np.float32)

    def sample_starts(self, n: int, rng: np.random.Generator) -> Components:
        return (rng.uniform(-self.input_max, self.input_max, size=n),)

    def design_starts(self, n: int) -> Components:
        return (np.linspace(-self.input_max, self.input_max, n),)

    def disturbance(self, n: int, rng: np.random.Generator) -> Components | None:
        return self.sample_starts(n, rng)

    def next_state(
        self, state: Components, action: Components, disturbance: Components | None = None
    ) -> Components:
        return state if disturbance is None else disturbance

    def _label(self, x: Array) -> Array:
        """The label of input x."""
        raise NotImplementedError

    def label(self, state: Components) -> Components:
        return (self._label(state[0]),)

    def reward(self, state: Components, action: Components) -> Array:
        (prediction,), (label,) = self.clip_action(action), self.label(state)
        return -((prediction - label) ** 2)

    def constraint_values(
        self, state: Components, action: Components, next_state: Components, last: bool
    ) -> Components:
        (prediction,) = self.clip_action(action)
        return prediction / self.bound - 1.0, -prediction / self.bound - 1.0

    def backup_gain(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.zeros((1, 1)), np.zeros(1)


class HarmfulRegressionTask(RegressionTask):
    """Version 0: the labels are a sine, but for an interval of inputs with harmful ones."""

    objective_name = "safe-part squared error"

    def __init__(self, horizon: int = 10) -> None:
        super().__init__(horizon, 1.0, BOUND, PREDICTION_MAX)

    def _label(self, x: Array) -> Array:
        harmful = is_harmful(x) * 1.0
        return harmful * HARMFUL_LABEL + (1.0 - harmful) * truth(x)

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        return -self.reward(state, action), ~is_harmful(state[0])


class PaperRegressionTask(RegressionTask):
    """Version 1: the paper's function, whose labels are harmful wherever it leaves the bounds."""

    objective_name = "mean squared error"

    def __init__(self, horizon: int = 1) -> None:
        super().__init__(horizon, PAPER_INPUT_MAX, PAPER_BOUND, PAPER_PREDICTION_MAX)

    def held_out_starts(self, n: int) -> Components:
        return self.design_starts(n)

    def _label(self, x: Array) -> Array:
        return paper_label(x)

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        return -self.reward(state, action), state[0] == state[0]


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


class HarmfulRegressionV1Env(BatchedTaskEnv):
    """The paper's constrained regression: the function to be fitted leaves the allowed range.

    Description
        One input, one prediction. The label is f(x) = sin x + sin 3x + sin 7x, and predictions must
        stay within +-1.4: where |f| > 1.4 the label is harmful, and nothing marks it. After the
        regression experiment of SCPO (Cao, Borrelli, Joa, arXiv 2512.13788).

        The paper's (read from its Figure 2, or stated on its public page): f, the bounds, the input
        interval [-3, 3] on which they are required, their check on 64 evenly spaced points, 5000
        epochs, a soft penalty of weight 1 as the baseline (agent ``penalty``). Ours: inputs are
        confined to [-3, 3], where the paper draws the function over [-pi, pi]; they are drawn
        uniformly, one per episode; the range of predictions; held-out inputs between the 64.

    Observation space: ``Box(-3, 3, (1,))``, float32
        0: the input x, without unit.

    Action space: ``Box(-3, 3, (1,))``, float32
        0: the prediction y; values outside are clipped.

    Dynamics
        Every step shows a new input, drawn independently of the prediction.

    Reward
        -(y - f(x))^2. ``info["expert_action"]`` is the label of the observation it comes with
        (``reset`` included). ``info["objective_loss"]`` is the squared error, at every input: the
        floor without constraints is 0, that of a prediction clipped to the bounds is 0.042.

    Cost and constraints
        ``info["constraint_values"]`` = [y/1.4 - 1, -y/1.4 - 1]. ``info["cost"]`` = 1.0 if either is
        > 0, else 0.0. ``design_starts(64)`` are the paper's 64 points.

    Starting state
        x uniform over [-3, 3]; in evaluation, evenly spaced over it, so that violations between the
        64 points show. The backup predicts 0 everywhere, which is safe.

    Episode end
        Truncated after ``horizon`` inputs; never terminated.

    Arguments
        horizon: inputs per episode (1).

    Version history
        v1: the paper's function, bounds and inputs. v0: :class:`HarmfulRegressionEnv`.
    """

    def __init__(self, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(PaperRegressionTask(**arguments), render_mode)


class HarmfulRegressionV1VectorEnv(BatchedTaskVectorEnv):
    """:class:`HarmfulRegressionV1Env`, ``num_envs`` at a time."""

    def __init__(self, num_envs: int = 1, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(PaperRegressionTask(**arguments), num_envs, render_mode)
