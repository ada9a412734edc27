"""What a safety margin costs and buys: every agent of suite `paper`, version 0, at several margins.

    python tests/performance/margin_sweep.py --write docs

writes docs/margins.md and docs/figures/margins.png. Runs go to margin-sweep/ and are kept: the same
command resumes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console

from scpo_bench.leaderboard.metrics import RunMetrics, measure
from scpo_bench.leaderboard.references import load_references
from scpo_bench.leaderboard.styles import agent_styles
from scpo_bench.records.files import read_run, read_updates
from scpo_bench.records.schema import Cell
from scpo_bench.runs.launch import run_cells
from scpo_bench.suites.cells import cells, get_suite, run_folder
from scpo_bench.suites.schema import PACKAGED_FILE, load_benchmarks

TASKS = {
    "scpo_bench/DoubleIntegratorImitation-v0": 32 * 30,
    "scpo_bench/HarmfulRegression-v0": 32 * 10,
}
"""Task -> interaction steps per update."""
MARGINS = (0.0, 0.01, 0.02, 0.05, 0.1)
UNCONSTRAINED = ("ppo", "sgd")
Point = tuple[float, float]
"""(share of evaluated iterates that violate, share of the gap closed)."""


def planned(agents: list[str] | None, seeds: int, updates: int) -> list[tuple[float, list[Cell]]]:
    """(margin, cells) of the sweep."""
    suite = get_suite(load_benchmarks(PACKAGED_FILE), "paper")
    base = [c for c in cells(suite, agents, list(TASKS), seeds) if c.agent not in UNCONSTRAINED]
    return [
        (
            margin,
            [
                cell.model_copy(update={"margin": margin, "steps": updates * TASKS[cell.task]})
                for cell in base
            ],
        )
        for margin in MARGINS
    ]


def outcome(folders: list[Path], task: str) -> Point:
    """All seeds together, and their median."""
    metrics: list[RunMetrics] = []
    for folder in folders:
        if read_run(folder).status != "finished":
            raise RuntimeError(f"{folder}: not finished")
        metrics.append(measure(read_updates(folder), 0.0, load_references()[task]))
    violating = sum(m.violating_iterates for m in metrics)
    share = violating / sum(m.evaluated_iterates for m in metrics)
    return share, statistics.median(m.gap_closed for m in metrics)


def draw(found: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """One panel per task, one line per agent through its margins; the first has the open mark."""
    figure, panels = plt.subplots(1, len(found), figsize=(12, 4.6), constrained_layout=True)
    for axes, (task, lines) in zip(panels, found.items()):
        styles = agent_styles(list(lines))
        for agent, points in lines.items():
            x, y = [100 * p[0] for p in points], [100 * p[1] for p in points]
            style = styles[agent]
            dashes = {"dashes": style.dashes} if style.dashes else {}
            axes.plot(x, y, color=style.color, marker="o", ms=5, lw=1.4, label=agent, **dashes)
            axes.plot(x[:1], y[:1], color=style.color, marker="o", ms=7, mfc="white", ls="none")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=-0.02)
        axes.set(xlabel="violating updates, %", ylabel="gap closed, %")
        axes.set_title(task.removeprefix("scpo_bench/"), loc="left")
        axes.grid(alpha=0.3)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(path, dpi=130)


def text(found: dict[str, dict[str, list[Point]]], seeds: int, updates: int) -> str:
    lines = [
        "# What a safety margin costs and buys",
        "",
        "The constrained agents of suite `paper` on its version 0 tasks, at several margins: a "
        "training step costs an agent 1, or enters",
        "SCPO's certificate, as soon as a constraint value exceeds minus the margin; policies are "
        f"judged at 0. {seeds} seeds of {updates} updates;",
        "each cell is the share of updates whose policy violates on the held-out starts, and the "
        "share of the gap from backup to oracle",
        "that the last policy closes (median). Configurations are the suite's, which were tuned at "
        "margin 0.02.",
        "",
        "![Gap closed against violating updates, one line per agent](figures/margins.png)",
        "",
        "The open mark is margin 0; each next one is the next margin of the table.",
        "",
        f"`python tests/performance/margin_sweep.py --seeds {seeds} --updates {updates} --write "
        "docs` made this page.",
    ]
    for task, agents in found.items():
        heads = " | ".join(f"margin {margin:g}" for margin in MARGINS)
        lines += ["", f"## {task}", "", f"| agent | {heads} |", "|:---" + "|---:" * 5 + "|"]
        for agent, points in agents.items():
            row = " | ".join(f"{100 * x:.2g} %, {100 * y:.0f} %" for x, y in points)
            lines.append(f"| {agent} | {row} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", help="only these (a,b,...)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("margin-sweep"))
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    agents = arguments.agents.split(",") if arguments.agents else None
    found: dict[str, dict[str, list[Point]]] = {task: {} for task in TASKS}
    for margin, runs in planned(agents, arguments.seeds, arguments.updates):
        name = f"margin-{margin:g}"
        run_cells(runs, name, arguments.output, arguments.jobs, Console())
        for cell in runs[:: arguments.seeds]:
            folders = [
                run_folder(arguments.output, name, cell.model_copy(update={"seed": seed}))
                for seed in range(arguments.seeds)
            ]
            points = found[cell.task].setdefault(cell.agent, [])
            points.append(outcome(folders, cell.task))
    page = text(found, arguments.seeds, arguments.updates)
    print(page)
    if arguments.write:
        draw(found, arguments.write / "figures" / "margins.png")
        (arguments.write / "margins.md").write_text(page)


if __name__ == "__main__":
    main()
