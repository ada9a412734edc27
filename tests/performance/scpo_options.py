"""What each option of SCPO buys, and how often its certificate fails: imitation.

    python tests/performance/scpo_options.py --write docs/scpo_options.md

takes about half an hour on 2 cores. All rows have the same policy, labels and proposals.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TASK = "scpo_bench/DoubleIntegratorImitation-v0"
PER_UPDATE = 32 * 30
NEAR = {"directions": 4096, "candidates": [], "probe_radius": 1e-3, "margin": 0.02}
POINTWISE = {"pointwise": True, "smoothness": "sampled", "safety_factor": 1.0}
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("no projection (sgd)", "sgd", {}),
    ("as published", "scpo", {"margin": 0.02}),
    ("as published, without the re-check", "scpo", {"margin": 0.02, "mode": "certified"}),
    ("+ complete bank, probed near", "scpo", NEAR),
    ("the same, without the re-check", "scpo", {**NEAR, "mode": "certified"}),
    ("+ pointwise constraints", "scpo", {**NEAR, **POINTWISE}),
    (
        "+ probes as long as the steps",
        "scpo",
        {**NEAR, **POINTWISE, "probe_radius": 0.03, "smallest_probe": 0.2, "follow_steps": True},
    ),
    ("+ few starts, probes reused: scpo-pointwise", "scpo-pointwise", {}),
    ("scpo-certified: no re-check", "scpo-certified", {}),
    ("scpo-proven: closed form, no rollouts", "scpo-proven", {}),
)
HEAD = (
    "| | % of gap closed | held updates | exceeded | breaches | violating policies | probe steps |",
    "|:---|---:|---:|---:|---:|---:|---:|",
)


def run(job: tuple[str, dict[str, Any], int, int]) -> dict[str, float]:
    """The metrics of one run, and the agent's own counts."""
    from scpo_bench.leaderboard.metrics import measure
    from scpo_bench.leaderboard.references import load_references
    from scpo_bench.records.files import read_updates
    from scpo_bench.records.schema import Cell
    from scpo_bench.runs.harness import run_cell

    agent, config, seed, updates = job
    cell = Cell(
        agent=agent,
        task=TASK,
        seed=seed,
        steps=updates * PER_UPDATE,
        num_envs=32,
        cost_limit=0.0,
        evaluation_episodes=1000,
        start="backup",
        config={"learning_rate": 0.3, **config},
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run_cell(cell, Path(folder), "options")
        if result.status != "finished":
            raise RuntimeError(result.error)
        record = read_updates(Path(folder))
    metrics = measure(record, 0.0, load_references()["tasks"][TASK])
    counts = {name: record[-1].diagnostics.get(name) or 0.0 for name in ("exceeded", "breaches")}
    return {**vars(metrics), **counts}


def table(results: list[dict[str, float]], seeds: int) -> str:
    lines = [*HEAD]
    for i, (label, agent, _) in enumerate(ROWS):
        rows = results[i * seeds : (i + 1) * seeds]

        def share(part: str, rows: list[dict[str, float]] = rows) -> str:
            total = sum(row["evaluated_iterates"] for row in rows)
            return f"{100 * sum(row[part] for row in rows) / total:.1f} %"

        gaps = [100 * row["gap_closed"] for row in rows]
        certified = agent not in ("sgd", "scpo-proven")
        unsafe, distinct = (
            int(sum(row[name] for row in rows))
            for name in ("violating_policies", "distinct_policies")
        )
        lines.append(
            f"| {label} | {statistics.median(gaps):.1f} ({min(gaps):.1f} to {max(gaps):.1f}) "
            f"| {share('held_updates')} | {share('exceeded') if certified else '–'} "
            f"| {share('breaches') if certified else '–'} | {unsafe} of {distinct} "
            f"| {statistics.median(row['probe_steps'] for row in rows) / 1e6:.1f}M |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    jobs = [
        (agent, config, seed, arguments.updates)
        for _, agent, config in ROWS
        for seed in range(arguments.seeds)
    ]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        text = table(list(pool.map(run, jobs)), arguments.seeds)
    print(text)
    if arguments.write:
        arguments.write.write_text(
            "# What each option of SCPO buys\n\n"
            f"`{TASK}`, {arguments.updates} updates, {arguments.seeds} seeds: median (lowest "
            "to highest) of the gap between\nbackup and oracle that is closed. *Exceeded*: a "
            "certified step after which some constraint value lay above its bound; *breaches*:\n"
            "of these, where it also lay above what the step was certified to keep to. Both as "
            "counted by the agent, per update; several may\nfall into one update. Violations "
            "are those that the harness finds on 1000 held-out episodes. Generated by\n"
            f"`python tests/performance/scpo_options.py --seeds {arguments.seeds} --updates "
            f"{arguments.updates} --write docs/scpo_options.md`.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
