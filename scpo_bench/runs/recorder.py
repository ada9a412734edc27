"""What is measured where the agent meets its environment; an agent reports nothing of its safety.

:class:`RecordingVecEnv` sees every interaction step; :class:`UpdateRecorder`, a callback, writes
one :class:`Update` per update of the policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from scpo_bench.contract import ProbeMeter, check_transition
from scpo_bench.errors import UserError
from scpo_bench.records.files import UpdateLog
from scpo_bench.records.schema import Cell, Update, violates
from scpo_bench.runs.evaluation import Evaluator

PROGRESS_S = 0.2  # between two reports of progress

# Called with (interaction steps, updates).
Progress = Callable[[int, int], None]


@dataclass
class Collection:
    """What happened between two updates. returns, costs: of the episodes that ended."""

    returns: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    cost_sum: float = 0.0
    violating_steps: int = 0
    worst: float | None = None


class RecordingVecEnv(VecEnvWrapper):
    """Counts steps, returns, costs and constraint values, and passes everything on.

    With a ``margin`` the agent gets another cost than the one that is recorded: 1 where a
    constraint value exceeds -margin, else 0. Everything else is unchanged.
    Raises KeyError if a step's info has no cost, FloatingPointError if anything is not finite,
    UserError for a margin where the task has no signed constraint values.
    Constraint evaluation charges its steps to ``probe_meter``.
    """

    def __init__(self, venv: VecEnv, margin: float = 0.0) -> None:
        super().__init__(venv)
        self.margin = margin
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
        if self.margin:
            infos = [{**info, "cost": self._training_cost(info)} for info in infos]
        return observations, rewards, dones, infos

    def _training_cost(self, info: dict[str, Any]) -> float:
        if "constraint_values" not in info:
            raise UserError(
                f"margin: {self.margin:g} is in units of info['constraint_values'], and this task "
                "has none; expected 0"
            )
        return float(np.max(info["constraint_values"]) > -self.margin)

    def take(self) -> Collection:
        """What was seen since the last call."""
        seen, self._collection = self._collection, Collection()
        return seen


class UpdateRecorder(BaseCallback):
    """Writes an :class:`Update` whenever the policy has changed: before a collection, at the end.

    save: called with the seconds so far when a checkpoint may be written. progress: called with
    (interaction steps, updates) after every update, and now and then in between.
    """

    def __init__(
        self,
        cell: Cell,
        env: RecordingVecEnv,
        evaluator: Evaluator,
        log: UpdateLog,
        save: Callable[[float], None],
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._cell, self._recording, self._evaluator, self._log = cell, env, evaluator, log
        self._save, self._progress = save, progress
        self.updates: list[Update] = []
        self._collected = self._spent = False
        self._began = self._last_shown = time.perf_counter()

    def resume(self, updates: list[Update], elapsed_s: float) -> None:
        """Continue after the updates that an interrupted run has recorded in ``elapsed_s``."""
        self.updates = updates
        self._began -= elapsed_s

    def _on_rollout_start(self) -> None:
        # Of interaction steps the algorithm itself takes no more than it is asked for.
        total = self._recording.steps + self._recording.probe_meter.steps
        self._spent = self._cell.budget == "total" and total >= self._cell.steps
        if not self.updates or self._collected:
            self._write(final=False)
            self._save(time.perf_counter() - self._began)
            # After every update, so that what stops a run by its progress does so at the same one.
            self._show()

    def _on_rollout_end(self) -> None:
        self._collected = True

    def _on_step(self) -> bool:
        now = time.perf_counter()
        if now - self._last_shown > PROGRESS_S:
            self._last_shown = now
            self._show()
        return not self._spent

    def _on_training_end(self) -> None:
        if self._collected:
            self._write(final=True)
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self._recording.steps, len(self.updates))

    def _predict(self, observations: NDArray[Any]) -> NDArray[Any]:
        """As the policy is deployed: normalised by the statistics of training, deterministic."""
        normalizer = self.model.get_vec_normalize_env()
        inputs = observations if normalizer is None else normalizer.normalize_obs(observations)
        return self.model.predict(inputs, deterministic=True)[0]

    def _write(self, final: bool) -> None:
        number, limit = len(self.updates), self._cell.cost_limit
        seen, meter = self._recording.take(), self._recording.probe_meter
        evaluated = {}
        if final or number % self._cell.evaluation_interval == 0:
            evaluated = self._evaluate(limit)
        elapsed = time.perf_counter() - self._began
        update = Update(
            update=number,
            interaction_steps=self._recording.steps,
            probe_steps=meter.steps,
            episodes=len(seen.returns),
            return_mean=float(np.mean(seen.returns)) if seen.returns else None,
            cost_mean=float(np.mean(seen.costs)) if seen.costs else None,
            cost_max=max(seen.costs, default=None),
            cost_sum=seen.cost_sum,
            violating_episodes=sum(cost > limit for cost in seen.costs),
            violating_steps=seen.violating_steps,
            worst_constraint_value=seen.worst,
            **evaluated,
            probe_violations=meter.violations,
            diagnostics=_plain(getattr(self.model, "diagnostics", {})),
            wall_time_s=elapsed,
            steps_per_s=self._recording.steps / elapsed if elapsed > 0 else 0.0,
        )
        self.updates.append(update)
        self._log.append(update)
        self._collected = False

    def _evaluate(self, limit: float) -> dict[str, Any]:
        """The fields of an update that describe its policy."""
        found = self._evaluator(self._predict)
        return {
            "iterate_return": found.mean_return,
            "iterate_cost": found.mean_cost,
            "iterate_worst_constraint_value": found.worst,
            "iterate_objective": found.objective,
            "iterate_violates": violates(found.mean_cost, found.worst, limit),
        }


def _plain(diagnostics: dict[str, Any]) -> dict[str, float | None]:
    """Plain floats; what is not finite becomes None (JSON has no NaN)."""
    return {str(k): float(v) if np.isfinite(v) else None for k, v in diagnostics.items()}
