"""A search for violating start states that knows the dynamics: many starts, then gradient ascent.

``python tests/adversary.py RUN_FOLDER`` runs it with 100 000 starts on every policy of a run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from scpo_bench.proofs.plants import LinearPlant
from scpo_bench.records.files import read_run
from scpo_bench.runs.harness import Attempt
from scpo_bench.runs.prove import describe, plant_of_cell


def action(policy, x):
    """u [N] in float64 for states x [N, n], by torch: written apart from the prover's."""
    h = x
    for W, b in policy.hidden:
        z = h @ torch.as_tensor(W).T + torch.as_tensor(b)
        h = torch.tanh(z) if policy.activation == "tanh" else torch.relu(z)
    residual = h @ torch.as_tensor(policy.head) + policy.head_bias
    if policy.gate is not None:
        P, level = policy.gate
        t = (((x @ torch.as_tensor(P)) * x).sum(dim=1) / level - 1).clamp(0, 1)
        residual = t * t * (3 - 2 * t) * residual
    return x @ torch.as_tensor(policy.gain) + policy.offset + residual


def worst_values(task, policy, x):
    """The largest constraint value [N] of the trajectories from x [N, n]."""
    state, worst = tuple(x.T), torch.full((len(x),), -np.inf, dtype=torch.float64)
    for step in range(task.constraint_horizon):
        u = (action(policy, torch.stack(state, dim=1)),)
        following = task.next_state(state, u)
        last = step + 1 == task.horizon
        for values in task.constraint_values(state, u, following, last):
            worst = torch.maximum(worst, values)
        state = following
    return worst


def attack(plant, policy, starts, steps=30, seed=0):
    """The largest constraint value that was found, from any start state of the task."""
    rng = np.random.default_rng(seed)
    n = plant.M.shape[0]
    y = rng.normal(size=(starts, n))
    y *= rng.uniform(size=(starts, 1)) ** (1 / n) / np.linalg.norm(y, axis=1, keepdims=True)
    y[: starts // 2] /= np.linalg.norm(y[: starts // 2], axis=1, keepdims=True)  # the boundary
    if not isinstance(plant, LinearPlant):
        y[: starts // 2] = np.linspace(-1, 1, starts // 2)[:, None]
    M = torch.as_tensor(plant.M)
    y = torch.as_tensor(y * plant.start)
    with torch.no_grad():
        values = torch.cat([worst_values(plant.task, policy, part @ M.T) for part in y.split(8192)])
    found = float(values.max())
    y = y[values.argsort(descending=True)[: max(starts // 50, 20)]].clone()
    rate = torch.full((len(y), 1), 0.02, dtype=torch.float64)
    before = None
    for _ in range(steps):
        y.requires_grad_(True)
        values = worst_values(plant.task, policy, y @ M.T)
        (slope,) = torch.autograd.grad(values.sum(), y)
        found = max(found, float(values.detach().max()))
        with torch.no_grad():
            if before is not None:
                rate = torch.where((values > before)[:, None], rate, rate / 2)
            before = values.detach()
            y = y + rate * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
            y = y * (plant.start / y.norm(dim=1, keepdim=True)).clamp(max=1)
    return found


def policies_of_run(folder):
    """(update, policy) of every update of a recorded run, which is repeated."""
    run = read_run(folder)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        attempt = Attempt(run.cell, Path(scratch) / "run", run.suite)

        def progress(steps, updates):
            if updates > len(found):
                found.append(describe(attempt.agent))

        attempt.execute(progress, 1)
    return run, list(enumerate(found))


if __name__ == "__main__":
    recorded, iterates = policies_of_run(Path(sys.argv[1]))
    searched = plant_of_cell(recorded.cell)
    for update, policy in iterates:
        print(update, attack(searched, policy, 100_000), flush=True)
