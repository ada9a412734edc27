"""Constraints g(w) <= 0 as functions of the parameters: exact, or estimated from noisy rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from scpo_bench.configuration import require
from scpo_bench.contract import Floats
from scpo_bench.errors import UserError
from scpo_bench.scpo.rollouts import BatchedRollouts, Rollouts


class Constraints(Protocol):
    """K constraints on parameters w [d].

    names: what users call them. group: [K], the index of each one's name; several may share one.
    """

    names: tuple[str, ...]
    group: NDArray[np.intp]

    def begin_update(self, update: int) -> bool:
        """Draw new noise, the same for all evaluations of this update.

        True if there is any: then the deployed policy has to be evaluated again.
        """
        ...

    def evaluate(self, w: Floats) -> Floats:
        """g(w) [K]; where g is noisy, an upper confidence bound on it."""
        ...

    def nearest(self, g: Floats) -> NDArray[np.intp]:
        """The constraints to probe where the values are g [K], ascending."""
        ...

    def beside(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """All constraints that are evaluated when those in ``rows`` are, ascending."""
        ...

    def probe(
        self, w: Floats, g: Floats, probes: Floats, rows: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        """g of the constraints ``rows`` [k] at ``probes`` [M, d], and the differences' half widths.

        The half widths are those of the confidence intervals of the differences from g [K], the
        values at w. Both results are [M, k]. rows: from ``nearest`` or ``beside``.
        """
        ...


def by_name(constraints: Constraints, values: Floats, rows: NDArray[np.intp]) -> Floats:
    """[n], the largest of ``values`` [k], of the constraints ``rows`` [k], under each name.

    -inf where there is none.
    """
    largest = np.full(len(constraints.names), -np.inf)
    np.maximum.at(largest, constraints.group[rows], values)
    return largest


@dataclass(frozen=True)
class RolloutConfig:
    """How constraints are evaluated by rollouts."""

    sharpness: float = 100.0
    """Batched tasks: sharpness of the log-sum-exp maximum over states and steps, per unit of
    relative constraint value.
    """
    pointwise: bool = False
    """Batched tasks: one constraint per start state, step and signed bound, instead of one smooth
    maximum per constraint of the task.
    """
    active_starts: int = 0
    """Pointwise: start states that are probed, per constraint of the task: those with the largest
    values. The others are evaluated with each candidate (verified mode), and probed if it would
    violate there. 0: all.
    """
    evaluation_starts: int = 512
    """Batched tasks: start states of a constraint evaluation.

    Too few leave gaps in which a policy that passes them all is unsafe: with 128 on the imitation
    task, 2 of 11 runs deployed policies that violated from starts between the evaluated ones.
    """
    level: float = 0.05
    """Noisy constraints: the probability with which an update may deploy an unsafe policy."""
    rollouts: int = 8
    """Noisy constraints: rollouts of the first evaluation of a policy, and of every probe."""
    rollout_budget: int = 512
    """Noisy constraints: rollouts of one policy at most."""

    def __post_init__(self) -> None:
        require(self, "sharpness", above=0)
        require(self, "evaluation_starts", low=1)
        require(self, "active_starts", low=0)
        require(self, "level", above=0, high=0.5)
        require(self, "rollouts", low=2)
        require(self, "rollout_budget", low=self.rollouts)


def constraints_from(rollouts: Rollouts, config: RolloutConfig, retries: int) -> Constraints:
    """The constraints that ``rollouts`` evaluate. retries: candidates per update, at most."""
    if config.pointwise:
        if not (isinstance(rollouts, BatchedRollouts) and rollouts.exact):
            raise UserError(
                "pointwise: constraints are evaluated pointwise on tasks whose dynamics are pure "
                "functions, without constraint noise; set pointwise to False"
            )
        return Pointwise(rollouts, config.active_starts)
    if rollouts.exact:
        return Exact(rollouts.names, lambda w: rollouts(w, (0,))[:, 0])
    return Expected(
        rollouts.names, rollouts, config.level, config.rollouts, config.rollout_budget, retries
    )


class Few:
    """Constraints with a name each, which are always evaluated together."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.group = np.arange(len(names))

    def nearest(self, g: Floats) -> NDArray[np.intp]:
        return self.group

    def beside(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        return self.group


class Exact(Few):
    """g is a function: ``values`` maps w [M, d] to g [M, k]."""

    def __init__(self, names: tuple[str, ...], values: Callable[[Floats], Floats]) -> None:
        super().__init__(names)
        self.values = values

    def begin_update(self, update: int) -> bool:
        return False

    def evaluate(self, w: Floats) -> Floats:
        return self.values(w[None])[0]

    def probe(
        self, w: Floats, g: Floats, probes: Floats, rows: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        values = self.values(probes)
        return values, np.zeros_like(values)


class Pointwise:
    """One constraint per start state, step and bound of a batched task.

    Bounds are signed: p <= 1 and -p <= 1 are two constraints. Nothing is aggregated, so each is as
    smooth as the dynamics, and one rollout gives the values of all constraints of its start.
    active: start states per name that are probed, those with the largest values; 0: all.
    """

    def __init__(self, rollouts: BatchedRollouts, active: int) -> None:
        self._rollouts, self._active = rollouts, active
        self.names = rollouts.names
        self._per_start = len(rollouts.bound_names)
        self.group = np.tile(rollouts.bound_names, rollouts.starts)

    def begin_update(self, update: int) -> bool:
        return False

    def evaluate(self, w: Floats) -> Floats:
        return self._rollouts.bounds(w[None])[0]

    def nearest(self, g: Floats) -> NDArray[np.intp]:
        if not 0 < self._active < self._rollouts.starts:
            return np.arange(len(g))
        by_start = g.reshape(-1, self._per_start)
        chosen: set[int] = set()
        for name in range(len(self.names)):
            worst = by_start[:, self._rollouts.bound_names == name].max(axis=1)
            chosen.update(np.argpartition(-worst, self._active - 1)[: self._active].tolist())
        return self._rows(np.array(sorted(chosen)))

    def beside(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        return self._rows(np.unique(rows // self._per_start))

    def _rows(self, starts: NDArray[np.intp]) -> NDArray[np.intp]:
        return (starts[:, None] * self._per_start + np.arange(self._per_start)).reshape(-1)

    def probe(
        self, w: Floats, g: Floats, probes: Floats, rows: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        values = self._rollouts.bounds(probes, rows[:: self._per_start] // self._per_start)
        return values, np.zeros_like(values)


class Expected(Few):
    """g(w) = E[y(w, noise)], estimated from rollouts, with confidence 1 - ``level`` per update.

    sample: (w [M, d], stream numbers [n]) -> y [M, n, k], one rollout per stream. Equal streams
    mean equal noise (common random numbers), so differences between policies are paired: the noise
    that both share cancels.
    rollouts: of a policy's first evaluation, and of every probe; they are doubled until the
    decision is clear, up to ``budget``.
    candidates: how many policies an update may evaluate beside its own. The level is shared among
    them (Bonferroni), the constraints, and the doublings.

    The intervals are Student's: exact for normal noise, approximate otherwise.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        sample: Callable[[Floats, Sequence[int]], Floats],
        level: float,
        rollouts: int,
        budget: int,
        candidates: int,
    ) -> None:
        super().__init__(names)
        self._sample = sample
        self._rollouts, self._budget = rollouts, budget
        doublings = 1 + max(0, int(np.ceil(np.log2(budget / rollouts))))
        # One share for the policy itself, one for each candidate, one for the slopes.
        self._tail = level / ((candidates + 2) * len(names) * doublings)
        self._first = 0  # the update's first stream

    def begin_update(self, update: int) -> bool:
        self._first = update * self._budget  # no update uses more
        return True

    def _rollout(self, w: Floats, start: int, stop: int) -> Floats:
        return self._sample(w, range(self._first + start, self._first + stop))

    def _half_width(self, y: Floats, tests: int = 1) -> Floats:
        """Of the one-sided confidence interval of the mean over axis -2 of y [..., n, k]."""
        n = y.shape[-2]
        return stats.t.ppf(1 - self._tail / tests, n - 1) * y.std(axis=-2, ddof=1) / np.sqrt(n)

    def evaluate(self, w: Floats) -> Floats:
        y = self._rollout(w[None], 0, self._rollouts)[0]
        while True:
            n, mean, half = len(y), y.mean(axis=0), self._half_width(y)
            # Clear: certainly unsafe, or safe with the distance to the limit known to within half
            # of itself.
            unsafe = (mean - half > 0).any()
            safe = (mean + half <= np.minimum(0.5 * mean, 0.0)).all()
            if unsafe or safe or n >= self._budget:
                return mean + half
            y = np.concatenate([y, self._rollout(w[None], n, min(2 * n, self._budget))[0]])

    def probe(
        self, w: Floats, g: Floats, probes: Floats, rows: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        y = self._rollout(np.concatenate([w[None], probes]), 0, self._rollouts)
        difference = y[1:] - y[0]
        return g + difference.mean(axis=1), self._half_width(difference, tests=len(probes))


def describe_unsafe(constraints: Constraints, g: Floats) -> str:
    """One line that names the worst constraint and its value, of g [K]."""
    worst = int(np.argmax(g))
    name = constraints.names[constraints.group[worst]]
    return f"constraint '{name}' has value {g[worst]:.4g} > 0"
