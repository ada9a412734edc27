"""Does an agent keep to the contract? What ``scpo-bench check`` runs, on a task so small that any
agent should learn it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from scpo_bench.errors import UserError
from scpo_bench.records.files import CHECKPOINT_FILE, read_updates
from scpo_bench.records.schema import Cell, Run, Update
from scpo_bench.runs.checkpoints import obstacle
from scpo_bench.runs.harness import make_agent, make_training_env, run_cell
from scpo_bench.runs.recorder import RecordingVecEnv
from scpo_bench.suites.registry import agents, load_agent

TRIVIAL, HORIZON = "scpo_bench/Trivial-v0", 10
BATCHED = "scpo_bench/HarmfulRegression-v0"
LEARNED_SHARE = 0.3  # of the way from the start policy's return to the best one
# in runs that are compared with one another: updates, from the first one that changes the policy
# ...
COMPARED_UPDATES = 2
COMPARED_STEPS = (
    1000  # ... and interaction steps, at least; shorter runs could not be stopped in the middle
)

Progress = Callable[[str, int, int], None]


class ActionError(ValueError):
    """An action that is not finite, or outside its space."""


class Trivial(gym.Env[Any, Any]):
    """Ten steps; the reward is -(a - b)^2 with b = 0.75 + 0.5 o_0 in sight, the cost 1 where a >
    1.5: b never goes there.

    Bounds are not symmetric on purpose. ``info["expert_action"]`` is b. ActionError for an action
    that is not one.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it as an instance variable
    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-0.5, 2.0, (1,), np.float32)

    def __init__(self, render_mode: None = None) -> None:
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {"expert_action": self._best()}

    def _observe(self) -> Any:
        self._observation = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        return self._observation

    def _best(self) -> Any:
        return np.array([0.75 + 0.5 * self._observation[0]], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        given = np.asarray(action)
        if given.shape != (1,) or not np.isfinite(given).all() or not -0.5 <= given[0] <= 2.0:
            raise ActionError(f"{given!r} is outside {self.action_space}")
        reward = -float((given[0] - self._best()[0]) ** 2)
        self._steps += 1
        observation = self._observe()
        info = {"cost": float(given[0] > 1.5), "expert_action": self._best()}
        return observation, reward, False, self._steps >= HORIZON, info


gym.register(TRIVIAL, entry_point=f"{__name__}:{Trivial.__name__}")


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it holds (None: could not be told), and what was seen.
    """

    name: str
    ok: bool | None
    detail: str


class _Enough(KeyboardInterrupt):
    """Ends a run as Ctrl-C would; its own class, so that the user's Ctrl-C ends the whole check."""


def check(
    agent: str, config: dict[str, Any], steps: int, folder: Path, progress: Progress | None = None
) -> Iterator[Finding]:
    """Run the checks one after the other, writing into ``folder``; what builds on a failed one is
    left out.

    agent: as on the command line; config: fields of its configuration; steps: interaction steps to
    learn in, at most - the run ends when it has learned; progress: called with what is being done,
    interaction steps and updates. Raises :class:`~scpo_bench.suites.registry.UserError` if the
    agent cannot be imported, UserError if it refuses a field.
    """
    load_agent(agent)
    spec = agents().get(agent)
    batched = spec is not None and spec.needs_batched
    # On the trivial task as if there were no limit: agents that begin by regaining safety would
    # learn too late.
    limit, start = (0.0, "backup") if batched else (float(HORIZON), "random")
    cell = Cell(
        agent=agent,
        task=BATCHED if batched else TRIVIAL,
        seed=0,
        steps=steps,
        num_envs=4,
        evaluation_episodes=16,
        evaluation_interval=1,
        config=config,
        cost_limit=limit,
        start=start,  # type: ignore[arg-type]
    )
    made = _constructs(cell)
    yield made
    if not made.ok:
        return

    learning = _Watched(cell, folder / "learning", "learning", progress)
    learning.run(lambda: learning.has_learned or learning.steps > 2 * steps)
    if learning.error is not None:
        outside = learning.error.startswith(ActionError.__name__)
        yield Finding(
            "actions are finite and inside their space" if outside else "runs without an error",
            False,
            learning.error,
        )
        return
    yield Finding(
        "runs without an error, actions finite and inside their space", True, f"on {cell.task}"
    )
    updates = learning.updates
    several = len(updates) > 2
    seen = (
        f"{len(updates) - 1} updates"
        if updates
        else "none seen: does learn() pass its callback on?"
    )
    yield Finding("updates its policy more than once", several, seen)
    if not several:
        return
    yield _learns(learning)

    first = next((u.update for u in updates if u.iterate_return != updates[0].iterate_return), 1)
    enough = updates[min(first + COMPARED_UPDATES - 1, len(updates) - 1)].interaction_steps
    short = cell.model_copy(update={"steps": min(max(enough, COMPARED_STEPS), steps)})
    whole = _Watched(short, folder / "whole", "a short run", progress)
    whole.run(lambda: whole.steps > 2 * short.steps)
    if whole.error is not None:
        yield Finding("runs without an error", False, f"the second time: {whole.error}")
        return
    kept = _keeps_to_budget(learning), _keeps_to_budget(whole)
    yield kept[0] if kept[0].ok is False else kept[1]
    if whole.result is None:
        return
    same = _repeats(short, folder / "again", whole.result, progress)
    yield same
    if same.ok:
        yield _goes_on(short, folder / "stopped", whole.result, progress)
    if progress is not None:
        progress("saving and loading", 0, 0)
    yield _save_and_load(short, folder / "agent.zip")


def _constructs(cell: Cell) -> Finding:
    """UserError where the refusal names a field of the given configuration: that is the user's to
    mend.
    """
    name = "constructed as Agent(policy, env, seed=..., **config)"
    with closing(RecordingVecEnv(make_training_env(cell))) as env:
        try:
            make_agent(cell, env)
        except Exception as error:
            if any(field in str(error) for field in cell.config):
                raise UserError(f"--config: {_first_line(error)}") from None
            return Finding(name, False, f"{type(error).__name__}: {_first_line(error)}")
    return Finding(name, True, f"by {cell.agent}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


class _Watched:
    """One run that is looked at while it goes on, and ended when there is no need to see more.

    steps: interaction steps taken; result: its record, if it ended by itself; error: one line, if
    it failed.
    """

    def __init__(self, cell: Cell, folder: Path, doing: str, progress: Progress | None) -> None:
        self.cell, self.folder = cell, folder
        self.steps = 0
        self.result: Run | None = None
        self.error: str | None = None
        self._doing, self._progress = doing, progress
        self._updates: list[Update] = []

    @property
    def updates(self) -> list[Update]:
        return self._updates

    @property
    def needed(self) -> float:
        """The return to get above."""
        start = self._updates[0].iterate_return
        assert start is not None
        return (
            start * (1 - LEARNED_SHARE) if self.cell.task == TRIVIAL else start
        )  # the best return on the trivial task is 0

    @property
    def best(self) -> float:
        return max(u.iterate_return for u in self._updates if u.iterate_return is not None)

    @property
    def has_learned(self) -> bool:
        return len(self._updates) > COMPARED_UPDATES and self.best > self.needed

    def run(self, enough: Callable[[], bool]) -> None:
        """Run, or go on, until ``enough`` or the end."""

        def watch(steps: int, updates: int) -> None:
            self.steps = steps
            if self._progress is not None:
                self._progress(self._doing, steps, updates)
            if updates > len(self._updates):
                self._updates = read_updates(self.folder)
                if enough():
                    raise _Enough

        try:
            run = run_cell(self.cell, self.folder, "check", watch)
        except _Enough:
            return
        if run.status == "finished":
            self.result, self._updates = run, read_updates(self.folder)
        else:
            self.error = f"{run.error}; traceback in {self.folder / 'traceback.txt'}"


def _learns(learning: _Watched) -> Finding:
    start = learning.updates[0].iterate_return
    seen = f"return {start:.3g} at the start, {learning.best:.3g} within {learning.updates[-1].interaction_steps} steps"
    return Finding(
        "learns",
        learning.best > learning.needed,
        f"{seen}; more than {learning.needed:.3g} expected",
    )


def _keeps_to_budget(run: _Watched) -> Finding:
    """An update may be finished beyond the budget, no more; ok is None for a run that was ended
    before it was used up.
    """
    name, budget = "keeps to the step budget", run.cell.steps
    taken = np.array([u.interaction_steps for u in run.updates])
    largest = int(np.diff(taken).max(initial=1))
    seen = f"asked for {budget}, took {max(run.steps, taken[-1])}, at most {largest} between two updates"
    if run.result is None:
        return Finding(name, False if run.steps > 2 * budget else None, f"{seen}, and did not end")
    return Finding(name, bool(budget <= taken[-1] < budget + largest), seen)


def _repeats(cell: Cell, folder: Path, whole: Run, progress: Progress | None) -> Finding:
    again = _Watched(cell, folder, "again, with the same seed", progress)
    again.run(lambda: False)
    if again.result is None:
        return Finding("same seed, same record", False, again.error or "the second run did not end")
    same = again.result.digest == whole.digest
    return Finding(
        "same seed, same record",
        same,
        f"two runs of {whole.updates - 1} updates, every number compared",
    )


def _goes_on(cell: Cell, folder: Path, whole: Run, progress: Progress | None) -> Finding:
    name = "goes on after being stopped"
    run = _Watched(cell, folder, "stopped, and going on", progress)
    run.run(lambda: len(run.updates) >= 2)
    if run.result is not None:
        return Finding(name, None, "too fast to be stopped")
    if run.error is None and not (folder / CHECKPOINT_FILE).exists():
        return Finding(
            name,
            False,
            f"its state cannot be pickled, so a killed run starts again; {_obstacle(cell)}",
        )
    run.run(lambda: False)
    if run.result is None:
        return Finding(name, False, run.error or "did not end")
    same = run.result.digest == whole.digest
    return Finding(
        name, same, "stopped after its first update; the record compared with an undisturbed one"
    )


def _obstacle(cell: Cell) -> str:
    with closing(RecordingVecEnv(make_training_env(cell))) as env:
        agent = make_agent(cell, env)
        agent.learn(total_timesteps=COMPARED_STEPS)
        return obstacle(agent) or "none of its attributes by itself"


def _save_and_load(cell: Cell, path: Path) -> Finding:
    name = "save and load keep the policy"
    with closing(RecordingVecEnv(make_training_env(cell))) as env:
        try:
            agent = make_agent(cell, env)
            agent.learn(total_timesteps=COMPARED_STEPS)
            rng = np.random.default_rng(0)
            shape = env.observation_space.shape
            assert shape is not None
            observations = rng.uniform(-1, 1, (64, *shape)).astype(np.float32)
            before = np.asarray(agent.predict(observations, deterministic=True)[0])
            agent.save(path)
            after = np.asarray(type(agent).load(path).predict(observations, deterministic=True)[0])
            worst = float(np.max(np.abs(before - after)))
            return Finding(name, worst == 0.0, f"64 observations, largest difference {worst:.3g}")
        except Exception as error:
            return Finding(name, False, f"{type(error).__name__}: {_first_line(error)}")
