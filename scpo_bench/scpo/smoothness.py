"""The smoothness constants L_i of the constraints: declared, sampled, or adapted."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats

Rule = Literal["apriori", "sampled", "adaptive"]

SHRINK = 0.8  # what was raised after a breach, and adaptive constants, per update without one
GROW = 2.0  # after a breach, at least
# Of many constraints, a second difference above this multiple of what most have shows a kink, or
# trajectories that part: it says nothing about the length of a step that would be safe.
CUT, MANY = 10.0, 64
FLOOR = 1e-2  # no smaller L is believed: a constraint that looked linear so far may still curve


def curvatures(values: Floats, plus: Floats, minus: Floats, lengths: Floats) -> Floats:
    """c_ij = |g_i(theta + d_j) - 2 g_i(theta) + g_i(theta - d_j)| / |d_j|^2.

    values: [k]; plus, minus: [m, k]; lengths: [m] |d_j|. Returns [k, m]. Each is a lower bound on
    any valid L_i, up to rounding.
    """
    return (np.abs(plus - 2.0 * values + minus) / lengths[:, None] ** 2).T


class Smoothness:
    """L_i and the slope errors e_ij of ``count`` constraints, as ``rule`` has them.

    apriori: L_i = declared, e_ij = L_i |d_j| / 2.
    sampled: L_i = factor max_j c_ij, e_ij = factor c_ij |d_j| / 2: each direction has an error of
    its own. Where the action saturates, a constraint has kinks, and only second differences over
    the length of a step can see those that the step may reach.
    adaptive: L_i sampled once, as factor max_j c_ij, then adapted; e_ij = L_i |d_j| / 2. What is
    carried to the next update is at most ``largest``.
    """

    def __init__(
        self, rule: Rule, declared: float, factor: float, largest: float, count: int
    ) -> None:
        self.rule, self._factor, self._largest = rule, factor, largest
        self._least = {"apriori": declared, "sampled": 1.0, "adaptive": FLOOR}[rule]
        # apriori and adaptive: L_i; sampled: what multiplies the sampled constant.
        self._scale: Floats | None = None
        if rule != "adaptive":
            self._scale = np.full(count, declared if rule == "apriori" else 1.0)

    @property
    def samples(self) -> bool:
        """Whether :meth:`constants` needs second differences."""
        return self.rule == "sampled" or self._scale is None

    def known(self, otherwise: float) -> Floats | float:
        """L [count] where it is known before probing, else ``otherwise``."""
        return otherwise if self.rule == "sampled" or self._scale is None else self._scale

    def constants(
        self, rows: NDArray[np.intp], c: Floats | None, lengths: Floats, cut: bool
    ) -> tuple[Floats, Floats]:
        """(L [k], e [k, m]) of the constraints ``rows`` [k].

        c: [k, m] their second differences; None where :attr:`samples` is False. lengths: [m].
        cut: sampled: take no second difference for more than CUT times the median of the
        constraints' largest; what was understated, evaluation has to show (:meth:`raised`).
        """
        if self.rule == "sampled":
            assert c is not None
            assert self._scale is not None
            if cut and len(c) > MANY:
                c = np.minimum(c, CUT * np.median(c.max(axis=1)))
            local = (self._factor * self._scale[rows])[:, None] * c
            return np.maximum(local.max(axis=1), FLOOR), local * (0.5 * lengths)
        if self._scale is None:
            assert c is not None
            self._scale = np.clip(self._factor * c.max(axis=1), FLOOR, self._largest)
        L = self._scale[rows]
        return L, np.outer(L, 0.5 * lengths)

    def raised(self, rows: NDArray[np.intp], excess: Floats) -> None:
        """Raise what was understated.

        excess: [k], realised change beyond the linear one, relative to what the certificate allowed
        for; above 1 it was exceeded.
        """
        assert self._scale is not None
        factor = np.where(excess > 1, np.maximum(GROW, excess), 1.0)
        self._scale[rows] = self._scale[rows] * factor

    def forget(self, rows: NDArray[np.intp]) -> None:
        """What was learned of constraints that others have replaced."""
        if self.rule == "sampled" and self._scale is not None:
            self._scale[rows] = 1.0

    def carry(self, relax: bool) -> None:
        """To the next update. relax: a bit lower, after an update that exceeded no bound."""
        if self._scale is None:
            return
        scale = SHRINK * self._scale if relax else self._scale
        most = self._largest if self.rule == "adaptive" else np.inf
        self._scale = np.clip(scale, self._least, most)
