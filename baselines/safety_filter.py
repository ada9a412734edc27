"""A predictive safety filter for the double integrator: any agent's actions, made safe at run time.

Source: Wabersich and Zeilinger, "Linear model predictive safety certification for learning-based
control", CDC 2018, arXiv 1803.08552. At each step the filter applies the input closest to the
agent's action from which a backup plan exists: inputs for the rest of the episode that keep |p|,
|v|, |u| <= 1 and end in the backup's invariant set.

Ours: the plan is as long as the rest of the episode, at whose end the task checks the invariant
set, and a polygon within that set takes its place. The QP over plans is solved explicitly instead
of by an iterative solver: with a state of two components, the states from which a plan of m inputs
exists are a polygon, computed once, and the admissible inputs are an interval.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from scpo_bench.contract import Floats, task_of
from scpo_bench.envs.double_integrator import DoubleIntegrator
from scpo_bench.envs.double_integrator_control import (
    P_MAX_M,
    U_MAX_M_S2,
    V_MAX_M_S,
    A,
    B,
    backup,
)
from scpo_bench.errors import UserError

CORNERS = 256  # of the polygon within the invariant set: at most 0.008 % smaller than the set
# Each polygon is met with this share of it to spare, for the rounding of float32 observations and
# actions: the next step then still has an input.
SPARE = 1e-5
# Observations that differ more from the model's prediction are of another episode.
SAME_EPISODE = 1e-5


def invariant_polygon() -> Floats:
    """Corners [CORNERS, 2] on the boundary of the backup's invariant set {x'Px <= level}."""
    angle = 2 * np.pi * np.arange(CORNERS) / CORNERS
    circle = np.stack([np.cos(angle), np.sin(angle)])
    return (np.linalg.cholesky(np.linalg.inv(backup().P) * backup().level) @ circle).T


@functools.cache
def half_planes(steps: int) -> tuple[Floats, Floats]:
    """(H [r, 2], h [r]): H x <= h are the states from which a plan of ``steps`` inputs exists.

    K_0 is the invariant polygon, and K_m the states within the bounds on p and v from which some
    |u| <= 1 leads into K_(m-1), with ``SPARE`` taken off each of them.
    """
    from scipy.spatial import ConvexHull, HalfspaceIntersection

    if steps == 0:
        corners = invariant_polygon()
        bounds = np.zeros((0, 3))
    else:
        H, h = half_planes(steps - 1)
        # Each row of these arrays is (n, -b), for n.x <= b; all sets contain the origin.
        target = HalfspaceIntersection(np.column_stack([H, -h]), np.zeros(2)).intersections
        pushed = [target - u * B[:, 0] for u in (-U_MAX_M_S2, U_MAX_M_S2)]
        corners = np.concatenate(pushed) @ np.linalg.inv(A).T
        box = np.array([P_MAX_M, V_MAX_M_S])
        bounds = np.column_stack([np.vstack([np.eye(2), -np.eye(2)]), -np.tile(box, 2)])
    rows = np.vstack([ConvexHull(corners).equations, bounds])
    return rows[:, :2], -(1.0 - SPARE) * rows[:, 2]


def admissible_inputs(states: Floats, steps: int) -> tuple[Floats, Floats]:
    """(lowest [n], highest [n]) first input of the plans of ``steps`` inputs from states [n, 2].

    Where there is no plan, lowest > highest.
    """
    H, h = half_planes(steps - 1)
    slope, room = H @ B[:, 0], h - states @ (H @ A).T  # slope u <= room
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = room / slope
    lowest = np.where(slope < 0, bound, -U_MAX_M_S2).max(axis=1, initial=-U_MAX_M_S2)
    highest = np.where(slope > 0, bound, U_MAX_M_S2).min(axis=1, initial=U_MAX_M_S2)
    return np.where(((slope == 0) & (room < 0)).any(axis=1), np.inf, lowest), highest


@dataclass
class Interventions:
    """What a filter has done. changed: actions; total_change: sum of |u - action| [m/s^2]."""

    steps: int = 0
    changed: int = 0
    total_change: float = 0.0
    without_plan: int = 0
    """Steps at which no plan existed, and the backup's input was applied."""

    def summary(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}interventions": float(self.changed),
            f"{prefix}intervention_share": self.changed / max(self.steps, 1),
            f"{prefix}mean_change": self.total_change / max(self.changed, 1),
            f"{prefix}without_plan": float(self.without_plan),
        }


class SafetyFilter:
    """Filters the actions of n episodes side by side. horizon: steps per episode."""

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon
        self.interventions = Interventions()
        self.restart(0)

    def restart(self, n: int) -> None:
        """n new episodes."""
        self._step = np.zeros(n, dtype=np.int64)
        self._predicted = np.full((n, 2), np.nan)

    def ended(self, dones: NDArray[np.bool_]) -> None:
        """Episodes that have ended start again."""
        self._step[dones] = 0

    def continues(self, observations: NDArray[Any]) -> bool:
        """Whether ``observations`` are what the model predicts from the last call."""
        return (
            observations.shape == self._predicted.shape
            and bool((self._step < self.horizon).all())
            and np.allclose(observations, self._predicted, SAME_EPISODE, SAME_EPISODE)
        )

    def __call__(self, observations: NDArray[Any], actions: NDArray[Any]) -> NDArray[Any]:
        """The actions [n, 1] to be applied at ``observations`` [n, 2].

        Safe ones within the action space are returned bit for bit.
        """
        states = np.asarray(observations, dtype=np.float64)
        wanted = np.clip(actions[:, 0].astype(np.float64), -U_MAX_M_S2, U_MAX_M_S2)
        lowest, highest = np.empty(len(states)), np.empty(len(states))
        for step in np.unique(self._step):
            rows = self._step == step
            lowest[rows], highest[rows] = admissible_inputs(states[rows], int(self.horizon - step))
        planned = lowest <= highest
        by_backup = np.clip(states @ backup().gain[0], -U_MAX_M_S2, U_MAX_M_S2)
        closest = np.where(planned, np.clip(wanted, lowest, highest), by_backup)
        change = np.abs(closest - wanted)
        applied = closest.astype(actions.dtype)[:, None]

        seen = self.interventions
        seen.steps += len(states)
        seen.changed += int((change > 0).sum())
        seen.total_change += float(change.sum())
        seen.without_plan += int((~planned).sum())
        self._step += 1
        u = np.clip(applied.astype(np.float64), -U_MAX_M_S2, U_MAX_M_S2)
        self._predicted = states @ A.T + u @ B.T
        return applied


class FilteredVecEnv(VecEnvWrapper):
    """The environments, with every action filtered before it is applied.

    Raises UserError for a task that is not the double integrator, and for normalised observations:
    the filter's model is of the true state.
    """

    def __init__(self, venv: VecEnv) -> None:
        task = task_of(venv)
        if not isinstance(task, DoubleIntegrator):
            raise UserError(
                "filtered: the filter's model is that of the double integrator; use one of the "
                "tasks scpo_bench/DoubleIntegrator..."
            )
        inner: Any = venv
        while isinstance(inner, VecEnvWrapper):
            if isinstance(inner, VecNormalize) and inner.norm_obs:
                raise UserError("filtered: needs observations that are not normalised")
            inner = inner.venv
        super().__init__(venv)
        self.filter = SafetyFilter(task.horizon)
        self.observations: Any = None

    def reset(self) -> Any:
        self.observations = self.venv.reset()
        self.filter.restart(self.num_envs)
        return self.observations

    def step_async(self, actions: Any) -> None:
        self.venv.step_async(self.filter(self.observations, actions))

    def step_wait(self) -> Any:
        self.observations, rewards, dones, infos = self.venv.step_wait()
        self.filter.ended(dones)
        return self.observations, rewards, dones, infos


@functools.cache
def filtered(agent_class: type[BaseAlgorithm]) -> type[BaseAlgorithm]:
    """``agent_class`` behind a safety filter, in training and in ``predict``.

    The agent learns from the actions that it chose, with the rewards of those that were applied.
    ``predict`` takes a batch that is not the model's continuation of the last one for the start of
    new episodes. What the filter did goes into ``diagnostics``: in training so far, and
    (``evaluation_``) in the last episodes that ``predict`` was called for.
    """

    class Filtered(agent_class):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.env is not None:
                self._evaluation = SafetyFilter(self.env.filter.horizon)

        @staticmethod
        def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
            wrapped = agent_class._wrap_env(env, verbose, monitor_wrapper)
            return wrapped if isinstance(wrapped, FilteredVecEnv) else FilteredVecEnv(wrapped)

        def predict(
            self, observation: Any, *args: Any, **kwargs: Any
        ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
            actions, state = super().predict(observation, *args, **kwargs)
            if self.env is not None and observation is self.env.observations:
                return actions, state  # of training: the environment filters them
            safe, observations = self._evaluation, np.reshape(observation, (-1, 2))
            if not safe.continues(observations):
                safe.restart(len(observations))
                safe.interventions = Interventions()
            applied = safe(observations, np.reshape(actions, (-1, 1)))
            return applied.reshape(np.shape(actions)), state

        @property
        def diagnostics(self) -> dict[str, float]:
            """The agent's own, and the filter's."""
            found = dict(self.__dict__.get("inner_diagnostics", {}))
            if self.env is not None:
                found |= self.env.filter.interventions.summary("")
            return found | self._evaluation.interventions.summary("evaluation_")

        @diagnostics.setter
        def diagnostics(self, values: dict[str, float]) -> None:
            self.inner_diagnostics = values

    Filtered.__name__ = Filtered.__qualname__ = f"Filtered{agent_class.__name__}"
    return Filtered
