"""SCPO: every proposed update is projected into the set of steps that a certificate shows to be safe.

Source: Cao, Borrelli, Joa, "Constrained Policy Optimization via Sampling-Based Weight-Space Projection", arXiv 2512.13788. Where the
paper is silent, this file is the definition. Deviations, each an option: ``verified`` mode looks at a step's constraints before
deploying it (they are the next update's starting point, so this costs nothing); L may be sampled or adapted instead of declared;
the certificate carries an explicit error for slopes that are difference quotients; constraints are log-sum-exp maxima of relative
values; the step may live in a subspace of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from scpo_bench.baselines.configuration import require
from scpo_bench.scpo import smoothness
from scpo_bench.scpo.gradient_descent import GradientDescent, GradientDescentConfig, require_choice
from scpo_bench.scpo.probes import DirectionMemory, probe_basis
from scpo_bench.scpo.projection import Certificate, Floats, project
from scpo_bench.scpo.rollouts import BatchedEvaluator, ProbeMeter, describe_unsafe


class UnsafeStartError(ValueError):
    """The start policy violates a constraint: SCPO's induction has nothing to start from."""


@dataclass(frozen=True)
class SCPOConfig(GradientDescentConfig):
    """SCPO's own fields; those of the proposal are inherited."""

    mode: Literal["certified", "verified"] = "verified"
    """certified (the paper): deploy on the strength of the certificate. verified: deploy only what was seen to be safe."""
    smoothness: smoothness.Rule = "adaptive"
    """apriori: L as declared. sampled: second differences times ``safety_factor``, with decay. adaptive: sampled once, then adapted."""
    L: float = 10.0
    """The declared smoothness constant of every constraint (per squared unit of w), for ``apriori``."""
    safety_factor: float = 2.0
    """Factor on sampled second differences."""
    directions: int = 64
    """Probed directions m. At least the space's dimension means a complete basis."""
    differences: Literal["central", "forward"] = "forward"
    """Difference quotients: forward needs m + 1 evaluations, central 2 m. ``sampled`` smoothness always takes central ones."""
    probe_radius: float = 1e-3
    """rho, in units of w. The slope error is L rho / 2; evaluation is in float64, so it can be small."""
    trust_radius: float = 0.5
    """r: the largest step |D|, in units of w."""
    margin: float = 0.0
    """How far below zero the certificate is asked to stay."""
    retries: int = 8
    """verified mode: projections per update before the update is given up and the policy stays."""
    sharpness: float = 100.0
    """Sharpness of the log-sum-exp maximum over states and steps, per unit of relative constraint value."""
    evaluation_starts: int = 512
    """Start states of a constraint evaluation. Too few leave gaps in which a policy that passes them all is unsafe: with 128 on the
    imitation task, 2 of 11 runs deployed policies that violated from starts between the evaluated ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "mode", ("certified", "verified"))
        require_choice(self, "smoothness", get_args(smoothness.Rule))
        require_choice(self, "differences", ("central", "forward"))
        for name in ("L", "probe_radius", "trust_radius", "sharpness"):
            require(self, name, above=0)
        require(self, "safety_factor", low=1)
        require(self, "margin", low=0)
        for name in ("directions", "retries", "evaluation_starts"):
            require(self, name, low=1)


class SCPO(GradientDescent):
    """``SCPO("MlpPolicy", env, policy_kwargs={"backup": module})`` on a vector environment whose dynamics are pure functions.

    The supervised objective of :class:`GradientDescent`, projected. Raises :class:`UnsafeStartError` in ``learn`` if the start policy
    violates a constraint, naming it and its value; ValueError if the environment offers no way to evaluate constraints.
    """

    Config: ClassVar[type[GradientDescentConfig]] = SCPOConfig
    config: SCPOConfig

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        self._evaluator: BatchedEvaluator | None = None
        self._g: Floats | None = None  # g at the deployed policy
        self._safe: tuple[Floats, Floats] | None = None  # (w, g) of the last policy that was seen to be safe
        self._smoothness: Floats | None = None  # L_i
        self._memory: DirectionMemory | None = None
        self.breaches = 0  # certified steps whose realised constraints exceeded the bound
        self.held = 0  # updates that stayed at z = 0
        self.recoveries = 0  # updates that went back to the last safe policy (certified mode, after a breach)
        super().__init__(policy, env, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_evaluator"]

    @property
    def evaluator(self) -> BatchedEvaluator:
        if self._evaluator is None:
            vec_env = self.env.unwrapped  # type: ignore[union-attr]
            task = getattr(vec_env, "task", None)
            if task is None:
                raise ValueError("SCPO: constraints are evaluated in batches, and this environment offers no batched task")
            # The harness counts probe steps itself, through the meter that it hangs on the environment.
            meter = getattr(self.env, "probe_meter", None) or ProbeMeter()
            self._evaluator = BatchedEvaluator(task, self.config.evaluation_starts, self.config.sharpness, meter)
        return self._evaluator

    def start_training(self) -> None:
        super().start_training()
        if self._g is None:
            self._g = self.evaluator(self.space, self.w[None])[0]
        if (self._g > 0).any():
            raise UnsafeStartError(
                f"SCPO: the start policy is unsafe: {describe_unsafe(self.evaluator.names, self._g)}; start from a safe policy"
            )

    def train(self) -> None:
        """One update: propose, probe, certify, project and, in ``verified`` mode, look before deploying."""
        g = self._g
        assert g is not None
        if (g > 0).any():
            self._recover()
            return
        self._safe = (self.w, g)
        proposal, loss = self.propose()
        memory = self._memory or DirectionMemory.empty(len(g), len(self.w))
        basis = probe_basis(proposal, memory.candidates(self.w), self.config.directions, self.rng)
        slopes, curvature = self._probe(basis, g)
        L = self._smoothness_before(curvature)

        target = basis.T @ proposal
        accepted, realised, bound = np.zeros(len(target)), g, g
        breached_now = 0
        status = "held"
        for _ in range(self.config.retries):
            certificate = Certificate(g, slopes, 0.5 * L * self.config.probe_radius, L)
            result = project(certificate, target, self.config.trust_radius, self.config.margin)
            if not result.z.any():
                break
            seen = self.evaluator(self.space, (self.w + basis @ result.z)[None])[0]
            breached = seen > result.bound
            breached_now += bool(breached.any())
            if self.config.smoothness != "apriori" or self.config.mode == "verified":
                squared = float(result.z @ result.z)
                raised = smoothness.after_breach(L, breached, seen, g + slopes @ result.z, squared)
            else:
                raised = L  # the paper's mode with a declared L: nothing is corrected, a breach is only recorded
            if self.config.mode == "certified" or (seen <= 0).all():
                accepted, realised, bound, status = result.z, seen, result.bound, result.status
                L = raised if breached.any() else smoothness.after_success(L) if self.config.smoothness == "adaptive" else L
                break
            L = np.where(seen > 0, np.maximum(raised, smoothness.GROW * L), raised)

        if self.config.smoothness != "apriori":
            self._smoothness = L
        self.deploy(self.w + basis @ accepted)
        self._g = realised
        self._memory = memory.seen(basis, slopes, accepted)
        self.breaches += breached_now
        self.held += status == "held"
        self.diagnostics = {
            "loss": loss,
            "proposal_norm": float(np.linalg.norm(target)),
            "step_norm": float(np.linalg.norm(accepted)),
            "breaches": float(self.breaches),
            "held": float(self.held),
            "recoveries": float(self.recoveries),
            **{f"bound/{name}": float(v) for name, v in zip(self.evaluator.names, bound)},
            **{f"realised/{name}": float(v) for name, v in zip(self.evaluator.names, realised)},
            **{f"L/{name}": float(v) for name, v in zip(self.evaluator.names, L)},
        }

    def _recover(self) -> None:
        """Back to the last safe policy: from an unsafe one (a breach in ``certified`` mode) nothing can be certified."""
        assert self._safe is not None
        w, self._g = self._safe
        self.deploy(w)
        self.recoveries += 1
        self.diagnostics = {**self.diagnostics, "recoveries": float(self.recoveries), "step_norm": 0.0}

    def _probe(self, basis: Floats, g: Floats) -> tuple[Floats, Floats | None]:
        """(slopes [k, m], second differences [k] or None where only forward quotients were taken)."""
        rho = self.config.probe_radius
        sampling = self.config.smoothness == "sampled" or (self.config.smoothness == "adaptive" and self._smoothness is None)
        central = self.config.differences == "central" or sampling
        probes = self.w + rho * np.concatenate([basis.T, -basis.T] if central else [basis.T])
        values = self.evaluator(self.space, probes)
        m = basis.shape[1]
        if not central:
            return (values - g).T / rho, None
        plus, minus = values[:m], values[m:]
        return (plus - minus).T / (2 * rho), smoothness.second_differences(g, plus, minus, rho)

    def _smoothness_before(self, curvature: Floats | None) -> Floats:
        """L [k] for this update's certificate."""
        rule, k = self.config.smoothness, len(self.evaluator.names)
        if rule == "apriori":
            return np.full(k, self.config.L)
        previous = self._smoothness
        if rule == "adaptive" and previous is not None:
            return previous
        assert curvature is not None
        sampled = np.maximum(self.config.safety_factor * curvature, smoothness.FLOOR)
        return sampled if previous is None else np.maximum(sampled, smoothness.SHRINK * previous)
