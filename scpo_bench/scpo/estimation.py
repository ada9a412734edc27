"""Constraints g(w) = E[y(w, noise)] <= 0, estimated from rollouts with confidence bounds."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.errors import UserError
from scpo_bench.scpo import bounds
from scpo_bench.scpo.constraints import Few, RolloutConfig
from scpo_bench.scpo.rollouts import Rollouts

POLICIES = 32  # safe policies whose rollouts are kept
GIVEN_UP = 2  # times the level: chance of bad further episodes at which a policy is given up
KNOWN = 16  # costly rollouts from which on their mean is believed
CLEAR = 0.4  # share of the distance to the limit that a bound has to leave to need no more rollouts
# Parameters closer than this are the same policy: written to a network and read back they have
# changed by rounding.
SAME = 1e-5
EPISODES = 512  # newest rollouts that are kept of each


@dataclass
class Evidence:
    """Everything that rollouts have shown so far. Belongs to a training run and is saved with it.

    samples: (w [d], y [n, k]) of each policy found safe, the newest last.
    streams: of noise used so far. None is used twice, so what was chosen under some noise is never
    judged by it.
    """

    samples: list[tuple[Floats, Floats]] = field(default_factory=list)
    streams: int = 0

    def next_streams(self, n: int) -> range:
        self.streams += n
        return range(self.streams - n, self.streams)

    def of(self, w: Floats) -> Floats | None:
        """All y [n, k] of a policy once found safe."""
        same = (y for known, y in reversed(self.samples) if _same(known, w))
        return next(same, None)

    def severity(self, low: float) -> float:
        """What a costly rollout of a safe policy costs: the mean of y - low where that is > 0.

        Where little is known, as much as the limit allows.
        """
        costs = np.concatenate([np.zeros(0), *(y.ravel() - low for _, y in self.samples)])
        costly = costs[costs > 0]
        return float(costly.mean()) if len(costly) >= KNOWN else -low

    def keep(self, w: Floats, y: Floats) -> None:
        """y [n, k]: all that is known of w."""
        others = [(known, old) for known, old in self.samples if not _same(known, w)]
        self.samples = [*others, (w, y[-EPISODES:])][-POLICIES:]


def _same(w: Floats, other: Floats) -> bool:
    return bool(np.linalg.norm(w - other) <= SAME * (1 + np.linalg.norm(w)))


class Expected(Few):
    """g(w) = E[y(w, noise)], with confidence 1 - ``level`` per update.

    rollouts: give y. candidates: how many policies an update may evaluate beside its own. evidence:
    what is known already; it is added to.

    A policy's first look takes ``config.rollouts`` rollouts and doubles them until the decision is
    clear, up to ``config.rollout_budget``. Every look and every set of probes has noise of its own,
    never used before; within a set of probes equal streams mean equal noise (common random
    numbers), so slopes are paired differences and the noise that both policies share cancels; what
    may be noise is shrunk towards 0.
    Once found safe, a policy is looked at again in every update that starts from it, and all its
    rollouts count. Then it alone is at stake, and it is given up when its mean is not found below
    the limit at the whole ``level``, or when further episodes would exceed it too often. Candidates
    share the level (Bonferroni: candidates, constraints and, unless the bound holds at all times,
    the doublings).

    Raises UserError if ``config.bound`` is "betting" and the values' range is unknown, or if a
    rollout costs more than that range says.
    """

    noisy = True

    def __init__(
        self, rollouts: Rollouts, config: RolloutConfig, candidates: int, evidence: Evidence
    ) -> None:
        super().__init__(rollouts.names)
        self.evidence = evidence
        self._rollouts, self._config, self._span = rollouts, config, rollouts.span
        if config.bound == "betting" and not np.isfinite(self._range()).all():
            raise UserError(
                "SCPO: bound betting needs the largest cost of an episode, and this task does not "
                "tell; give largest_cost, or choose bound mixed or student"
            )
        # The whole level for a policy that is kept, whose looks start with half as many rollouts.
        # Of the shares, one is the deployed policy's, one each candidate's, one that of the slopes.
        doublings = 1 + max(0, int(np.ceil(np.log2(config.rollout_budget / config.rollouts))))
        once = config.bound == "betting"
        self._whole = config.level / (len(self.names) * (1 if once else doublings + 1))
        share = config.level / (len(self.names) * (1 if once else doublings))
        self._share = share / (candidates + 2)

    def begin_update(self, update: int, w: Floats, g: Floats | None) -> Floats:
        return self.evaluate(w)  # more is known now than when it was accepted

    def evaluate(self, w: Floats) -> Floats:
        """An upper confidence bound on g(w) [k].

        For a policy found safe before: at most 0 unless it has to be given up. For any other, with
        ``config.reserve`` added.
        """
        known = self.evidence.of(w)
        # Of a policy that is known, its share of the probes is still to come.
        used = self._config.rollouts if known is None else (self._config.rollouts + 1) // 2
        y = self._look(w, known, used)
        while True:
            upper, mean = self._upper(y, self._share, self._config.level), y.mean(axis=0)
            lower = mean - bounds.student(y, self._share)
            # Clear: certainly unsafe, or safe by a good part of the distance to the limit.
            unsafe = (lower > 0).any()
            safe = (upper <= np.minimum(CLEAR * mean, 0.0)).all()
            if unsafe or safe or used >= self._config.rollout_budget:
                break
            more = min(used, self._config.rollout_budget - used)
            y, used = self._look(w, y, more), used + more
        if known is None:
            upper = upper + self._config.reserve
        else:
            kept = self._upper(y, self._whole, GIVEN_UP * self._config.level)
            upper = np.where(kept <= 0, np.minimum(upper, 0.0), np.maximum(upper, kept))
        if (upper <= 0).all():
            self.evidence.keep(w, y)
        self.uncertainty = np.maximum(upper - lower, 0.0)
        return upper

    def probe(
        self, w: Floats, g: Floats, probes: Floats, rows: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        streams = self.evidence.next_streams(self._config.probe_rollouts)
        y = self._rollouts(np.concatenate([w[None], probes]), streams)
        known = self.evidence.of(w)
        if known is not None:  # w was chosen before this noise was drawn
            self.evidence.keep(w, np.concatenate([known, y[0]]))
        # What may be noise must not look like a slope, nor its differences like curvature.
        difference = y[1:] - y[0]
        believed = bounds.shrunk(difference)
        half = bounds.student(difference, self._share / len(probes))
        return g + believed, half + np.abs(difference.mean(axis=1) - believed)

    def rounding(self, w: Floats) -> Floats | float:
        return 0.0

    def _look(self, w: Floats, known: Floats | None, n: int) -> Floats:
        """y of all rollouts of w: the ``known`` ones, and n under new noise."""
        y = self._rollouts(w[None], self.evidence.next_streams(n))[0]
        return y if known is None else np.concatenate([known, y])

    def _range(self) -> tuple[float, float]:
        return self._span or (-np.inf, np.inf)

    def _upper(self, y: Floats, tail: float, bad_luck: float) -> Floats:
        """The bound that a policy must keep: [k], from y [n, k].

        bad_luck: the probability with which further episodes may exceed the limit.
        """
        upper = self._mean_bound(y, tail)
        if self._config.predicted_episodes:
            further = bounds.predicted(y, self._config.predicted_episodes, bad_luck)
            upper = np.maximum(upper, further)
        return upper

    def _mean_bound(self, y: Floats, tail: float) -> Floats:
        """Upper confidence bound on the mean: [k], from y [n, k]."""
        rule, (low, high) = self._config.bound, self._range()
        if rule == "betting":
            x = (y - low) / (high - low)
            if (x > 1).any():
                raise UserError(
                    f"RolloutConfig.largest_cost: an episode cost {x.max():.4g} times as much"
                )
            return low + (high - low) * np.array([bounds.betting(c, tail) for c in x.T])
        if rule == "student" or self._span is None:
            return y.mean(axis=0) + bounds.student(y, tail)
        severity = self.evidence.severity(low)
        return low + np.array([bounds.mixed(c - low, tail, severity) for c in y.T])
