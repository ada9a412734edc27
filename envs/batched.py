"""Environments whose dynamics are pure functions of arrays.

A :class:`BatchedTask` states a task once, on component arrays: ``(p, v)`` rather than ``x[..., 2]``. The same lines then run on
NumPy arrays of any shape (the environments below) and on torch tensors (SCPO's constraint evaluation, the oracle, which
differentiates through them). :class:`BatchedTaskEnv` is its Gymnasium environment, :class:`BatchedTaskVectorEnv` its native
vector environment; neither adds any arithmetic of its own.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

Array = Any  # a NumPy array or a torch tensor: both have the operators and the .clip() that the tasks use
Components = tuple[Array, ...]  # one array per state, action or constraint component, all of one shape


class BatchedTask:
    """A task as pure functions. Every array argument and result has one shape, the batch's, whatever it is.

    Attributes
    ----------
    observation_space, action_space: Box spaces, one entry per component.
    horizon: steps per episode; the task's environments truncate there themselves, because a constraint may be in force at
        the last step alone.
    constraint_horizon: steps from a start state after which its constraints are known (the horizon, as a rule).
    constraint_names: one name per constraint; a value is violated where it is > 0.
    objective_name: what ``info["objective_loss"]`` measures (lower is better).
    """

    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    horizon: int
    constraint_horizon: int
    constraint_names: tuple[str, ...]
    objective_name: str

    def sample_starts(self, n: int, rng: np.random.Generator) -> Components:
        """n start states from the task's start distribution. Each component: [n]."""
        raise NotImplementedError

    def design_starts(self, n: int) -> Components:
        """n start states that cover the start set, its boundary included, for evaluating constraints. Each: [n]."""
        raise NotImplementedError

    def next_state(self, state: Components, action: Components, disturbance: Components | None = None) -> Components:
        """The state after one step. The action is clipped to the action space here, as an actuator would."""
        raise NotImplementedError

    def reward(self, state: Components, action: Components) -> Array:
        """Reward of taking ``action`` in ``state``."""
        raise NotImplementedError

    def constraint_values(self, state: Components, action: Components, next_state: Components, last: bool) -> Components:
        """Signed constraint values of one step, violated where > 0. ``last``: this step ends the episode at the horizon."""
        raise NotImplementedError

    def objective_loss(self, state: Components, action: Components, step: int) -> tuple[Array, Array]:
        """(loss, counts): the loss of this step and whether it is part of the task's objective (bool)."""
        raise NotImplementedError

    def label(self, state: Components) -> Components | None:
        """The supervisor's action in ``state``: an expert's action or a regression label; None where there is no supervisor."""
        return None

    def disturbance(self, n: int, rng: np.random.Generator) -> Components | None:
        """Process noise for one step, or None where the task is deterministic. Each component: [n]."""
        return None

    def backup_gain(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(gain [action_dim, obs_dim], offset [action_dim]) of the safe backup controller u = gain @ x + offset."""
        raise NotImplementedError

    def clip_action(self, action: Components) -> Components:
        low, high = self.action_space.low, self.action_space.high
        return tuple(a.clip(float(lo), float(hi)) for a, lo, hi in zip(action, low, high))


def as_observation(state: Components) -> NDArray[np.float32]:
    """[..., obs_dim] float32 from component arrays [...]."""
    return np.stack(state, axis=-1).astype(np.float32)


def _one_step(task: BatchedTask, state: Components, actions: NDArray[Any], step: int, noise: Components | None) -> Any:
    """What both environments report of one step, from the task's pure functions."""
    action = tuple(np.asarray(actions, dtype=np.float64).T)
    following = task.next_state(state, action, noise)
    reward = task.reward(state, action)
    values = np.stack(task.constraint_values(state, action, following, step + 1 == task.horizon), axis=-1)
    loss, counts = task.objective_loss(state, action, step)
    return following, reward, values, loss, counts


def _given_starts(task: BatchedTask, options: dict[str, Any] | None, n: int) -> Components | None:
    """The states of ``reset(options={"states": ...})``, checked. ValueError names what is wrong."""
    if not options or "states" not in options:
        return None
    states = np.asarray(options["states"], dtype=np.float64)
    width = task.observation_space.shape[0]
    if states.shape != (n, width) or not np.isfinite(states).all():
        raise ValueError(f"reset options.states: expected {n} x {width} finite numbers, got an array of shape {states.shape}")
    return tuple(states.T)


class BatchedTaskEnv(gym.Env[Any, Any]):
    """One instance of a batched task. ``reset(options={"states": [[...]]})`` sets the start state (shape (1, obs_dim))."""

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it as an instance variable

    def __init__(self, task: BatchedTask, render_mode: None = None) -> None:
        self.task = task
        self.render_mode = render_mode
        self.observation_space = task.observation_space
        self.action_space = task.action_space
        self._state: Components = ()
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = _given_starts(self.task, options, 1) or self.task.sample_starts(1, self.np_random)
        self._step = 0
        return as_observation(self._state)[0], self._label()

    def _label(self) -> dict[str, Any]:
        """The supervisor's action [action_dim] at the observation it is returned with, if there is a supervisor."""
        label = self.task.label(self._state)
        return {} if label is None else {"expert_action": as_observation(label)[0]}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        noise = self.task.disturbance(1, self.np_random)
        action = np.asarray(action, dtype=np.float64).reshape(1, -1)
        self._state, reward, values, loss, counts = _one_step(self.task, self._state, action, self._step, noise)
        self._step += 1
        info = {
            "cost": float((values[0] > 0).any()),
            "constraint_values": values[0],
            **self._label(),
        }
        if counts[0]:
            info["objective_loss"] = float(loss[0])
        return as_observation(self._state)[0], float(reward[0]), False, self._step >= self.task.horizon, info


class BatchedTaskVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` instances stepped as arrays. All episodes have one length, so they all end, and restart, in the same step.

    Autoreset is SAME_STEP: at an episode's end the observations are those of the new episode, the last ones are in
    ``info["final_obs"]``. ``constraint_values`` is [num_envs, m]; ``objective_loss`` counts where ``_objective_loss`` is True.
    ``reset(options={"states": array [num_envs, obs_dim]})`` sets the start states.
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

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        # One generator serves all instances. VectorEnv's type allows a list of seeds; a native environment has no use for it.
        super().reset(seed=seed)
        self._state = _given_starts(self.task, options, self.num_envs) or self._fresh_starts()
        self._step = 0
        return as_observation(self._state), self._labels()

    def _fresh_starts(self) -> Components:
        return self.task.sample_starts(self.num_envs, self.np_random)

    def _labels(self) -> dict[str, Any]:
        label = self.task.label(self._state)
        return {} if label is None else {"expert_action": as_observation(label), "_expert_action": self._everywhere}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        noise = self.task.disturbance(self.num_envs, self.np_random)
        self._state, reward, values, loss, counts = _one_step(self.task, self._state, actions, self._step, noise)
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
            self._state, self._step = self._fresh_starts(), 0
        info.update(self._labels())
        terminated = np.zeros(self.num_envs, dtype=bool)
        truncated = np.full(self.num_envs, ended)
        return as_observation(self._state), np.asarray(reward, dtype=np.float64), terminated, truncated, info
