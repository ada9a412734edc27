"""What probes around a policy say of its constraints: slopes, curvature, and a certificate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from scpo_bench.contract import Floats
from scpo_bench.scpo.bank import Bank
from scpo_bench.scpo.constraints import Constraints
from scpo_bench.scpo.projection import FIRST, Certificate
from scpo_bench.scpo.smoothness import Smoothness, curvatures

EPSILON = 4 * np.finfo(np.float64).eps
STEEPNESS = 2.0  # of first-order bounds, times the slopes that were seen


@dataclass(frozen=True)
class LocalModel:
    """Constraints around w [d], along the columns of a bank.

    values: [K], of all constraints at w. rows: [k], the constraints that were probed. slopes and
    noise: [k, m], difference quotients and the half widths of their confidence intervals.
    curvatures: [k, m], second differences; None where only forward quotients were taken.
    """

    w: Floats
    bank: Bank
    values: Floats
    rows: NDArray[np.intp]
    slopes: Floats
    noise: Floats
    curvatures: Floats | None

    def certificate(
        self, smoothness: Smoothness, with_noise: bool, cut: bool, rounding: Floats | float = 0.0
    ) -> Certificate:
        """gbar of the probed constraints.

        with_noise: also for the slopes' noise. cut: see :meth:`Smoothness.constants`. rounding: how
        far off the values may be [K].
        """
        bank = self.bank
        L, errors = smoothness.constants(self.rows, self.curvatures, bank.lengths, cut)
        values = self.values[self.rows]
        # A difference quotient over |d_j| is off by the rounding of the values, divided by |d_j|.
        errors = errors + np.outer(EPSILON * (1.0 + np.abs(values)), 1 / bank.lengths)
        if with_noise:
            errors = errors + self.noise
        if np.any(rounding):
            errors = errors + np.outer(2 * np.broadcast_to(rounding, len(L)), 1 / bank.lengths)
        return Certificate(values, self.slopes, errors, L, bank.factor)

    def without(self, changed: NDArray[np.intp], values: Floats) -> LocalModel:
        """This model without constraints that others have replaced, whose values are now known.

        values: [K], at the deployed policy.
        """
        kept = ~np.isin(self.rows, changed)
        known = self.values.copy()
        known[changed] = values[changed]
        return replace(
            self,
            values=known,
            rows=self.rows[kept],
            slopes=self.slopes[kept],
            noise=self.noise[kept],
            curvatures=None if self.curvatures is None else self.curvatures[kept],
        )

    def extended(self, other: LocalModel) -> LocalModel:
        """This model with the constraints that were probed for another one around the same w."""
        both = None
        if self.curvatures is not None and other.curvatures is not None:
            both = np.concatenate([self.curvatures, other.curvatures])
        values = self.values.copy()
        values[other.rows] = other.values[other.rows]
        return replace(
            self,
            values=values,
            rows=np.concatenate([self.rows, other.rows]),
            slopes=np.concatenate([self.slopes, other.slopes]),
            noise=np.concatenate([self.noise, other.noise]),
            curvatures=both,
        )


def probe(
    constraints: Constraints,
    w: Floats,
    values: Floats,
    rows: NDArray[np.intp],
    bank: Bank,
    central: bool,
) -> LocalModel:
    """Evaluate the constraints ``rows`` [k] at theta + d_j, for central quotients at theta - d_j.

    values: [K], all constraints at w [d].
    """
    steps = (bank.directions * bank.lengths).T
    probed, noise = constraints.probe(
        w, values, w + (np.concatenate([steps, -steps]) if central else steps), rows
    )
    g, lengths = values[rows], bank.lengths[:, None]
    if not central:
        return LocalModel(
            w, bank, values, rows, ((probed - g) / lengths).T, (noise / lengths).T, None
        )
    plus, minus = np.split(probed, 2)
    slopes = ((plus - minus) / (2 * lengths)).T
    error = (np.maximum(*np.split(noise, 2)) / lengths).T
    return LocalModel(
        w, bank, values, rows, slopes, error, curvatures(g, plus, minus, bank.lengths)
    )


class FirstOrder:
    """Which constraints a first-order bound serves better than the certificate.

    Where an action saturates, or trajectories part, curvature is no guide: a constraint far from
    its bound would still allow no step. Its first-order bound g_i + Lambda_i |D xi|, with Lambda_i
    STEEPNESS times the length of its slopes and their errors, allows |D xi| <= r_i. If that is more
    than the certificate allows in every direction, the step is confined to the smallest such r_i
    instead, and constraints with larger r_i need not be looked at. Only for many constraints: the
    few that tasks have otherwise are all near their bounds.

    radius: what the step is confined to. bounded: [k], the constraints that this bounds.
    """

    def __init__(self, certificate: Certificate, margin: Floats, reach: float) -> None:
        """margin: [k]; reach: the length that the step has at most without this."""
        k = len(certificate.values)
        self.radius, self.bounded = reach, np.zeros(k, dtype=bool)
        self._certificate = certificate
        if k <= FIRST:
            return
        slack = np.maximum(-margin - certificate.values, 0.0)
        # Along the steepest step: |s.z| and e.|z| for |R z| = 1, where columns may be skew.
        inverse = solve_triangular(certificate.factor, np.eye(len(certificate.factor)))
        errors = np.linalg.norm(certificate.slope_errors, axis=1) * np.linalg.norm(inverse, 2)
        steepness = np.linalg.norm(certificate.slopes @ inverse, axis=1) + errors
        self._steepness = STEEPNESS * steepness
        allowed = slack / np.maximum(self._steepness, 1e-300)
        root = np.sqrt(steepness**2 + 2 * certificate.smoothness * slack)
        by_certificate = 2 * slack / np.maximum(steepness + root, 1e-300)
        # Only what confines the step for good reason: not what is at its bound already.
        better = (allowed > by_certificate) & (allowed < reach)
        self.radius = float(allowed[better].min(initial=reach))
        self.bounded = allowed >= self.radius

    def bound(self, z: Floats, length: float) -> Floats:
        """[k]: what is certified of each constraint at z [m], a step of that length."""
        bound = self._certificate.bound(z)
        if self.bounded.any():
            values = self._certificate.values + self._steepness * length
            bound[self.bounded] = values[self.bounded]
        return bound
