"""How far a re-run on another type of CPU differs from the record, update by update.

    python tests/performance/cpu_types.py runs

prints the tables of docs/reproducing.md, after about 15 minutes on one core. Other CPU types are
emulated: environment variables make torch, MKL, NumPy and its OpenBLAS choose the kernels that they
would choose there. Runs that are in the folder already are not repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scpo_bench.records.files import read_run, read_updates
from scpo_bench.records.schema import TIMING_FIELDS, Cell, Update
from scpo_bench.submissions.reproduce import compare_folders
from scpo_bench.submissions.tiers import EVALUATED, MEASURED, Tier

RESULTS = Path(__file__).parents[2] / "results" / "paper"
AGENTS = ("scpo", "cpo", "ppo-lagrangian", "crpo", "sgd")
TASKS = ("HarmfulRegression-v0", "DoubleIntegratorImitation-v0")
HERE = "this CPU"
_NO_AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
CPU_TYPES: dict[str, dict[str, str]] = {
    HERE: {},
    "AVX2, no AVX-512": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_CBWR": "AVX2",
        "NPY_DISABLE_CPU_FEATURES": _NO_AVX512,
    },
    "no AVX": {
        "ATEN_CPU_CAPABILITY": "default",
        "OPENBLAS_CORETYPE": "Prescott",
        "MKL_CBWR": "COMPATIBLE",
        "NPY_DISABLE_CPU_FEATURES": f"{_NO_AVX512} AVX2 FMA3 F16C AVX",
    },
    "BLAS of Intel AVX-512 alone": {"OPENBLAS_CORETYPE": "SkylakeX"},
    "torch without AVX alone": {"ATEN_CPU_CAPABILITY": "default"},
}


def run(folder: Path) -> None:
    """Run the cell that ``folder``'s last three parts name: a committed one or a short one."""
    from scpo_bench.runs.harness import run_cell

    cell = Path(*folder.parts[-3:])
    if cell in safety_cells():
        task, agent, _ = cell.parts
        few: dict[str, Any] = {"steps": 8000, "num_envs": 2, "evaluation_episodes": 2}
        config = {"steps_per_update": 2000}
        run_cell(
            Cell(task=task, agent=agent, seed=0, cost_limit=25.0, config=config, **few), folder, "s"
        )
        return
    record = read_run(RESULTS / cell)
    run_cell(record.cell, folder, record.suite)


def cells() -> list[Path]:
    return [Path(f"scpo_bench.{task}") / agent / "seed-0" for task in TASKS for agent in AGENTS]


def safety_cells() -> list[Path]:
    """Four updates each, without a committed record."""
    tasks, agents = ("SafetyPointGoal1-v0", "SafetyHopperVelocity-v1"), ("cpo", "ppo-lagrangian")
    return [Path(task) / agent / "seed-0" for task in tasks for agent in agents]


def _safety_table(folder: Path) -> list[str]:
    """Markdown: how far the emulated CPU types leave this one on Safety-Gymnasium's tasks."""
    lines = [
        "| Agent | Task | measured, to update 0 | to 1 | to 2 | to 4 |",
        "|:---|:---|---:|---:|---:|---:|",
    ]
    for cell in safety_cells():
        here = read_updates(folder / HERE / cell)
        sizes = []
        for name in CPU_TYPES:
            pairs = list(zip(here, read_updates(folder / name / cell)))
            sizes.append([_largest(pairs[: last + 1], MEASURED) for last in (0, 1, 2, 4)])
        largest = " | ".join(f"{max(column):.0e}" for column in zip(*sizes))
        lines.append(f"| {cell.parts[1]} | {cell.parts[0]} | {largest} |")
    return lines


def _table(folder: Path) -> list[str]:
    """Markdown: per cell, where and how far the emulated CPU types leave the committed record."""
    lines = [
        "| Agent | Task | first update that differs | measured, to update 1 | to 2 | to 5 "
        "| evaluated, to update 20 | to the end | Tier |",
        "|:---|:---|---:|---:|---:|---:|---:|---:|:---|",
    ]
    for cell in cells():
        setup = sorted((RESULTS / cell).parent.glob("seed-*"))
        updates = read_updates(RESULTS / cell)
        firsts, tiers, sizes = [], {}, [[0.0] * 5]
        for name in CPU_TYPES:
            rerun = folder / name / cell
            tier = compare_folders(RESULTS / cell, rerun, setup).tier
            if name == HERE:
                if tier is not Tier.EXACT:
                    raise SystemExit(f"{cell}: {tier} on this CPU, without any variable")
                continue
            pairs = list(zip(updates, read_updates(rerun)))
            firsts.append(next(a.update for a, b in pairs if _untimed(a) != _untimed(b)))
            tiers[tier] = None
            measured = [_largest(pairs[: last + 1], MEASURED) for last in (1, 2, 5)]
            sizes.append([*measured, *(_largest(pairs[:last], EVALUATED) for last in (21, None))])
        largest = " | ".join(f"{max(column):.0e}" for column in zip(*sizes))
        task, agent = cell.parts[0].removeprefix("scpo_bench."), cell.parts[1]
        first = " to ".join(map(str, dict.fromkeys((min(firsts), max(firsts)))))
        lines.append(f"| {agent} | {task} | {first} | {largest} | {', '.join(tiers)} |")
    return lines


def _kernels(folder: Path) -> list[str]:
    """What each CPU type's runs recorded: that the variables were heeded."""
    lines = ["| CPU type | torch | BLAS |", "|:---|:---|:---|"]
    for name in CPU_TYPES:
        found = read_run(folder / name / cells()[0]).provenance
        lines.append(f"| {name} | {found['instruction_set']} | {', '.join(found['blas'])} |")
    return lines


def _untimed(update: Update) -> dict[str, Any]:
    return update.model_dump(exclude=set(TIMING_FIELDS))


def _largest(pairs: Sequence[tuple[Update, Update]], fields: Sequence[str]) -> float:
    """The largest relative difference in any of the fields, |a - b| / max(|a|, |b|)."""
    values = [(getattr(a, name), getattr(b, name)) for a, b in pairs for name in fields]
    sizes = [abs(a - b) / max(abs(a), abs(b)) for a, b in values if a != b]
    return max(sizes, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.folder)
        return
    for name, variables in CPU_TYPES.items():
        for cell in [*cells(), *safety_cells()]:
            place = arguments.folder / name / cell
            if not (place / "updates.jsonl.gz").exists():
                command = [sys.executable, __file__, str(place), "--run"]
                subprocess.run(command, env={**os.environ, **variables}, check=True)
    for table in (_kernels, _table, _safety_table):
        print("\n".join([*table(arguments.folder), ""]))


if __name__ == "__main__":
    main()
