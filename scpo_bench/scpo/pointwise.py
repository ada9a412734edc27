"""Pointwise constraints: one per start state, step and bound of a batched task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.scpo.constraints import NONE
from scpo_bench.scpo.rollouts import BatchedRollouts


class Pointwise:
    """One constraint per start state, step and bound.

    Bounds are signed: p <= 1 and -p <= 1 are two constraints. Nothing is aggregated, so each is as
    smooth as the dynamics, and one rollout gives the values of all constraints of its start.

    active: start states per name that are probed, those with the largest values; 0: all.
    kept, fresh: numbers of start states beside those of ``rollouts``. The fresh ones are drawn in
    every update, by a generator that ``seed`` and the update's number start; each of them with a
    larger value than one of the kept takes its place.
    """

    noisy = False
    uncertainty: Floats | float = 0.0

    def __init__(
        self, rollouts: BatchedRollouts, active: int, kept: int, fresh: int, seed: int
    ) -> None:
        self._rollouts, self._active, self._seed = rollouts, active, seed
        self._kept, self._fresh = kept, fresh
        rollouts.add_starts(kept + fresh, self._rng(0))
        self.names = rollouts.names
        self.changed = NONE
        self._per_start = len(rollouts.bound_names)
        self.group = np.tile(rollouts.bound_names, rollouts.starts)

    @property
    def start_states(self) -> tuple[Floats, ...]:
        """One array [n] per component: part of what a saved training run has to remember."""
        return self._rollouts.start_states

    @start_states.setter
    def start_states(self, states: tuple[Floats, ...]) -> None:
        self._rollouts.start_states = states

    def _rng(self, update: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._seed, update]))

    def begin_update(self, update: int, w: Floats, g: Floats | None) -> Floats:
        if g is None:
            return self.evaluate(w)
        if update == 0 or not self._fresh:
            return g
        starts, per_start = self._rollouts.starts, self._per_start
        fresh = np.arange(starts - self._fresh, starts)
        kept = np.arange(fresh[0] - self._kept, fresh[0])
        by_start = g.reshape(starts, per_start).copy()
        worst = by_start.max(axis=1)
        changed = [fresh]
        for new in fresh[np.argsort(-worst[fresh])]:
            old = kept[np.argmin(worst[kept])] if self._kept else new
            if worst[new] <= worst[old]:
                break
            self._rollouts.copy_start(new, old)
            by_start[old], worst[old] = by_start[new], worst[new]
            changed.append(np.array([old]))
        self._rollouts.draw_starts(fresh, self._rng(update))
        by_start[fresh] = self._rollouts.bounds(w[None], fresh).reshape(-1, per_start)
        self.changed = self._rows(np.sort(np.concatenate(changed)))
        return by_start.reshape(-1)

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

    def rounding(self, w: Floats) -> Floats | float:
        return 0.0
