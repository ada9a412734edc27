"""Deterministic evaluation of a policy on held-out starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import BatchedTask
from scpo_bench.runs.environments import make_vector_env

EPISODES_AT_ONCE = 16  # environments that are held in memory
# Roots of the evaluation seeds, which no cell's seed leads to.
ENTROPY = {"held-out": 20_251_213, "tuning": 20_251_125}

# Observations [n, ...] -> actions [n, ...].
Predict = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Evaluation:
    """Means over episodes; ``worst`` over all steps; ``objective`` over the steps that count."""

    mean_return: float
    mean_cost: float
    worst: float | None
    objective: float | None


@dataclass
class _Episode:
    """What one episode has come to so far."""

    total_return: float = 0.0
    cost: float = 0.0
    worst: float = -np.inf
    losses: list[float] = field(default_factory=list)

    def add(self, reward: float, info: dict[str, Any]) -> None:
        self.total_return += reward
        self.cost += float(info["cost"])
        if "constraint_values" in info:
            self.worst = max(self.worst, float(np.max(info["constraint_values"])))
        if "objective_loss" in info:
            self.losses.append(info["objective_loss"])


class Evaluator:
    """Evaluates policies on ``episodes`` episodes with the same starts and noise at every call.

    The seeds come from a branch of the seed tree of their own, the same for all agents and seeds of
    a task: every agent is judged on the same starts, and none trains on them. native: in the task's
    vector environment; there a task may state its held-out starts itself. starts: "held-out", or
    "tuning" for others, drawn from the task's start distribution, on which agents are tuned.
    """

    def __init__(
        self,
        task: str,
        env_kwargs: dict[str, Any],
        episodes: int,
        native: bool,
        starts: Literal["held-out", "tuning"] = "held-out",
    ) -> None:
        sequence = np.random.SeedSequence(ENTROPY[starts])
        self._seeds = [int(s) for s in sequence.generate_state(1 if native else episodes)]
        self._vector_env = make_vector_env(task, episodes, env_kwargs) if native else None
        own = starts == "held-out"
        self._options = _held_out_starts(self._vector_env, episodes) if own else None
        at_once = 0 if native else min(episodes, EPISODES_AT_ONCE)
        self._envs = [gym.make(task, **env_kwargs) for _ in range(at_once)]

    def __call__(self, predict: Predict) -> Evaluation:
        return self._evaluate_native(predict) if self._vector_env else self._evaluate_each(predict)

    def _evaluate_native(self, predict: Predict) -> Evaluation:
        env = self._vector_env
        assert env is not None
        observations, _ = env.reset(seed=self._seeds[0], options=self._options)
        returns, costs = np.zeros(env.num_envs), np.zeros(env.num_envs)
        running = np.ones(env.num_envs, dtype=bool)
        worst = -np.inf
        losses: list[float] = []
        while running.any():
            observations, rewards, terminated, truncated, info = env.step(predict(observations))
            returns += rewards * running
            costs += info["cost"] * running
            if "constraint_values" in info:
                worst = max(worst, float(info["constraint_values"][running].max()))
            if "objective_loss" in info:
                losses += info["objective_loss"][running & info["_objective_loss"]].tolist()
            running &= ~(terminated | truncated)
        return _summary(returns, costs, worst, losses)

    def _evaluate_each(self, predict: Predict) -> Evaluation:
        episodes = [_Episode() for _ in self._seeds]
        for first in range(0, len(episodes), len(self._envs)):
            group = slice(first, first + len(self._envs))
            self._side_by_side(predict, self._seeds[group], episodes[group])
        return _summary(
            np.array([episode.total_return for episode in episodes]),
            np.array([episode.cost for episode in episodes]),
            max(episode.worst for episode in episodes),
            [loss for episode in episodes for loss in episode.losses],
        )

    def _side_by_side(self, predict: Predict, seeds: list[int], episodes: list[_Episode]) -> None:
        """Several episodes at once, so that one prediction serves them all."""
        envs = self._envs[: len(seeds)]
        observations = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
        running = list(range(len(seeds)))
        while running:
            # An episode that has ended keeps its row: by rounding, an action may depend on the
            # number of observations that it is predicted with.
            actions = predict(observations)
            for i in tuple(running):
                observations[i], reward, terminated, truncated, info = envs[i].step(actions[i])
                episodes[i].add(float(reward), info)
                if terminated or truncated:
                    running.remove(i)

    def close(self) -> None:
        for env in self._envs:
            env.close()
        if self._vector_env is not None:
            self._vector_env.close()


def _held_out_starts(env: Any, episodes: int) -> dict[str, Any] | None:
    """The options of ``reset`` that set the start states of a task which states them itself."""
    task = getattr(env, "task", None)  # none behind a wrapper, which might change the task
    starts = task.held_out_starts(episodes) if isinstance(task, BatchedTask) else None
    return None if starts is None else {"states": np.stack(starts, axis=-1)}


def _summary(
    returns: NDArray[Any], costs: NDArray[Any], worst: float, losses: list[float]
) -> Evaluation:
    return Evaluation(
        float(returns.mean()),
        float(costs.mean()),
        worst if worst > -np.inf else None,
        float(np.mean(losses)) if losses else None,
    )
