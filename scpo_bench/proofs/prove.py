"""The prover: is a policy safe from every start state, and if not, from which one not?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.envs.batched import BatchedTaskVectorEnv
from scpo_bench.proofs.cells import Cells, cover, split
from scpo_bench.proofs.invariance import check
from scpo_bench.proofs.plants import LinearPlant, Problem
from scpo_bench.proofs.trajectories import cells_safe, worst_values

CHUNK = 1024
PER_SIDE = 32
INVARIANCE_BUDGET = 100_000
BUDGET = 500_000  # a policy of SCPO takes some 20 000
FIRST_LOOK = 4096  # start states that are simulated before anything is proved

# Observations [n, obs_dim] in float32 -> the actions [n, 1] of the deployed network.
Predict = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Counterexample:
    """A start state from which the environment itself shows a violated constraint."""

    state: tuple[float, ...]
    constraint: str
    value: float


@dataclass(frozen=True)
class Verdict:
    """cells: examined. status "proved": safe from every start state of the task."""

    status: Literal["proved", "violating", "undecided"]
    cells: int
    counterexample: Counterexample | None = None


def prove(problem: Problem, predict: Predict, budget: int = BUDGET) -> Verdict:
    """Prove the policy safe from every start state, or find one from which it is not.

    predict: the deployed network, by which a counterexample is verified in the environment.
    """
    plant = problem.plant
    starts = np.stack(plant.task.design_starts(FIRST_LOOK), axis=-1)
    found = simulate(problem, predict, starts)
    if found is not None:
        return Verdict("violating", 0, found)
    invariance = check(problem, min(INVARIANCE_BUDGET, budget))
    if invariance.proved:
        return Verdict("proved", invariance.cells)
    if isinstance(plant, LinearPlant):
        return _search(problem, predict, budget, invariance.cells)
    worst = invariance.open_.centre[np.argsort(-invariance.deficit, kind="stable")[:FIRST_LOOK]]
    found = simulate(problem, predict, np.clip(worst, -1.0, 1.0) @ plant.M.T)
    return Verdict("violating" if found else "undecided", invariance.cells, found)


def _search(problem: Problem, predict: Predict, budget: int, examined: int) -> Verdict:
    """Branch and bound over the start set, along trajectories."""
    start = problem.plant.start
    waiting = cover(2, start, PER_SIDE)
    while len(waiting):
        if examined > budget:
            return Verdict("undecided", examined)
        # From the end: depth first, so that few cells wait.
        cells, waiting = waiting[-CHUNK:], waiting[:-CHUNK]
        examined += len(cells)
        failed = cells[~cells_safe(problem, cells)]
        if not len(failed):
            continue
        length = np.linalg.norm(failed.centre, axis=1, keepdims=True)
        centres = failed.centre * np.minimum(1.0, start / np.maximum(length, 1e-300))
        violating = worst_values(problem, centres) > 0
        if violating.any():
            found = simulate(problem, predict, centres[violating] @ problem.plant.M.T)
            if found is not None:
                return Verdict("violating", examined, found)
        children = split(failed, start)
        waiting = Cells(
            np.concatenate([waiting.centre, children.centre]),
            np.concatenate([waiting.half, children.half]),
        )
    return Verdict("proved", examined)


def simulate(problem: Problem, predict: Predict, states: Floats) -> Counterexample | None:
    """The worst of the start states [n, obs_dim], if it violates in the environment."""
    task = problem.plant.task
    env = BatchedTaskVectorEnv(task, len(states))
    observations, _ = env.reset(seed=0, options={"states": states})
    worst = np.full((len(states), len(task.constraint_names)), -np.inf)
    # The first steps' constraints are those of the start states.
    for _ in range(task.constraint_horizon):
        observations, _, _, _, info = env.step(predict(observations))
        worst = np.maximum(worst, info["constraint_values"])
    row, column = np.unravel_index(int(np.argmax(worst)), worst.shape)
    if worst[row, column] <= 0:
        return None
    state = tuple(float(value) for value in states[row])
    return Counterexample(state, task.constraint_names[column], float(worst[row, column]))
