"""Costs summed over episodes: the constraint estimate J_C."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class EpisodeCosts:
    """Undiscounted cost of the episodes that end during one update's data collection.

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
        """Forget the finished episodes; running ones continue."""
        self.finished, self.lengths = [], []
        self.collected_C, self.steps = np.zeros_like(self.collected_C), 0

    def restart_episodes(self) -> None:
        """The environments were reset from outside: running episodes are dropped, not finished."""
        self.running_NC[:], self.length_N[:] = 0.0, 0.0

    def add(self, costs_NC: NDArray[np.float64], dones_N: NDArray[np.bool_]) -> None:
        """Count one vectorised step."""
        self.running_NC += costs_NC
        self.length_N += 1.0
        self.collected_C += costs_NC.sum(axis=0)
        self.steps += len(costs_NC)
        for env in np.flatnonzero(dones_N):
            self.finished.append(self.running_NC[env].copy())
            self.lengths.append(float(self.length_N[env]))
            self.all_episodes += 1
            self.all_steps += self.length_N[env]
            self.running_NC[env], self.length_N[env] = 0.0, 0.0

    def mean_length(self) -> float:
        """Mean length in steps of all episodes finished so far.

        Where none has finished, the length of the longest running one.
        """
        if self.all_episodes:
            return float(self.all_steps / self.all_episodes)
        return float(max(self.length_N.max(), 1.0))

    def estimate(self) -> tuple[NDArray[np.float64], float]:
        """(J_C [C] in cost per episode, mean episode length in steps) of this update.

        Where no episode ended in it: its cost per step times the episode length, taken to be the
        larger of the last update's mean length and the longest running episode (a lower bound).
        """
        if self.finished:
            self.last_episode_length = float(np.mean(self.lengths))
            return np.mean(self.finished, axis=0), self.last_episode_length
        length = max(self.last_episode_length, float(self.length_N.max()), 1.0)
        return self.collected_C / max(self.steps, 1) * length, length
