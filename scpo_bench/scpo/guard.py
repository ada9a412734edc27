"""The guard: SCPO's projection as a component.

It takes a proposed change of parameters and decides what may be deployed. It knows no policy,
environment or optimiser: parameters are vectors w, constraints are something that can be evaluated
(:mod:`scpo_bench.scpo.constraints`). The SCPO agent, the wrapped SB3 algorithms and the wrapped
torch optimisers all use it.
Source: Cao, Borrelli, Joa, arXiv 2512.13788; ``verified`` mode, the smoothness rules and the choice
of directions are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from scpo_bench.configuration import require, require_choice
from scpo_bench.contract import Floats
from scpo_bench.errors import UserError
from scpo_bench.scpo import smoothness
from scpo_bench.scpo.constraints import Constraints, describe_unsafe
from scpo_bench.scpo.directions import Candidate, DirectionMemory, probe_basis
from scpo_bench.scpo.projection import Certificate, project

Mode = Literal["certified", "verified", "proven"]
Differences = Literal["central", "forward"]


class UnsafeStartError(UserError):
    """The start policy violates a constraint: SCPO's induction has nothing to start from."""


@dataclass(frozen=True)
class GuardConfig:
    """How a proposal is probed, certified and projected."""

    mode: Mode = "verified"
    """certified (the paper): deploy on the strength of the certificate. verified: evaluate first,
    and deploy only what is then safe. proven: deploy only what is proved safe from every state,
    where the plant is known (:mod:`scpo_bench.scpo.closed_form`).
    """
    smoothness: smoothness.Rule = "adaptive"
    """apriori: L as declared. sampled: second differences times ``safety_factor``, with decay.
    adaptive: sampled once, then adapted.
    """
    L: float = 10.0
    """The declared smoothness constant of every constraint (per squared unit of w), for
    ``apriori``.
    """
    safety_factor: float = 2.0
    """Factor on sampled second differences."""
    directions: int = 64
    """Probed directions m. At least the space's dimension means a complete basis."""
    candidates: tuple[Candidate, ...] = ("normals", "momentum", "start")
    """Which directions are probed after the proposal, best first, before random ones fill up.
    normals: running estimates of the constraints' gradients; momentum: of the steps taken; start:
    the way back to the start policy; cost: the gradient of a cost critic's advantages, where the
    algorithm offers one.
    """
    differences: Differences = "forward"
    """Difference quotients: forward needs m + 1 evaluations, central 2 m.

    ``sampled`` smoothness always takes central ones.
    """
    probe_radius: float = 1e-3
    """rho, in units of w. The slope error is L rho / 2."""
    safe_probes: bool = False
    """Shrink rho where the last certificate does not cover it, so that probes stay inside what is
    certified.
    """
    smallest_probe: float = 1e-3
    """The share of ``probe_radius`` that ``safe_probes`` goes down to: difference quotients over
    less mean nothing where values are counts or noisy.
    """
    trust_radius: float = 0.5
    """r: the largest step |D|, in units of w."""
    margin: float = 0.0
    """How far below zero the certificate is asked to stay."""
    retries: int = 8
    """verified mode: projections per update before the update is given up and the policy stays."""

    def __post_init__(self) -> None:
        require_choice(self, "mode", get_args(Mode))
        require_choice(self, "smoothness", get_args(smoothness.Rule))
        require_choice(self, "differences", get_args(Differences))
        for candidate in self.candidates:
            require_choice(self, "candidates", get_args(Candidate), candidate)
        for name in ("L", "probe_radius", "trust_radius", "smallest_probe"):
            require(self, name, above=0)
        require(self, "safety_factor", low=1)
        require(self, "margin", low=0)
        for name in ("directions", "retries"):
            require(self, name, low=1)


@dataclass(frozen=True)
class Decision:
    """What an update deploys.

    w: [d]. status: "unaltered" (the whole proposal), "projected", "held" (w as it was: no step was
    certified), or "recovered" (w had become unsafe; this is the last policy evaluated as safe).
    diagnostics: the numbers of this update.
    """

    w: Floats
    status: Literal["unaltered", "projected", "held", "recovered"]
    diagnostics: dict[str, float]


class Guard:
    """SCPO's updates, and what it remembers between them. w = 0 is the start policy."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.g: Floats | None = None  # [k], at the deployed policy
        self.smoothness: Floats | None = None  # [k], L_i
        self.memory: DirectionMemory | None = None
        self.updates = 0
        self.breaches = 0  # certified steps whose realised constraints exceeded the bound
        self.held = 0  # updates that stayed at z = 0
        self.recoveries = 0  # updates that returned to the last safe policy
        self._safe: tuple[Floats, Floats] | None = None  # (w, g) of the last safe policy

    def start(self, w: Floats, constraints: Constraints) -> Floats:
        """Evaluate the policy that training starts from, once. Returns g [k] at the present policy.

        Raises :class:`UnsafeStartError` if it violates a constraint.
        """
        if self.g is None:
            constraints.begin_update(0)
            self.g = constraints.evaluate(w)
        if (self.g > 0).any() and self._safe is None:
            raise UnsafeStartError(
                f"SCPO: the start policy is unsafe: {describe_unsafe(constraints.names, self.g)}; "
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
    ) -> Decision:
        """One update of the deployed policy w [d].

        propose: returns the proposed change of w [d]; it is called only if w is safe.
        cost_gradients: the candidates "cost". Raises :class:`UnsafeStartError` in the first update
        if w is unsafe.
        """
        g = self.start(w, constraints)
        self.updates += 1
        if constraints.begin_update(self.updates):
            # The noise is new: what was accepted under the old noise is evaluated again.
            g = constraints.evaluate(w)
        if (g > 0).any():
            return self._recover()
        self._safe = w, g
        return self._project(w, g, propose(), constraints, rng, cost_gradients)

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
    ) -> Decision:
        """The certified step closest to ``proposal`` [d] among the directions probed."""
        config = self.config
        memory = self.memory or DirectionMemory.empty(len(g), len(w))
        candidates = memory.candidates(w, config.candidates, cost_gradients)
        basis = probe_basis(proposal, candidates, config.directions, rng)
        rho = self._radius(g, memory)
        slopes, slope_noise, curvature = self._probe(w, g, basis, rho, constraints)
        L = self._smoothness_before(curvature, len(g))
        # In verified mode noise in the slopes costs a retry, not safety; in certified mode the
        # certificate has to cover it.
        slope_error = slope_noise if config.mode == "certified" else 0.0
        # The paper's mode with a declared L corrects nothing: a breach is only recorded.
        correct = config.mode == "verified" or config.smoothness != "apriori"

        target = basis.T @ proposal
        step, realised, bound, status = np.zeros(len(target)), g, g, "held"
        breaches = 0
        for _ in range(config.retries):
            certificate = Certificate(g, slopes, 0.5 * L * rho + slope_error, L)
            result = project(certificate, target, config.trust_radius, config.margin)
            z = result.z
            if not z.any():
                break
            values = constraints.evaluate(w + basis @ z)
            breached = values > result.bound
            breaches += bool(breached.any())
            if correct:
                L = smoothness.after_breach(L, breached, values, g + slopes @ z, float(z @ z))
            if config.mode == "certified" or (values <= 0).all():
                step, realised, bound, status = z, values, result.bound, result.status
                if config.smoothness == "adaptive" and not breached.any():
                    L = smoothness.after_success(L)
                break

        if config.smoothness != "apriori":
            self.smoothness = L
        self.g = realised
        self.memory = memory.updated(basis, slopes, step)
        self.breaches += breaches
        self.held += status == "held"
        diagnostics = {
            "proposal_norm": float(np.linalg.norm(target)),
            "step_norm": float(np.linalg.norm(step)),
            "breaches": float(self.breaches),
            "held": float(self.held),
            "recoveries": float(self.recoveries),
            **({"probe_radius": rho} if config.safe_probes else {}),
        }
        for i, name in enumerate(constraints.names):
            diagnostics[f"bound/{name}"] = float(bound[i])
            diagnostics[f"realised/{name}"] = float(realised[i])
            diagnostics[f"L/{name}"] = float(L[i])
        if status == "held":
            return Decision(w, "held", diagnostics)
        whole = status == "inactive" and float(np.linalg.norm(target)) <= config.trust_radius
        return Decision(w + basis @ step, "unaltered" if whole else "projected", diagnostics)

    def _radius(self, g: Floats, memory: DirectionMemory) -> float:
        """rho: as configured or, with ``safe_probes``, what the last certificate covers, if less.

        That is the largest rho with g + |normal| rho + L rho^2 / 2 <= 0.
        """
        rho = self.config.probe_radius
        if not self.config.safe_probes:
            return rho
        slope = np.linalg.norm(memory.normals, axis=1)
        L = np.full(len(g), self.config.L) if self.smoothness is None else self.smoothness
        # The positive root of L rho^2 / 2 + slope rho = -g, in the form that does not cancel.
        root = -2 * g / np.maximum(slope + np.sqrt(slope**2 - 2 * L * g), 1e-300)
        return max(min(rho, float(root.min())), self.config.smallest_probe * rho)

    def _probe(
        self, w: Floats, g: Floats, basis: Floats, rho: float, constraints: Constraints
    ) -> tuple[Floats, Floats, Floats | None]:
        """(slopes [k, m], their error from noise [k], second differences [k]).

        The last is None where only forward quotients were taken.
        """
        rule = self.config.smoothness
        sampling = rule == "sampled" or (rule == "adaptive" and self.smoothness is None)
        central = self.config.differences == "central" or sampling
        directions = np.concatenate([basis.T, -basis.T]) if central else basis.T
        values, noise = constraints.probe(w, g, w + rho * directions)
        error = noise.max(axis=0) / rho
        if not central:
            return (values - g).T / rho, error, None
        plus, minus = np.split(values, 2)
        slopes = (plus - minus).T / (2 * rho)
        return slopes, error, smoothness.second_differences(g, plus, minus, rho)

    def _smoothness_before(self, curvature: Floats | None, k: int) -> Floats:
        """L [k] for this update's certificate."""
        rule, previous = self.config.smoothness, self.smoothness
        if rule == "apriori":
            return np.full(k, self.config.L)
        if rule == "adaptive" and previous is not None:
            return previous
        assert curvature is not None
        sampled = np.maximum(self.config.safety_factor * curvature, smoothness.FLOOR)
        return sampled if previous is None else np.maximum(sampled, smoothness.SHRINK * previous)
