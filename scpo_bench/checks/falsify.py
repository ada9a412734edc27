"""Tries to prove SCPO's certificate wrong: a search for certified updates that exceed their bound.

For every policy visited in training, the update is certified again with other smoothness constants,
probe radii and directions, and evaluated. A breach with a valid L would falsify the guarantee;
breaches with an understated one show that the search can find them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from scpo_bench.checks.counterexample import Counterexample, Evaluate, Setting, certify, smallest
from scpo_bench.checks.known_functions import KnownFunctions
from scpo_bench.contract import Floats
from scpo_bench.errors import UserError, nearest
from scpo_bench.records.schema import Cell
from scpo_bench.runs.agents import make_agent
from scpo_bench.runs.environments import make_training_env
from scpo_bench.scpo.agent import SCPO
from scpo_bench.scpo.bank import DirectionMemory, orthonormal_bank
from scpo_bench.scpo.constraints import Constraints, Exact
from scpo_bench.scpo.guard import Decision, Guard
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.suites.cells import cells, get_suite
from scpo_bench.suites.registry import tasks
from scpo_bench.suites.schema import default_file, load_benchmarks

KNOWN = "known-smoothness"
KNOWN_DIMENSIONS = (2, 10, 50)  # one after the other, seed by seed
FACTORS = tuple(2.0**e for e in range(-7, 3))
RADII = (1e-4, 1e-3, 1e-2)
DIRECTIONS = ("remembered", "random")
RULES = ("sampled", "adaptive")


class Visit(NamedTuple):
    """What an update of training started from."""

    update: int
    w: Floats
    proposal: Floats
    memory: DirectionMemory


@dataclass(frozen=True)
class Subject:
    """What is examined: constraints g, and what training visited. L: where it is known."""

    task: str
    seed: int
    evaluate: Evaluate
    visits: Sequence[Visit]
    directions: int
    trust_radius: float
    L: float | None


class _WatchingGuard(Guard):
    """Keeps what every update started from."""

    def __init__(self, config: GuardConfig) -> None:
        super().__init__(config)
        self.visits: list[Visit] = []

    def update(
        self,
        w: Floats,
        propose: Callable[[], Floats],
        constraints: Constraints,
        *rest: Any,
        **named: Any,
    ) -> Decision:
        memory = self.memory or DirectionMemory.empty(len(constraints.names), len(w))

        def watched() -> Floats:
            proposal = propose()
            self.visits.append(Visit(self.updates, w, proposal, memory))
            return proposal

        return super().update(w, watched, constraints, *rest, **named)


# ---- subjects


def check_task(task: str) -> None:
    """Raise UserError unless ``task`` can be examined."""
    known = [KNOWN, *(spec.id for spec in tasks().values() if spec.batched and spec.labelled)]
    if task not in known:
        raise UserError(f"--task: cannot falsify on '{task}'{nearest(task, known)}")


def _cell(task: str, seed: int, updates: int, rule: str) -> Cell:
    """SCPO in ``certified`` mode, with the settings that suite ``quick`` gives it on the task."""
    suite = get_suite(load_benchmarks(default_file()), "quick")
    cell = cells(suite, ["scpo"], [task], 1)[0]
    per_update = cell.num_envs * int(cell.config.get("n_steps", 30))
    config = {**cell.config, "mode": "certified", "smoothness": rule}
    return cell.model_copy(update={"seed": seed, "steps": updates * per_update, "config": config})


def _agent(cell: Cell) -> tuple[SCPO, Evaluate]:
    """(untrained agent, its constraints as a function)."""
    agent = make_agent(cell, make_training_env(cell))
    assert isinstance(agent, SCPO)
    constraints = agent.constraints
    assert isinstance(constraints, Exact)
    return agent, constraints.values


def known_subject(seed: int, updates: int) -> Subject:
    """Functions whose L is known, and a walk through their safe set along certified steps."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    d = KNOWN_DIMENSIONS[seed % len(KNOWN_DIMENSIONS)]
    functions = KnownFunctions(d, 3, rng)
    config = GuardConfig(
        mode="certified",
        smoothness="apriori",
        L=functions.L,
        directions=min(8, d),
        probe_radius=RADII[0],
        trust_radius=2.0,
    )
    guard, w = _WatchingGuard(config), np.zeros(d)
    for _ in range(updates):
        decision = guard.update(
            w, lambda: rng.normal(size=d), Exact(functions.names, functions), rng
        )
        w = decision.w
    return Subject(KNOWN, seed, functions, guard.visits, config.directions, 2.0, functions.L)


def _subjects(
    task: str,
    seed: int,
    updates: int,
    rules: dict[str, tuple[int, int]],
    progress: Callable[[str, int, int], None],
) -> Iterator[Subject]:
    """What to examine on ``task``; adds the breaches of training to ``rules``."""
    if task == KNOWN:
        yield known_subject(seed, updates)
        return
    for rule in RULES:
        cell = _cell(task, seed, updates, rule)
        agent, evaluate = _agent(cell)
        agent.guard = guard = _WatchingGuard(agent.config)

        class Watch(BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_start(self, rule: str = rule, guard: Guard = guard) -> None:
                what = f"seed {seed}: training, {rule} smoothness"
                progress(what, guard.updates, updates)

        agent.learn(cell.steps, Watch())
        breaches, certified = rules.get(rule, (0, 0))
        rules[rule] = breaches + guard.breaches, certified + guard.updates - guard.recoveries
        if rule == RULES[-1]:
            visits = guard.visits[:: max(1, len(guard.visits) // 8)]
            config = agent.config
            yield Subject(
                task, seed, evaluate, visits, config.directions, config.trust_radius, None
            )


# ---- the search


def examine(subject: Subject) -> Iterator[tuple[Setting, Counterexample | None]]:
    """Every visit, certified with every setting: (setting, counterexample if it breached).

    Steps of length 0 are left out.
    """
    rng = np.random.default_rng(np.random.SeedSequence([subject.seed, 1]))

    def constants(curvature: Floats) -> list[Floats]:
        base = curvature if subject.L is None else np.full_like(curvature, subject.L)
        return [factor * base for factor in FACTORS]

    for update, w, proposal, memory in subject.visits:
        # A complete basis leaves nothing to choose.
        for directions in DIRECTIONS if subject.directions < len(w) else ("all",):
            remembered = memory.candidates(w, ("normals", "momentum", "start"), ())
            known = remembered if directions == "remembered" else []
            basis = orthonormal_bank(proposal, known, subject.directions, 1.0, rng).basis
            for radius in RADII:
                steps = certify(
                    subject.evaluate, w, basis, proposal, radius, subject.trust_radius, constants
                )
                for factor, step in zip(FACTORS, steps):
                    if not step.z.any():
                        continue
                    setting = Setting(factor=factor, radius=radius, directions=directions)
                    found = None
                    if step.breached:
                        found = Counterexample(
                            task=subject.task,
                            seed=subject.seed,
                            update=update,
                            setting=setting,
                            w=w.tolist(),
                            basis=basis.tolist(),
                            proposal=proposal.tolist(),
                            L=step.L.tolist(),
                            trust_radius=subject.trust_radius,
                            step_norm=float(np.linalg.norm(step.z)),
                            bound=step.bound.tolist(),
                            realised=step.realised.tolist(),
                        )
                    yield setting, found


@dataclass(frozen=True)
class Report:
    """Breach rates.

    rates: setting -> (breaches, certified steps). rules: smoothness rule -> (breaches, updates), of
    the agent as it trains. counterexample: the shortest step that breached.
    """

    task: str
    rates: dict[Setting, tuple[int, int]]
    rules: dict[str, tuple[int, int]]
    counterexample: Counterexample | None

    @property
    def known(self) -> bool:
        """Whether the search knew L."""
        return self.task == KNOWN

    def by_factor(self) -> dict[float, tuple[int, int]]:
        totals = dict.fromkeys(FACTORS, (0, 0))
        for setting, (breaches, steps) in self.rates.items():
            before = totals[setting.factor]
            totals[setting.factor] = before[0] + breaches, before[1] + steps
        return totals

    @property
    def falsified(self) -> bool:
        """A breach although L was known and not understated."""
        return self.known and any(
            breaches for factor, (breaches, _) in self.by_factor().items() if factor >= 1
        )


def falsify(
    task: str, seeds: int, updates: int, progress: Callable[[str, int, int], None]
) -> Report:
    """Search on ``task``; ``progress`` is called with (what, done, of).

    Raises UserError if there is no such task to search on.
    """
    check_task(task)
    rates: dict[Setting, tuple[int, int]] = defaultdict(lambda: (0, 0))
    rules: dict[str, tuple[int, int]] = {}
    shortest: Counterexample | None = None
    for seed in range(seeds):
        for subject in _subjects(task, seed, updates, rules, progress):
            total = len(subject.visits) * len(DIRECTIONS) * len(RADII) * len(FACTORS)
            for done, (setting, found) in enumerate(examine(subject)):
                breaches, steps = rates[setting]
                rates[setting] = breaches + (found is not None), steps + 1
                if found is not None and (shortest is None or found.step_norm < shortest.step_norm):
                    shortest = smallest(found, subject.evaluate)
                progress(f"seed {seed}: certifying again", done, total)
    return Report(task, dict(rates), rules, shortest)


def replay_lines(found: Counterexample) -> tuple[list[str], bool]:
    """A counterexample then and now, in words, and whether it still breaches."""
    bound, realised = replay(found)

    def numbers(values: Iterable[float]) -> str:
        return " ".join(f"{value:.6g}" for value in values)

    breached = bool((realised > bound).any())
    return [
        f"bound     then {numbers(found.bound)}   now {numbers(bound)}",
        f"realised  then {numbers(found.realised)}   now {numbers(realised)}",
        "it breaches" if breached else "it does not breach",
    ], breached


def replay(found: Counterexample) -> tuple[Floats, Floats]:
    """(bound [k], realised [k]) of the counterexample's update, computed again."""
    check_task(found.task)
    if found.task == KNOWN:
        evaluate = known_subject(found.seed, 0).evaluate
        dimension = KNOWN_DIMENSIONS[found.seed % len(KNOWN_DIMENSIONS)]
    else:
        # Policies are coordinates in a space that the start policy defines: no training is needed.
        agent, evaluate = _agent(_cell(found.task, found.seed, 1, RULES[-1]))
        dimension = agent.space.dimension
    if len(found.w) != dimension:
        raise UserError(
            f"counterexample: w: expected {dimension} numbers for {found.task}, got {len(found.w)}"
        )
    step = found.repeat(evaluate, np.array(found.proposal))
    return step.bound, step.realised


def report_lines(report: Report) -> Iterator[str]:
    """The counts of a report, and its verdict where L is known."""
    yield f"{'factor on L':>12}  {'breaches':>8} of {'steps':>6}"
    for factor, (breaches, steps) in report.by_factor().items():
        yield f"{factor:12g}  {breaches:8} of {steps:6}  {100 * breaches / max(steps, 1):5.1f} %"
    for rule, (breaches, of) in report.rules.items():
        share = f"{100 * breaches / max(of, 1):.1f} %"
        yield f"the agent, certified mode, {rule} L: {breaches} breaches in {of} updates, {share}"
    if found := report.counterexample:
        excess = f"exceeds its bound by {found.excess:.3g}, factor {found.setting.factor:g}"
        yield f"smallest counterexample: |step| {found.step_norm:.3g}, {excess}"
    if report.falsified:
        yield "FALSIFIED: a breach although L is known and not understated"
    elif report.known:
        yield "no breach with a valid L"
