"""From probes to a certified step: lines 4 to 6 of the paper's algorithm (:mod:`.guard`).

The projection of the raw step, backtracked on the task loss; in verified mode the constraints are
evaluated where it leads and, if they fail, the certificate is tightened and it starts again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Floats
from scpo_bench.scpo.bank import Bank
from scpo_bench.scpo.constraints import Constraints
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.local_model import FirstOrder, LocalModel, probe
from scpo_bench.scpo.projection import Certificate, project
from scpo_bench.scpo.smoothness import Smoothness

# Why an update stays. converged: the bank offers no feasible descent, even if the constraints were
# linear; coarse: the certificate is too conservative for any step; recheck: all candidates failed.
Held = Literal["converged", "coarse", "recheck"]
ARMIJO, HALVINGS = 1e-4, 20  # c1, and the shortest step 2^-20 of the projected one
CONVERGED = 1e-6  # share of the raw step that counts as none
NEARLY_ACTIVE = 5e-3  # of constraint values
MISSED_AT_ONCE = 24  # constraints that are added to a model at a time
ROUNDING = 1e-9  # of constraint values, which are computed in floating point


@dataclass(frozen=True)
class Objective:
    """The task loss, for backtracking. value: w [d] -> loss; gradient: w [d] -> [d]."""

    value: Callable[[Floats], float]
    gradient: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Step:
    """A certified step from the deployed policy. change: [d]. realised: [K], evaluated there.

    bound and smoothness: [k], of the model's constraints. uncertainty: what the certificate
    added to the linear prediction, at most, where a constraint is nearly active. reach: distance
    from where the model was probed.
    """

    change: Floats
    realised: Floats
    bound: Floats
    smoothness: Floats
    uncertainty: float
    reach: float


class Search:
    """The search for one update's step.

    learned_margin: beside the configured one. objective: without one, steps are not backtracked.
    Afterwards: exceeded, breaches: certified steps after which some g_i was above gbar_i; of these,
    where it was also above what the step was certified to keep to. model: with what was added.
    """

    def __init__(
        self,
        config: GuardConfig,
        constraints: Constraints,
        smoothness: Smoothness,
        learned_margin: float,
        objective: Objective | None,
    ) -> None:
        self.config, self.constraints, self.smoothness = config, constraints, smoothness
        self.learned_margin, self.objective = learned_margin, objective
        self.exceeded = self.breaches = 0
        self.model: LocalModel | None = None

    def run(self, model: LocalModel, w: Floats, raw: Floats) -> Step | Held:
        """A step from w [d] that the model certifies, or why there is none. raw: [d], not zero."""
        config, constraints = self.config, self.constraints
        self.model = model
        # Rounding is in the evaluation that would decide, too: it counts in both modes.
        rounding = constraints.rounding(w)
        reason: Held = "recheck"
        for _ in range(config.retries):
            margin = np.full(len(model.rows), config.margin + self.learned_margin) + 2 * rounding
            target = model.bank.basis.T @ (w - model.w + raw)
            # In verified mode noise in the slopes, and kinks, cost a retry, not safety; in
            # certified mode the certificate has to cover them.
            certified = config.mode == "certified"
            certificate = model.certificate(self.smoothness, certified, not certified, rounding)
            length = float(np.linalg.norm(target))
            simple = FirstOrder(certificate, margin, length)
            near = ~simple.bounded
            target *= min(1.0, simple.radius / length)
            result = project(certificate.rows(near), target, margin[near])
            z, change = self._backtrack(model, w, result.z)
            off = float(np.linalg.norm(change - raw))
            if result.status == "inactive" and off <= 1e-12 * float(np.linalg.norm(raw)):
                change = raw  # to the last bit, components that are 0 included
            if not change.any():
                # A certified step that the loss does not fall along is no descent.
                rising = (result.z != model.bank.coordinates(w - model.w)).any()
                straight = certificate.rows(near)
                if rising or self._converged(straight, target, margin[near], model, w):
                    reason = "converged"
                else:
                    reason = "coarse"
                break
            realised = constraints.evaluate(w + change)
            bound = simple.bound(z, model.bank.length(z))
            exceeded = self._judge(
                model, certificate, z, bound + 2 * rounding + ROUNDING, margin, realised
            )
            allowed = np.maximum(model.values, -config.recheck * config.margin)
            if certified or (realised <= allowed).all():
                active = near & (bound > -margin - NEARLY_ACTIVE)
                uncertainty = certificate.uncertainty(z)[active].max(initial=0.0)
                return Step(
                    change,
                    realised,
                    bound,
                    certificate.smoothness,
                    float(uncertainty),
                    model.bank.length(z),
                )
            wider = self._with_missed(model, realised - allowed)
            if wider is model and not exceeded:
                # Unsafe by noise, or by less than the certificate knows: only a shorter step helps.
                raw = raw * min(1.0, 0.5 * float(np.linalg.norm(change) / np.linalg.norm(raw)))
            model = wider
        return reason

    def _judge(
        self,
        model: LocalModel,
        certificate: Certificate,
        z: Floats,
        bound: Floats,
        margin: Floats,
        realised: Floats,
    ) -> bool:
        """Whether a certified step to z ended above its bound somewhere; counts, and raises L."""
        # Of noisy values only what is certain counts; L must not learn from luck.
        certain = (realised - self.constraints.uncertainty)[model.rows]
        exceeded = certain > bound
        ceiling = np.maximum(model.values[model.rows], -margin)
        self.exceeded += bool(exceeded.any())
        self.breaches += bool((exceeded & (certain > ceiling + ROUNDING)).any())
        # The paper's mode with a declared L corrects nothing: a breach is only recorded.
        if exceeded.any() and (
            self.config.mode == "verified" or self.config.smoothness != "apriori"
        ):
            gained = certain - certificate.linear(z)
            expected = np.maximum(certificate.uncertainty(z), 1e-300)
            self.smoothness.raised(model.rows, np.where(exceeded, gained / expected, 0.0))
        return bool(exceeded.any())

    def _with_missed(self, model: LocalModel, excess: Floats) -> LocalModel:
        """The model with the constraints that failed the re-check and were not probed.

        excess: [K], by how much each failed it.
        """
        known = np.zeros(len(excess), dtype=bool)
        known[model.rows] = True
        missed = np.flatnonzero((excess > 0) & ~known)
        if not len(missed):
            return model
        worst = missed[np.argsort(-excess[missed])[:MISSED_AT_ONCE]]
        # Start states may be newer than the model, and their values known elsewhere only.
        rows, values = self.constraints.beside(worst), model.values.copy()
        there = self.constraints.probe(model.w, values, model.w[None], rows)[0][0]
        values[rows] = np.minimum(there, 0.0)  # if they violated there, the re-check has to decide
        self.model = model.extended(self.probed(model.w, values, model.bank, rows))
        return self.model

    def probed(self, w: Floats, g: Floats, bank: Bank, rows: NDArray[np.intp]) -> LocalModel:
        """A model around w of the constraints ``rows``, and those evaluated with them."""
        central = self.config.differences == "central" or self.smoothness.samples
        return probe(self.constraints, w, g, self.constraints.beside(rows), bank, central)

    def _backtrack(self, model: LocalModel, w: Floats, z: Floats) -> tuple[Floats, Floats]:
        """(coordinates, change of w [d]): the step to z, halved until the loss falls enough.

        Armijo's rule. w and w + change are certified and the set is convex, so a shorter step is
        certified too. A step that is no descent, or is halved too often, becomes 0.
        """
        objective = self.objective
        before = model.bank.coordinates(w - model.w)
        change = model.bank.step(z - before)
        if objective is None or not change.any():
            return z, change
        slope = float(objective.gradient(w) @ change)
        loss, t = objective.value(w), 1.0
        for _ in range(HALVINGS if slope < 0 else 0):
            if objective.value(w + t * change) <= loss + ARMIJO * t * slope:
                return before + t * (z - before), t * change
            t *= 0.5
        return before, np.zeros_like(change)

    @staticmethod
    def _converged(
        certificate: Certificate, target: Floats, margin: Floats, model: LocalModel, w: Floats
    ) -> bool:
        """Whether the bank offers no step even if the constraints were linear."""
        certain = replace(
            certificate,
            slope_errors=np.zeros_like(certificate.slope_errors),
            smoothness=np.zeros_like(certificate.smoothness),
        )
        z = project(certain, target, margin).z
        moved = z - model.bank.coordinates(w - model.w)
        return bool(model.bank.length(moved) <= CONVERGED * np.linalg.norm(target))
