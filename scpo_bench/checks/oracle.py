"""The oracle: what a learner could reach that knows the simulator and differentiates through it.

It uses the gradients of objective and constraints, so it is no competitor; its value is the ceiling
against which improvement over the backup is stated. ``python -m scpo_bench.checks.oracle`` computes
the constants in references.json and writes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from scpo_bench.contract import BatchedTask, Components
from scpo_bench.envs.double_integrator import RegulationTask
from scpo_bench.envs.harmful_regression import PaperRegressionTask
from scpo_bench.leaderboard.references import REFERENCES_FILE
from scpo_bench.policies import backup_of, residual_scale

TASKS = (
    "scpo_bench/DoubleIntegratorImitation-v0",
    "scpo_bench/DoubleIntegratorRegulation-v0",
    "scpo_bench/HarmfulRegression-v0",
    "scpo_bench/HarmfulRegression-v1",
    "scpo_bench/DoubleIntegratorImitation-v1",
    "scpo_bench/DoubleIntegratorDiverging-v1",
)
# Times --steps: shorter searches end above what safe learners reach there.
LONGER = {"scpo_bench/DoubleIntegratorDiverging-v1": 2}
FITTED, HELD_OUT = 1, 2  # branches of a seed: starts to optimise on, starts to evaluate on


class _Controller(nn.Module):
    """Backup plus a tanh network (times the backup's residual scale), both in float64.

    The network's output layer starts at zero.
    """

    def __init__(self, task: BatchedTask) -> None:
        super().__init__()
        obs, act = task.observation_space.shape[0], task.action_space.shape[0]
        self.backup = backup_of(task)
        first, second, last = nn.Linear(obs, 64), nn.Linear(64, 64), nn.Linear(64, act)
        nn.init.normal_(first.weight, 0.0, 2.0)
        nn.init.normal_(second.weight, 0.0, 0.2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
        self.double()

    def forward(self, observations: Tensor) -> Tensor:
        residual = self.net(observations)
        scale = residual_scale(self.backup, observations)
        return self.backup(observations) + (residual if scale is None else scale * residual)


def _rollout(task: BatchedTask, controller: nn.Module, state: Components) -> tuple[Tensor, Tensor]:
    """(mean objective loss, constraint values [k, steps * n]) from start states, each [n]."""
    losses, counted, values = [], [], []
    for step in range(task.constraint_horizon):
        action = controller(torch.stack(state, dim=-1)).unbind(dim=-1)
        following = task.next_state(state, action)
        loss, counts = task.objective_loss(state, action, step)
        losses.append((loss * counts).sum())
        counted.append(counts.sum())
        last = step + 1 == task.constraint_horizon
        values.append(torch.stack(task.constraint_values(state, action, following, last)))
        state = following
    return torch.stack(losses).sum() / torch.stack(counted).sum(), torch.cat(values, dim=-1)


def _starts(task: BatchedTask, n: int, seed: int, branch: int) -> Components:
    return task.sample_starts(n, np.random.default_rng(np.random.SeedSequence([seed, branch])))


def _tensors(components: Components) -> Components:
    return tuple(torch.as_tensor(c, dtype=torch.float64) for c in components)


def _evaluate(task: BatchedTask, controller: nn.Module, seed: int) -> tuple[float, float]:
    """(objective loss, worst constraint value) on 1000 held-out starts."""
    starts = task.held_out_starts(1000) or _starts(task, 1000, seed, HELD_OUT)
    with torch.no_grad():
        loss, values = _rollout(task, controller, _tensors(starts))
    return float(loss), float(values.max())


def oracle_value(task: BatchedTask, steps: int, seed: int) -> tuple[float, float]:
    """(objective loss, worst constraint value) on held-out starts, of the best safe controller.

    Adam on an augmented Lagrangian (Nocedal and Wright, Numerical Optimization, ch. 17) of the
    objective and of smooth maxima of the constraint values, kept a hundredth below zero; the best
    iterate that is safe on the design starts counts.
    """
    torch.manual_seed(seed)
    controller = _Controller(task)
    optimizer = torch.optim.Adam(controller.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)
    fitted = _tensors(_starts(task, 512, seed, FITTED))
    design = _tensors(task.design_starts(256))
    multipliers = torch.zeros(len(task.constraint_names), dtype=torch.float64)
    penalty, sharpness, best = 50.0, 400.0, np.inf

    def copied_state() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in controller.state_dict().items()}

    best_state = copied_state()
    for step in range(steps):
        loss, _ = _rollout(task, controller, fitted)
        _, values = _rollout(task, controller, design)
        if values.max() <= -1e-3 and loss.item() < best:
            best, best_state = loss.item(), copied_state()
        g = torch.logsumexp(sharpness * values, dim=-1) / sharpness + 1e-2
        shifted = (multipliers + penalty * g).clip(min=0)
        augmented = (shifted**2 - multipliers**2).sum() / (2 * penalty)
        optimizer.zero_grad()
        (loss + augmented).backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            multipliers = shifted.detach()
    controller.load_state_dict(best_state)
    return _evaluate(task, controller, seed)


def backup_value(task: BatchedTask) -> tuple[float, float]:
    """The same two values for the backup controller, on the starts of the oracle with seed 0."""
    return _evaluate(task, backup_of(task).double(), 0)


class _ClippedLabel(nn.Module):
    """The best safe predictor of the paper's regression: its function, cut at the bounds."""

    def __init__(self, task: PaperRegressionTask) -> None:
        super().__init__()
        self._task = task

    def forward(self, observations: Tensor) -> Tensor:
        bound = self._task.bound
        return torch.stack(self._task.label((observations[..., 0],)), dim=-1).clip(-bound, bound)


def mpc_value(task: RegulationTask, starts: int = 1000) -> tuple[float, float]:
    """(mean stage cost, worst constraint value) of the regulation task's MPC, on these starts."""
    state = _starts(task, starts, 0, HELD_OUT)
    losses, worst = [], -np.inf
    for step in range(task.horizon):
        action = (task.mpc.actions(*state),)
        following = task.next_state(state, action)
        losses.append(task.objective_loss(state, action, step)[0].mean())
        values = task.constraint_values(state, action, following, step + 1 == task.horizon)
        worst = max(worst, float(np.max(values)))
        state = following
    return float(np.mean(losses)), worst


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compute the oracle constants and write references.json."
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--output", type=Path, default=REFERENCES_FILE)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    tasks: dict[str, Any] = {}
    for task_id in arguments.tasks:
        task = gym.make(task_id).unwrapped.task  # type: ignore[attr-defined]
        entry: dict[str, Any] = {"objective": task.objective_name}
        entry["backup"], entry["backup_worst"] = backup_value(task)
        if isinstance(task, PaperRegressionTask):  # known exactly
            runs = [_evaluate(task, _ClippedLabel(task), 0)]
        else:
            steps = arguments.steps * LONGER.get(task_id, 1)
            runs = [oracle_value(task, steps, seed) for seed in range(arguments.restarts)]
        entry["oracle"], entry["oracle_worst"] = min(run for run in runs if run[1] <= 0)
        if isinstance(task, RegulationTask):
            entry["mpc"], entry["mpc_worst"] = mpc_value(task)
        tasks[task_id] = entry
        print(task_id, entry, flush=True)
    options = f"--steps {arguments.steps} --restarts {arguments.restarts}"
    command = f"python -m scpo_bench.checks.oracle {options}"
    arguments.output.write_text(json.dumps({"command": command, "tasks": tasks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
