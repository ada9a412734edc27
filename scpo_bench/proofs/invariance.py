"""Does a policy keep the set S = {|y| <= 1} in one step? Then it is safe for ever.

For every y in S the action has to lie in [lo(y), hi(y)] (``safe_actions``), or beyond the action's
own limit where the limit itself lies in there. For the regression tasks this is all there is to be
proved; for the double integrator it is sufficient.

On a box, hi is concave and the policy's enclosure linear, so that hi - u is smallest at a corner.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.proofs.cells import Cells, cover, split
from scpo_bench.proofs.enclosures import enclose
from scpo_bench.proofs.plants import Problem, corners

PER_SIDE = 24  # cells of the first cover, in each direction
CHUNK = 1024  # cells at a time: their arrays fit a cache
SMALLEST = 1e-5  # half width of the smallest cells


class Invariance(NamedTuple):
    """cells: examined. open_: those that are left, none if S is proved invariant.

    deficit: [open cells], by how much their enclosure misses what would prove them.
    """

    cells: int
    open_: Cells
    deficit: Floats

    @property
    def proved(self) -> bool:
        return len(self.open_) == 0


def _vertices(cells: Cells) -> tuple[Floats, NDArray[np.bool_]]:
    """Vertices [N, 8, 2], relative to the centres, of polygons that hold each cell's part of S.

    A cell that S's boundary crosses is cut by the tangent before it, so that what is left sticks
    out of S by the square of its size only. Second result: whether nothing is left.
    """
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    start = square * cells.half[:, None, None]
    end = np.roll(start, -1, axis=1)
    length = np.linalg.norm(cells.centre, axis=1, keepdims=True)
    normal = cells.centre / np.maximum(length, 1e-300)
    # n . y <= 1 holds in S; the tolerance is for the rounding of n.
    room = 1 + 1e-12 - length
    a, b = (
        room - np.einsum("nki,ni->nk", start, normal),
        room - np.einsum("nki,ni->nk", end, normal),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = start + (a / (a - b))[..., None] * (end - start)
    first = np.where((a >= 0)[..., None], start, crossing)
    second = np.where((b >= 0)[..., None], end, crossing)
    # An edge that is all outside has no part in the polygon: any other vertex stands for it.
    outside = (a < 0) & (b < 0)
    some = np.argmax(~outside, axis=1)
    rows = np.arange(len(some))
    stand_in = first[rows, some][:, None]
    first = np.where(outside[..., None], stand_in, first)
    second = np.where(outside[..., None], stand_in, second)
    return np.concatenate([first, second], axis=1), outside.all(axis=1)


def margins(problem: Problem, cells: Cells) -> Floats:
    """[N]: at least this far are the actions in each cell from being unsafe; >= 0 proves it."""
    policy, plant = problem.policy, problem.plant
    n = cells.centre.shape[1]
    u = enclose(policy, cells.centre, cells.radius)
    if n == 2:
        offsets, empty = _vertices(cells)
    else:
        offsets, empty = corners(n) * cells.half[:, None, None], np.zeros(len(cells), bool)
    points = (cells.centre[:, None] + offsets).reshape(-1, n)
    low, high = (bound.reshape(len(cells), -1) for bound in plant.safe_actions(points))
    at_vertices = u.value[:, None] + np.einsum("nci,ni->nc", offsets, u.gradient)
    slack = (u.slack + problem.errors(cells.centre, cells.radius))[:, None]
    above = (high - at_vertices - slack).min(axis=1)
    below = (at_vertices - slack - low).min(axis=1)
    # Where the limit of the action is itself safe, so is what is beyond it.
    above[(high >= plant.u_max * (1 + 1e-12)).all(axis=1)] = np.inf
    below[(low <= -plant.u_max * (1 + 1e-12)).all(axis=1)] = np.inf
    return np.where(empty, np.inf, np.minimum(above, below))


def point_margins(problem: Problem, y: Floats) -> Floats:
    """[N]: :func:`margins` of boxes that are single points y [N, n]."""
    u, plant = problem.policy(y), problem.plant
    error = problem.errors(y, np.zeros_like(y))
    low, high = plant.safe_actions(y)
    above = np.where(high >= plant.u_max, np.inf, high - u - error)
    below = np.where(low <= -plant.u_max, np.inf, u - error - low)
    return np.minimum(above, below)


def check(problem: Problem, budget: int = 200_000, smallest: float = SMALLEST) -> Invariance:
    """Prove S invariant with at most ``budget`` cells no smaller than ``smallest``.

    Ends where a cell's centre shows that it cannot be proved.
    """
    n = problem.policy.gain.size
    waiting = cover(n, 1.0, PER_SIDE if n > 1 else 16 * PER_SIDE)
    examined = 0
    while True:
        examined += len(waiting)
        chunks = range(0, len(waiting), CHUNK)
        value = np.concatenate([margins(problem, waiting[i : i + CHUNK]) for i in chunks])
        open_ = waiting[value < 0]
        if not len(open_):
            return Invariance(examined, open_, np.zeros(0))
        inside = np.linalg.norm(open_.centre, axis=1) <= 1.0
        hopeless = inside & (point_margins(problem, open_.centre) < 0)
        if hopeless.any() or examined > budget or (open_.half <= smallest).any():
            return Invariance(examined, open_, -value[value < 0])
        waiting = split(open_, 1.0)
        if not len(waiting):
            return Invariance(examined, waiting, np.zeros(0))
