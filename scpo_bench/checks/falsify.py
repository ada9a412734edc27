"""The instrument that would prove SCPO's certificate wrong: a search for certified updates that
exceed their bound.

For every policy visited in training, the update is certified again with other smoothness constants,
probe radii and directions, and looked at. A breach with a valid L would falsify the guarantee;
breaches with an understated one show that the search can find them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scpo_bench.checks.known_functions import KnownFunctions
from scpo_bench.errors import UserError, nearest
from scpo_bench.records.files import write_atomically
from scpo_bench.records.schema import Cell
from scpo_bench.scpo.directions import DirectionMemory, probe_basis
from scpo_bench.scpo.guard import Guard, GuardConfig
from scpo_bench.scpo.projection import Certificate, Floats, project
from scpo_bench.scpo.smoothness import second_differences
from scpo_bench.suites.registry import tasks

KNOWN = "known-smoothness"
KNOWN_DIMENSIONS = (2, 10, 50)  # one after the other, seed by seed
FACTORS = tuple(2.0**e for e in range(-7, 3))
RADII = (1e-4, 1e-3, 1e-2)
DIRECTIONS = ("remembered", "random")
RULES = ("sampled", "adaptive")
FORMAT = 1
MAX_COUNTEREXAMPLE_BYTES = 16 << 20
# realised values this far above their bound are not called a breach: g itself is computed in
# floating point
ROUNDING = 1e-9


@dataclass(frozen=True)
class Setting:
    """How an update was certified. factor: on L, which is the known one, or what second differences
    along the probes show.
    """

    factor: float
    radius: float
    directions: str


@dataclass(frozen=True)
class Counterexample:
    """Everything that repeats a breach: certify at w [d] along ``basis`` [d, m], project
    ``proposal`` [d], look.
    """

    task: str
    seed: int
    update: int
    setting: Setting
    w: list[float]
    basis: list[list[float]]
    proposal: list[float]
    L: list[float]
    trust_radius: float
    step_norm: float
    bound: list[float]
    realised: list[float]

    @property
    def excess(self) -> float:
        return float(np.max(np.subtract(self.realised, self.bound)))


@dataclass(frozen=True)
class Subject:
    """What is examined: constraints g, and the (update, w, proposal, memory) visited.

    L: [k] where it is known.
    """

    task: str
    seed: int
    names: tuple[str, ...]
    evaluate: Callable[[Floats], Floats]
    visits: Sequence[tuple[int, Floats, Floats, DirectionMemory]]
    directions: int
    trust_radius: float
    L: Floats | None


def task_cell(task: str, seed: int, updates: int, rule: str) -> Cell:
    """SCPO in ``certified`` mode on one of the paper's tasks, with the settings that suite
    ``quick`` gives it there.
    """
    from scpo_bench.suites.cells import cells, get_suite
    from scpo_bench.suites.schema import default_file, load_benchmarks

    suite = get_suite(load_benchmarks(default_file()), "quick")
    cell = cells(suite, ["scpo"], [task], 1)[0]
    per_update = cell.num_envs * int(cell.config.get("n_steps", 30))
    config = {**cell.config, "mode": "certified", "smoothness": rule}
    return cell.model_copy(update={"seed": seed, "steps": updates * per_update, "config": config})


def check_task(task: str) -> None:
    """Raise UserError unless ``task`` can be examined."""
    known = [KNOWN, *(spec.id for spec in tasks().values() if spec.batched and spec.labelled)]
    if task not in known:
        raise UserError(f"--task: cannot falsify on '{task}'{nearest(task, known)}")


class _WatchingGuard(Guard):
    """Keeps what every update started from."""

    def __init__(self, config: GuardConfig) -> None:
        super().__init__(config)
        self.visits: list[tuple[int, Floats, Floats, DirectionMemory]] = []

    def step(
        self,
        w: Floats,
        proposal: Floats,
        constraints: Any,
        rng: Any,
        cost_gradients: Sequence[Floats] = (),
    ) -> Floats:
        memory = self._memory or DirectionMemory.empty(len(constraints.names), len(w))
        self.visits.append((self.updates, w, proposal, memory))
        return super().step(w, proposal, constraints, rng, cost_gradients)


def train(cell: Cell, progress: Callable[[int], None]) -> tuple[Any, _WatchingGuard]:
    """(agent, its guard) after training; progress is told the updates done."""
    from stable_baselines3.common.callbacks import BaseCallback

    from scpo_bench.runs.harness import make_agent, make_training_env

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            progress(self.model.guard.updates)  # type: ignore[attr-defined]

    agent = make_agent(cell, make_training_env(cell))
    agent.guard = _WatchingGuard(agent.config)
    agent.learn(cell.steps, Watch())
    return agent, agent.guard


def known_subject(seed: int, updates: int) -> Subject:
    """Functions whose L is known, and a walk through their safe set along certified steps."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    d = KNOWN_DIMENSIONS[seed % len(KNOWN_DIMENSIONS)]
    functions = KnownFunctions(d, 3, rng)
    w, memory = np.zeros(d), DirectionMemory.empty(3, d)
    visits = []
    for update in range(1, updates + 1):
        proposal = rng.normal(size=d)
        visits.append((update, w, proposal, memory))
        basis = probe_basis(
            proposal, memory.candidates(w, ("normals", "momentum", "start"), ()), min(8, d), rng
        )
        g, slopes, _ = _probe(functions, w, basis, RADII[0])
        z = project(
            Certificate(g, slopes, 0.5 * functions.L * RADII[0], functions.L),
            basis.T @ proposal,
            2.0,
        ).z
        w, memory = w + basis @ z, memory.seen(basis, slopes, z)
    return Subject(KNOWN, seed, functions.names, functions, visits, min(8, d), 2.0, functions.L)


def _probe(
    evaluate: Callable[[Floats], Floats], w: Floats, basis: Floats, radius: float
) -> tuple[Floats, Floats, Floats]:
    """(g [k], slopes [k, m] by central differences, second differences [k])."""
    values = evaluate(np.concatenate([w[None], w + radius * basis.T, w - radius * basis.T]))
    m = basis.shape[1]
    g, plus, minus = values[0], values[1 : m + 1], values[m + 1 :]
    return g, (plus - minus).T / (2 * radius), second_differences(g, plus, minus, radius)


def _certified_step(
    evaluate: Callable[[Floats], Floats],
    w: Floats,
    basis: Floats,
    proposal: Floats,
    radius: float,
    L: Floats,
    trust: float,
) -> tuple[Floats, Floats, Floats]:
    """(z, bound, realised) of one certified update."""
    g, slopes, _ = _probe(evaluate, w, basis, radius)
    result = project(Certificate(g, slopes, 0.5 * L * radius, L), basis.T @ proposal, trust)
    return result.z, result.bound, evaluate((w + basis @ result.z)[None])[0]


def examine(subject: Subject) -> Iterator[tuple[Setting, bool, Counterexample | None]]:
    """Every visit, certified with every setting:

    (setting, breached, counterexample if so). Steps of length 0 are left out.
    """
    rng = np.random.default_rng(np.random.SeedSequence([subject.seed, 1]))
    for update, w, proposal, memory in subject.visits:
        # A complete basis leaves nothing to choose.
        for directions in DIRECTIONS if subject.directions < len(w) else ("all",):
            remembered = (
                memory.candidates(w, ("normals", "momentum", "start"), ())
                if directions == "remembered"
                else []
            )
            basis = probe_basis(proposal, remembered, subject.directions, rng)
            for radius in RADII:
                g, slopes, curvature = _probe(subject.evaluate, w, basis, radius)
                if (g > 0).any():
                    continue  # nothing is certified from an unsafe policy
                base = curvature if subject.L is None else subject.L
                steps, bounds = [], []
                for factor in FACTORS:
                    L = factor * base
                    result = project(
                        Certificate(g, slopes, 0.5 * L * radius, L),
                        basis.T @ proposal,
                        subject.trust_radius,
                    )
                    steps.append(result.z)
                    bounds.append(result.bound)
                realised = subject.evaluate(w + np.stack(steps) @ basis.T)
                for factor, z, bound, seen in zip(FACTORS, steps, bounds, realised):
                    if not z.any():
                        continue
                    setting = Setting(factor, radius, directions)
                    if not (seen > bound + ROUNDING).any():
                        yield setting, False, None
                        continue
                    yield (
                        setting,
                        True,
                        Counterexample(
                            subject.task,
                            subject.seed,
                            update,
                            setting,
                            w.tolist(),
                            basis.tolist(),
                            proposal.tolist(),
                            (factor * base).tolist(),
                            subject.trust_radius,
                            float(np.linalg.norm(z)),
                            bound.tolist(),
                            seen.tolist(),
                        ),
                    )


def smallest(subject: Subject, found: Counterexample) -> Counterexample:
    """``found`` with its proposal halved for as long as it still breaches."""
    w, basis, L = np.array(found.w), np.array(found.basis), np.array(found.L)
    best = found
    for _ in range(20):
        proposal = np.array(best.proposal) / 2
        z, bound, realised = _certified_step(
            subject.evaluate, w, basis, proposal, found.setting.radius, L, found.trust_radius
        )
        if not (realised > bound + ROUNDING).any():
            return best
        best = replace(
            best,
            proposal=proposal.tolist(),
            step_norm=float(np.linalg.norm(z)),
            bound=bound.tolist(),
            realised=realised.tolist(),
        )
    return best


@dataclass(frozen=True)
class Report:
    """rates: setting -> (breaches, certified steps). rules: smoothness rule -> (breaches, updates),
    of the agent as it trains.
    """

    task: str
    known: bool
    rates: dict[Setting, tuple[int, int]]
    rules: dict[str, tuple[int, int]]
    counterexample: Counterexample | None
    """The shortest step that breached."""

    def by_factor(self) -> dict[float, tuple[int, int]]:
        total: dict[float, list[int]] = {factor: [0, 0] for factor in FACTORS}
        for setting, (breaches, steps) in self.rates.items():
            total[setting.factor][0] += breaches
            total[setting.factor][1] += steps
        return {factor: (breaches, steps) for factor, (breaches, steps) in total.items()}

    @property
    def falsified(self) -> bool:
        """A breach although L was known and not understated."""
        return self.known and any(
            breaches for factor, (breaches, _) in self.by_factor().items() if factor >= 1
        )


def falsify(
    task: str, seeds: int, updates: int, progress: Callable[[str, int, int], None]
) -> Report:
    """Search on ``task``: progress is told (what, done, of).

    UserError if there is no such task to search on.
    """
    check_task(task)
    rates: dict[Setting, list[int]] = defaultdict(lambda: [0, 0])
    rules: dict[str, list[int]] = {} if task == KNOWN else {rule: [0, 0] for rule in RULES}
    shortest: Counterexample | None = None
    for seed in range(seeds):
        for subject in _subjects(task, seed, updates, rules, progress):
            per_visit = len(DIRECTIONS) * len(RADII) * len(FACTORS)
            for done, (setting, breached, found) in enumerate(examine(subject)):
                rates[setting][0] += breached
                rates[setting][1] += 1
                if found is not None and (shortest is None or found.step_norm < shortest.step_norm):
                    shortest = smallest(subject, found)
                progress(f"seed {seed}: certifying again", done, len(subject.visits) * per_visit)
    plain = {setting: (b, n) for setting, (b, n) in rates.items()}
    return Report(
        task, task == KNOWN, plain, {rule: (b, n) for rule, (b, n) in rules.items()}, shortest
    )


def _subjects(
    task: str,
    seed: int,
    updates: int,
    rules: dict[str, list[int]],
    progress: Callable[[str, int, int], None],
) -> Iterator[Subject]:
    if task == KNOWN:
        yield known_subject(seed, updates)
        return
    for rule in RULES:
        cell = task_cell(task, seed, updates, rule)

        def show(done: int, what: str = f"seed {seed}: training, {rule} smoothness") -> None:
            progress(what, done, updates)

        agent, guard = train(cell, show)
        rules[rule][0] += guard.breaches
        rules[rule][1] += guard.updates - guard.recoveries
        if rule == RULES[-1]:
            every = max(1, len(guard.visits) // 8)
            yield Subject(
                task,
                seed,
                agent.constraints.names,
                lambda w, agent=agent: agent.evaluator(agent.space, w),  # type: ignore[misc]
                guard.visits[::every],
                agent.config.directions,
                agent.config.trust_radius,
                None,
            )


# ---- counterexamples
# -------------------------------------------------------------------------------------------------------


def save(found: Counterexample, path: Path) -> None:
    """As JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, json.dumps({"format": FORMAT, **asdict(found)}, allow_nan=False).encode()
    )


def load(path: Path) -> Counterexample:
    """A saved counterexample, checked. UserError if the file is not one."""
    try:
        if path.stat().st_size > MAX_COUNTEREXAMPLE_BYTES:
            raise UserError(
                f"{path}: larger than {MAX_COUNTEREXAMPLE_BYTES >> 20} MiB, no counterexample is"
            )
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: expected JSON as `scpo-bench falsify` writes it") from None
    try:
        if content.pop("format") != FORMAT:
            raise UserError(f"{path}: format: expected {FORMAT}")
        setting = Setting(**content.pop("setting"))
        found = Counterexample(setting=setting, **content)
        w, basis, proposal = (
            np.array(v, dtype=np.float64) for v in (found.w, found.basis, found.proposal)
        )
        L, bound, realised = (
            np.array(v, dtype=np.float64) for v in (found.L, found.bound, found.realised)
        )
        shapes_fit = (
            basis.ndim == 2
            and basis.shape[0] == len(w) == len(proposal)
            and len(L) == len(bound) == len(realised)
        )
        numbers = [setting.radius, setting.factor, found.trust_radius, *L]
        fits = (
            shapes_fit
            and all(np.isfinite(v).all() for v in (w, basis, proposal, L))
            and min(numbers) >= 0
            and setting.radius > 0
        )
        fits = (
            fits and isinstance(found.seed, int) and isinstance(found.task, str) and found.seed >= 0
        )
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: not a counterexample as `scpo-bench falsify` writes it")
    check_task(found.task)
    return found


def replay(found: Counterexample) -> tuple[Floats, Floats]:
    """(bound [k], realised [k]) of the counterexample's update, computed anew."""
    if found.task == KNOWN:
        subject = known_subject(found.seed, 0)
        evaluate, dimension = subject.evaluate, KNOWN_DIMENSIONS[found.seed % len(KNOWN_DIMENSIONS)]
    else:
        # Policies are coordinates in a space that the start policy defines; no training is needed
        # to have it.
        agent, _ = train(task_cell(found.task, found.seed, 1, RULES[-1]), lambda done: None)
        evaluate, dimension = (lambda w: agent.evaluator(agent.space, w)), agent.space.dimension
    if len(found.w) != dimension:
        raise UserError(
            f"counterexample: w: expected {dimension} numbers for {found.task}, got {len(found.w)}"
        )
    _, bound, realised = _certified_step(
        evaluate,
        np.array(found.w),
        np.array(found.basis),
        np.array(found.proposal),
        found.setting.radius,
        np.array(found.L),
        found.trust_radius,
    )
    return bound, realised


# ---- the figure
# ------------------------------------------------------------------------------------------------------------


def draw(report: Report, path: Path) -> None:
    """Breach rate against the factor on L, one line per probe radius and kind of directions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from scpo_bench.leaderboard.plots import COLOURS, DASHES, STYLE

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
        for i, radius in enumerate(RADII):
            for j, directions in enumerate(("all", *DIRECTIONS)):
                seen = [
                    report.rates.get(Setting(factor, radius, directions), (0, 0))
                    for factor in FACTORS
                ]
                if not any(steps for _, steps in seen):
                    continue
                points = [100 * breaches / steps if steps else np.nan for breaches, steps in seen]
                label = f"{directions} directions, probes {radius:g}"
                axes.plot(
                    FACTORS,
                    points,
                    color=COLOURS[i],
                    linestyle=DASHES[j],
                    marker="o",
                    markersize=3,
                    label=label,
                )
        for i, (rule, (breaches, updates)) in enumerate(report.rules.items()):
            rate = 100 * breaches / max(updates, 1)
            axes.axhline(
                rate,
                color=COLOURS[5 + i],
                linestyle=DASHES[2],
                label=f"the agent, {rule} L: {rate:.1f} %",
            )
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(FACTORS, [f"{f:g}" if f >= 1 else f"1/{1 / f:g}" for f in FACTORS])
        axes.set_ylim(-2, 102)
        axes.set_xlabel(
            "factor on " + ("the known L" if report.known else "L as sampled along the probes")
        )
        axes.set_ylabel("certified steps that breach, %")
        axes.set_title(f"{report.task}: breaches of the certificate")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


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
