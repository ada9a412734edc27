"""Constraints g(w) <= 0 as functions of the parameters: exact, or estimated from noisy rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np

from scpo_bench.configuration import require, require_choice
from scpo_bench.contract import Floats
from scpo_bench.scpo.bounds import Bound
from scpo_bench.scpo.estimation import Evidence, Expected
from scpo_bench.scpo.rollouts import Rollouts


class Constraints(Protocol):
    """k constraints on parameters w [d].

    names: of the constraints, k of them. uncertainty: how far below what ``evaluate`` returned last
    g may be [k], or one number for all: the width of a confidence interval.
    """

    names: tuple[str, ...]
    uncertainty: Floats | float

    def begin_update(self, update: int) -> bool:
        """True if there is noise: then the deployed policy has to be evaluated again."""
        ...

    def evaluate(self, w: Floats) -> Floats:
        """g(w) [k]; where g is noisy, an upper confidence bound on it."""
        ...

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        """g at ``probes`` [M, d], and the half width of each difference's confidence interval.

        The difference is the one from g [k], the values at w. Both results are [M, k].
        """
        ...

    def rounding(self, w: Floats) -> Floats:
        """[k]: how far off g may be, near w, by the precision of weights and arithmetic."""
        ...


@dataclass(frozen=True)
class RolloutConfig:
    """How constraints are evaluated by rollouts."""

    sharpness: float = 100.0
    """Batched tasks: sharpness of the log-sum-exp maximum over states and steps, per unit of
    relative constraint value.
    """
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
        require(self, "level", above=0, high=0.5)
        require(self, "rollouts", low=2)
        require(self, "probe_rollouts", low=2)
        require(self, "rollout_budget", low=self.rollouts)
        require_choice(self, "bound", get_args(Bound))
        for name in ("predicted_episodes", "reserve", "largest_cost"):
            require(self, name, low=0)


def constraints_from(
    rollouts: Rollouts, config: RolloutConfig, retries: int, evidence: Evidence | None = None
) -> Constraints:
    """The constraints that ``rollouts`` evaluate. retries: candidates per update, at most.

    evidence: what earlier rollouts of this training run have shown, where they are noisy.
    """
    if rollouts.exact:
        return Exact(rollouts.names, lambda w: rollouts(w, (0,))[:, 0])
    return Expected(rollouts, config, retries, Evidence() if evidence is None else evidence)


class Exact:
    """g is a function: ``values`` maps w [M, d] to g [M, k].

    rounding: maps w [d] to how far off its values may be by rounding [k]; by default not at all.
    """

    uncertainty: Floats | float = 0.0

    def __init__(
        self,
        names: tuple[str, ...],
        values: Callable[[Floats], Floats],
        rounding: Callable[[Floats], Floats] | None = None,
    ) -> None:
        self.names = names
        self.values = values
        self._rounding = rounding

    def begin_update(self, update: int) -> bool:
        return False

    def evaluate(self, w: Floats) -> Floats:
        return self.values(w[None])[0]

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        values = self.values(probes)
        return values, np.zeros_like(values)

    def rounding(self, w: Floats) -> Floats:
        return np.zeros(len(self.names)) if self._rounding is None else self._rounding(w)


def describe_unsafe(names: tuple[str, ...], g: Floats) -> str:
    """One line that names the worst constraint and its value."""
    worst = int(np.argmax(g))
    return f"constraint '{names[worst]}' has value {g[worst]:.4g} > 0"
