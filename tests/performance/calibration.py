"""PPO-Lagrangian and CPO beside OmniSafe 0.5.0 at the same settings: training return and cost.

    python tests/performance/calibration.py run [--tasks ...] [--agents ...] [--seeds 3]
        [--steps 1000000] [--libraries ours omnisafe] [--jobs 1] [--omnisafe-python PATH]
    python tests/performance/calibration.py report [--write docs]

``run`` makes the runs that are missing, seed by seed; each writes one file to
tests/data/calibration/ when it ends, so the same command resumes. A run of 1e6 steps takes 10 to 70
minutes. ``report`` prints docs/calibration.md as the files give it; with --write it writes the page
and docs/figures/calibration.png. OmniSafe's environment is created on first use: see
side_by_side.py.

Settings: OmniSafe's defaults and its recipe for 1e6 steps, 2048 steps per update (OmniSafe 0.5.0,
examples/benchmarks/run_experiment_grid.py). One environment: OmniSafe resets it before every
update, so of several with 2048 steps between them, none would finish an episode of 1000.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from side_by_side import (
    THEIR_NAMES,
    make_environments,
    normalised,
    omnisafe_python,
    train_omnisafe,
)

TASKS = ("SafetyHopperVelocity-v1", "SafetySwimmerVelocity-v1", "SafetyPointGoal1-v0")
AGENTS = ("ppo-lagrangian", "cpo")
LIBRARIES = ("ours", "omnisafe")
SEEDS, STEPS = 3, 1_000_000
STEPS_PER_UPDATE, COST_LIMIT = 2048, 25.0
WINDOW = 50
"""Episodes in a moving average (OmniSafe 0.5.0, algorithms/on_policy/base/policy_gradient.py)."""
COST_AXIS = 100.0
"""Top of the figure's cost axes: untrained policies cost several times the limit."""
# Not those of the other figures, which are close: here dashes tell libraries apart, not agents.
COLOURS = {"ppo-lagrangian": "#0072B2", "cpo": "#D55E00"}
DATA = Path(__file__).parents[1] / "data" / "calibration"

Series = list[float | None]


@dataclass(frozen=True)
class Plan:
    """One training run."""

    library: str
    task: str
    agent: str
    seed: int
    steps: int

    def path(self, data: Path) -> Path:
        """Where its curve belongs."""
        name = f"{self.library}-{self.task}-{self.agent}-{self.steps}-steps-seed-{self.seed}.json"
        return data / name

    def updates(self) -> int:
        """Whole updates in ``steps``."""
        return self.steps // STEPS_PER_UPDATE


def plans(
    libraries: Iterable[str], tasks: Iterable[str], agents: Iterable[str], seeds: int, steps: int
) -> list[Plan]:
    """Seed by seed, and the libraries side by side: a part of the runs is a fair part."""
    product = itertools.product(range(seeds), tasks, agents, libraries)
    return [Plan(library, task, agent, seed, steps) for seed, task, agent, library in product]


# ---- runs ----


@dataclass(frozen=True)
class Curve:
    """After every update: mean return and cost of the last ``WINDOW`` episodes, None before any."""

    steps: list[int]
    returns: Series
    costs: Series


def trailing_means(values_UE: Iterable[list[float]], window: int) -> Series:
    """Mean of the last ``window`` values after every update; None while there is none.

    values_UE: per update, the values of the episodes that ended in it, in order.
    """
    last: deque[float] = deque(maxlen=window)
    means: Series = []
    for values in values_UE:
        last.extend(values)
        means.append(statistics.fmean(last) if last else None)
    return means


def run_ours(plan: Plan) -> tuple[Curve, dict[str, Any], dict[str, Any]]:
    """Curve, configuration and package versions of a run in this process, with one thread."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    from scpo_bench.runs.provenance import provenance
    from scpo_bench.runs.recorder import Collection, RecordingVecEnv
    from scpo_bench.suites.registry import load_agent

    torch.set_num_threads(1)
    recording = RecordingVecEnv(make_environments(plan.task, 1))
    collections: list[Collection] = []

    class TakeCollections(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            collections.append(recording.take())

    agent = load_agent(plan.agent)(
        "MlpPolicy",
        normalised(recording),
        seed=plan.seed,
        steps_per_update=STEPS_PER_UPDATE,
        cost_limit=COST_LIMIT,
    )
    agent.learn(plan.updates() * STEPS_PER_UPDATE, TakeCollections())
    curve = Curve(
        [STEPS_PER_UPDATE * (i + 1) for i in range(len(collections))],
        trailing_means([c.returns for c in collections], WINDOW),
        trailing_means([c.costs for c in collections], WINDOW),
    )
    origin = provenance()
    versions = {"commit": origin["commit"], "python": origin["python"], **origin["versions"]}
    return curve, dataclasses.asdict(agent.config), versions


def run_omnisafe(plan: Plan, python: Path) -> tuple[Curve, dict[str, Any], dict[str, Any]]:
    """As ``run_ours``, in OmniSafe's environment, with one torch thread."""
    limit_of = "algo_cfgs" if plan.agent == "cpo" else "lagrange_cfgs"
    settings: dict[str, Any] = {
        "seed": plan.seed,
        "train_cfgs": {
            "total_steps": plan.updates() * STEPS_PER_UPDATE,
            "vector_env_nums": 1,
            "torch_threads": 1,
        },
        "algo_cfgs": {"steps_per_epoch": STEPS_PER_UPDATE},
    }
    settings.setdefault(limit_of, {})["cost_limit"] = COST_LIMIT
    trained = train_omnisafe(python, plan.agent, plan.task, settings)
    curve = Curve(
        [int(float(row["TotalEnvSteps"])) for row in trained.progress],
        [_number(row["Metrics/EpRet"]) for row in trained.progress],
        [_number(row["Metrics/EpCost"]) for row in trained.progress],
    )
    return curve, trained.config, trained.versions


def _number(text: str) -> float | None:
    """None for the NaN that OmniSafe writes before the first episode has ended."""
    value = float(text)
    return value if value == value else None


def _rounded(series: Series) -> Series:
    return [value if value is None else float(f"{value:.5g}") for value in series]


def make(plan: Plan, data: Path, python: Path | None) -> float:
    """Make one run and write its file; its seconds."""
    from scpo_bench.records.files import write_atomically
    from scpo_bench.runs.provenance import provenance

    start = time.perf_counter()
    curve, config, versions = run_ours(plan) if python is None else run_omnisafe(plan, python)
    fields = {
        **dataclasses.asdict(plan),
        "cpu": provenance()["cpu"],
        "versions": versions,
        "config": config,
        "curve": {
            "steps": curve.steps,
            "returns": _rounded(curve.returns),
            "costs": _rounded(curve.costs),
        },
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    data.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.path(data), f"{{\n{lines}\n}}\n".encode())
    return time.perf_counter() - start


def run(arguments: argparse.Namespace) -> int:
    """Make the missing runs; the number of those that failed."""
    data: Path = arguments.data
    wanted = plans(
        arguments.libraries, arguments.tasks, arguments.agents, arguments.seeds, arguments.steps
    )
    missing = [plan for plan in wanted if not plan.path(data).exists()]
    print(f"{len(wanted)} runs, of which {len(wanted) - len(missing)} exist", flush=True)
    needs_omnisafe = any(plan.library == "omnisafe" for plan in missing)
    python = omnisafe_python(arguments.omnisafe_python) if needs_omnisafe else None
    failed = 0
    # Started afresh: a process with threads of its own, such as torch's, cannot safely be copied.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, max_tasks_per_child=1) as pool:
        made = {
            pool.submit(make, plan, data, python if plan.library == "omnisafe" else None): plan
            for plan in missing
        }
        for future in as_completed(made):
            name = made[future].path(data).stem
            try:
                print(f"{name}: {future.result():.0f} s", flush=True)
            except Exception as error:
                failed += 1
                print(f"{name}: {error}", file=sys.stderr, flush=True)
    return failed


# ---- report ----

Curves = dict[Plan, Curve]


def read_curves(wanted: Iterable[Plan], data: Path) -> Curves:
    """The runs that exist."""
    found = {}
    for plan in wanted:
        if plan.path(data).exists():
            curve = json.loads(plan.path(data).read_text(encoding="utf-8"))["curve"]
            found[plan] = Curve(curve["steps"], curve["returns"], curve["costs"])
    return found


def final(series: Series) -> float:
    """Mean over the last tenth of the updates (one at least)."""
    tail = series[-max(len(series) // 10, 1) :]
    return statistics.fmean(value for value in tail if value is not None)


def _groups(wanted: Iterable[Plan], curves: Curves) -> Iterator[tuple[tuple[str, ...], Any]]:
    """((task, agent, library), its curves over seeds), in the order of the page."""
    for key in itertools.product(TASKS, AGENTS, LIBRARIES):
        seeds = [p for p in wanted if (p.task, p.agent, p.library) == key]
        yield key, [curves.get(plan) for plan in seeds]


def _cell(values: Series) -> str:
    """Mean over the seeds that exist, then every seed."""
    known = [value for value in values if value is not None]
    mean = f"**{statistics.fmean(known):.1f}**" if known else "–"
    each = ", ".join("–" if value is None else f"{value:.1f}" for value in values)
    return f"{mean} ({each})"


def text(wanted: list[Plan], curves: Curves) -> str:
    """docs/calibration.md."""
    updates = wanted[0].updates()
    steps = updates * STEPS_PER_UPDATE
    lines = [
        "# Calibration: beside OmniSafe",
        "",
        "PPO-Lagrangian and CPO of this package beside OmniSafe 0.5.0's, each in its own Python "
        f"environment: {updates} updates of {STEPS_PER_UPDATE}",
        f"steps ({steps} in all) and cost limit {COST_LIMIT:g}. The recipe is OmniSafe's for 1e6 "
        "steps (`examples/benchmarks/run_experiment_grid.py`), everything",
        "else both libraries' defaults: 64x64 tanh, discount 0.99 and GAE 0.95 for rewards and "
        "costs, observations normalised and clipped at 5,",
        "rewards and costs as they are, one environment. PPO-Lagrangian: 40 passes of batch 64, "
        "early stop at KL 0.02; CPO: 10 critic passes of",
        "batch 128, trust region 0.01 per action dimension.",
        "",
        "`python tests/performance/calibration.py run` makes the runs, each of which leaves a "
        "file in `tests/data/calibration/`; `python",
        "tests/performance/calibration.py report --write docs` made this page from them.",
        "",
        f"**{len(curves)} of {len(wanted)} planned runs exist.** A dash in the table is a run that "
        "is missing; means over fewer than all seeds decide nothing.",
        "",
    ]
    if curves:
        lines += [
            "![Training return and cost, both libraries](figures/calibration.png)",
            "",
            "Thin lines are seeds, thick ones their mean (over the seeds that exist); dashed is "
            f"OmniSafe, the horizontal line the limit. Costs above {COST_AXIS:g} are cut off.",
            "",
        ]
    lines += [
        f"Return and cost in training, stochastic policy: the mean of the last {WINDOW} finished "
        "episodes, averaged over the last tenth of the updates.",
        "Mean over seeds, then each seed. This is OmniSafe's `Metrics/EpRet` and `Metrics/EpCost` "
        f"(its window is {WINDOW} episodes; `window_lens` of its",
        "configuration is not read there), and the same window over ours.",
        "",
        "| task | agent | library | return | cost | runs |",
        "|:---|:---|:---|:---|:---|---:|",
    ]
    for (task, agent, library), found in _groups(wanted, curves):
        returns = _cell([final(c.returns) if c else None for c in found])
        costs = _cell([final(c.costs) if c else None for c in found])
        count = f"{sum(c is not None for c in found)} of {len(found)}"
        lines.append(f"| {task} | {agent} | {library} | {returns} | {costs} | {count} |")
    lines += [
        "",
        "## What still differs",
        "",
        f"- J_C, the cost that multiplier and trust region see: OmniSafe takes the mean of the "
        f"last {WINDOW} episodes, which at two episodes of 1000 steps",
        "  per update go back 25 updates; ours that of the update's own finished episodes.",
        "- OmniSafe resets the environment before every update and drops the episode that is cut; "
        "ours goes on with it. Both bootstrap there.",
        "- OmniSafe hands unclipped actions to the environment, whose control cost (velocity "
        "tasks) counts them so; ours clips them to the action",
        "  space. All three tasks have actions in [-1, 1], so that OmniSafe's scaling changes "
        "nothing.",
        "- CPO's c: ours is the excess per step, OmniSafe's per episode.",
        "- Initial weights: orthogonal (Stable-Baselines3), OmniSafe Kaiming uniform.",
        "- Simulators: OmniSafe's pins give mujoco 2.3.3, gymnasium 0.28 and the original "
        "Safety-Gymnasium 1.0.0; see",
        "  [the parity of ours](safety_gymnasium_parity.md).",
    ]
    return "\n".join(lines) + "\n"


def draw(wanted: list[Plan], curves: Curves, path: Path) -> None:
    """Return above cost, one column per task; seeds thin, their mean thick, OmniSafe dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from scpo_bench.leaderboard.plots import STYLE

    with matplotlib.rc_context(STYLE):
        figure, panels = plt.subplots(
            2, len(TASKS), figsize=(12, 6), sharex=True, constrained_layout=True
        )
        for (task, agent, library), found in _groups(wanted, curves):
            known = [curve for curve in found if curve]
            look: dict[str, Any] = {
                "color": COLOURS[agent],
                "ls": "-" if library == "ours" else (0, (4, 1.5)),
            }
            for axes, name in zip(panels[:, TASKS.index(task)], ("returns", "costs")):
                # In the legend whether or not this task has a run of it.
                axes.plot([], [], lw=1.8, label=f"{agent}, {library}", **look)
                if not known:
                    continue
                rows = np.array([getattr(curve, name) for curve in known], dtype=float)
                x = np.array(known[0].steps) / 1e6
                if len(known) > 1:
                    axes.plot(x, rows.T, lw=0.5, alpha=0.5, **look)
                axes.plot(x, rows.mean(axis=0), lw=1.8, **look)
        for axes, task in zip(panels[0], TASKS):
            axes.set_title(task, loc="left")
        for axes in panels[1]:
            axes.axhline(COST_LIMIT, color="#333333", lw=0.8)
            axes.set(ylim=(0, COST_AXIS), xlabel="steps, millions")
        for column, task in zip(panels.T, TASKS):
            if not any(plan.task == task for plan in curves):
                for axes in column:
                    axes.text(0.5, 0.5, "no run yet", ha="center", transform=axes.transAxes)
                column[0].set_yticks([])
        panels[0, 0].set_ylabel(f"return, last {WINDOW} episodes")
        panels[1, 0].set_ylabel(f"cost, last {WINDOW} episodes")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def report(arguments: argparse.Namespace) -> int:
    """Print the page or write it, with its figure; 0."""
    wanted = plans(LIBRARIES, TASKS, AGENTS, arguments.seeds, arguments.steps)
    curves = read_curves(wanted, arguments.data)
    page = text(wanted, curves)
    print(page, end="")
    if arguments.write:
        if curves:
            draw(wanted, curves, arguments.write / "figures" / "calibration.png")
        (arguments.write / "calibration.md").write_text(page, encoding="utf-8")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="make the missing runs")
    runs.set_defaults(function=run)
    runs.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    runs.add_argument("--agents", nargs="+", default=AGENTS, choices=list(THEIR_NAMES))
    runs.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    runs.add_argument("--jobs", type=int, default=1)
    runs.add_argument("--omnisafe-python")
    page = commands.add_parser("report", help="the page and its figure from the runs that exist")
    page.set_defaults(function=report)
    page.add_argument("--write", type=Path, help="folder of the documents")
    for command in (runs, page):
        command.add_argument("--seeds", type=int, default=SEEDS)
        command.add_argument("--steps", type=int, default=STEPS)
        command.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    if arguments.steps < STEPS_PER_UPDATE:
        parser.error(f"--steps: expected at least one update of {STEPS_PER_UPDATE} steps")
    sys.exit(min(arguments.function(arguments), 1))


if __name__ == "__main__":
    main()
