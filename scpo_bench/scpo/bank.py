"""The bank of candidate updates: the directions in which constraints are evaluated.

A step is a combination of the bank's columns, D xi. The paper's bank is the previous accepted step
and the raw step. In a large weight space neither need contain a constraint's normal, and then
shrinking is the only way to stay safe; so a memory of normals, and complete bases, are options.
Source: Cao, Borrelli, Joa, arXiv 2512.13788 (the bank D); the other candidates are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import solve_triangular

from scpo_bench.contract import Floats

Candidate = Literal["previous", "normals", "momentum", "start", "cost"]

DECAY = 0.9  # of the running estimate of each constraint's normal, and of the momentum
# A candidate is left out if less than this share of its length is outside the span of those before.
COLLINEAR = 1e-3
# ... or if it is shorter than this share of the raw step: difference quotients over so little are
# rounding.
SHORT = 1e-6


@dataclass(frozen=True)
class Bank:
    """Candidate updates d_1..d_m, the columns of D.

    Steps are given by coordinates z [m] along the unit columns: D xi with xi_j = z_j / |d_j|.
    directions: [d, m], unit columns d_j / |d_j|. lengths: [m] |d_j|, where constraints are
    evaluated. basis: [d, m], orthonormal, and factor: [m, m], upper triangular, with
    directions = basis @ factor; so |D xi| = |factor z|, and the paper's S = D'D is factor' factor
    up to the lengths.
    """

    directions: Floats
    lengths: Floats
    basis: Floats
    factor: Floats

    @property
    def complete(self) -> bool:
        """Whether every step is a combination of the columns."""
        return self.directions.shape[0] == self.directions.shape[1]

    def step(self, z: Floats) -> Floats:
        """[d] for coordinates z [m]."""
        return self.directions @ z

    def length(self, z: Floats) -> float:
        """|D xi|, of the step with coordinates z [m]."""
        return float(np.linalg.norm(self.factor @ z))

    def coordinates(self, step: Floats) -> Floats:
        """[m]: of the projection of a step [d] on the columns' span."""
        return solve_triangular(self.factor, self.basis.T @ step)


@dataclass(frozen=True)
class DirectionMemory:
    """Directions of past updates.

    normals: [n, d], decayed sums of estimates of grad g_i, one per name of a constraint.
    momentum: [d], decayed sum of the steps taken. previous: [d], the last accepted step.
    """

    normals: Floats
    momentum: Floats
    previous: Floats

    @staticmethod
    def empty(n: int, d: int) -> DirectionMemory:
        return DirectionMemory(np.zeros((n, d)), np.zeros(d), np.zeros(d))

    def with_normals(self, bank: Bank, slopes: Floats) -> DirectionMemory:
        """The memory after probing. slopes: [n, m], along the bank's unit columns."""
        # Along the probed directions the new slopes replace the old estimate; elsewhere it decays.
        known = solve_triangular(bank.factor, slopes.T, trans="T").T @ bank.basis.T
        old = self.normals - (self.normals @ bank.basis) @ bank.basis.T
        return DirectionMemory(DECAY * old + known, self.momentum, self.previous)

    def with_step(self, step: Floats) -> DirectionMemory:
        """The memory after a step [d]; zero: the policy stayed."""
        previous = step if step.any() else self.previous
        return DirectionMemory(self.normals, DECAY * self.momentum + step, previous)

    def candidates(
        self, w: Floats, kinds: Sequence[Candidate], cost_gradients: Sequence[Floats]
    ) -> list[Floats]:
        """Directions worth probing, best first.

        w: [d], zero at the start policy; cost_gradients: each [d].
        """
        directions: dict[str, Sequence[Floats]] = {
            "previous": [self.previous],
            "normals": list(self.normals),
            "momentum": [self.momentum],
            "start": [-w],
            "cost": cost_gradients,
        }
        return [direction for kind in kinds for direction in directions.get(kind, ())]


def candidate_bank(
    raw: Floats, previous: Floats | None, others: Sequence[Floats], count: int
) -> Bank:
    """The paper's bank: candidates are evaluated where they are, theta + d_j.

    raw: [d], not zero. previous: [d], the last accepted step; None or zero: there is none. others:
    directions without a length of their own, which get the raw step's. At most ``count`` columns,
    the raw step first; a candidate in the span of those before it is left out (the paper: "nearly
    collinear").
    """
    length = float(np.linalg.norm(raw))
    scaled = [d * (length / np.linalg.norm(d)) for d in others if d.any()]
    columns, basis = [raw], [raw / length]
    for candidate in [*([] if previous is None else [previous]), *scaled]:
        if len(columns) == min(count, len(raw)) or np.linalg.norm(candidate) < SHORT * length:
            continue
        rest = _orthogonal(candidate, basis)
        if rest is not None:
            columns.append(candidate)
            basis.append(rest)
    D, Q = np.stack(columns, axis=1), np.stack(basis, axis=1)
    lengths = np.linalg.norm(D, axis=0)
    return Bank(D / lengths, lengths, Q, np.triu(Q.T @ (D / lengths)))


def orthonormal_bank(
    raw: Floats,
    candidates: Sequence[Floats],
    count: int,
    radius: float,
    rng: np.random.Generator,
) -> Bank:
    """min(count, d) orthonormal directions, all evaluated at distance ``radius``; D = radius Q.

    The first is along ``raw`` [d]. Candidates are taken in order, except those in the span of
    earlier columns; random directions fill up. With count >= d the basis is complete: the
    reflection that maps the first axis to the raw step.
    """
    d = len(raw)
    length = np.linalg.norm(raw)
    first = raw / length if length > 0 else np.eye(d)[0]
    if count >= d:
        Q = _reflection(first)
    else:
        basis = [first]
        queue = [c for c in candidates if c.any()]
        while len(basis) < count:
            rest = _orthogonal(queue.pop(0) if queue else rng.normal(size=d), basis)
            if rest is not None:
                basis.append(rest)
        Q = np.stack(basis, axis=1)
    m = Q.shape[1]
    return Bank(Q, np.full(m, radius), Q, np.eye(m))


def _reflection(first: Floats) -> Floats:
    """[d, d]: the Householder reflection whose first column is the unit vector ``first`` [d]."""
    # I - 2 v v' with v along first - e_1; the sign keeps v away from zero.
    v = first.copy()
    v[0] += 1.0 if first[0] > 0 else -1.0
    v /= np.linalg.norm(v)
    Q = np.eye(len(first)) - 2.0 * np.outer(v, v)
    Q[:, 0] = first  # up to its sign what the reflection gives, without rounding
    return Q


def _orthogonal(direction: Floats, basis: Sequence[Floats]) -> Floats | None:
    """The unit vector along what ``direction`` [d] adds to the orthonormal ``basis``; None if
    that is nearly nothing."""
    direction = direction / np.linalg.norm(direction)
    span = np.stack(basis)
    # Twice is enough (Kahan): the second pass removes what rounding left in the first.
    for _ in range(2):
        direction = direction - span.T @ (span @ direction)
    rest = float(np.linalg.norm(direction))
    return direction / rest if rest > COLLINEAR else None
