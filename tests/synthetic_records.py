"""Records like those of the harness, generated from a seed.

They are consistent in every field, cheap, and have a known shape.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from scpo_bench.records.files import UpdateLog, write_run
from scpo_bench.records.schema import Cell, Run, Update, digest
from scpo_bench.suites.cells import run_folder

IMITATION = "scpo_bench/DoubleIntegratorImitation-v0"
REGRESSION = "scpo_bench/HarmfulRegression-v0"
GOAL = "SafetyPointGoal1-v0"
REFERENCES: dict[str, dict[str, Any]] = {
    IMITATION: {"objective": "imitation loss", "backup": 0.5, "oracle": 0.1},
    REGRESSION: {"objective": "squared error", "backup": 2.0, "oracle": 1.0},
}
STARTED = datetime(2025, 12, 13, 10, tzinfo=UTC)
CONSTRAINTS = ("position", "velocity")


def synthetic_cell(agent: str, task: str, seed: int, updates: int, **fields: Any) -> Cell:
    """A cell with 100 steps per update; custom tasks have limit 0, the others 25."""
    defaults = {
        "cost_limit": 0.0 if task.startswith("scpo_bench/") else 25.0,
        "start": "backup",
        "num_envs": 4,
    }
    return Cell(agent=agent, task=task, seed=seed, steps=100 * updates, **{**defaults, **fields})


def synthetic_updates(cell: Cell, updates: int) -> list[Update]:
    """Update 0 and ``updates`` more.

    "scpo" never violates; other agents violate from some update on, and some of them stop again.
    """
    rng = np.random.default_rng([cell.seed, sum(map(ord, cell.agent + cell.task))])
    signed = cell.task.startswith("scpo_bench/")
    backup, oracle = (
        (REFERENCES[cell.task]["backup"], REFERENCES[cell.task]["oracle"]) if signed else (1.0, 0.0)
    )
    safe = cell.agent == "scpo"
    begins = 0.0 if safe else rng.uniform(0.02, 0.3)
    ends = 0.0 if safe else rng.uniform(0.5, 1.4)
    reached = rng.uniform(0.75, 0.95) if safe else rng.uniform(0.6, 1.2)
    records = []
    for number in range(updates + 1):
        t = number / max(1, updates)
        progress = reached * (1 - np.exp(-4 * t))
        violating = begins < t < ends
        worst = (
            0.3 + 0.05 * rng.random()
            if violating
            else -0.02 - 0.2 * np.exp(-5 * t) - 0.005 * rng.random()
        )
        loss = backup - progress * (backup - oracle) + (0.01 * rng.random() if number else 0.0)
        episodes = 4 if number else 0
        limit = cell.cost_limit
        costs = np.zeros(episodes)
        if violating and number:
            costs = np.where(
                rng.random(episodes) < 0.7, limit + rng.exponential(5.0, episodes), 0.3 * limit
            )
        elif not signed:
            costs = rng.uniform(0, limit, episodes)
        if signed:  # a step costs 0 or 1 there
            costs = np.minimum(10.0, np.ceil(costs))
        iterate_cost = float(limit + 5 if violating else 0.4 * limit)
        wall = 0.5 * number + (0.1 if number else 0.0)
        diagnostics: dict[str, float | None] = {"loss": float(loss)}
        if safe and signed and number:
            for i, name in enumerate(CONSTRAINTS):
                diagnostics[f"realised/{name}"] = float(worst - 0.02 * i)
                diagnostics[f"bound/{name}"] = float(
                    min(0.0, worst - 0.02 * i + 0.1 * rng.random() * (1 - t))
                )
                diagnostics[f"L/{name}"] = float(2.0 + rng.random())
            diagnostics |= {
                "breaches": 0.0,
                "held": float(number // 20),
                "proposal_norm": 0.4,
                "step_norm": 0.4 * (1 - t),
            }
        records.append(
            Update(
                update=number,
                interaction_steps=100 * number,
                probe_steps=50 * number if safe else 0,
                episodes=episodes,
                return_mean=float(-loss * 10) if number else None,
                cost_mean=float(costs.mean()) if number else None,
                cost_max=float(costs.max()) if number else None,
                cost_sum=float(costs.sum()),
                violating_episodes=int((costs > limit).sum()),
                violating_steps=int(costs.sum()) if signed else int(3 * (costs > 0).sum()),
                worst_constraint_value=float(worst + 0.01) if signed and number else None,
                iterate_return=float(-loss * 10),
                iterate_cost=iterate_cost,
                iterate_worst_constraint_value=float(worst) if signed else None,
                iterate_objective=float(loss) if signed else None,
                iterate_violates=bool(worst > 0) if signed and limit == 0 else iterate_cost > limit,
                diagnostics=diagnostics,
                wall_time_s=wall,
                steps_per_s=100 * number / wall if wall else 0.0,
            )
        )
    return records


def folder_of(results: Path, suite: str, cell: Cell) -> Path:
    return run_folder(results, suite, cell)


def write_record(
    results: Path,
    suite: str,
    cell: Cell,
    updates: list[Update],
    status: Any = "finished",
    error: str | None = None,
    **run_fields: Any,
) -> Path:
    """Write the record of a run that ended with ``status``, and return its folder."""
    folder = folder_of(results, suite, cell)
    folder.mkdir(parents=True)
    log = UpdateLog(folder)
    for update in updates:
        log.append(update)
    if status == "finished":
        log.compress()
    else:
        log.close()
    duration = timedelta(seconds=int(updates[-1].wall_time_s) + 2 if updates else 1)
    fields = {
        "key": cell.key(),
        "updates": 0 if status == "running" else len(updates),
        "digest": digest(updates) if status == "finished" else None,
        "provenance": {
            "versions": {"scpo-bench": "0.1.0", "torch": "2.13.0"},
            "commit": "0" * 40,
            "cpu": "synthetic",
            "threads": 1,
        },
        "started": STARTED.isoformat(),
        "ended": None if status == "running" else (STARTED + duration).isoformat(),
        **run_fields,
    }
    write_run(folder, Run(suite=suite, cell=cell, status=status, error=error, **fields))
    return folder


def write_suite(
    results: Path,
    suite: str = "synthetic",
    tasks: tuple[str, ...] = (IMITATION, REGRESSION, GOAL),
    agents: tuple[str, ...] = ("scpo", "sgd", "ppo"),
    seeds: int = 3,
    updates: int = 30,
) -> list[Cell]:
    """Write finished runs of every task, agent and seed, and return their cells."""
    cells = [
        synthetic_cell(agent, task, seed, updates)
        for task in tasks
        for agent in agents
        for seed in range(seeds)
    ]
    for cell in cells:
        write_record(results, suite, cell, synthetic_updates(cell, updates))
    return cells


def write_mixed_suite(results: Path) -> list[Cell]:
    """A suite "synthetic" as from :func:`write_suite`, with a failed and a missing run.

    Both are of sgd on the imitation task. Returns the planned cells.
    """
    planned = write_suite(results)
    failed, missing = (synthetic_cell("sgd", IMITATION, seed, 30) for seed in (3, 4))
    updates = synthetic_updates(failed, 30)[:8]
    write_record(
        results, "synthetic", failed, updates, status="failed", error="ValueError: [red]x|y"
    )
    return [*planned, failed, missing]
