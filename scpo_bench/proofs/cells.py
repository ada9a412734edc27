"""Covers of a ball by boxes, and their refinement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.proofs.plants import corners


@dataclass(frozen=True)
class Cells:
    """N cubes: centre [N, n] and half width [N]."""

    centre: Floats
    half: Floats

    def __len__(self) -> int:
        return len(self.half)

    def __getitem__(self, chosen: slice | NDArray[np.bool_]) -> Cells:
        return Cells(self.centre[chosen], self.half[chosen])

    @property
    def radius(self) -> Floats:
        """[N, n]."""
        return np.repeat(self.half[:, None], self.centre.shape[1], axis=1)


def cover(n: int, ball: float, per_side: int) -> Cells:
    """The cubes of a grid that touch the ball |y| <= ``ball`` of R^n."""
    half = ball / per_side
    ticks = np.linspace(-ball + half, ball - half, per_side)
    centre = np.stack(np.meshgrid(*[ticks] * n, indexing="ij"), axis=-1).reshape(-1, n)
    return touching(Cells(centre, np.full(len(centre), half)), ball)


def touching(cells: Cells, ball: float) -> Cells:
    """Those of the cells that are not outside of the ball."""
    nearest = np.maximum(np.abs(cells.centre) - cells.half[:, None], 0.0)
    # The grid's own rounding must not lose the boundary.
    inside = np.linalg.norm(nearest, axis=1) <= ball * (1 + 1e-12)
    return Cells(cells.centre[inside], cells.half[inside])


def split(cells: Cells, ball: float) -> Cells:
    """Each cell's 2^n halves, without those outside of the ball."""
    n = cells.centre.shape[1]
    half = cells.half / 2
    centre = cells.centre[:, None] + corners(n) * half[:, None, None]
    children = Cells(centre.reshape(-1, n), np.repeat(half, 2**n))
    return touching(children, ball)
