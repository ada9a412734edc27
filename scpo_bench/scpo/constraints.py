"""Constraints g(w) <= 0 as functions of the parameters: exact, or estimated from noisy rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import stats

from scpo_bench.configuration import require
from scpo_bench.contract import Floats
from scpo_bench.scpo.rollouts import Rollouts


class Constraints(Protocol):
    """k constraints on parameters w [d]. names: of the constraints, k of them."""

    names: tuple[str, ...]

    def begin_update(self, update: int) -> bool:
        """Draw new noise, the same for all evaluations of this update.

        True if there is any: then the deployed policy has to be evaluated again.
        """
        ...

    def evaluate(self, w: Floats) -> Floats:
        """g(w) [k]; where g is noisy, an upper confidence bound on it."""
        ...

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        """g at ``probes`` [M, d], and the half width of each difference's confidence interval.

        The difference is the one from g [k], the values at w. Both results are [M, k].
        """
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
    """Noisy constraints: rollouts of the first evaluation of a policy, and of every probe."""
    rollout_budget: int = 512
    """Noisy constraints: rollouts of one policy at most."""

    def __post_init__(self) -> None:
        require(self, "sharpness", above=0)
        require(self, "evaluation_starts", low=1)
        require(self, "level", above=0, high=0.5)
        require(self, "rollouts", low=2)
        require(self, "rollout_budget", low=self.rollouts)


def constraints_from(rollouts: Rollouts, config: RolloutConfig, retries: int) -> Constraints:
    """The constraints that ``rollouts`` evaluate. retries: candidates per update, at most."""
    if rollouts.exact:
        return Exact(rollouts.names, lambda w: rollouts(w, (0,))[:, 0])
    return Expected(
        rollouts.names, rollouts, config.level, config.rollouts, config.rollout_budget, retries
    )


class Exact:
    """g is a function: ``values`` maps w [M, d] to g [M, k]."""

    def __init__(self, names: tuple[str, ...], values: Callable[[Floats], Floats]) -> None:
        self.names = names
        self.values = values

    def begin_update(self, update: int) -> bool:
        return False

    def evaluate(self, w: Floats) -> Floats:
        return self.values(w[None])[0]

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        values = self.values(probes)
        return values, np.zeros_like(values)


class Expected:
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
        self.names = names
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

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        y = self._rollout(np.concatenate([w[None], probes]), 0, self._rollouts)
        difference = y[1:] - y[0]
        return g + difference.mean(axis=1), self._half_width(difference, tests=len(probes))


def describe_unsafe(names: tuple[str, ...], g: Floats) -> str:
    """One line that names the worst constraint and its value."""
    worst = int(np.argmax(g))
    return f"constraint '{names[worst]}' has value {g[worst]:.4g} > 0"
