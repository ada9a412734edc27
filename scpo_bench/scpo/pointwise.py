"""Pointwise constraints: one per start state, step and bound of a batched task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from scpo_bench.contract import Floats
from scpo_bench.scpo.constraints import NONE
from scpo_bench.scpo.rollouts import BatchedRollouts

LEVELS, NEIGHBOURS = 4, 4  # of the search between start states
FORGOTTEN = 0.002  # of the largest value that was seen from a start, per update


class Pointwise:
    """One constraint per start state, step and bound.

    Bounds are signed: p <= 1 and -p <= 1 are two constraints. Nothing is aggregated, so each is as
    smooth as the dynamics, and one rollout gives the values of all constraints of its start.

    active: start states per name that are probed, those with the largest values; 0: all but the
    fresh ones.
    kept, fresh: numbers of start states beside those of ``rollouts``. The fresh ones are drawn in
    every update, by a generator that ``seed`` and the update's number start, and where neighbouring
    starts lead far apart. They are evaluated only; each from which any evaluated policy, candidates
    included, had a value above ``alarming``, and above one of the kept, takes its place.
    """

    noisy = False
    uncertainty: Floats | float = 0.0

    def __init__(
        self,
        rollouts: BatchedRollouts,
        active: int,
        kept: int,
        fresh: int,
        alarming: float,
        seed: int,
    ) -> None:
        self._alarming = alarming
        self._rollouts, self._active, self._seed = rollouts, active, seed
        self._kept, self._fresh = kept, fresh
        rollouts.add_starts(kept + fresh, np.random.default_rng(np.random.SeedSequence([seed, 0])))
        self.names = rollouts.names
        self.changed = NONE
        self._per_start = len(rollouts.bound_names)
        self.group = np.tile(rollouts.bound_names, rollouts.starts)
        # [starts], the largest value of any evaluated policy, which is slowly forgotten.
        self._seen = np.full(rollouts.starts, -np.inf)

    @property
    def state(self) -> tuple[Floats, ...]:
        """What a saved training run has to remember: the start states, one array [starts] per
        component, and the largest value that was seen from each."""
        return (*self._rollouts.start_states, self._seen.copy())

    @state.setter
    def state(self, state: tuple[Floats, ...]) -> None:
        *states, self._seen = state
        self._rollouts.start_states = tuple(states)

    def begin_update(self, update: int, w: Floats, g: Floats | None) -> Floats:
        if g is None:
            return self.evaluate(w)
        if update == 0 or not self._fresh:
            return g
        starts, per_start = self._rollouts.starts, self._per_start
        values = g.reshape(starts, per_start).copy()
        fresh = np.arange(starts - self._fresh, starts)
        self._seen = np.maximum(self._seen - FORGOTTEN, values.max(axis=1))
        changed = [self._keep_worst(values, fresh), fresh]
        states, values[fresh] = self._draw(w, values, update)
        self._seen[fresh] = values[fresh].max(axis=1)
        self._rollouts.set_starts(fresh, states)
        self.changed = self._rows(np.sort(np.concatenate(changed)))
        return values.reshape(-1)

    def _keep_worst(self, values: Floats, fresh: NDArray[np.intp]) -> NDArray[np.intp]:
        """Let fresh starts take the places of kept ones that were less alarming; those places.

        values: [starts, P], which change accordingly.
        """
        kept = np.arange(fresh[0] - self._kept, fresh[0])
        worst, places = self._seen, []
        for new in fresh[np.argsort(-worst[fresh], kind="stable")][: self._kept]:
            old = kept[np.argmin(worst[kept])]
            if worst[new] <= max(worst[old], self._alarming):
                break
            states = [component[[new]] for component in self._rollouts.start_states]
            self._rollouts.set_starts(np.array([old]), states)
            values[old], worst[old] = values[new], worst[new]
            places.append(old)
        return np.array(places, dtype=np.intp)

    def _draw(self, w: Floats, values: Floats, update: int) -> tuple[list[Floats], Floats]:
        """(fresh start states, one array per component; their values [fresh, P]).

        The first quarter is sampled; all are, where a state between two starts is none. The others
        halve, LEVELS times, the distance between those neighbouring starts whose values differ
        most: where trajectories part, a violation may hide between two starts that are safe.
        """
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, update]))
        pairs = 3 * self._fresh // (4 * LEVELS) if self._rollouts.convex_starts else 0
        sampled = self._rollouts.sample_states(self._fresh - pairs * LEVELS, rng)
        states = [np.stack(sampled, axis=-1)]
        drawn = [self._values(w, states[0])]
        known = np.stack(self._rollouts.start_states, axis=-1)
        others = min(NEIGHBOURS, len(known) - 1)
        near = np.asarray(cKDTree(known).query(known, range(2, others + 2))[1])
        first, second = np.repeat(np.arange(len(known)), others), near.reshape(-1)
        first, second = np.unique(np.sort([first, second], axis=0), axis=1)
        apart = np.abs(values[first] - values[second]).max(axis=1)
        widest = np.argsort(-apart, kind="stable")[:pairs]
        a, b = known[first[widest]], known[second[widest]]
        values_a, values_b = values[first[widest]], values[second[widest]]
        for _ in range(LEVELS if len(widest) else 0):
            middle = (a + b) / 2
            at = self._values(w, middle)
            states.append(middle)
            drawn.append(at)
            left = np.abs(values_a - at).max(axis=1) >= np.abs(at - values_b).max(axis=1)
            a, values_a = np.where(left[:, None], a, middle), np.where(left[:, None], values_a, at)
            b, values_b = np.where(left[:, None], middle, b), np.where(left[:, None], at, values_b)
        return list(np.concatenate(states).T), np.concatenate(drawn)

    def _values(self, w: Floats, states: Floats) -> Floats:
        """[n, P] from start states [n, ...]."""
        return self._rollouts.bounds(w[None], tuple(states.T)).reshape(len(states), -1)

    def evaluate(self, w: Floats) -> Floats:
        g = self._rollouts.bounds(w[None])[0]
        self._seen = np.maximum(self._seen, g.reshape(-1, self._per_start).max(axis=1))
        return g

    def nearest(self, g: Floats) -> NDArray[np.intp]:
        by_start = g.reshape(-1, self._per_start)[: self._rollouts.starts - self._fresh]
        if not 0 < self._active < len(by_start):
            return self._rows(np.arange(len(by_start)))
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

    def rounding(self, w: Floats) -> Floats | float:
        return 0.0
