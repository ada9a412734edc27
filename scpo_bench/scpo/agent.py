"""SCPO: every proposed update is projected into the set of certified steps.

Source: Cao, Borrelli, Joa, "Constrained Policy Optimization via Sampling-Based Weight-Space
Projection", arXiv 2512.13788. The defaults are the published algorithm, as far as it is public
(:mod:`scpo_bench.scpo.guard` cites it line by line); where the paper is silent, this package is the
definition: each constraint is a log-sum-exp maximum over start states and steps of relative values,
and the step changes the last layer.

:class:`PointwiseSCPO` is what this project makes of it: one constraint per start state, step and
signed bound, a complete bank, sampled curvature, and probes that serve several updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from scpo_bench.configuration import Range, SearchSpace, require
from scpo_bench.contract import Floats, probe_meter_of, task_of
from scpo_bench.errors import UserError
from scpo_bench.scpo.bank import Candidate
from scpo_bench.scpo.certified_step import Objective
from scpo_bench.scpo.closed_form import ClosedForm, ProvenGuard
from scpo_bench.scpo.constraints import RolloutConfig
from scpo_bench.scpo.estimation import Evidence
from scpo_bench.scpo.evaluation import constraints_from
from scpo_bench.scpo.gradient_descent import GradientDescent, GradientDescentConfig
from scpo_bench.scpo.guard import Guard
from scpo_bench.scpo.guard_config import GuardConfig, Mode
from scpo_bench.scpo.pointwise import Pointwise
from scpo_bench.scpo.rollouts import BatchedRollouts, refuse_wrappers
from scpo_bench.scpo.smoothness import Rule


@dataclass(frozen=True)
class SCPOConfig(RolloutConfig, GuardConfig, GradientDescentConfig):
    """The guard's fields, those of the proposal, and those of constraint evaluation."""

    search_space: ClassVar[SearchSpace] = {
        "learning_rate": Range(0.03, 0.6, log=True),
        "trust_radius": Range(0.1, 2.0, log=True),
        "directions": Range(2, 8),
        "smoothness": ("adaptive", "sampled"),
    }

    constraint_noise: float = 0.0
    """Standard deviation of normal noise on every rollout's constraint values, as measured by the
    agent: to study noisy constraints on tasks whose own are exact.
    """

    def __post_init__(self) -> None:
        for part in (GuardConfig, GradientDescentConfig, RolloutConfig):
            part.__post_init__(self)
        require(self, "constraint_noise", low=0)
        name = type(self).__name__
        if self.pointwise and self.smoothness == "adaptive":
            raise UserError(
                f"{name}.smoothness: expected 'sampled' or 'apriori' for pointwise constraints, "
                "whose start states may change, got 'adaptive'"
            )
        if self.pointwise and self.safe_probes:
            raise UserError(
                f"{name}.safe_probes: expected False for pointwise constraints, got True"
            )
        if self.mode == "certified" and self.active_starts > 0:
            raise UserError(
                f"{name}.active_starts: expected 0 in certified mode, where nothing "
                f"would evaluate the other start states, got {self.active_starts}"
            )


@dataclass(frozen=True)
class PointwiseConfig(SCPOConfig):
    """The defaults of agent ``scpo-pointwise``."""

    search_space: ClassVar[SearchSpace] = {
        "learning_rate": Range(0.03, 0.6, log=True),
        "trust_radius": Range(0.1, 2.0, log=True),
        "probe_radius": Range(0.01, 0.1, log=True),
        "reuse": Range(0.001, 0.02, log=True),
    }

    pointwise: bool = True
    evaluation_starts: int = 256
    active_starts: int = 8
    kept_starts: int = 64
    fresh_starts: int = 128
    smoothness: Rule = "sampled"
    safety_factor: float = 1.0
    directions: int = 4096
    """In effect a complete basis."""
    candidates: tuple[Candidate, ...] = ()
    probe_radius: float = 0.03
    follow_steps: bool = True
    smallest_probe: float = 0.2
    reuse: float = 0.005
    margin: float = 0.02


@dataclass(frozen=True)
class CertifiedConfig(PointwiseConfig):
    """The defaults of agent ``scpo-certified``: no step is evaluated before it is deployed."""

    mode: Mode = "certified"
    active_starts: int = 0
    kept_starts: int = 32
    safety_factor: float = 2.0
    reuse: float = 0.0
    margin: float = 0.05


@dataclass(frozen=True)
class ProvenConfig(SCPOConfig):
    """The defaults of agent ``scpo-proven``."""

    search_space: ClassVar[SearchSpace] = {"learning_rate": Range(0.03, 0.6, log=True)}

    mode: Mode = "proven"


class SCPO(GradientDescent):
    """The updates of :class:`GradientDescent`, projected.

    ``SCPO("MlpPolicy", env, policy_kwargs={"backup": module})``, on a vector environment whose
    dynamics are pure functions. Raises :class:`~scpo_bench.scpo.guard.UnsafeStartError` in
    ``learn`` if the start policy violates a constraint, naming it and its value; UserError if the
    environment offers no way to evaluate constraints.
    """

    Config: ClassVar[type[GradientDescentConfig]] = SCPOConfig
    config: SCPOConfig

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        self._constraints: Any = None  # Constraints, or a ClosedForm in mode `proven`
        # Of pointwise constraints, for when the agent is loaded.
        self._pointwise_state: tuple[Floats, ...] | None = None
        self._evidence = Evidence()  # of noisy constraints
        super().__init__(policy, env, **kwargs)
        proven = self.config.mode == "proven"
        self.guard: Guard | ProvenGuard = ProvenGuard() if proven else Guard(self.config)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_constraints"]

    @property
    def constraints(self) -> Any:
        if self._constraints is None:
            config, task = self.config, task_of(self.env)
            assert self.env is not None
            refuse_wrappers(self.env)
            if config.mode == "proven":
                self._constraints = ClosedForm(task, self.space, self.policy)
                return self._constraints
            if task is None:
                raise UserError(
                    "SCPO: constraints are evaluated in batches, and this environment offers no "
                    "batched task"
                )
            rollouts = BatchedRollouts(
                task,
                self.space,
                config.evaluation_starts,
                config.sharpness,
                probe_meter_of(self.env),
                config.constraint_noise,
                self.seed or 0,
            )
            self._constraints = constraints_from(
                rollouts, config, config, self.seed or 0, self._evidence
            )
            if isinstance(self._constraints, Pointwise) and self._pointwise_state is not None:
                self._constraints.state = self._pointwise_state
        return self._constraints

    @property
    def objective(self) -> Objective:
        """The loss over the labels seen so far, for backtracking."""

        def gradient(w: Floats) -> Floats:
            variable = torch.as_tensor(w).clone().requires_grad_()
            return torch.autograd.grad(self.loss(variable), variable)[0].numpy()

        def value(w: Floats) -> float:
            with torch.no_grad():
                return float(self.loss(torch.as_tensor(w)))

        return Objective(value, gradient)

    def start_training(self) -> None:
        super().start_training()
        self.guard.start(self.w, self.constraints)

    def train(self) -> None:
        """One update: propose, and deploy what the guard decides."""
        decision = self.guard.update(
            self.w, self.propose, self.constraints, self.rng, objective=self.objective
        )
        self.deploy(decision.w)
        if isinstance(self._constraints, Pointwise):
            self._pointwise_state = self._constraints.state
        self.diagnostics = {**self.diagnostics, **decision.diagnostics}


class PointwiseSCPO(SCPO):
    """Agent ``scpo-pointwise``: :class:`SCPO` with the defaults of :class:`PointwiseConfig`."""

    Config: ClassVar[type[GradientDescentConfig]] = PointwiseConfig


class CertifiedSCPO(SCPO):
    """Agent ``scpo-certified``: :class:`SCPO` with the defaults of :class:`CertifiedConfig`."""

    Config: ClassVar[type[GradientDescentConfig]] = CertifiedConfig


class ProvenSCPO(SCPO):
    """Agent ``scpo-proven``: :class:`SCPO` in closed form, where every policy is proved."""

    Config: ClassVar[type[GradientDescentConfig]] = ProvenConfig
