"""Constraints g(w) <= 0 as functions of the parameters: what they offer, and exact ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from scpo_bench.configuration import require, require_choice
from scpo_bench.contract import Floats
from scpo_bench.scpo.bounds import Bound

NONE: NDArray[np.intp] = np.zeros(0, dtype=np.intp)


class Constraints(Protocol):
    """K constraints on parameters w [d].

    names: what users call them. group: [K], the index of each one's name; several may share one.
    noisy: evaluating w again tells more. uncertainty: how far below what ``evaluate`` returned last
    g may be [K], or one number for all: the width of a confidence interval. changed: the
    constraints that the last ``begin_update`` has replaced by others.
    """

    names: tuple[str, ...]
    group: NDArray[np.intp]
    noisy: bool
    uncertainty: Floats | float
    changed: NDArray[np.intp]

    def begin_update(self, update: int, w: Floats, g: Floats | None) -> Floats:
        """g(w) [K] for this update, whose noise or start states may be new.

        g: as it was known before; None: not at all.
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

    def rounding(self, w: Floats) -> Floats | float:
        """How far off g [K] may be, near w, by the precision of weights and arithmetic."""
        ...


def by_name(constraints: Constraints, values: Floats, rows: NDArray[np.intp]) -> Floats:
    """[n], the largest of ``values`` [k], of the constraints ``rows`` [k], under each name.

    -inf where there is none.
    """
    largest = np.full(len(constraints.names), -np.inf)
    np.maximum.at(largest, constraints.group[rows], values)
    return largest


def describe_worst(constraints: Constraints, g: Floats) -> str:
    """One line that names the constraint with the largest value of g [K]."""
    worst = int(np.argmax(g))
    name = constraints.names[constraints.group[worst]]
    return f"constraint '{name}' has value {g[worst]:.4g} > 0"


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
    values. The others are evaluated with each candidate (verified mode), and probed if it fails
    there. 0: all.
    """
    fresh_starts: int = 0
    """Pointwise: start states that are drawn anew for every update, most of them between those
    whose trajectories part. A fixed set has gaps, and training finds them.
    """
    kept_starts: int = 0
    """Pointwise: start states with the largest values among those drawn so far, which are kept."""
    evaluation_starts: int = 512
    """Batched tasks: start states of a constraint evaluation.

    Too few leave gaps in which a policy that passes them all is unsafe: with 128 on the imitation
    task, 2 of 11 runs deployed policies that violated from starts between the evaluated ones.
    """
    level: float = 0.05
    """Noisy constraints: the probability with which an update may deploy an unsafe policy."""
    rollouts: int = 8
    """Noisy constraints: rollouts of the first evaluation of a policy."""
    probe_rollouts: int = 8
    """Noisy constraints: rollouts of every probe."""
    rollout_budget: int = 512
    """Noisy constraints: rollouts in one evaluation of a policy at most."""
    bound: Bound = "mixed"
    """Noisy constraints: upper confidence bound on the mean. student: exact for normal values.
    mixed: the larger of that and a bound on the share of costly episodes (Clopper-Pearson) times
    what one costs; a heuristic for costs of which many are zero, and student where there are signed
    values. betting: holds for every distribution within the range of an episode's cost, but needs
    hundreds of rollouts where that range is far above the limit.
    """
    predicted_episodes: int = 0
    """Noisy constraints: also ask that the mean of so many further episodes stays within the limit
    with probability 1 - ``level`` (by Student's prediction interval). 0: do not.
    """
    reserve: float = 0.0
    """Noisy constraints: how far below zero a candidate's bound has to be. The deployed policy may
    use this up when more is known of it.
    """
    largest_cost: float = 0.0
    """Noisy constraints: the most that an episode can cost. 0: its number of steps, which is right
    where a step costs 1 at most.
    """

    def __post_init__(self) -> None:
        require(self, "sharpness", above=0)
        require(self, "evaluation_starts", low=1)
        for name in ("active_starts", "fresh_starts", "kept_starts"):
            require(self, name, low=0)
        require(self, "level", above=0, high=0.5)
        require(self, "rollouts", low=2)
        require(self, "probe_rollouts", low=2)
        require(self, "rollout_budget", low=self.rollouts)
        require_choice(self, "bound", get_args(Bound))
        for name in ("predicted_episodes", "reserve", "largest_cost"):
            require(self, name, low=0)


class Few:
    """Constraints with a name each, which are always evaluated together."""

    noisy = False
    changed = NONE
    uncertainty: Floats | float = 0.0

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.group = np.arange(len(names))

    def nearest(self, g: Floats) -> NDArray[np.intp]:
        return self.group

    def beside(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        return self.group


class Exact(Few):
    """g is a function: ``values`` maps w [M, d] to g [M, k].

    rounding: maps w [d] to how far off its values may be by rounding [k]; by default not at all.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        values: Callable[[Floats], Floats],
        rounding: Callable[[Floats], Floats] | None = None,
    ) -> None:
        super().__init__(names)
        self.values = values
        self._rounding = rounding

    def begin_update(self, update: int, w: Floats, g: Floats | None) -> Floats:
        return self.evaluate(w) if g is None else g

    def evaluate(self, w: Floats) -> Floats:
        return self.values(w[None])[0]

    def probe(
        self, w: Floats, g: Floats, probes: Floats, rows: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        values = self.values(probes)
        return values, np.zeros_like(values)

    def rounding(self, w: Floats) -> Floats | float:
        return 0.0 if self._rounding is None else self._rounding(w)
