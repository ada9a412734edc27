"""The guard: SCPO's projection as a component.

It takes a proposed change of parameters and decides what may be deployed. It knows no policy,
environment or optimiser: parameters are vectors w, constraints are something that can be evaluated
(:mod:`scpo_bench.scpo.constraints`). The SCPO agent, the wrapped SB3 algorithms and the wrapped
torch optimisers all use it.

One update, as in the paper (lines of its algorithm as known from the first author's page; with the
defaults of :class:`GuardConfig` it is that algorithm):

1. raw step Delta = -eta grad L, scaled down to the trust region;
2. bank D = [raw step, previous accepted step], the raw step alone if they are nearly collinear;
3. samples G_i = g(theta + d_i), with g(theta) from the last update;
4. projection of Delta onto the certified region (Eq. 29), a convex QCQP;
5. Armijo backtracking on the task loss, c1 = 1e-4;
6. re-check: the constraints at the new parameters; if they fail, tighten and go to 4;
7. deploy.

What this project adds, each an option: orthonormal and complete banks (``probe_radius``,
``directions``), a memory of normals, sampled and adapted L, pointwise constraints, probes that
serve several updates (``reuse``), and ``certified`` mode, which leaves out line 6.
Source: Cao, Borrelli, Joa, arXiv 2512.13788.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scpo_bench.configuration import require, require_choice
from scpo_bench.contract import Floats
from scpo_bench.errors import UserError
from scpo_bench.scpo import smoothness
from scpo_bench.scpo.bank import (
    Bank,
    Candidate,
    DirectionMemory,
    candidate_bank,
    orthonormal_bank,
)
from scpo_bench.scpo.constraints import Constraints, by_name, describe_unsafe
from scpo_bench.scpo.local_model import LocalModel, first_order, probe
from scpo_bench.scpo.projection import Certificate, project

Mode = Literal["certified", "verified"]
Differences = Literal["central", "forward"]

# Why an update stays. converged: the bank offers no feasible descent, even if the constraints were
# linear; coarse: the certificate is too conservative for any step; recheck: all candidates failed.
HELD = ("converged", "coarse", "recheck")
ARMIJO, HALVINGS = 1e-4, 20  # c1, and the shortest step 2^-20 of the projected one
CONVERGED = 1e-6  # share of the raw step that counts as none
NEARLY_ACTIVE = 5e-3  # of constraint values
MISSED_AT_ONCE = 24  # violating constraints that are added to a model at a time


class UnsafeStartError(UserError):
    """The start policy violates a constraint: SCPO's induction has nothing to start from."""


@dataclass(frozen=True)
class GuardConfig:
    """How a proposal is probed, certified and projected. The defaults are the paper's algorithm."""

    mode: Mode = "verified"
    """certified: deploy on the strength of the certificate. verified: evaluate the step first and,
    if it is unsafe, tighten the certificate and project again (the paper's re-check).
    """
    smoothness: smoothness.Rule = "adaptive"
    """apriori: L as declared. sampled: second differences times ``safety_factor``. adaptive:
    sampled once, then adapted.
    """
    L: float = 10.0
    """The declared smoothness constant of every constraint (per squared unit of w), for
    ``apriori``.
    """
    safety_factor: float = 2.0
    """Factor on sampled second differences, and on the slopes of first-order bounds."""
    directions: int = 2
    """Columns m of the bank. At least the space's dimension means a complete basis."""
    candidates: tuple[Candidate, ...] = ("previous",)
    """What the bank holds beside the raw step, best first. previous: the last accepted step;
    normals: running estimates of the constraints' gradients; momentum: of the steps taken; start:
    the way back to the start policy; cost: the gradient of a cost critic's advantages, where the
    algorithm offers one. With a ``probe_radius``, random ones fill up.
    """
    probe_radius: float = 0.0
    """0 (the paper): candidates are evaluated where they are, at theta + d_j. rho > 0: they are
    made orthonormal and evaluated at distance rho, in units of w.
    """
    differences: Differences = "forward"
    """Difference quotients: forward needs m + 1 evaluations, central 2 m.

    ``sampled`` smoothness always takes central ones.
    """
    safe_probes: bool = False
    """Shrink rho where the last certificate does not cover it, so that probes stay inside what is
    certified.
    """
    follow_steps: bool = False
    """Shrink rho to the length of the last step: kinks that a step can reach are then within the
    reach of the probes, and others are not.
    """
    smallest_probe: float = 1e-3
    """The share of ``probe_radius`` that the two go down to: difference quotients over less mean
    nothing where values are counts or noisy.
    """
    reuse: float = 0.0
    """Complete banks: probes serve further updates until what the certificate adds to the linear
    prediction exceeds this, in units of the constraint values. 0: every update probes.
    """
    trust_radius: float = 0.5
    """The raw step is scaled down to this length, in units of w."""
    margin: float = 0.0
    """How far below zero the certificate is asked to stay."""
    retries: int = 8
    """Projections per update before it is given up and the policy stays."""

    def __post_init__(self) -> None:
        require_choice(self, "mode", get_args(Mode))
        require_choice(self, "smoothness", get_args(smoothness.Rule))
        require_choice(self, "differences", get_args(Differences))
        for candidate in self.candidates:
            require_choice(self, "candidates", get_args(Candidate), candidate)
        for name in ("L", "trust_radius", "smallest_probe"):
            require(self, name, above=0)
        require(self, "safety_factor", low=1)
        for name in ("margin", "probe_radius", "reuse"):
            require(self, name, low=0)
        for name in ("directions", "retries"):
            require(self, name, low=1)


@dataclass(frozen=True)
class Decision:
    """What an update deploys.

    w: [d]. status: "unaltered" (the whole proposal), "projected", "held" (w as it was: no step was
    deployed), or "recovered" (w had become unsafe; this is the last policy evaluated as safe).
    diagnostics: the numbers of this update.
    """

    w: Floats
    status: Literal["unaltered", "projected", "held", "recovered"]
    diagnostics: dict[str, float]


@dataclass(frozen=True)
class Objective:
    """The task loss, for backtracking. value: w [d] -> loss; gradient: w [d] -> [d]."""

    value: Callable[[Floats], float]
    gradient: Callable[[Floats], Floats]


@dataclass(frozen=True)
class _Step:
    """A certified step from the deployed policy. change: [d]. realised: [K], evaluated there.

    bound and smoothness: [k], of the model's constraints. uncertainty: what the certificate
    added to the linear prediction, at most, where a constraint is nearly active.
    """

    change: Floats
    realised: Floats
    bound: Floats
    smoothness: Floats
    uncertainty: float


class Guard:
    """SCPO's updates, and what it remembers between them. w = 0 is the start policy."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.g: Floats | None = None  # [K], at the deployed policy
        self.smoothness: smoothness.Smoothness | None = None
        self.memory: DirectionMemory | None = None
        self.updates = 0
        self.exceeded = 0  # certified steps after which some g_i was above gbar_i
        self.breaches = (
            0  # of these, where it was also above what the step was certified to keep to
        )
        self.held = dict.fromkeys(HELD, 0)  # updates that stayed, by reason
        self.recoveries = 0  # updates that returned to the last safe policy
        self._model: LocalModel | None = None  # which the next update may use again
        self._last_length = np.inf  # of the last step; halved for each update without one
        self._safe: tuple[Floats, Floats] | None = None  # (w, g) of the last safe policy

    def start(self, w: Floats, constraints: Constraints) -> Floats:
        """Evaluate the policy that training starts from, once. Returns g [K] at the present policy.

        Raises :class:`UnsafeStartError` if it violates a constraint.
        """
        if self.g is None:
            constraints.begin_update(0)
            self.g = constraints.evaluate(w)
        if (self.g > 0).any() and self._safe is None:
            raise UnsafeStartError(
                f"SCPO: the start policy is unsafe: {describe_unsafe(constraints, self.g)}; "
                "start from a safe policy"
            )
        return self.g

    def update(
        self,
        w: Floats,
        propose: Callable[[], Floats],
        constraints: Constraints,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats] = (),
        objective: Objective | None = None,
    ) -> Decision:
        """One update of the deployed policy w [d].

        propose: returns the proposed change of w [d], the raw step; it is called only if w is safe.
        cost_gradients: the candidates "cost". objective: without one, steps are not backtracked.
        Raises :class:`UnsafeStartError` in the first update if w is unsafe.
        """
        g = self.start(w, constraints)
        self.updates += 1
        if constraints.begin_update(self.updates):
            # The noise is new: what was accepted under the old noise is evaluated again.
            g = constraints.evaluate(w)
        if (g > 0).any():
            return self._recover()
        self._safe = w, g
        return self._project(w, g, propose(), constraints, rng, cost_gradients, objective)

    def _recover(self) -> Decision:
        """Back to the last safe policy: from an unsafe one nothing can be certified."""
        assert self._safe is not None
        w, self.g = self._safe
        self.recoveries += 1
        diagnostics = {"recoveries": float(self.recoveries), "step_norm": 0.0}
        return Decision(w, "recovered", diagnostics)

    def _project(
        self,
        w: Floats,
        g: Floats,
        proposal: Floats,
        constraints: Constraints,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats],
        objective: Objective | None,
    ) -> Decision:
        """The certified step closest to ``proposal`` [d] among the combinations of a bank."""
        config = self.config
        length = float(np.linalg.norm(proposal))
        raw = proposal * min(1.0, config.trust_radius / length) if length > 0 else proposal
        if self.smoothness is None:
            self.smoothness = smoothness.Smoothness(
                config.smoothness, config.L, config.safety_factor, len(g)
            )
        if self.memory is None:
            self.memory = DirectionMemory.empty(len(constraints.names), len(w))

        model, exceeded = self._model, self.exceeded
        taken: _Step | str = "converged" if length == 0 else "coarse"
        if length > 0 and model is not None:
            taken = self._step(model, w, raw, constraints, objective)
            model = self._model
        if length > 0 and not isinstance(taken, _Step):
            # Without a model, or where the one of earlier probes leads no further.
            bank = self._bank(w, g, raw, cost_gradients, rng)
            self._model = self._probed(w, g, bank, constraints.nearest(g), constraints)
            self.memory = self.memory.with_normals(bank, _steepest(self._model, constraints))
            taken = self._step(self._model, w, raw, constraints, objective)
        if self.exceeded == exceeded:
            self.smoothness.relax()

        model = self._model
        diagnostics = {"proposal_norm": length, "step_norm": 0.0}
        if isinstance(taken, _Step):
            self.g = taken.realised
            self.memory = self.memory.with_step(taken.change)
            diagnostics["step_norm"] = self._last_length = float(np.linalg.norm(taken.change))
            if taken.uncertainty >= config.reuse or not (model and model.bank.complete):
                self._model = None
        else:
            self.g = g
            self.held[taken] += 1
            self._last_length /= 2
            if config.reuse == 0 or taken != "converged":
                self._model = None
        diagnostics |= self._diagnostics(taken, g, model, constraints)
        if not isinstance(taken, _Step):
            return Decision(w, "held", diagnostics)
        whole = length <= config.trust_radius and np.array_equal(taken.change, raw)
        return Decision(w + taken.change, "unaltered" if whole else "projected", diagnostics)

    # ---- the bank and its probes

    def _bank(
        self,
        w: Floats,
        g: Floats,
        raw: Floats,
        cost_gradients: Sequence[Floats],
        rng: np.random.Generator,
    ) -> Bank:
        config, memory = self.config, self.memory
        assert memory is not None
        kinds, count = config.candidates, config.directions
        if config.probe_radius > 0:
            others = memory.candidates(w, kinds, cost_gradients)
            return orthonormal_bank(raw, others, count, self._radius(g, memory), rng)
        previous = memory.previous if "previous" in kinds else None
        others = memory.candidates(w, [k for k in kinds if k != "previous"], cost_gradients)
        return candidate_bank(raw, previous, others, count)

    def _radius(self, g: Floats, memory: DirectionMemory) -> float:
        """rho: as configured, or shrunk as configured.

        What the last certificate covers is the largest rho with g + |normal| rho + L rho^2 / 2 <=
        0.
        """
        rho = smallest = self.config.probe_radius
        smallest *= self.config.smallest_probe
        if self.config.follow_steps:
            rho = max(min(rho, self._last_length), smallest)
        if not self.config.safe_probes or self.smoothness is None:
            return rho
        slope = np.linalg.norm(memory.normals, axis=1)
        L = self.smoothness.known(self.config.L)
        # The positive root of L rho^2 / 2 + slope rho = -g, in the form that does not cancel.
        root = -2 * g / np.maximum(slope + np.sqrt(slope**2 - 2 * L * g), 1e-300)
        return max(min(rho, float(root.min())), smallest)

    def _probed(
        self,
        w: Floats,
        g: Floats,
        bank: Bank,
        rows: NDArray[np.intp],
        constraints: Constraints,
    ) -> LocalModel:
        assert self.smoothness is not None
        central = self.config.differences == "central" or self.smoothness.samples
        return probe(constraints, w, g, rows, bank, central)

    # ---- from a model to a step

    def _step(
        self,
        model: LocalModel,
        w: Floats,
        raw: Floats,
        constraints: Constraints,
        objective: Objective | None,
    ) -> _Step | str:
        """A step from w that the model certifies, or why there is none (a key of HELD)."""
        config = self.config
        assert self.smoothness is not None
        # The paper's mode with a declared L corrects nothing: a breach is only recorded.
        correct = config.mode == "verified" or config.smoothness != "apriori"
        target = model.bank.basis.T @ (w - model.w + raw)
        reach = float(np.linalg.norm(target))
        reason = "recheck"
        for _ in range(config.retries):
            # In verified mode noise in the slopes costs a retry, not safety; in certified mode the
            # certificate has to cover it.
            certificate = model.certificate(self.smoothness, config.mode == "certified")
            far = first_order(certificate, reach, config.safety_factor) <= -config.margin
            result = project(certificate.rows(~far), target, config.margin)
            z, change = self._backtrack(model, w, result.z, objective)
            if result.status == "inactive" and np.allclose(change, raw, rtol=1e-12, atol=0):
                change = raw  # to the last bit
            if not change.any():
                converged = self._converged(certificate.rows(~far), target, model, w)
                reason = "converged" if converged else "coarse"
                break
            realised = constraints.evaluate(w + change)
            bound = np.where(
                far,
                first_order(certificate, model.bank.length(z), config.safety_factor),
                certificate.bound(z),
            )
            exceeded = realised[model.rows] > bound
            ceiling = np.maximum(model.values[model.rows], -config.margin)
            self.exceeded += bool(exceeded.any())
            self.breaches += bool((exceeded & (realised[model.rows] > ceiling)).any())
            if correct and exceeded.any():
                gained = realised[model.rows] - certificate.linear(z)
                allowed = np.maximum(certificate.uncertainty(z), 1e-300)
                self.smoothness.raised(model.rows, np.where(exceeded, gained / allowed, 0.0))
            if config.mode == "certified" or (realised <= 0).all():
                near = ~far & (bound > -config.margin - NEARLY_ACTIVE)
                uncertainty = certificate.uncertainty(z)[near].max(initial=0.0)
                return _Step(change, realised, bound, certificate.smoothness, float(uncertainty))
            model = self._with_missed(model, realised, constraints)
        return reason

    def _with_missed(
        self, model: LocalModel, realised: Floats, constraints: Constraints
    ) -> LocalModel:
        """The model with the constraints that violate and were not probed."""
        known = np.zeros(len(realised), dtype=bool)
        known[model.rows] = True
        missed = np.flatnonzero((realised > 0) & ~known)
        if not len(missed):
            return model
        worst = missed[np.argsort(-realised[missed])[:MISSED_AT_ONCE]]
        rows = constraints.beside(worst)
        more = self._probed(model.w, model.values, model.bank, rows, constraints)
        self._model = model.extended(more)
        return self._model

    def _backtrack(
        self, model: LocalModel, w: Floats, z: Floats, objective: Objective | None
    ) -> tuple[Floats, Floats]:
        """(coordinates, change of w [d]): the step to z, halved until the loss falls enough.

        Armijo's rule. w and w + change are certified and the set is convex, so a shorter step is
        certified too. A step that is no descent, or is halved too often, becomes 0.
        """
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

    def _converged(
        self, certificate: Certificate, target: Floats, model: LocalModel, w: Floats
    ) -> bool:
        """Whether the bank offers no step even if the constraints were linear."""
        certain = replace(
            certificate,
            slope_errors=np.zeros_like(certificate.slope_errors),
            smoothness=np.zeros_like(certificate.smoothness),
        )
        z = project(certain, target, self.config.margin).z
        moved = z - model.bank.coordinates(w - model.w)
        return bool(model.bank.length(moved) <= CONVERGED * np.linalg.norm(target))

    def _diagnostics(
        self, taken: _Step | str, g: Floats, model: LocalModel | None, constraints: Constraints
    ) -> dict[str, float]:
        numbers = {
            "breaches": float(self.breaches),
            "exceeded": float(self.exceeded),
            "held": float(sum(self.held.values())),
            **{f"held/{reason}": float(count) for reason, count in self.held.items()},
            "recoveries": float(self.recoveries),
        }
        if model is not None and self.config.safe_probes:
            numbers["probe_radius"] = float(model.bank.lengths[0])
        everything = np.arange(len(g))
        shown = {"bound": (g, everything), "realised": (g, everything)}
        if isinstance(taken, _Step) and model is not None:
            shown["bound"], shown["L"] = (taken.bound, model.rows), (taken.smoothness, model.rows)
            shown["realised"] = (taken.realised, everything)
        for kind, (values, rows) in shown.items():
            for name, value in zip(constraints.names, by_name(constraints, values, rows)):
                if np.isfinite(value):
                    numbers[f"{kind}/{name}"] = float(value)
        return numbers


def _steepest(model: LocalModel, constraints: Constraints) -> Floats:
    """[n, m], the slopes of the probed constraint with the largest value under each name."""
    slopes = np.zeros((len(constraints.names), model.slopes.shape[1]))
    for name in range(len(slopes)):
        of_name = np.flatnonzero(constraints.group[model.rows] == name)
        if len(of_name):
            slopes[name] = model.slopes[of_name[np.argmax(model.values[model.rows[of_name]])]]
    return slopes
