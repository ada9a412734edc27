"""Deterministic evaluation of a policy on held-out starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from scpo_bench.runs.environments import make_vector_env

EPISODES_AT_ONCE = 16  # environments that are held in memory
HELD_OUT_ENTROPY = 20_251_213  # root of the evaluation seeds, which no cell's seed leads to

# Observations [n, ...] -> actions [n, ...].
Predict = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Evaluation:
    """Means over episodes; ``worst`` over all steps; ``objective`` over the steps that count."""

    mean_return: float
    mean_cost: float
    worst: float | None
    objective: float | None


class Evaluator:
    """Evaluates policies on ``episodes`` episodes with the same starts and noise at every call.

    The seeds come from a branch of the seed tree of their own, the same for all agents and seeds of
    a task: every agent is judged on the same starts, and none trains on them. native: in the task's
    vector environment.
    """

    def __init__(self, task: str, env_kwargs: dict[str, Any], episodes: int, native: bool) -> None:
        sequence = np.random.SeedSequence(HELD_OUT_ENTROPY)
        self._seeds = [int(s) for s in sequence.generate_state(1 if native else episodes)]
        self._vector_env = make_vector_env(task, episodes, env_kwargs) if native else None
        at_once = 0 if native else min(episodes, EPISODES_AT_ONCE)
        self._envs = [gym.make(task, **env_kwargs) for _ in range(at_once)]

    def __call__(self, predict: Predict) -> Evaluation:
        return self._evaluate_native(predict) if self._vector_env else self._evaluate_each(predict)

    def _evaluate_native(self, predict: Predict) -> Evaluation:
        env = self._vector_env
        assert env is not None
        observations, _ = env.reset(seed=self._seeds[0])
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
        """Several episodes side by side, so that one prediction serves them all."""
        n = len(self._seeds)
        returns, costs = np.zeros(n), np.zeros(n)
        worst = -np.inf
        losses: list[list[float]] = [[] for _ in range(n)]
        for first in range(0, n, len(self._envs)):
            episodes = range(first, min(first + len(self._envs), n))
            envs = dict(zip(episodes, self._envs))
            starts = [env.reset(seed=self._seeds[i])[0] for i, env in envs.items()]
            observations = np.stack(starts)
            running = list(episodes)
            while running:
                # An episode that has ended keeps its row: by rounding, an action may depend on the
                # number of observations it is predicted with.
                actions = predict(observations)
                for i in tuple(running):
                    row = i - first
                    observation, reward, terminated, truncated, info = envs[i].step(actions[row])
                    observations[row] = observation
                    returns[i] += float(reward)
                    costs[i] += float(info["cost"])
                    if "constraint_values" in info:
                        worst = max(worst, float(np.max(info["constraint_values"])))
                    if "objective_loss" in info:
                        losses[i].append(info["objective_loss"])
                    if terminated or truncated:
                        running.remove(i)
        return _summary(returns, costs, worst, [loss for episode in losses for loss in episode])

    def close(self) -> None:
        for env in self._envs:
            env.close()
        if self._vector_env is not None:
            self._vector_env.close()


def _summary(
    returns: NDArray[Any], costs: NDArray[Any], worst: float, losses: list[float]
) -> Evaluation:
    return Evaluation(
        float(returns.mean()),
        float(costs.mean()),
        worst if worst > -np.inf else None,
        float(np.mean(losses)) if losses else None,
    )
