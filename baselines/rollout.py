"""One update's on-policy data, and the advantages and critic targets computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from scpo_bench.advantages import generalised_advantages, next_values
from scpo_bench.baselines.constrained import flat
from scpo_bench.baselines.networks import Array, Mlp


class Rollout:
    """T steps of N environments. Signal 0 is the reward, signals 1..C are the costs.

    The constructor's signature is what Stable-Baselines3 calls a ``rollout_buffer_class`` with;
    device, gae_lambda and gamma are not used.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Box,
        action_space: spaces.Space,
        device: Any = None,
        gae_lambda: float | None = None,
        gamma: float | None = None,
        n_envs: int = 1,
        n_costs: int = 1,
    ) -> None:
        shape = (buffer_size, n_envs)
        self.observations = np.zeros((*shape, int(np.prod(observation_space.shape))), np.float32)
        dtype = np.int64 if isinstance(action_space, spaces.Discrete) else np.float32
        self.actions = np.zeros((*shape, *(action_space.shape or ())), dtype)
        self.signals = np.zeros((1 + n_costs, *shape))
        self.ends = np.zeros(shape, np.bool_)
        self.reset()

    def reset(self) -> None:
        """Forget the truncated episodes; ``store`` overwrites everything else."""
        self.truncated_at: list[tuple[int, int]] = []
        self.truncated_observations: list[Array] = []

    def store(
        self,
        t: int,
        observations: Array,
        actions: NDArray[Any],
        rewards: NDArray[np.floating],
        costs_NC: NDArray[np.float64],
        dones: NDArray[np.bool_],
        infos: Sequence[dict[str, Any]],
    ) -> None:
        """Step ``t`` of every environment; observations: [N, O], acted on."""
        self.observations[t], self.actions[t] = observations, actions
        self.signals[0, t], self.signals[1:, t], self.ends[t] = rewards, costs_NC.T, dones
        for i in np.flatnonzero(dones):
            if infos[i].get("TimeLimit.truncated", False):
                self.truncated_at.append((t, int(i)))
                self.truncated_observations.append(flat(infos[i]["terminal_observation"][None])[0])

    def advantages_and_returns(
        self,
        critics: Sequence[Mlp],
        last_observations: Array,
        gammas: Sequence[float],
        lambdas: Sequence[float],
        scale: float,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(advantages, critic targets), each [1 + C, T, N]; the targets are returns times scale.

        critics: of each signal, predicting returns times ``scale``; last_observations: [N, O] after
        the last step; gammas, lambdas: of each signal. A time limit bootstraps from the value of
        the observation at which it cut the episode; a termination does not.
        """
        T, N = self.ends.shape

        def values_at(observations: Array) -> NDArray[np.floating]:
            return np.stack([critic.forward(observations)[:, 0] for critic in critics]) / scale

        values = values_at(self.observations.reshape(T * N, -1)).reshape(-1, T, N)
        end_values = np.zeros_like(values)
        if self.truncated_at:
            rows, columns = np.array(self.truncated_at).T
            end_values[:, rows, columns] = values_at(np.stack(self.truncated_observations))
        following = next_values(values, values_at(last_observations), self.ends, end_values)
        advantages = generalised_advantages(
            self.signals, values, following, self.ends, gammas, lambdas
        )
        return advantages, (advantages + values) * scale


@dataclass
class Batch:
    """What an update learns from, flattened to B = T*N steps."""

    observations: Array
    """[B, O]"""
    actions: NDArray[Any]
    """[B, A], as sampled (before clipping to the action space), or [B] integers."""
    offset: Array | float
    """The backup's actions [B, A], or 0."""
    advantages: Array
    """[1 + C, B], of the reward and of each cost, unnormalised."""
    returns: Array
    """[1 + C, B], the critics' targets (times ``return_scale``)."""
