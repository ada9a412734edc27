"""The oracle: what a learner could reach that knows the simulator, the objective and the gradients
of both.

It differentiates through the task's pure functions, so it is no competitor; its value is the
ceiling against which improvement over the backup is stated. ``python -m scpo_bench.checks.oracle``
computes the constants in references.json and writes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from scpo_bench.contract import BatchedTask, Components
from scpo_bench.leaderboard.references import REFERENCES_FILE
from scpo_bench.policies import AffineBackup

TASKS = (
    "scpo_bench/DoubleIntegratorImitation-v0",
    "scpo_bench/DoubleIntegratorRegulation-v0",
    "scpo_bench/HarmfulRegression-v0",
)


class _Controller(nn.Module):
    """Backup plus a tanh network, both in float64."""

    def __init__(self, task: BatchedTask) -> None:
        super().__init__()
        obs, act = task.observation_space.shape[0], task.action_space.shape[0]
        self.backup = AffineBackup(*task.backup_gain())
        self.net = nn.Sequential(
            nn.Linear(obs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, act)
        )
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(
                    layer.weight,
                    0.0,
                    2.0 / np.sqrt(layer.in_features / obs) if layer.in_features == obs else 0.2,
                )
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]
        self.double()

    def forward(self, observations: Tensor) -> Tensor:
        return self.backup(observations) + self.net(observations)


def _rollout(task: BatchedTask, controller: nn.Module, state: Components) -> tuple[Tensor, Tensor]:
    """(mean objective loss, constraint values [k, steps * n]) from start states, each component
    [n].
    """
    losses, counted, values = [], [], []
    for step in range(task.constraint_horizon):
        action = controller(torch.stack(state, dim=-1)).unbind(dim=-1)
        following = task.next_state(state, action)
        loss, counts = task.objective_loss(state, action, step)
        losses.append((loss * counts).sum())
        counted.append(counts.sum())
        values.append(
            torch.stack(
                task.constraint_values(
                    state, action, following, step + 1 == task.constraint_horizon
                )
            )
        )
        state = following
    return torch.stack(losses).sum() / torch.stack(counted).sum(), torch.cat(values, dim=-1)


def _states(components: Components) -> Components:
    return tuple(torch.as_tensor(c, dtype=torch.float64) for c in components)


def oracle_value(task: BatchedTask, steps: int, seed: int) -> tuple[float, float]:
    """(objective loss, worst constraint value) on 1000 sampled starts, of the best safe controller
    found.

    Adam on an augmented Lagrangian (Nocedal and Wright, Numerical Optimization, ch. 17) of the
    objective and of smooth maxima of the constraint values, kept a hundredth below zero; the best
    iterate that is safe on the design starts counts.
    """
    torch.manual_seed(seed)
    controller = _Controller(task)
    optimizer = torch.optim.Adam(controller.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)
    fitted = _states(
        task.sample_starts(512, np.random.default_rng(np.random.SeedSequence([seed, 1])))
    )
    design = _states(task.design_starts(256))
    held_out = _states(
        task.sample_starts(1000, np.random.default_rng(np.random.SeedSequence([seed, 2])))
    )
    multipliers, penalty, sharpness = (
        torch.zeros(len(task.constraint_names), dtype=torch.float64),
        50.0,
        400.0,
    )
    best, best_state = np.inf, {k: v.clone() for k, v in controller.state_dict().items()}
    for step in range(steps):
        loss, _ = _rollout(task, controller, fitted)
        _, values = _rollout(task, controller, design)
        if values.max() <= -1e-3 and loss.item() < best:
            best, best_state = (
                loss.item(),
                {k: v.clone() for k, v in controller.state_dict().items()},
            )
        g = torch.logsumexp(sharpness * values, dim=-1) / sharpness + 1e-2
        augmented = ((multipliers + penalty * g).clip(min=0) ** 2 - multipliers**2).sum() / (
            2 * penalty
        )
        optimizer.zero_grad()
        (loss + augmented).backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            multipliers = (multipliers + penalty * g.detach()).clip(min=0)
    controller.load_state_dict(best_state)
    with torch.no_grad():
        loss, values = _rollout(task, controller, held_out)
    return float(loss), float(values.max())


def backup_value(task: BatchedTask) -> tuple[float, float]:
    """(objective loss, worst constraint value) of the backup controller on the same 1000 starts as
    the oracle with seed 0.
    """
    held_out = _states(
        task.sample_starts(1000, np.random.default_rng(np.random.SeedSequence([0, 2])))
    )
    with torch.no_grad():
        loss, values = _rollout(task, AffineBackup(*task.backup_gain()).double(), held_out)
    return float(loss), float(values.max())


def mpc_value(task: Any) -> tuple[float, float]:
    """(mean stage cost, worst constraint value) of the regulation task's MPC, on the same starts."""
    state = task.sample_starts(1000, np.random.default_rng(np.random.SeedSequence([0, 2])))
    losses, worst = [], -np.inf
    for step in range(task.horizon):
        action = (task.mpc.actions(*state),)
        following = task.next_state(state, action)
        losses.append(task.objective_loss(state, action, step)[0].mean())
        worst = max(
            worst,
            *(
                float(np.max(v))
                for v in task.constraint_values(state, action, following, step + 1 == task.horizon)
            ),
        )
        state = following
    return float(np.mean(losses)), worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compute the oracle constants and write references.json."
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--output", type=Path, default=REFERENCES_FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks: dict[str, Any] = {}
    for task_id in TASKS:
        task = gym.make(task_id).unwrapped.task  # type: ignore[attr-defined]
        entry: dict[str, Any] = {"objective": task.objective_name}
        entry["backup"], entry["backup_worst"] = backup_value(task)
        runs = [oracle_value(task, arguments.steps, seed) for seed in range(arguments.restarts)]
        entry["oracle"], entry["oracle_worst"] = min(run for run in runs if run[1] <= 0)
        if task_id == "scpo_bench/DoubleIntegratorRegulation-v0":
            entry["mpc"], entry["mpc_worst"] = mpc_value(task)
        tasks[task_id] = entry
        print(task_id, entry, flush=True)
    command = f"python -m scpo_bench.checks.oracle --steps {arguments.steps} --restarts {arguments.restarts}"
    arguments.output.write_text(json.dumps({"command": command, "tasks": tasks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
