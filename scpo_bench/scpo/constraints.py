"""What the guard looks at: constraints g(w) <= 0 as functions of the parameters, exact or estimated
from noisy rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from scipy import stats

from scpo_bench.scpo.projection import Floats


class Constraints(Protocol):
    """names: [k]."""

    names: tuple[str, ...]

    def begin_update(self, update: int) -> bool:
        """Take new noise, the same for all evaluations of this update.

        True if there is any: then g(w) has to be looked at again.
        """
        ...

    def look(self, w: Floats) -> Floats:
        """[k]: g(w), w [d]; where g is noisy, an upper confidence bound on it."""
        ...

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        """(g at ``probes`` [M, d], half width of the confidence interval of its difference from
        g(w)): both [M, k]. g: [k], at w.
        """
        ...


class Exact:
    """g is a function: ``evaluate`` maps w [M, d] to g [M, k]."""

    def __init__(self, names: tuple[str, ...], evaluate: Callable[[Floats], Floats]) -> None:
        self.names = names
        self._evaluate = evaluate

    def begin_update(self, update: int) -> bool:
        return False

    def look(self, w: Floats) -> Floats:
        return self._evaluate(w[None])[0]

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        values = self._evaluate(probes)
        return values, np.zeros_like(values)


class Expected:
    """g(w) = E[y(w, noise)], estimated from rollouts; what is returned holds with confidence 1 -
    ``level`` for a whole update.

    sample: (w [M, d], stream numbers [n]) -> y [M, n, k], one rollout per stream. Equal streams
    mean equal noise (common random numbers), so differences between policies are paired: the noise
    that both share cancels.
    rollouts: of a first look, and of every probe; they are doubled until the decision is clear, up
    to ``budget``.
    looks: how many candidates an update may look at; the level is shared among them (Bonferroni),
    the constraints, and the doublings.

    The intervals are Student's: exact for normal noise, approximate otherwise.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        sample: Callable[[Floats, Sequence[int]], Floats],
        level: float,
        rollouts: int,
        budget: int,
        looks: int,
    ) -> None:
        self.names = names
        self._sample = sample
        self._rollouts, self._budget = rollouts, budget
        doublings = 1 + max(0, int(np.ceil(np.log2(budget / rollouts))))
        # One look at the policy itself, ``looks`` at candidates, one share for the slopes.
        self._tail = level / ((looks + 2) * len(names) * doublings)
        self._first = 0  # the update's first stream

    def begin_update(self, update: int) -> bool:
        self._first = update * self._budget  # no update uses more
        return True

    def _streams(self, start: int, stop: int) -> range:
        return range(self._first + start, self._first + stop)

    def _half_width(self, y: Floats, tests: int = 1) -> Floats:
        """Of the one-sided confidence interval of the mean over axis -2 of y [..., n, k]."""
        n = y.shape[-2]
        return stats.t.ppf(1 - self._tail / tests, n - 1) * y.std(axis=-2, ddof=1) / np.sqrt(n)

    def look(self, w: Floats) -> Floats:
        y = self._sample(w[None], self._streams(0, self._rollouts))[0]
        while True:
            mean, half = y.mean(axis=0), self._half_width(y)
            # Clear: unsafe for certain, or safe with the room to the limit known to within half of
            # itself.
            unsafe, safe = (
                (mean - half > 0).any(),
                (mean + half <= np.minimum(0.5 * mean, 0.0)).all(),
            )
            n = len(y)
            if unsafe or safe or n >= self._budget:
                return mean + half
            more = self._sample(w[None], self._streams(n, min(2 * n, self._budget)))[0]
            y = np.concatenate([y, more])

    def probe(self, w: Floats, g: Floats, probes: Floats) -> tuple[Floats, Floats]:
        y = self._sample(np.concatenate([w[None], probes]), self._streams(0, self._rollouts))
        difference = y[1:] - y[0]
        return g + difference.mean(axis=1), self._half_width(difference, tests=len(probes))


def describe_unsafe(names: tuple[str, ...], g: Floats) -> str:
    """One line that names the worst constraint and its value."""
    worst = int(np.argmax(g))
    return f"constraint '{names[worst]}' has value {g[worst]:.4g} > 0"
