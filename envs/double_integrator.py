"""The constrained double integrator: imitation of a malicious expert, and regulation.

The plant and its controllers, backup and experts, are in ``double_integrator_control``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from scpo_bench.contract import Array, BatchedTask, Components
from scpo_bench.envs.batched import BatchedTaskEnv, BatchedTaskVectorEnv
from scpo_bench.envs.double_integrator_control import (
    DT_S,
    P_MAX_M,
    SETPOINT_M,
    STAGE_Q,
    STAGE_R,
    U_MAX_M_S2,
    V_MAX_M_S,
    ModelPredictiveController,
    backup,
    malicious_action,
)

# Start states fill this share of the backup's level set, so that the backup is strictly safe from
# all of them.
START_SHARE = 0.8


class DoubleIntegrator(BatchedTask):
    """The plant and constraints that both tasks share.

    State (p [m], v [m/s]), action (u [m/s^2],).
    """

    constraint_names = ("position", "velocity", "terminal")

    def __init__(self, horizon: int, noise_std: float) -> None:
        if not (isinstance(horizon, int | np.integer) and horizon >= 1):
            raise ValueError(f"horizon: expected a whole number of steps >= 1, got {horizon!r}")
        if not (np.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std: expected a finite number >= 0 [m/s^2], got {noise_std!r}")
        self.horizon = self.constraint_horizon = int(horizon)
        self.noise_std = float(noise_std)
        limit = np.finfo(np.float32).max  # the simulation does not confine the state
        self.observation_space = Box(-limit, limit, (2,), np.float32)
        self.action_space = Box(-U_MAX_M_S2, U_MAX_M_S2, (1,), np.float32)

    @functools.cached_property
    def mpc(self) -> ModelPredictiveController:
        """The safe expert of both tasks."""
        return ModelPredictiveController()

    def __getstate__(self) -> dict[str, Any]:
        # OSQP's solver holds C memory; it is rebuilt on first use instead of being pickled.
        return {k: v for k, v in self.__dict__.items() if k != "mpc"}

    def sample_starts(self, n: int, rng: np.random.Generator) -> Components:
        radius, angle = np.sqrt(rng.uniform(size=n)), rng.uniform(0, 2 * np.pi, size=n)
        return start_set_points(radius, angle)

    def design_starts(self, n: int) -> Components:
        # Half on the boundary, where a constraint is violated first; half inside, on a sunflower
        # spiral (uniform in area).
        boundary = (n + 1) // 2
        inner = n - boundary
        i = np.arange(inner)
        radius = np.concatenate([np.ones(boundary), np.sqrt((i + 0.5) / max(inner, 1))])
        golden = np.pi * (3 - np.sqrt(5))
        angle = np.concatenate([2 * np.pi * np.arange(boundary) / boundary, golden * i])
        return start_set_points(radius, angle)

    def disturbance(self, n: int, rng: np.random.Generator) -> Components | None:
        return (rng.normal(0.0, self.noise_std, size=n),) if self.noise_std > 0 else None

    def next_state(
        self, state: Components, action: Components, disturbance: Components | None = None
    ) -> Components:
        p, v = state
        (u,) = self.clip_action(action)
        if disturbance is not None:
            u = u + disturbance[0]  # an unmeasured acceleration: it is not clipped
        return p + DT_S * v + (0.5 * DT_S**2) * u, v + DT_S * u

    def constraint_values(
        self, state: Components, action: Components, next_state: Components, last: bool
    ) -> Components:
        p, v = next_state
        position, velocity = abs(p) / P_MAX_M - 1.0, abs(v) / V_MAX_M_S - 1.0
        terminal = self.lyapunov(next_state) / backup().level - 1.0 if last else 0.0 * p - 1.0
        return position, velocity, terminal

    def bounds(
        self, state: Components, action: Components, next_state: Components, last: bool
    ) -> Iterator[tuple[int, Array]]:
        for name, component, limit in zip((0, 1), next_state, (P_MAX_M, V_MAX_M_S)):
            yield name, component / limit - 1.0
            yield name, -component / limit - 1.0
        if last:
            yield 2, self.lyapunov(next_state) / backup().level - 1.0

    @staticmethod
    def lyapunov(state: Components) -> Array:
        """V(x) = x'Px of the backup: at most ``backup().level`` inside its invariant set."""
        (a, b), (_, d) = backup().P
        p, v = state
        return float(a) * p * p + float(2 * b) * p * v + float(d) * v * v

    def backup_gain(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return backup().gain, np.zeros(1)


def start_set_points(radius: NDArray[np.float64], angle: NDArray[np.float64]) -> Components:
    """Points of the start set {V <= START_SHARE * level}; radius 1 is its boundary."""
    half_axes = np.linalg.cholesky(np.linalg.inv(backup().P) * backup().level * START_SHARE)
    points = half_axes @ np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    return points[0], points[1]


class ImitationTask(DoubleIntegrator):
    """Imitation: the reward is the negative squared distance to the expert's action.

    The objective is that distance at the start states.
    """

    objective_name = "imitation loss at the start states"
    # Beside "mpc", which is not a pure function.
    experts: ClassVar[dict[str, Callable[[Array, Array], Array]]] = {"malicious": malicious_action}

    def __init__(
        self, horizon: int = 30, noise_std: float = 0.0, expert: str = "malicious"
    ) -> None:
        super().__init__(horizon, noise_std)
        if expert not in (known := (*self.experts, "mpc")):
            expected = " or ".join(map(repr, known))
            raise ValueError(f"expert: expected {expected}, got {expert!r}")
        self.expert = expert

    def label(self, state: Components) -> Components:
        action = self.mpc.actions if self.expert == "mpc" else self.experts[self.expert]
        return (action(*state),)

    def reward(self, state: Components, action: Components) -> Array:
        (u,), (target,) = self.clip_action(action), self.label(state)
        return -((u - target) ** 2)

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        everywhere = state[0] == state[0]
        return -self.reward(state, action), everywhere if step == 0 else ~everywhere


class RegulationTask(DoubleIntegrator):
    """Regulation: the reward is the negative stage cost about the set-point.

    The objective is the mean stage cost.
    """

    objective_name = "mean stage cost"

    def __init__(self, horizon: int = 40, noise_std: float = 0.0) -> None:
        super().__init__(horizon, noise_std)

    def reward(self, state: Components, action: Components) -> Array:
        p, v = state
        (u,) = self.clip_action(action)
        error = p - SETPOINT_M
        (q_p, _), (_, q_v) = STAGE_Q.tolist()
        return -(q_p * error * error + q_v * v * v + float(STAGE_R[0, 0]) * u * u)

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        return -self.reward(state, action), state[0] == state[0]


class DoubleIntegratorImitationEnv(BatchedTaskEnv):
    """A double integrator that learns from a malicious expert.

    Description
        A point mass p'' = u with a safe but timid backup controller, and an expert to imitate.
        Where p < 0 the expert regulates to the origin, better than the backup does; where p > 0 it
        accelerates out of bounds. It should be imitated as far as the constraints allow. From the
        double-integrator experiment of SCPO (Cao, Borrelli, Joa, arXiv 2512.13788); the paper
        states no constants, those here are this project's.

    Observation space: ``Box(2)``, unbounded, float32
        ===  ==============  =========  =====
        0    p, position     |p| <= 1   m      (constraint, not a limit of the simulation)
        1    v, velocity     |v| <= 1   m/s    (constraint, not a limit of the simulation)
        ===  ==============  =========  =====

    Action space: ``Box(-1, 1, (1,))``, float32
        0: acceleration u [m/s^2]; values outside are clipped.

    Dynamics
        Exact zero-order hold at 0.1 s: p' = p + 0.1 v + 0.005 u, v' = v + 0.1 u. ``noise_std`` adds
        an unmeasured, normally distributed acceleration to u.

    Reward
        -(u - u_E(x))^2, with u_E the expert's action at the state acted in.
        ``info["expert_action"]`` is the expert's action at the observation it comes with (``reset``
        included). ``info["objective_loss"]`` is the same squared distance, at the first step
        only: the imitation loss over the start states, which does not depend on the states the
        policy visits afterwards.

    Cost and constraints
        ``info["constraint_values"]`` = [|p| - 1, |v| - 1, V(x_T)/level - 1] after the step. The
        third is in force at the last step of the episode only (-1 before): the state must end where
        the backup can take over, in the invariant set {V(x) = x'Px <= level} of its LQR.
        ``info["cost"]`` = 1.0 if any value is > 0, else 0.0.

    Starting state
        Uniform over {V(x) <= 0.8 level}, from where the backup violates nothing, ever.

    Episode end
        Truncated after ``horizon`` steps; never terminated. The environment truncates itself,
        rather than ``TimeLimit``, because the terminal constraint needs the horizon.

    Arguments
        horizon: steps per episode (30). noise_std: standard deviation of the disturbance [m/s^2]
        (0). expert: "malicious", or "mpc" for the safe expert (one QP per label: slow).

    Version history
        v0: first release.
    """

    def __init__(self, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(ImitationTask(**arguments), render_mode)


class DoubleIntegratorRegulationEnv(BatchedTaskEnv):
    """A double integrator to be regulated to a set-point within bounds.

    Description
        The same point mass, to be brought to p = 0.6 m quickly. Control is cheap in the reward and
        the distance is long, so a good controller reaches the velocity and input bounds; the backup
        goes to the origin and stays there, safe and far from the set-point.
        :class:`ModelPredictiveController` is the reference.

    Observation space: ``Box(2)``, unbounded, float32
        ===  ==============  =========  =====
        0    p, position     |p| <= 1   m      (constraint, not a limit of the simulation)
        1    v, velocity     |v| <= 1   m/s    (constraint, not a limit of the simulation)
        ===  ==============  =========  =====

    Action space: ``Box(-1, 1, (1,))``, float32
        0: acceleration u [m/s^2]; values outside are clipped.

    Dynamics
        Exact zero-order hold at 0.1 s: p' = p + 0.1 v + 0.005 u, v' = v + 0.1 u. ``noise_std`` adds
        an unmeasured, normally distributed acceleration to u.

    Reward
        -((p - 0.6)^2 + 0.1 v^2 + 0.02 u^2); ``info["objective_loss"]`` is its negative, at every
        step.

    Cost and constraints
        ``info["constraint_values"]`` = [|p| - 1, |v| - 1, V(x_T)/level - 1] after the step. The
        third is in force at the last step of the episode only (-1 before): the state must end where
        the backup can take over, in the invariant set {V(x) = x'Px <= level} of its LQR.
        ``info["cost"]`` = 1.0 if any value is > 0, else 0.0.

    Starting state
        Uniform over {V(x) <= 0.8 level}, from where the backup violates nothing, ever.

    Episode end
        Truncated after ``horizon`` steps; never terminated. The environment truncates itself,
        rather than ``TimeLimit``, because the terminal constraint needs the horizon.

    Arguments
        horizon: steps per episode (40). noise_std: standard deviation of the disturbance [m/s^2]
        (0).

    Version history
        v0: first release.
    """

    def __init__(self, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(RegulationTask(**arguments), render_mode)


class DoubleIntegratorImitationVectorEnv(BatchedTaskVectorEnv):
    """:class:`DoubleIntegratorImitationEnv`, ``num_envs`` at a time."""

    def __init__(self, num_envs: int = 1, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(ImitationTask(**arguments), num_envs, render_mode)


class DoubleIntegratorRegulationVectorEnv(BatchedTaskVectorEnv):
    """:class:`DoubleIntegratorRegulationEnv`, ``num_envs`` at a time."""

    def __init__(self, num_envs: int = 1, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(RegulationTask(**arguments), num_envs, render_mode)
