"""How far a re-run on another type of CPU differs from the record, update by update.

    python tests/performance/cpu_types.py runs        # about 40 minutes on one core

Other CPU types are emulated: environment variables make torch, NumPy's OpenBLAS and loops, and MKL
choose the kernels that they would choose there. Runs that are in the folder already are not
repeated, so the command resumes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from scpo_bench.records.files import read_run

RESULTS = Path(__file__).parents[2] / "results" / "paper"
AGENTS = ("scpo", "cpo", "ppo-lagrangian", "crpo", "sgd")
TASKS = ("HarmfulRegression-v0", "DoubleIntegratorImitation-v0")
_NO_AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
CPU_TYPES: dict[str, dict[str, str]] = {
    "this CPU": {},
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
    """Run the cell of the committed record that ``folder``'s last three parts name."""
    from scpo_bench.runs.harness import run_cell

    record = read_run(RESULTS / Path(*folder.parts[-3:]))
    run_cell(record.cell, folder, record.suite)


def cells() -> list[Path]:
    return [Path(f"scpo_bench.{task}") / agent / "seed-0" for task in TASKS for agent in AGENTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.folder)
        return
    for name, variables in CPU_TYPES.items():
        for cell in cells():
            place = arguments.folder / name / cell
            if not (place / "updates.jsonl.gz").exists():
                command = [sys.executable, __file__, str(place), "--run"]
                subprocess.run(command, env={**os.environ, **variables}, check=True)


if __name__ == "__main__":
    main()
