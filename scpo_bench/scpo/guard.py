"""The guard: SCPO's projection as a component.

It takes a proposed change of parameters and returns one that may be deployed.

It knows no policy, environment or optimiser: parameters are vectors w, constraints are something
that can be looked at (:mod:`scpo_bench.scpo.constraints`). The SCPO agent, the wrapped SB3
algorithms and the wrapped torch optimisers all use it.
Source: Cao, Borrelli, Joa, arXiv 2512.13788; ``verified`` mode, the smoothness rules and the choice
of directions are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from scpo_bench.configuration import require, require_choice
from scpo_bench.errors import UserError
from scpo_bench.scpo import smoothness
from scpo_bench.scpo.constraints import Constraints, describe_unsafe
from scpo_bench.scpo.directions import Candidate, DirectionMemory, probe_basis
from scpo_bench.scpo.projection import Certificate, Floats, project


class UnsafeStartError(UserError):
    """The start policy violates a constraint: SCPO's induction has nothing to start from."""


@dataclass(frozen=True)
class GuardConfig:
    """How a proposal is probed, certified and projected."""

    mode: Literal["certified", "verified"] = "verified"
    """certified (the paper): deploy on the strength of the certificate. verified: deploy only what
    was seen to be safe.
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
    algorithm has one to offer.
    """
    differences: Literal["central", "forward"] = "forward"
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
        require_choice(self, "mode", ("certified", "verified"))
        require_choice(self, "smoothness", get_args(smoothness.Rule))
        require_choice(self, "differences", ("central", "forward"))
        for candidate in self.candidates:
            require_choice(self, "candidates", get_args(Candidate), candidate)
        for name in ("L", "probe_radius", "trust_radius", "smallest_probe"):
            require(self, name, above=0)
        require(self, "safety_factor", low=1)
        require(self, "margin", low=0)
        for name in ("directions", "retries"):
            require(self, name, low=1)


class Guard:
    """What SCPO remembers between updates: the constraints' values, their smoothness, directions
    worth probing, the last safe w.

    w = 0 is the start policy. ``step`` returns what to deploy; ``diagnostics`` are the numbers of
    that update.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.g: Floats | None = None  # [k], at the deployed policy
        self.smoothness: Floats | None = None  # [k], L_i
        self.unaltered = False  # the last step is the proposal, the whole proposal
        self.diagnostics: dict[str, float] = {}
        self.updates = 0
        self.breaches = 0  # certified steps whose realised constraints exceeded the bound
        self.held = 0  # updates that stayed at z = 0
        self.recoveries = 0  # updates that went back to the last safe policy
        self._safe: tuple[Floats, Floats] | None = (
            None  # (w, g) of the last policy that was seen to be safe
        )
        self._memory: DirectionMemory | None = None

    def start(self, w: Floats, constraints: Constraints) -> None:
        """Look at the policy that training starts from, once.

        Raises :class:`UnsafeStartError` if it violates a constraint.
        """
        if self.g is None:
            constraints.begin_update(0)
            self.g = constraints.look(w)
        if (self.g > 0).any() and self._safe is None:
            raise UnsafeStartError(
                f"SCPO: the start policy is unsafe: {describe_unsafe(constraints.names, self.g)}; start from a safe policy"
            )

    def look_again(self, w: Floats, constraints: Constraints) -> bool:
        """Begin an update at w.

        False: w has turned out to be unsafe, and :meth:`recover` says where to go.
        """
        self.updates += 1
        if constraints.begin_update(
            self.updates
        ):  # noise is drawn anew: what was accepted because it looked good is looked at again
            self.g = constraints.look(w)
        assert self.g is not None
        if (self.g > 0).any():
            return False
        self._safe = (w, self.g)
        return True

    def recover(self) -> Floats:
        """The last safe policy: from an unsafe one nothing can be certified."""
        assert self._safe is not None
        w, self.g = self._safe
        self.recoveries += 1
        self.diagnostics = {
            **self.diagnostics,
            "recoveries": float(self.recoveries),
            "step_norm": 0.0,
        }
        return w

    def step(
        self,
        w: Floats,
        proposal: Floats,
        constraints: Constraints,
        rng: np.random.Generator,
        cost_gradients: Sequence[Floats] = (),
    ) -> Floats:
        """The change of w [d] to deploy: the certified one closest to ``proposal`` [d] among the
        directions probed.

        cost_gradients: the candidates "cost". ``unaltered`` then says whether the certificate
        allowed the proposal itself.
        """
        config, g = self.config, self.g
        assert g is not None
        memory = self._memory or DirectionMemory.empty(len(g), len(w))
        candidates = memory.candidates(w, config.candidates, cost_gradients)
        basis = probe_basis(proposal, candidates, config.directions, rng)
        rho = self._radius(g, memory)
        slopes, slope_noise, curvature = self._probe(w, basis, rho, constraints)
        L = self._smoothness_before(curvature, len(g))

        # Where a look decides, noise in the slopes costs a retry, not safety; where the certificate
        # does, it has to cover them.
        slope_error = slope_noise if config.mode == "certified" else 0.0
        target = basis.T @ proposal
        accepted, realised, bound = np.zeros(len(target)), g, g
        breached_now = 0
        status = "held"
        for _ in range(config.retries):
            certificate = Certificate(g, slopes, 0.5 * L * rho + slope_error, L)
            result = project(certificate, target, config.trust_radius, config.margin)
            if not result.z.any():
                break
            seen = constraints.look(w + basis @ result.z)
            breached = seen > result.bound
            breached_now += bool(breached.any())
            if config.smoothness != "apriori" or config.mode == "verified":
                squared = float(result.z @ result.z)
                raised = smoothness.after_breach(L, breached, seen, g + slopes @ result.z, squared)
            else:
                # the paper's mode with a declared L: nothing is corrected, a breach is only
                # recorded
                raised = L
            if config.mode == "certified" or (seen <= 0).all():
                accepted, realised, bound, status = result.z, seen, result.bound, result.status
                L = (
                    raised
                    if breached.any()
                    else smoothness.after_success(L)
                    if config.smoothness == "adaptive"
                    else L
                )
                break
            L = np.where(seen > 0, np.maximum(raised, smoothness.GROW * L), raised)

        if config.smoothness != "apriori":
            self.smoothness = L
        self.g = realised
        self._memory = memory.seen(basis, slopes, accepted)
        self.breaches += breached_now
        self.held += status == "held"
        self.unaltered = (
            status == "inactive" and float(np.linalg.norm(target)) <= config.trust_radius
        )
        self.diagnostics = {
            "proposal_norm": float(np.linalg.norm(target)),
            "step_norm": float(np.linalg.norm(accepted)),
            "breaches": float(self.breaches),
            "held": float(self.held),
            "recoveries": float(self.recoveries),
            **({"probe_radius": rho} if config.safe_probes else {}),
            **{f"bound/{name}": float(v) for name, v in zip(constraints.names, bound)},
            **{f"realised/{name}": float(v) for name, v in zip(constraints.names, realised)},
            **{f"L/{name}": float(v) for name, v in zip(constraints.names, L)},
        }
        return basis @ accepted

    def _radius(self, g: Floats, memory: DirectionMemory) -> float:
        """rho: as configured or, with ``safe_probes``, the largest that g + |normal| rho + L rho^2
        / 2 <= 0 allows, if that is less.
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
        self, w: Floats, basis: Floats, rho: float, constraints: Constraints
    ) -> tuple[Floats, Floats, Floats | None]:
        """(slopes [k, m], their error from noise [k], second differences [k] or None where only
        forward quotients were taken).
        """
        g = self.g
        assert g is not None
        sampling = self.config.smoothness == "sampled" or (
            self.config.smoothness == "adaptive" and self.smoothness is None
        )
        central = self.config.differences == "central" or sampling
        probes = w + rho * np.concatenate([basis.T, -basis.T] if central else [basis.T])
        values, noise = constraints.probe(w, g, probes)
        error = noise.max(axis=0) / rho
        m = basis.shape[1]
        if not central:
            return (values - g).T / rho, error, None
        plus, minus = values[:m], values[m:]
        return (
            (plus - minus).T / (2 * rho),
            error,
            smoothness.second_differences(g, plus, minus, rho),
        )

    def _smoothness_before(self, curvature: Floats | None, k: int) -> Floats:
        """L [k] for this update's certificate."""
        rule = self.config.smoothness
        if rule == "apriori":
            return np.full(k, self.config.L)
        previous = self.smoothness
        if rule == "adaptive" and previous is not None:
            return previous
        assert curvature is not None
        sampled = np.maximum(self.config.safety_factor * curvature, smoothness.FLOOR)
        return sampled if previous is None else np.maximum(sampled, smoothness.SHRINK * previous)
