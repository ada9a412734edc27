"""Does a policy respect the constraints from every start state? Enclosures of trajectories.

From a cell of start states c + d, |d_i| <= h, the state after t steps lies in c_t + G_t e with
|e_j| <= 1. The first two columns of G_t belong to the start, and each step adds one, for what its
linear enclosures miss of the action (the policy over the reached box; the action's clip by its
chord over the action's range; float32). So what moves together stays together, and a contracting
policy contracts the errors. A cell is proved where the constraints hold for all of this set at
every step; where they do not, it is split. Source: affine arithmetic (de Figueiredo and Stolfi
2004).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.proofs.cells import Cells
from scpo_bench.proofs.enclosures import ROUNDING, enclose
from scpo_bench.proofs.plants import LinearPlant, Problem, corners


def clip_enclosure(low: Floats, high: Floats, limit: float) -> tuple[Floats, Floats, Floats]:
    """(slope, offset, radius) [N]: clip(u) in slope u + offset +- radius for low <= u <= high."""
    width = high - low
    rise = np.clip(high, -limit, limit) - np.clip(low, -limit, limit)
    slope = np.divide(rise, width, out=np.ones_like(width), where=width > 1e-14)
    # What is left is piecewise linear: extreme at the ends or at the kinks.
    at = np.stack([low, high, np.clip(-limit, low, high), np.clip(limit, low, high)])
    rest = np.clip(at, -limit, limit) - slope * at
    most, least = rest.max(axis=0), rest.min(axis=0)
    return slope, (most + least) / 2, (most - least) / 2


def cells_safe(problem: Problem, cells: Cells) -> NDArray[np.bool_]:
    """[N]: the constraints are proved to hold from every start state of the cell."""
    plant = problem.plant
    assert isinstance(plant, LinearPlant)
    centre = cells.centre
    spread = np.eye(2) * cells.half[:, None, None]  # G_t [N, 2, 2 + t]
    alive = np.arange(len(centre))
    for _ in range(plant.horizon):
        reach = np.abs(spread).sum(axis=2)
        u = enclose(problem.policy, centre, reach)
        slack = u.slack + problem.errors(centre, reach)
        along = np.einsum("ni,nij->nj", u.gradient, spread)
        size = np.abs(along).sum(axis=1) + slack
        slope, offset, bend = clip_enclosure(u.value - size, u.value + size, plant.u_max)
        missed = slope * slack + bend + ROUNDING
        centre = centre @ plant.A.T + (slope * u.value + offset)[:, None] * plant.B
        moved = plant.A @ spread + plant.B[:, None] * (slope[:, None] * along)[:, None, :]
        spread = np.concatenate([moved, (missed[:, None] * plant.B)[:, :, None]], axis=2)
        bound = np.abs(centre @ plant.H.T) + np.abs(plant.H @ spread).sum(axis=2)
        kept = (bound <= 1 - ROUNDING).all(axis=1)
        centre, spread, alive = centre[kept], spread[kept], alive[kept]
    ends = centre[:, None] + np.einsum("nij,cj->nci", spread[:, :, :2], corners(2))
    rest = np.linalg.norm(np.abs(spread[:, :, 2:]).sum(axis=2), axis=1)
    safe = np.zeros(len(cells), bool)
    safe[alive[np.linalg.norm(ends, axis=2).max(axis=1, initial=0) + rest <= 1 - ROUNDING]] = True
    return safe


def worst_values(problem: Problem, y: Floats) -> Floats:
    """[N]: the largest constraint value along the trajectory from each y [N, 2], in float64."""
    plant = problem.plant
    assert isinstance(plant, LinearPlant)
    worst = np.full(len(y), -np.inf)
    for _ in range(plant.horizon):
        action = np.clip(problem.policy(y), -plant.u_max, plant.u_max)
        y = y @ plant.A.T + action[:, None] * plant.B
        worst = np.maximum(worst, np.abs(y @ plant.H.T).max(axis=1) - 1)
    return np.maximum(worst, (y * y).sum(axis=1) - 1)
