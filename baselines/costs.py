"""Costs as the agents see them: read from ``info``, checked, and summed over episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_costs(infos: Sequence[dict[str, Any]], cost_keys: Sequence[str]) -> NDArray[np.float64]:
    """Costs of one vectorised step. Returns [N, C]: environments x constraints.

    Raises KeyError naming the environment and the key where ``info`` lacks one.
    """
    try:
        return np.array([[info[key] for key in cost_keys] for info in infos], dtype=np.float64)
    except KeyError:
        env, key = next((i, k) for i, info in enumerate(infos) for k in cost_keys if k not in info)
        message = f"environment {env}: info has no {key!r}; a constrained agent needs info[{key!r}] at every step"
        raise KeyError(message) from None


def check_finite(step: int, **fields: NDArray[Any]) -> None:
    """Raise FloatingPointError naming step, environment index and field if any array holds NaN or infinity.

    step: environment steps taken so far (all environments together). fields: name -> array [N, ...].
    """
    for name, values in fields.items():
        if not np.isfinite(values).all():
            rows = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            env = int(np.flatnonzero(~rows)[0])
            raise FloatingPointError(f"step {step}, environment {env}: {name} is not finite: {values[env]}")


def check_transition(
    step: int,
    observations: NDArray[Any],
    rewards: NDArray[Any],
    costs: NDArray[Any],
    dones: NDArray[np.bool_],
    infos: Sequence[dict[str, Any]],
) -> None:
    """``check_finite`` on everything one vectorised step returned, terminal observations included."""
    check_finite(step, observation=observations, reward=rewards, cost=costs)
    for env in np.flatnonzero(dones):
        terminal = np.asarray(infos[env].get("terminal_observation", 0.0))
        if not np.isfinite(terminal).all():
            raise FloatingPointError(f"step {step}, environment {env}: terminal_observation is not finite: {terminal}")


class EpisodeCosts:
    """Undiscounted cost of the episodes that end during one update's data collection: the constraint estimate J_C.

    n_envs: N environments; n_costs: C constraints. Episodes may start in an earlier update.
    """

    def __init__(self, n_envs: int, n_costs: int) -> None:
        self.running_NC = np.zeros((n_envs, n_costs))
        self.length_N = np.zeros(n_envs)
        self.finished: list[NDArray[np.float64]] = []
        self.lengths: list[float] = []
        self.collected_C = np.zeros(n_costs)
        self.steps = 0
        self.last_episode_length = 0.0
        self.all_episodes, self.all_steps = 0, 0.0

    def start_update(self) -> None:
        """Forget the finished episodes; running ones go on."""
        self.finished, self.lengths = [], []
        self.collected_C, self.steps = np.zeros_like(self.collected_C), 0

    def restart_episodes(self) -> None:
        """The environments were reset from outside: running episodes are dropped, not finished."""
        self.running_NC[:], self.length_N[:] = 0.0, 0.0

    def add(self, costs_NC: NDArray[np.float64], dones_N: NDArray[np.bool_]) -> None:
        """One vectorised step."""
        self.running_NC += costs_NC
        self.length_N += 1.0
        self.collected_C += costs_NC.sum(axis=0)
        self.steps += len(costs_NC)
        for env in np.flatnonzero(dones_N):
            self.finished.append(self.running_NC[env].copy())
            self.lengths.append(float(self.length_N[env]))
            self.all_episodes, self.all_steps = self.all_episodes + 1, self.all_steps + self.length_N[env]
            self.running_NC[env], self.length_N[env] = 0.0, 0.0

    def mean_length(self) -> float:
        """Mean length in steps of all episodes finished so far; the longest running one's where none has."""
        return float(self.all_steps / self.all_episodes if self.all_episodes else max(self.length_N.max(), 1.0))

    def estimate(self) -> tuple[NDArray[np.float64], float]:
        """(J_C [C] in cost per episode, mean episode length in steps).

        When no episode ended in this update: this update's cost per step times the episode length, the latter being
        the larger of the last update's mean length and the longest running episode (a lower bound on its own).
        """
        if self.finished:
            self.last_episode_length = float(np.mean(self.lengths))
            return np.mean(self.finished, axis=0), self.last_episode_length
        length = max(self.last_episode_length, float(self.length_N.max()), 1.0)
        return self.collected_C / max(self.steps, 1) * length, length
