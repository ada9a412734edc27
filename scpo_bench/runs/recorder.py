"""What is measured, where the agent meets the environment.

:class:`RecordingVecEnv` sees every interaction step; :func:`evaluate` runs the policy on held-out
starts; :class:`UpdateRecorder`, a callback, writes one line per update. The agent reports nothing
about its own safety.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from scpo_bench.contract import ProbeMeter, check_transition
from scpo_bench.records.files import UpdateLog
from scpo_bench.records.schema import Cell, Update
from scpo_bench.runs.checkpoints import Checkpointer
from scpo_bench.runs.native_vec_env import NativeVecEnv

EPISODES_AT_ONCE = 16  # of evaluation: environments held in memory for it
HELD_OUT_ENTROPY = 20_251_213  # root of the evaluation seeds, which no cell's seed leads to


@dataclass
class Collection:
    """What happened between two updates, at the environment boundary."""

    returns: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    cost_sum: float = 0.0
    violating_steps: int = 0
    worst: float | None = None


class RecordingVecEnv(VecEnvWrapper):
    """Counts steps, returns, costs and constraint values, and passes everything through unchanged.

    Raises KeyError if a step's info has no cost, FloatingPointError if anything is not finite.
    ``probe_meter`` is where constraint evaluation charges its steps.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.probe_meter = ProbeMeter()
        self.steps = 0
        self._collection = Collection()
        self._return_N = np.zeros(venv.num_envs)
        self._cost_N = np.zeros(venv.num_envs)

    def reset(self) -> Any:
        self._return_N[:], self._cost_N[:] = 0.0, 0.0
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.steps += self.num_envs
        try:
            costs = np.array([info["cost"] for info in infos], dtype=np.float64)
        except KeyError:
            raise KeyError(
                "info['cost'] is missing; every step of a task must report its cost"
            ) from None
        check_transition(self.steps, np.asarray(observations), rewards, costs, dones, infos)
        seen = self._collection
        self._return_N += rewards
        self._cost_N += costs
        seen.cost_sum += float(costs.sum())
        seen.violating_steps += int((costs > 0).sum())
        if "constraint_values" in infos[0]:
            worst = max(float(np.max(info["constraint_values"])) for info in infos)
            seen.worst = worst if seen.worst is None else max(seen.worst, worst)
        for i in np.flatnonzero(dones):
            seen.returns.append(float(self._return_N[i]))
            seen.costs.append(float(self._cost_N[i]))
            self._return_N[i] = self._cost_N[i] = 0.0
        return observations, rewards, dones, infos

    def take(self) -> Collection:
        """What was seen since the last call."""
        seen, self._collection = self._collection, Collection()
        return seen


@dataclass(frozen=True)
class Evaluation:
    """Deterministic episodes on held-out starts: means over episodes; worst over steps; objective
    over the steps that count.
    """

    mean_return: float
    mean_cost: float
    worst: float | None
    objective: float | None

    def violates(self, limit: float) -> bool:
        """With limit 0 any constraint value > 0 counts, or any cost where the task has no signed
        values.
        """
        if limit == 0 and self.worst is not None:
            return self.worst > 0
        return self.mean_cost > limit


class Evaluator:
    """Evaluates a policy on ``episodes`` episodes whose starts, and noise, are the same at every
    call.

    The seeds come from their own branch of the seed tree (``HELD_OUT_ENTROPY``), the same for all
    agents and seeds of a task: every agent is judged on the same starts, and no agent trains on
    them.
    """

    def __init__(self, task: str, env_kwargs: dict[str, Any], episodes: int, native: bool) -> None:
        sequence = np.random.SeedSequence(HELD_OUT_ENTROPY)
        self._native: NativeVecEnv | None = None
        self._envs: list[gym.Env[Any, Any]] = []
        if native:
            vector_env = gym.make_vec(
                task, num_envs=episodes, vectorization_mode="vector_entry_point", **env_kwargs
            )
            self._native = NativeVecEnv(vector_env)
            self._seeds = [int(sequence.generate_state(1)[0])]
        else:
            self._envs = [
                gym.make(task, **env_kwargs) for _ in range(min(episodes, EPISODES_AT_ONCE))
            ]
            self._seeds = [int(s) for s in sequence.generate_state(episodes)]

    def __call__(self, predict: Callable[[Any], Any]) -> Evaluation:
        """predict: observations [n, ...] -> actions [n, ...]."""
        return self._evaluate_native(predict) if self._native else self._evaluate_stepped(predict)

    def _evaluate_native(self, predict: Callable[[Any], Any]) -> Evaluation:
        assert self._native is not None
        env = self._native.vector_env
        observations, _ = env.reset(seed=self._seeds[0])
        n = env.num_envs
        returns, costs, going = np.zeros(n), np.zeros(n), np.ones(n, dtype=bool)
        worst: float | None = None
        objective: list[Any] = []
        while going.any():
            observations, rewards, terminated, truncated, info = env.step(predict(observations))
            returns += rewards * going
            costs += info["cost"] * going
            if "constraint_values" in info:
                worst = max(
                    -np.inf if worst is None else worst,
                    float(info["constraint_values"][going].max()),
                )
            if "objective_loss" in info:
                objective.append(info["objective_loss"][going & info["_objective_loss"]])
            going &= ~(terminated | truncated)
        losses = np.concatenate(objective) if objective else np.zeros(0)
        return Evaluation(
            float(returns.mean()),
            float(costs.mean()),
            worst,
            float(losses.mean()) if len(losses) else None,
        )

    def _evaluate_stepped(self, predict: Callable[[Any], Any]) -> Evaluation:
        """Several episodes side by side, so that one prediction serves them all."""
        n = len(self._seeds)
        returns, costs = np.zeros(n), np.zeros(n)
        losses: list[list[float]] = [[] for _ in range(n)]
        worst: float | None = None
        for first in range(0, n, len(self._envs)):
            group = range(first, min(first + len(self._envs), n))
            observations = np.stack(
                [env.reset(seed=self._seeds[i])[0] for i, env in zip(group, self._envs)]
            )
            going = set(group)
            while going:
                # An episode that has ended keeps its row: an action must not depend, by rounding,
                # on who else is still going.
                actions = predict(observations)
                for i in sorted(going):
                    observation, reward, terminated, truncated, info = self._envs[i - first].step(
                        actions[i - first]
                    )
                    observations[i - first] = observation
                    returns[i] += float(reward)
                    costs[i] += float(info["cost"])
                    if "constraint_values" in info:
                        worst = max(
                            -np.inf if worst is None else worst,
                            float(np.max(info["constraint_values"])),
                        )
                    if "objective_loss" in info:
                        losses[i].append(info["objective_loss"])
                    if terminated or truncated:
                        going.remove(i)
        counted = [loss for episode in losses for loss in episode]
        objective = float(np.mean(counted)) if counted else None
        return Evaluation(float(returns.mean()), float(costs.mean()), worst, objective)

    def close(self) -> None:
        for env in [self._native, *self._envs]:
            if env is not None:
                env.close()


class UpdateRecorder(BaseCallback):
    """Writes an :class:`Update` whenever the policy has changed: at the start of the next data
    collection, and at the end.

    log, updates, elapsed_s: of a run that goes on, what it has written so far and the seconds it
    took. checkpointer: told after every update. progress: called with (interaction steps, updates)
    after every update, and now and then in between.
    """

    def __init__(
        self,
        cell: Cell,
        env: RecordingVecEnv,
        evaluator: Evaluator,
        log: UpdateLog,
        checkpointer: Checkpointer,
        progress: Callable[[int, int], None] | None = None,
        updates: Sequence[Update] = (),
        elapsed_s: float = 0.0,
    ) -> None:
        super().__init__()
        self._cell, self._recording, self._evaluator, self._log = cell, env, evaluator, log
        self._checkpointer, self._progress = checkpointer, progress
        self.updates = list(updates)
        self._collected = False
        self._last_shown = time.perf_counter()
        self._began = self._last_shown - elapsed_s

    def _on_rollout_start(self) -> None:
        if not self.updates or self._collected:
            self._write(final=False)
            self._checkpointer.save(
                self.model, self._recording, self._log, time.perf_counter() - self._began
            )
            # After every update, so that what stops a run by it does so at the same update always.
            if self._progress:
                self._progress(self._recording.steps, len(self.updates))

    def _on_rollout_end(self) -> None:
        self._collected = True

    def _on_step(self) -> bool:
        now = time.perf_counter()
        if self._progress and now - self._last_shown > 0.2:
            self._last_shown = now
            self._progress(self._recording.steps, len(self.updates))
        return True

    def _on_training_end(self) -> None:
        if self._collected:
            self._write(final=True)
        if self._progress:
            self._progress(self._recording.steps, len(self.updates))

    def _predict(self, observations: Any) -> Any:
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None:
            observations = normalizer.normalize_obs(observations)
        return self.model.predict(observations, deterministic=True)[0]

    def _write(self, final: bool) -> None:
        number = len(self.updates)
        seen = self._recording.take()
        meter = self._recording.probe_meter
        evaluation = None
        if final or number % self._cell.evaluation_interval == 0:
            evaluation = self._evaluator(self._predict)
        elapsed = time.perf_counter() - self._began
        limit = self._cell.cost_limit
        update = Update(
            update=number,
            interaction_steps=self._recording.steps,
            probe_steps=meter.steps,
            episodes=len(seen.returns),
            return_mean=float(np.mean(seen.returns)) if seen.returns else None,
            cost_mean=float(np.mean(seen.costs)) if seen.costs else None,
            cost_max=max(seen.costs) if seen.costs else None,
            cost_sum=seen.cost_sum,
            violating_episodes=sum(cost > limit for cost in seen.costs),
            violating_steps=seen.violating_steps,
            worst_constraint_value=seen.worst,
            iterate_return=evaluation.mean_return if evaluation else None,
            iterate_cost=evaluation.mean_cost if evaluation else None,
            iterate_worst_constraint_value=evaluation.worst if evaluation else None,
            iterate_objective=evaluation.objective if evaluation else None,
            iterate_violates=evaluation.violates(limit) if evaluation else None,
            probe_violations=meter.violations,
            diagnostics=_plain(getattr(self.model, "diagnostics", {})),
            wall_time_s=elapsed,
            steps_per_s=self._recording.steps / elapsed if elapsed > 0 else 0.0,
        )
        self.updates.append(update)
        self._log.append(update)
        self._collected = False


def _plain(diagnostics: dict[str, Any]) -> dict[str, float | None]:
    """Plain floats; what is not finite becomes None (JSON has no NaN)."""
    return {str(k): float(v) if np.isfinite(v) else None for k, v in diagnostics.items()}
