"""What each kind of probed direction buys SCPO: agent scpo-ppo on the regulation task, all weights
of its network, few directions.

    python tests/performance/scpo_directions.py --write docs/scpo_directions.md     (about 10
    minutes on 2 cores)

Every row is the same agent with the same proposals; only the directions in which its steps may bend
differ.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

TASK = "scpo_bench/DoubleIntegratorRegulation-v0"
UPDATES, PER_UPDATE = 40, 32 * 40
CONFIG = {"n_steps": 40, "batch_size": 256, "gamma": 0.97, "learning_rate": 0.001, "margin": 0.01}
ROWS = (
    ("the proposal alone", 1, ()),
    ("+ 3 random", 4, ()),
    ("+ 7 random", 8, ()),
    ("+ the steps before (momentum), 2 random", 4, ("momentum",)),
    ("+ the way back to the start, 2 random", 4, ("start",)),
    ("+ the cost critic's gradient, 2 random", 4, ("cost",)),
    ("+ cost critic, way back, 1 random", 4, ("cost", "start")),
    ("+ 3 constraint normals", 4, ("normals",)),
    (
        "+ normals, cost critic, way back, momentum, 1 random",
        8,
        ("normals", "cost", "start", "momentum"),
    ),
)


def run(job: tuple[int, tuple[str, ...], int]) -> tuple[float, float, int, int]:
    """(objective at the end, share of updates that moved by less than a hundredth of the proposal,
    violating iterates, updates).
    """
    from scpo_bench.records.files import read_updates
    from scpo_bench.records.schema import Cell
    from scpo_bench.runs.harness import run_cell

    directions, candidates, seed = job
    config = {**CONFIG, "directions": directions, "candidates": list(candidates)}
    cell = Cell(
        agent="scpo-ppo",
        task=TASK,
        seed=seed,
        steps=UPDATES * PER_UPDATE,
        num_envs=32,
        cost_limit=0.0,
        evaluation_episodes=500,
        start="backup",
        config=config,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run_cell(cell, Path(folder), "ablation")
        if result.status != "finished":
            raise RuntimeError(result.error)
        updates = read_updates(Path(folder))
    moved = [u.diagnostics["step_norm"] / u.diagnostics["proposal_norm"] for u in updates[1:]]
    stuck = sum(share < 0.01 for share in moved) / len(moved)
    assert updates[-1].iterate_objective is not None
    return (
        updates[-1].iterate_objective,
        stuck,
        sum(bool(u.iterate_violates) for u in updates),
        len(updates),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    jobs = [(m, kinds, seed) for _, m, kinds in ROWS for seed in range(arguments.seeds)]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        results = list(pool.map(run, jobs))
    lines = [
        "| probed directions | m | objective | updates that stay put | violating iterates |",
        "|:---|---:|---:|---:|---:|",
    ]
    for i, (label, m, _) in enumerate(ROWS):
        of = results[i * arguments.seeds : (i + 1) * arguments.seeds]
        objectives = sorted(r[0] for r in of)
        lines.append(
            f"| {label} | {m} | {statistics.median(objectives):.3f} ({objectives[0]:.3f} to {objectives[-1]:.3f}) "
            f"| {100 * statistics.mean(r[1] for r in of):.0f} % | {sum(r[2] for r in of)} of {sum(r[3] for r in of)} |"
        )
    table = "\n".join(lines)
    print(table)
    if arguments.write:
        arguments.write.write_text(
            "# Which directions are worth probing\n\n"
            f"Agent `scpo-ppo` on `{TASK}`, {UPDATES} updates from the backup, {arguments.seeds} seeds; mean stage cost at held-out "
            "starts, median (lowest to highest).\nThe backup stands at 0.412, the model predictive controller at 0.113. Made by\n"
            f"`python tests/performance/scpo_directions.py --seeds {arguments.seeds} --write docs/scpo_directions.md`.\n\n"
            f"{table}\n"
        )


if __name__ == "__main__":
    main()
