"""Checks whether an agent keeps to the contract; what ``scpo-bench check`` runs.

The task is so small that any agent should learn it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from scpo_bench.errors import UserError
from scpo_bench.records.files import CHECKPOINT_FILE, read_updates
from scpo_bench.records.schema import Cell, Run, Update
from scpo_bench.runs.agents import make_agent
from scpo_bench.runs.checkpoints import obstacle
from scpo_bench.runs.environments import make_training_env
from scpo_bench.runs.harness import run_cell
from scpo_bench.runs.recorder import RecordingVecEnv
from scpo_bench.suites.registry import agents, load_agent

TRIVIAL, HORIZON = "scpo_bench/Trivial-v0", 10
BATCHED = "scpo_bench/HarmfulRegression-v0"
LEARNED_SHARE = 0.3  # of the difference between the start policy's return and the best one
# Runs that are compared with one another have at least this many updates from the first one that
# changes the policy, and this many interaction steps.
COMPARED_UPDATES = 2
COMPARED_STEPS = 1000

Progress = Callable[[str, int, int], None]
Floats32 = NDArray[np.float32]


class ActionError(ValueError):
    """An action that is not finite, or outside its space."""


class Trivial(gym.Env[Floats32, Floats32]):
    """Ten steps whose best action can be read from the observation.

    With b = 0.75 + 0.5 o_0 the reward is -(a - b)^2, and the cost 1 where a > 1.5, which b never
    exceeds. ``info["expert_action"]`` is b. The bounds are asymmetric on purpose. ActionError if an
    action is not in the action space.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it as an instance variable
    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-0.5, 2.0, (1,), np.float32)

    def __init__(self, render_mode: None = None) -> None:
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe()

    def _observe(self) -> tuple[Floats32, dict[str, Any]]:
        observation = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        self._best = np.array([0.75 + 0.5 * observation[0]], np.float32)
        return observation, {"expert_action": self._best}

    def step(self, action: Floats32) -> tuple[Floats32, float, bool, bool, dict[str, Any]]:
        given = np.asarray(action)
        if given.shape != (1,) or not np.isfinite(given).all() or not -0.5 <= given[0] <= 2.0:
            raise ActionError(f"{given!r} is outside {self.action_space}")
        reward = -float((given[0] - self._best[0]) ** 2)
        self._steps += 1
        observation, info = self._observe()
        info["cost"] = float(given[0] > 1.5)
        return observation, reward, False, self._steps >= HORIZON, info


gym.register(TRIVIAL, entry_point=f"{__name__}:{Trivial.__name__}")


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it holds (None: could not be told), and what was seen."""

    name: str
    ok: bool | None
    detail: str


class _Enough(KeyboardInterrupt):
    """Ends a run as Ctrl-C would; its own class, so that the user's Ctrl-C ends the whole check."""


def check(
    agent: str,
    config: dict[str, Any],
    steps: int,
    folder: Path,
    progress: Progress = lambda doing, steps, updates: None,
) -> Iterator[Finding]:
    """Run the checks one after the other, writing into ``folder``.

    Checks that depend on a failed one are skipped.

    agent: as on the command line; config: fields of its configuration; steps: interaction steps to
    learn in, at most (the run ends when it has learned); progress: called with what is being done,
    interaction steps and updates. UserError if the agent cannot be imported or refuses a field.
    """
    load_agent(agent)
    cell = _cell(agent, config, steps)
    constructed = _constructs(cell)
    yield constructed
    if not constructed.ok:
        return
    learning = _Watched(cell, folder / "learning", "learning", progress)
    learning.run(until=learning.has_learned)
    for prerequisite in (_runs(learning), _updates_repeatedly(learning)):
        yield prerequisite
        if not prerequisite.ok:
            return
    yield _learns(learning)

    short = cell.model_copy(update={"steps": _steps_to_compare(learning.updates, steps)})
    whole = _Watched(short, folder / "whole", "a short run", progress)
    whole.run()
    if whole.error is not None:
        yield Finding("runs without an error", False, f"the second time: {whole.error}")
        return
    kept = _keeps_to_budget(learning)
    yield _keeps_to_budget(whole) if kept.ok is not False else kept
    if whole.result is None:
        return
    again = _Watched(short, folder / "again", "again, with the same seed", progress)
    again.run()
    compared = f"two runs of {len(whole.updates) - 1} updates, every number compared"
    same = _same_record("same seed, same record", again, whole, compared)
    yield same
    if same.ok:
        yield _resumes(_Watched(short, folder / "stopped", "stopped and resumed", progress), whole)
    progress("saving and loading", 0, 0)
    yield _save_and_load(short, folder / "agent.zip")


def _cell(agent: str, config: dict[str, Any], steps: int) -> Cell:
    spec = agents().get(agent)
    batched = spec is not None and spec.needs_batched
    return Cell(
        agent=agent,
        task=BATCHED if batched else TRIVIAL,
        seed=0,
        steps=steps,
        num_envs=4,
        evaluation_episodes=16,
        evaluation_interval=1,
        config=config,
        # The trivial task as if it had no limit: an agent that begins by regaining safety would
        # learn too late.
        cost_limit=0.0 if batched else float(HORIZON),
        start="backup" if batched else "random",
    )


@contextmanager
def _agent_of(cell: Cell) -> Iterator[tuple[Any, RecordingVecEnv]]:
    with closing(RecordingVecEnv(make_training_env(cell))) as env:
        yield make_agent(cell, env), env


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


class _Watched:
    """One run that is watched while it trains, and stopped when there is no need to see more.

    updates: as far as it was watched; result: its record, if it ended by itself; error: one line,
    if it failed.
    """

    def __init__(self, cell: Cell, folder: Path, doing: str, progress: Progress) -> None:
        self.cell, self.folder = cell, folder
        self.updates: list[Update] = []
        self.result: Run | None = None
        self.error: str | None = None
        self._doing, self._progress = doing, progress

    @property
    def steps(self) -> int:
        return self.updates[-1].interaction_steps

    @property
    def needed(self) -> float:
        """The return to exceed; the best return on the trivial task is 0."""
        start = _return(self.updates[0])
        return start * (1 - LEARNED_SHARE) if self.cell.task == TRIVIAL else start

    def has_learned(self, update: Update) -> bool:
        return update.update >= COMPARED_UPDATES and _return(update) > self.needed

    def run(self, until: Callable[[Update], bool] = lambda update: False) -> None:
        """Run, or resume, until an update for which ``until`` holds or twice the budget is spent.

        That update is the last one of ``updates``, no matter how often progress is reported: what
        is found about the agent must not depend on how fast the machine is.
        """

        def watch(steps: int, updates: int) -> None:
            self._progress(self._doing, steps, updates)
            # Ever more seldom, since each reading takes time proportional to the number of updates.
            if updates <= 1.1 * len(self.updates):
                return
            for update in read_updates(self.folder)[len(self.updates) :]:
                self.updates.append(update)
                if until(update) or update.interaction_steps > 2 * self.cell.steps:
                    raise _Enough

        try:
            run = run_cell(self.cell, self.folder, "check", watch)
        except _Enough:
            return
        if run.status == "finished":
            self.result, self.updates = run, read_updates(self.folder)
        else:
            self.error = f"{run.error}; traceback in {self.folder / 'traceback.txt'}"


def _return(update: Update) -> float:
    assert update.iterate_return is not None  # since every update is evaluated
    return update.iterate_return


# The checks, in their order.


def _constructs(cell: Cell) -> Finding:
    """UserError where the refusal names a field of the given configuration: the user's mistake."""
    name = "constructed as Agent(policy, env, seed=..., **config)"
    try:
        with _agent_of(cell):
            return Finding(name, True, f"by {cell.agent}")
    except Exception as error:
        if any(field in str(error) for field in cell.config):
            raise UserError(f"--config: {_one_line(error)}") from None
        return Finding(name, False, f"{type(error).__name__}: {_one_line(error)}")


def _runs(learning: _Watched) -> Finding:
    if learning.error is None:
        name = "runs without an error, actions finite and inside their space"
        return Finding(name, True, f"on {learning.cell.task}")
    outside = learning.error.startswith(ActionError.__name__)
    name = "actions are finite and inside their space" if outside else "runs without an error"
    return Finding(name, False, learning.error)


def _updates_repeatedly(learning: _Watched) -> Finding:
    number = len(learning.updates) - 1
    seen = f"{number} updates" if number >= 0 else "none seen: does learn() pass its callback on?"
    return Finding("updates its policy more than once", number > 1, seen)


def _learns(learning: _Watched) -> Finding:
    start, best = _return(learning.updates[0]), max(map(_return, learning.updates))
    seen = f"return {start:.3g} at the start, {best:.3g} within {learning.steps} steps"
    expected = f"more than {learning.needed:.3g} expected"
    return Finding("learns", best > learning.needed, f"{seen}; {expected}")


def _steps_to_compare(updates: list[Update], budget: int) -> int:
    """Interaction steps of the runs that are compared, from the learning run's updates."""
    start = updates[0].iterate_return
    changed = next((u.update for u in updates if u.iterate_return != start), 1)
    enough = updates[min(changed + COMPARED_UPDATES, len(updates)) - 1].interaction_steps
    return min(max(enough, COMPARED_STEPS), budget)


def _keeps_to_budget(run: _Watched) -> Finding:
    """The last update may exceed the budget; ok is None for a run that was stopped before that."""
    name, budget = "keeps to the step budget", run.cell.steps
    largest = int(np.diff([u.interaction_steps for u in run.updates]).max(initial=1))
    seen = f"asked for {budget}, took {run.steps}, at most {largest} between two updates"
    if run.result is not None:
        return Finding(name, budget <= run.steps < budget + largest, seen)
    return Finding(name, False if run.steps > 2 * budget else None, f"{seen}, and was stopped")


def _same_record(name: str, run: _Watched, whole: _Watched, compared: str) -> Finding:
    if run.result is None or whole.result is None:
        return Finding(name, False, run.error or "did not end")
    return Finding(name, run.result.digest == whole.result.digest, compared)


def _resumes(run: _Watched, whole: _Watched) -> Finding:
    name = "resumes after being stopped"
    run.run(until=lambda update: update.update == 1)
    if run.result is not None:
        return Finding(name, None, "too fast to be stopped")
    if run.error is None and not (run.folder / CHECKPOINT_FILE).exists():
        with _agent_of(run.cell) as (agent, _):
            agent.learn(total_timesteps=COMPARED_STEPS)
            reason = obstacle(agent) or "none of its attributes by itself"
        return Finding(
            name, False, f"its state cannot be pickled, so a killed run starts again; {reason}"
        )
    run.run()
    compared = "stopped after its first update; the record compared with an undisturbed one"
    return _same_record(name, run, whole, compared)


def _save_and_load(cell: Cell, path: Path) -> Finding:
    name = "save and load keep the policy"
    try:
        with _agent_of(cell) as (agent, env):
            agent.learn(total_timesteps=COMPARED_STEPS)
            shape = (64, *(env.observation_space.shape or ()))
            observations = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
            before = np.asarray(agent.predict(observations, deterministic=True)[0])
            agent.save(path)
            after = np.asarray(type(agent).load(path).predict(observations, deterministic=True)[0])
            worst = float(np.max(np.abs(before - after)))
            return Finding(name, worst == 0.0, f"64 observations, largest difference {worst:.3g}")
    except Exception as error:
        return Finding(name, False, f"{type(error).__name__}: {_one_line(error)}")


def check_and_print(agent: str, config: dict[str, Any], steps: int) -> int:
    """Print every finding of :func:`check` as it is made, and return how many failed.

    The records of the checks are kept where one failed: they and their tracebacks are needed.
    """
    folder = Path(tempfile.mkdtemp(prefix="scpo-bench-check-"))
    status = Console(stderr=True).status("starting")

    def report(doing: str, taken: int, updates: int) -> None:
        status.update(f"{doing}: {taken:,} steps, {updates} updates")

    failed = 0
    try:
        remaining = check(agent, config, steps, folder, report)
        while True:
            with status:  # not while a line is printed: the two may share a terminal
                found = next(remaining, None)
            if found is None:
                break
            failed += found.ok is False
            word = "ok    " if found.ok else "FAILED" if found.ok is False else "?     "
            print(f"{word} {found.name}: {found.detail}", flush=True)
        summary = f"{failed} failed; records in {folder}" if failed else "conforms"
        print(f"{agent}: {summary}")
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)
    return failed
