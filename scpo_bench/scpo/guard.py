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
from scpo_bench.scpo import recovery, smoothness
from scpo_bench.scpo.constraints import Constraints, describe_unsafe
from scpo_bench.scpo.directions import Candidate, DirectionMemory, probe_basis
from scpo_bench.scpo.projection import Certificate, project

Mode = Literal["certified", "verified"]
Differences = Literal["central", "forward"]


class UnsafeStartError(UserError):
    """The start policy violates a constraint: SCPO's induction has nothing to start from."""


@dataclass(frozen=True)
class GuardConfig:
    """How a proposal is probed, certified and projected."""

    mode: Mode = "verified"
    """certified (the paper): deploy on the strength of the certificate. verified: evaluate first,
    and deploy only what is then safe.
    """
    smoothness: smoothness.Rule = "adaptive"
    """apriori: L as declared. sampled: second differences times ``safety_factor``, with decay.
    adaptive: sampled once, then adapted.
    """
    L: float = 10.0
    """The declared smoothness constant of every constraint (per squared unit of w), for
    ``apriori``.
    """
    largest_L: float = 1e9
    """adaptive: the largest L that is carried to the next update. Where the constraint jumps (costs
    are counts), what one breached step shows is no curvature, and would stop learning for long.
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
    recovery: bool = False
    """Where the start policy is unsafe: lower the largest constraint value until it is safe,
    instead of refusing to start. Policies deployed until then violate.
    """

    def __post_init__(self) -> None:
        require_choice(self, "mode", get_args(Mode))
        require_choice(self, "smoothness", get_args(smoothness.Rule))
        require_choice(self, "differences", get_args(Differences))
        for candidate in self.candidates:
            require_choice(self, "candidates", get_args(Candidate), candidate)
        for name in ("L", "largest_L", "probe_radius", "trust_radius", "smallest_probe"):
            require(self, name, above=0)
        require(self, "safety_factor", low=1)
        require(self, "margin", low=0)
        for name in ("directions", "retries"):
            require(self, name, low=1)


@dataclass(frozen=True)
class Decision:
    """What an update deploys.

    w: [d]. status: "unaltered" (the whole proposal), "projected", "held" (w as it was: no step was
    certified), "recovered" (w had become unsafe; this is the newest of the earlier policies that is
    still found safe), or "recovering" (the start policy is unsafe, and so may this be).
    diagnostics: the numbers of this update.
    """

    w: Floats
    status: Literal["unaltered", "projected", "held", "recovered", "recovering"]
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
        self.recoveries = 0  # updates that returned to an earlier policy
        self.learned_margin = 0.0  # beside the configured one; grows with recoveries
        self.recovery_radius = recovery.FIRST_RADIUS  # of the next step from an unsafe start
        self.verified: list[recovery.Verified] = []  # policies to return to, the newest last

    def start(self, w: Floats, constraints: Constraints) -> Floats:
        """Evaluate the policy that training starts from, once. Returns g [k] at the present policy.

        Raises :class:`UnsafeStartError` if it violates a constraint, unless ``config.recovery``.
        """
        if self.g is None:
            constraints.begin_update(0)
            self.g = _known(constraints.evaluate(w), constraints.names)
        if (self.g > 0).any() and not self.verified and not self.config.recovery:
            raise UnsafeStartError(
                f"SCPO: the start policy is unsafe: {describe_unsafe(constraints.names, self.g)}; "
                "start from a safe policy, or set recovery to make it safe first"
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

        propose: returns the proposed change of w [d]; it is not called to return from an unsafe w
        to an earlier policy.
        cost_gradients: the candidates "cost". Raises :class:`UnsafeStartError` in the first update
        if w is unsafe (unless ``config.recovery``), UserError if a constraint has no value (NaN).
        """
        g = self.start(w, constraints)
        self.updates += 1
        self.learned_margin *= recovery.DECAY
        noisy = constraints.begin_update(self.updates)
        if noisy:
            # More is known now than when it was accepted.
            g = _known(constraints.evaluate(w), constraints.names)
        if (g <= 0).all():
            self.verified = recovery.pushed(self.verified, recovery.Verified(w, g))
            return self._project(w, g, propose(), constraints, rng, cost_gradients)
        if self.verified:
            return self._recover(w, constraints if noisy else None)
        return self._leave_unsafe_start(w, g, propose(), constraints, rng, cost_gradients)

    def _recover(self, failed: Floats, noisy: Constraints | None) -> Decision:
        """Back to an earlier policy: from an unsafe one nothing can be certified.

        noisy: evaluates the earlier ones again.
        """
        self.verified = recovery.fall_back(
            self.verified, failed, lambda old: noisy.evaluate(old.w) if noisy else old.g
        )
        self.recoveries += 1
        if noisy:
            self.learned_margin = recovery.margin_after_return(self.learned_margin)
        w, self.g = self.verified[-1].w, self.verified[-1].g
        diagnostics = {"recoveries": float(self.recoveries), "step_norm": 0.0}
        return Decision(w, "recovered", diagnostics)

    def _leave_unsafe_start(
        self,
        w: Floats,
        g: Floats,
        proposal: Floats,
        constraints: Constraints,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats],
    ) -> Decision:
        """One update of the recovery phase. The proposal is a direction among others."""
        config = self.config
        memory = self.memory or DirectionMemory.empty(len(g), len(w))
        candidates = memory.candidates(w, config.candidates, cost_gradients)
        basis = probe_basis(proposal, candidates, config.directions, rng)
        rho = config.probe_radius
        values, _ = constraints.probe(w, g, w + rho * np.concatenate([basis.T, -basis.T]))
        plus, minus = np.split(values, 2)
        step = recovery.descend(
            g,
            (plus - minus).T / (2 * rho),
            lambda z: _known(constraints.evaluate(w + basis @ z), constraints.names),
            radius=min(self.recovery_radius, config.trust_radius),
            margin=config.margin,
            retries=config.retries,
        )
        self.g, self.recovery_radius = step.g, step.radius
        self.memory = memory.updated(basis, step.slopes, step.z)
        diagnostics = {
            "recovering": 1.0,
            "target_violation": step.target,
            "step_norm": float(np.linalg.norm(step.z)),
        }
        for name, value in zip(constraints.names, step.g):
            diagnostics[f"realised/{name}"] = float(value)
        return Decision(w + basis @ step.z, "recovering", diagnostics)

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
        # Rounding is in the evaluation that would decide, too: it counts in both modes.
        rounding = constraints.rounding(w)
        slope_error = slope_error + 2 * rounding / rho
        margin = config.margin + self.learned_margin + 2 * rounding
        # The paper's mode with a declared L corrects nothing: a breach is only recorded.
        correct = config.mode == "verified" or config.smoothness != "apriori"

        target = basis.T @ proposal
        step, realised, bound, status = np.zeros(len(target)), g, g, "held"
        breaches = 0
        radius = config.trust_radius
        for _ in range(config.retries):
            certificate = Certificate(g, slopes, 0.5 * L * rho + slope_error, L)
            result = project(certificate, target, radius, margin)
            z = result.z
            if not z.any():
                break
            values = constraints.evaluate(w + basis @ z)
            # Of noisy values only what is certain counts as a breach; L must not learn from luck.
            certain = values - constraints.uncertainty
            breached = certain > result.bound
            breaches += bool(breached.any())
            if correct:
                L = smoothness.after_breach(L, breached, certain, g + slopes @ z, float(z @ z))
            if config.mode == "certified" or (values <= 0).all():
                step, realised, bound, status = z, values, result.bound, result.status
                if config.smoothness == "adaptive" and not breached.any():
                    L = smoothness.after_success(L)
                break
            if not breached.any():
                radius = 0.5 * float(np.linalg.norm(z))

        if config.smoothness != "apriori":
            self.smoothness = np.minimum(L, config.largest_L)
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
            **({"learned_margin": self.learned_margin} if self.recoveries else {}),
            **({"probe_radius": rho} if config.safe_probes else {}),
        }
        for i, name in enumerate(constraints.names):
            diagnostics[f"bound/{name}"] = float(bound[i])
            diagnostics[f"realised/{name}"] = float(realised[i])
            diagnostics[f"L/{name}"] = float(L[i])
        if status == "held":
            return Decision(w, "held", diagnostics)
        whole = status == "inactive" and float(np.linalg.norm(target)) <= radius
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
        if rule == "adaptive":
            sampled = np.minimum(sampled, self.config.largest_L)
        return sampled if previous is None else np.maximum(sampled, smoothness.SHRINK * previous)


def _known(g: Floats, names: tuple[str, ...]) -> Floats:
    """g; UserError if it holds a NaN, which would pass for safe and be unsafe at once."""
    if np.isnan(g).any():
        name = names[int(np.argmax(np.isnan(g)))]
        raise UserError(f"SCPO: constraint '{name}' has value nan; expected a number")
    return g
