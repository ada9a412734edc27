"""What probes around a policy say of its constraints: slopes, curvature, and a certificate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.scpo.bank import Bank
from scpo_bench.scpo.constraints import Constraints
from scpo_bench.scpo.projection import FIRST, Certificate
from scpo_bench.scpo.smoothness import Smoothness, curvatures


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

    def certificate(self, smoothness: Smoothness, with_noise: bool) -> Certificate:
        """gbar of the probed constraints. with_noise: also for the slopes' noise."""
        bank = self.bank
        L, errors = smoothness.constants(self.rows, self.curvatures, bank.lengths)
        if with_noise:
            errors = errors + self.noise
        return Certificate(self.values[self.rows], self.slopes, errors, L, bank.factor)

    def extended(self, other: LocalModel) -> LocalModel:
        """This model with the constraints that were probed for another one around the same w."""
        both = None
        if self.curvatures is not None and other.curvatures is not None:
            both = np.concatenate([self.curvatures, other.curvatures])
        return replace(
            self,
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


def first_order(certificate: Certificate, reach: float, factor: float) -> Floats:
    """g_i + Lambda_i reach: [k], a bound for steps no longer than ``reach``.

    Lambda_i is ``factor`` times the length of the slope and its errors. Where the constraint is far
    from its bound this may say more than the certificate: at a kink curvature is no guide. Few
    constraints are not worth it: then all are infinite.
    """
    if len(certificate.values) <= FIRST:
        return np.full(len(certificate.values), np.inf)
    steepest = np.linalg.norm(np.abs(certificate.slopes) + certificate.slope_errors, axis=1)
    return certificate.values + factor * steepest * reach
