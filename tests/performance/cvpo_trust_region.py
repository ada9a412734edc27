"""CVPO's KL between successive policies against its bounds, over 300 thousand steps.

    python tests/performance/cvpo_trust_region.py [--tasks ID ...] [--steps N] [--folder FOLDER]

On SafetyHopperVelocity-v1 and SafetyPointGoal1-v0, configured as in the suites. After each update
the divergences between the policies before and after it are measured once more, on replayed states
of the script's own drawing. Prints them beside return and cost (stochastic, while collecting; and
of the deterministic policy), and exits 1 where one exceeds twice its bound. About 20 minutes per
task on one core; rerun the command with the same --folder to resume.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scpo_bench.baselines.cvpo import CVPO
from scpo_bench.baselines.cvpo_m_step import gaussian_kl_split

SUITES = {
    "SafetyHopperVelocity-v1": "safety-velocity",
    "SafetyPointGoal1-v0": "safety-navigation",
}
STATES, ALLOWED, ROW = 16_384, 2.0, 20


class MeasuredCVPO(CVPO):
    """CVPO with the independent measurement among its diagnostics."""

    @torch.no_grad()
    def train(self, gradient_steps: int, batch_size: int) -> None:
        old = copy.deepcopy(self.policy.actor)
        with torch.enable_grad():
            super().train(gradient_steps, batch_size)
        rng = np.random.default_rng(self._n_updates)  # the run itself must not change
        batch = self.replay_buffer.sample(STATES, 1, 0.0, rng, self._vec_normalize_env)
        observations = torch.from_numpy(batch.observations)
        split = gaussian_kl_split(*self.policy.actor(observations), *old(observations))
        kl_mean, kl_covariance = (kl.mean().item() for kl in split)
        measured = {"measured_kl_mean": kl_mean, "measured_kl_covariance": kl_covariance}
        self._publish(self.diagnostics | measured)


def updates_of(task: str, steps: int, folder: Path) -> list[Any]:
    """The records of the run's updates."""
    from scpo_bench.records.files import read_updates
    from scpo_bench.runs.harness import run_cell
    from scpo_bench.runs.launch import is_finished
    from scpo_bench.suites.cells import cells, get_suite
    from scpo_bench.suites.schema import PACKAGED_FILE, load_benchmarks

    suite = get_suite(load_benchmarks(PACKAGED_FILE), SUITES[task])
    (planned,) = cells(suite, ["cvpo"], [task], seeds=1)
    changes = {
        "agent": f"{Path(__file__).resolve()}:MeasuredCVPO",
        "steps": steps,
        "evaluation_episodes": 1,
        "evaluation_interval": ROW,
    }
    cell = planned.model_copy(update=changes)
    if not is_finished(folder / task, cell):
        result = run_cell(cell, folder / task, "trust-region")
        if result.status != "finished":
            raise RuntimeError(result.error)
    return read_updates(folder / task)


def mean_of(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def report(updates: list[Any]) -> float:
    """Print a row per ``ROW`` updates; return the largest measured KL in units of its bound."""
    names = ("steps", "return", "cost", "det. return", "det. cost", "KL mean", "KL cov.", "pulled")
    print("".join(f"{name:>12}" for name in names), "   (KL: largest, in units of its bound)")
    worst = 0.0
    trained = [update for update in updates if "measured_kl_mean" in update.diagnostics]
    for start in range(0, len(trained), ROW):
        rows = trained[start : start + ROW]
        d = [row.diagnostics for row in rows]
        kl_mean = max(x["measured_kl_mean"] / x["kl_mean_bound"] for x in d)
        kl_covariance = max(x["measured_kl_covariance"] / x["kl_covariance_bound"] for x in d)
        worst = max(worst, kl_mean, kl_covariance)
        numbers = (
            rows[-1].interaction_steps,
            mean_of([row.return_mean for row in rows]),
            mean_of([row.cost_mean for row in rows]),
            mean_of([row.iterate_return for row in rows]),
            mean_of([row.iterate_cost for row in rows]),
            kl_mean,
            kl_covariance,
            float(np.mean([x["step_fraction"] < 1.0 for x in d])),
        )
        print("".join(f"{number:12.4g}" for number in numbers))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--folder", type=Path, default=Path("trust-region"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for task in arguments.tasks:
        print(task)
        worst = report(updates_of(task, arguments.steps, arguments.folder))
        failed |= not worst <= ALLOWED
        print(f"largest KL: {worst:.2f} bounds, {ALLOWED:g} allowed")
    sys.exit(failed)


if __name__ == "__main__":
    main()
