"""Replay of transitions with costs, sampled as n-step returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecNormalize

from scpo_bench.baselines.constrained import flat
from scpo_bench.errors import UserError

Array = NDArray[np.float32]
FIELDS = ("observations", "actions", "rewards", "costs", "next_observations", "terminated", "ends")


@dataclass
class Transitions:
    """B sampled n-step transitions."""

    observations: Array
    """[B, O]"""
    actions: Array
    """[B, A], as applied (inside the action space)."""
    rewards: Array
    """[B]: sum_{i<m} gamma^i r_{t+i}, over the m <= n steps to the episode's end or newest step."""
    costs: Array
    """[B]: the same sum of costs."""
    next_observations: Array
    """[B, O]: m steps later."""
    discounts: Array
    """[B]: gamma^m, or 0 where the episode terminated (a truncated one bootstraps)."""

    def tensors(self, device: torch.device) -> list[torch.Tensor]:
        """All fields in their order."""
        return [torch.from_numpy(array).to(device) for array in vars(self).values()]


class CostReplay:
    """Ring buffer of ``buffer_size`` transitions over N environments, not normalised.

    The constructor's signature is that of SB3's replay buffers; device and optimize_memory_usage
    are not used.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        device: Any = None,
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
    ) -> None:
        self.rows, self.n_envs = max(buffer_size // n_envs, 1), n_envs
        shape, obs_dim = (self.rows, n_envs), int(np.prod(observation_space.shape))
        self.observations, self.next_observations = (
            np.zeros((*shape, obs_dim), np.float32) for _ in range(2)
        )
        self.actions = np.zeros((*shape, int(np.prod(action_space.shape))), np.float32)
        self.rewards, self.costs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.terminated, self.ends = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        self.position, self.stored = 0, 0

    def add(self, **row: NDArray[Any]) -> None:
        """One vectorised step: every name in ``FIELDS``, each [N, ...]."""
        for name in FIELDS:
            getattr(self, name)[self.position] = row[name]
        self.position = (self.position + 1) % self.rows
        self.stored = min(self.stored + 1, self.rows)

    def sample(
        self,
        batch_size: int,
        n_step: int,
        gamma: float,
        rng: np.random.Generator,
        normaliser: VecNormalize | None = None,
    ) -> Transitions:
        """Uniform over stored steps, with replacement.

        ``normaliser`` is applied to single rewards, before they are summed, and to observations.
        """
        age = rng.integers(self.stored, size=batch_size)  # 0: the newest row
        env = rng.integers(self.n_envs, size=batch_size)
        offset = np.arange(n_step)
        rows = (self.position - 1 - age[:, None] + offset) % self.rows
        ends = self.ends[rows, env[:, None]]
        ended_before = np.cumsum(ends, axis=1) - ends > 0
        used = (offset <= age[:, None]) & ~ended_before
        weights = np.where(used, gamma**offset, 0.0).astype(np.float32)
        last = used.sum(axis=1) - 1
        last_row = rows[np.arange(batch_size), last]
        going = ~self.terminated[last_row, env]
        rewards = self.rewards[rows, env[:, None]]
        observations = self.observations[rows[:, 0], env]
        following = self.next_observations[last_row, env]
        if normaliser is not None:
            rewards = normaliser.normalize_reward(rewards)
            observations, following = (
                flat(normaliser.normalize_obs(o)) for o in (observations, following)
            )
        return Transitions(
            observations,
            self.actions[rows[:, 0], env],
            np.einsum("bn,bn->b", weights, rewards),
            np.einsum("bn,bn->b", weights, self.costs[rows, env[:, None]]),
            following,
            (gamma ** (last + 1.0) * going).astype(np.float32),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Rows that nothing was stored in yet are not pickled."""
        return {**self.__dict__, **{name: getattr(self, name)[: self.stored] for name in FIELDS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in FIELDS:
            stored = state[name]
            rows = np.zeros((self.rows, *stored.shape[1:]), stored.dtype)
            rows[: self.stored] = stored
            setattr(self, name, rows)

    def state_dict(self) -> dict[str, Any]:
        """What is stored, as tensors: SB3's ``save`` writes it beside the networks."""
        arrays = {
            name: torch.from_numpy(getattr(self, name)[: self.stored].copy()) for name in FIELDS
        }
        return arrays | {"position": self.position, "stored": self.stored}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Restore a ``state_dict``.

        Raises UserError if it comes from another number of environments or a larger buffer.
        """
        saved, holds = tuple(state["rewards"].shape), (self.rows, self.n_envs)
        if state["stored"] > self.rows or saved[1] != self.n_envs:
            raise UserError(
                f"replay: saved {saved} (steps, environments), this buffer holds {holds}"
            )
        for name in FIELDS:
            getattr(self, name)[: state["stored"]] = state[name].numpy()
        self.position, self.stored = state["position"], state["stored"]
