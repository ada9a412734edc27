"""Mode ``proven``: constraints in closed form, and no step that is not proved.

Where the policy is affine in its last layer, u(x; w) = backup(x) + s(x) phi(x)'C w, and the actions
that keep a set S invariant are an interval [lo(x), hi(x)] for each x in S, safety for ever is
linear in w for each x. An update is then a projection onto a polyhedron,

    minimise |w' - (w + proposal)|^2  subject to  lo(x) + pad <= u(x; w') <= hi(x) - pad,

a QP with cutting planes over a grid of x. The pad is for what is between the grid's points. Whether
it suffices is proved for every x in S (:mod:`scpo_bench.proofs.invariance`), and for the float32
network that is deployed. No rollout is needed. In the regression tasks, S is the interval of inputs
and [lo, hi] the bounds on the prediction.
Source: this project's; one-step invariance as in Blanchini, Set invariance in control, Automatica
1999.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import osqp
from numpy.typing import NDArray
from scipy import sparse

from scpo_bench.contract import BatchedTask, Floats
from scpo_bench.errors import UserError
from scpo_bench.proofs.invariance import Invariance, check
from scpo_bench.proofs.plants import Plant, Problem, plant_of, problem
from scpo_bench.proofs.policy import Policy, from_modules
from scpo_bench.scpo.certified_step import Held, Objective
from scpo_bench.scpo.guard import Decision, UnsafeStartError
from scpo_bench.scpo.spaces import LastLayer

PAD = 1e-3  # first pad, in units of the action, beside the error of float32
TRIES = 8  # pads per update, each twice the one before, until the step is proved
BAND = 0.02  # actions are bounded as well where a bound is beyond the actuator's limit by less
TOLERANCE = 1e-4  # by which a solution may exceed a row of the grid: it is part of the pad
CUTS = 60  # rows added per round, at most
ROUNDS = 40
NEW_POINTS = 30  # of the grid, after a proof that failed
# Fixed: OSQP's own choice of when to adapt its step size would depend on the clock.
_SETTINGS = {
    "verbose": False,
    "eps_abs": 1e-6,
    "eps_rel": 1e-6,
    "max_iter": 20_000,
    "adaptive_rho": 1,
    "adaptive_rho_interval": 50,
}


def nearest(target: Floats, rows: Floats, low: Floats, high: Floats) -> Floats | None:
    """The point nearest to ``target`` [d] with low <= rows @ point <= high; None: OSQP failed.

    rows: [m, d]; low, high: [m], infinite where there is no bound.
    """
    d, at = len(target), rows @ target
    solver = osqp.OSQP()
    solver.setup(
        P=sparse.eye(d, format="csc"),
        q=np.zeros(d),
        A=sparse.csc_matrix(rows),
        l=low - at,
        u=high - at,
        **_SETTINGS,
    )
    result = solver.solve(raise_error=False)
    if result.info.status not in ("solved", "solved inaccurate"):
        return None
    return target + result.x


def _grid(n: int) -> Floats:
    """Points [N, n] of the unit ball, most of them near its boundary, where bounds are met."""
    if n == 1:
        return np.linspace(-1.0, 1.0, 3001)[:, None]
    angle = np.linspace(0.0, 2 * np.pi, 361)[:-1]
    radius = 1 - np.linspace(0.0, 1.0, 25)[:-1] ** 2
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return (radius[:, None, None] * circle).reshape(-1, 2)


class ClosedForm:
    """The safe set of w in closed form, for one task and one space.

    Raises UserError where there is none.
    """

    def __init__(self, task: BatchedTask | None, space: Any, policy: Any) -> None:
        if not isinstance(space, LastLayer):
            raise UserError(
                "SCPO: mode 'proven' needs space 'last_layer', in which actions are affine"
            )
        self.plant: Plant = plant_of(task)
        extractor, head = policy.mlp_extractor, policy.action_net.linear
        self._policy: Policy = from_modules(extractor.extractor.policy_net, head, extractor.backup)
        self._in_y = self._policy.in_coordinates(self.plant.M)
        self._whitening = space.whitening()
        d = self._whitening.shape[1]
        # What is asked of w at each point: low <= row . w <= high.
        self._tables = np.zeros((0, d)), np.zeros(0), np.zeros(0)
        self.add(_grid(self._policy.gain.size))

    def add(self, y: Floats) -> None:
        """Ask for safe actions at the points y [N, n], too."""
        low, high = self.plant.safe_actions(y)
        backup = y @ self._in_y.gain + self._in_y.offset
        limit = self.plant.u_max + BAND
        # No bound beyond what the actuator guarantees.
        low = np.where(low < -limit, -np.inf, low - backup)
        high = np.where(high > limit, np.inf, high - backup)
        bounded = np.isfinite(low) | np.isfinite(high)
        rows = self._in_y.features(y) @ self._whitening
        new = rows[bounded], low[bounded], high[bounded]
        rows, low, high = map(np.concatenate, zip(self._tables, new))
        self._tables = rows, low, high

    def add_worst(self, proof: Invariance) -> None:
        """Ask for safe actions where a proof was missed by most."""
        worst = np.argsort(-proof.deficit, kind="stable")[:NEW_POINTS]
        y = proof.open_.centre[worst]
        self.add(y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1.0))

    def problem(self, w: Floats) -> Problem:
        """The policy w as it is deployed: its last layer in float32."""
        weights = (self._whitening @ w).astype(np.float32).astype(np.float64)
        policy = replace(self._policy, head=weights[:-1], head_bias=float(weights[-1]))
        return problem(self.plant, policy)

    def prove(self, w: Floats) -> Invariance:
        return check(self.problem(w), budget=40_000, smallest=2e-4)

    def project(
        self, target: Floats, pad: float, active: NDArray[np.intp]
    ) -> tuple[Floats | None, NDArray[np.intp]]:
        """(the point nearest to ``target`` on the grid's polyhedron, its active rows).

        active: indices of rows to begin with.
        """
        rows, low, high = self._tables
        low, high = low + pad, high - pad
        chosen, w = active, target
        for round_ in range(ROUNDS):
            at = rows @ w
            excess = np.maximum(low - at, at - high)
            excess[chosen] = 0.0
            worst = np.argsort(-excess, kind="stable")[:CUTS]
            new = worst[excess[worst] > TOLERANCE]
            if not len(new) and (round_ > 0 or not len(chosen)):
                break
            chosen = np.concatenate([chosen, new])
            solution = nearest(target, rows[chosen], low[chosen], high[chosen])
            if solution is None:
                return None, chosen
            w = solution
        at = rows[chosen] @ w
        tight = np.maximum(low[chosen] - at, at - high[chosen]) > -10 * TOLERANCE
        return w, chosen[tight]


class ProvenGuard:
    """The guard of mode ``proven``, with the surface of :class:`scpo_bench.scpo.guard.Guard`.

    Its constraints are a :class:`ClosedForm`.
    """

    def __init__(self) -> None:
        self.updates = self.breaches = self.exceeded = self.recoveries = 0
        self.held: dict[Held, int] = dict.fromkeys(get_args(Held), 0)
        self._active = np.zeros(0, dtype=np.intp)
        self._started = False

    def start(self, w: Floats, constraints: ClosedForm) -> None:
        """Prove the policy that training starts from.

        Raises :class:`UnsafeStartError` if it is not proved.
        """
        if not self._started and not constraints.prove(w).proved:
            raise UnsafeStartError(
                "SCPO: the start policy is not proved safe; start from a safe one"
            )
        self._started = True

    def update(
        self,
        w: Floats,
        propose: Callable[[], Floats],
        constraints: ClosedForm,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats] = (),
        objective: Objective | None = None,
    ) -> Decision:
        """One update of the deployed policy w [d], which is proved. No rollouts, no chance."""
        self.start(w, constraints)
        self.updates += 1
        proposal = propose()
        target, pad = w + proposal, PAD + constraints.problem(w).error
        cells = cuts = 0
        deployed = None
        for _ in range(TRIES):
            candidate, self._active = constraints.project(target, pad, self._active)
            cuts = len(self._active)
            if candidate is not None:
                proof = constraints.prove(candidate)
                cells += proof.cells
                if proof.proved:
                    deployed = candidate
                    break
                constraints.add_worst(proof)
            pad *= 2
        if deployed is None:
            self.held["recheck"] += 1
        step = 0.0 if deployed is None else float(np.linalg.norm(deployed - w))
        diagnostics = {
            "proposal_norm": float(np.linalg.norm(proposal)),
            "step_norm": step,
            "held": float(sum(self.held.values())),
            "held/recheck": float(self.held["recheck"]),
            "cells": float(cells),
            "cuts": float(cuts),
            "pad": pad,
        }
        if deployed is None:
            return Decision(w, "held", diagnostics)
        whole = bool(np.array_equal(deployed, target))
        return Decision(deployed, "unaltered" if whole else "projected", diagnostics)
