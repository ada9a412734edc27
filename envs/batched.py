"""Environments whose dynamics are pure functions of arrays.

A :class:`BatchedTask` defines a task once, on component arrays: ``(p, v)`` rather than ``x[...,
2]``. The same code then runs on NumPy arrays of any shape (the environments below) and on torch
tensors (SCPO's constraint evaluation, and the oracle, which differentiates through them).
:class:`BatchedTaskEnv` is its Gymnasium environment, :class:`BatchedTaskVectorEnv` its native
vector environment; neither adds any arithmetic of its own.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from scpo_bench.contract import Array, BatchedTask, Components


def as_observation(state: Components) -> NDArray[np.float32]:
    """[..., obs_dim] float32 from component arrays [...]."""
    return np.stack(state, axis=-1).astype(np.float32)


def _one_step(
    task: BatchedTask, state: Components, actions: NDArray[Any], step: int, noise: Components | None
) -> tuple[Components, Array, NDArray[np.float64], Array, Array]:
    """(next state, reward, constraint values [n, m], loss, whether it counts) of one step."""
    action = tuple(np.asarray(actions, dtype=np.float64).T)
    following = task.next_state(state, action, noise)
    values = task.constraint_values(state, action, following, step + 1 == task.horizon)
    loss, counts = task.objective_loss(state, action, step)
    return following, task.reward(state, action), np.stack(values, axis=-1), loss, counts


def _starts(
    task: BatchedTask, options: dict[str, Any] | None, n: int, rng: np.random.Generator
) -> Components:
    """The states of ``reset(options={"states": ...})``, or sampled ones.

    Raises ValueError where the given states have the wrong shape or are not finite.
    """
    if not options or "states" not in options:
        return task.sample_starts(n, rng)
    states = np.asarray(options["states"], dtype=np.float64)
    width = task.observation_space.shape[0]
    if states.shape != (n, width) or not np.isfinite(states).all():
        raise ValueError(
            f"reset options.states: expected {n} x {width} finite numbers, "
            f"got an array of shape {states.shape}"
        )
    return tuple(states.T)


class BatchedTaskEnv(gym.Env[Any, Any]):
    """One instance of a batched task.

    ``reset(options={"states": [[...]]})`` sets the start state (shape (1, obs_dim)).
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it as an instance variable

    def __init__(self, task: BatchedTask, render_mode: None = None) -> None:
        self.task = self.batched_task = task
        self.render_mode = render_mode
        self.observation_space, self.action_space = task.observation_space, task.action_space
        self._state: Components = ()
        self._step = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._state, self._step = _starts(self.task, options, 1, self.np_random), 0
        return as_observation(self._state)[0], self._label()

    def _label(self) -> dict[str, Any]:
        """The supervisor's action [action_dim] at the observation it is returned with, if any."""
        label = self.task.label(self._state)
        return {} if label is None else {"expert_action": as_observation(label)[0]}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        noise = self.task.disturbance(1, self.np_random)
        action = np.asarray(action, dtype=np.float64).reshape(1, -1)
        self._state, reward, values, loss, counts = _one_step(
            self.task, self._state, action, self._step, noise
        )
        self._step += 1
        info = {"cost": float((values[0] > 0).any()), "constraint_values": values[0]}
        info |= self._label()
        if counts[0]:
            info["objective_loss"] = float(loss[0])
        truncated = self._step >= self.task.horizon
        return as_observation(self._state)[0], float(reward[0]), False, truncated, info


class BatchedTaskVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` instances stepped as arrays.

    All episodes have the same length, so they all end, and restart, in the same step. Autoreset is
    SAME_STEP: at an episode's end the observations are those of the new episode, and the last ones
    are in ``info["final_obs"]``. ``constraint_values`` is [num_envs, m]; ``objective_loss`` counts
    where ``_objective_loss`` is True. ``reset(options={"states": array [num_envs, obs_dim]})`` sets
    the start states.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012 - as above

    def __init__(self, task: BatchedTask, num_envs: int = 1, render_mode: None = None) -> None:
        self.task = task
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = task.observation_space
        self.single_action_space = task.action_space
        self.observation_space = batch_space(task.observation_space, num_envs)
        self.action_space = batch_space(task.action_space, num_envs)
        self._state: Components = ()
        self._step = 0
        self._everywhere = np.ones(num_envs, dtype=bool)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        # One generator serves all instances. VectorEnv's type allows a list of seeds; a native
        # environment has no use for it.
        super().reset(seed=seed)
        self._state, self._step = _starts(self.task, options, self.num_envs, self.np_random), 0
        return as_observation(self._state), self._labels()

    def _labels(self) -> dict[str, Any]:
        label = self.task.label(self._state)
        if label is None:
            return {}
        return {"expert_action": as_observation(label), "_expert_action": self._everywhere}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        noise = self.task.disturbance(self.num_envs, self.np_random)
        self._state, reward, values, loss, counts = _one_step(
            self.task, self._state, actions, self._step, noise
        )
        self._step += 1
        info: dict[str, Any] = {
            "cost": (values > 0).any(axis=-1).astype(np.float64),
            "_cost": self._everywhere,
            "constraint_values": values,
            "_constraint_values": self._everywhere,
            "objective_loss": loss,
            "_objective_loss": counts,
        }
        ended = self._step >= self.task.horizon
        if ended:
            info["final_obs"], info["_final_obs"] = as_observation(self._state), self._everywhere
            self._state, self._step = _starts(self.task, None, self.num_envs, self.np_random), 0
        info.update(self._labels())
        rewards = np.asarray(reward, dtype=np.float64)
        terminated, truncated = np.zeros(self.num_envs, dtype=bool), np.full(self.num_envs, ended)
        return as_observation(self._state), rewards, terminated, truncated, info
