"""Which directions to probe: the proposal, then those that proved useful before, then random ones.

A step can only use directions that were probed. In a large weight space random directions almost
never contain a constraint's normal, and then shrinking is the only way to stay safe; so a memory of
normals is part of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from scpo_bench.contract import Floats

Candidate = Literal["normals", "momentum", "start", "cost"]

DECAY = 0.9  # of the running estimate of each constraint's normal, and of the momentum


@dataclass(frozen=True)
class DirectionMemory:
    """Directions of past updates.

    normals: [k, d], decayed sums of Q s_i, estimates of grad g_i.
    momentum: [d], decayed sum of the steps taken.
    """

    normals: Floats
    momentum: Floats

    @staticmethod
    def empty(k: int, d: int) -> DirectionMemory:
        return DirectionMemory(np.zeros((k, d)), np.zeros(d))

    def updated(self, basis: Floats, slopes: Floats, step: Floats) -> DirectionMemory:
        """The memory after an update. basis: [d, m]; slopes: [k, m]; step: [m], in that basis."""
        # Along the probed directions the new slopes replace the old estimate; elsewhere it decays.
        old = self.normals - (self.normals @ basis) @ basis.T
        return DirectionMemory(DECAY * old + slopes @ basis.T, DECAY * self.momentum + basis @ step)

    def candidates(
        self, w: Floats, kinds: Sequence[Candidate], cost_gradients: Sequence[Floats]
    ) -> list[Floats]:
        """Directions worth probing, best first.

        w: [d], zero at the start policy; cost_gradients: each [d].
        """
        directions: dict[Candidate, Sequence[Floats]] = {
            "normals": list(self.normals),
            "momentum": [self.momentum],
            "start": [-w],
            "cost": cost_gradients,
        }
        return [direction for kind in kinds for direction in directions[kind]]


def probe_basis(
    proposal: Floats, candidates: Sequence[Floats], count: int, rng: np.random.Generator
) -> Floats:
    """[d, min(count, d)]: orthonormal columns, the first along ``proposal``.

    Candidates are taken in order, except those in the span of earlier columns; random directions
    fill up. With count >= d the basis is complete: the reflection that maps the first axis to the
    proposal.
    """
    d = len(proposal)
    length = np.linalg.norm(proposal)
    first = proposal / length if length > 0 else np.eye(d)[0]
    if count >= d:
        # Householder: I - 2 v v' with v along first - e_1; the sign keeps v away from zero.
        v = first.copy()
        v[0] += 1.0 if first[0] > 0 else -1.0
        v /= np.linalg.norm(v)
        basis = np.eye(d) - 2.0 * np.outer(v, v)
        basis[:, 0] = first  # up to its sign what the reflection gives, without rounding
        return basis
    columns = [first]
    queue = [c for c in candidates if np.linalg.norm(c) > 0]
    while len(columns) < count:
        direction = queue.pop(0) if queue else rng.normal(size=d)
        direction = direction / np.linalg.norm(direction)
        # Twice is enough (Kahan): the second pass removes what rounding left in the first.
        for _ in range(2):
            direction = direction - np.stack(columns, axis=1) @ (np.stack(columns) @ direction)
        rest = np.linalg.norm(direction)
        if rest > 1e-6:
            columns.append(direction / rest)
    return np.stack(columns, axis=1)
