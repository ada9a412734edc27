"""SCPO: every proposed update is projected into the set of certified steps.

Source: Cao, Borrelli, Joa, "Constrained Policy Optimization via Sampling-Based Weight-Space
Projection", arXiv 2512.13788. Where the paper is silent, this package is the definition.
Deviations, each an option: ``verified`` mode evaluates a step's constraints before deploying it
(they are the next update's starting point, so this costs nothing); L may be sampled or adapted
instead of declared; the certificate carries an explicit error for slopes that are difference
quotients; constraints are log-sum-exp maxima of relative values; the step may be confined to a
subspace of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scpo_bench.configuration import require
from scpo_bench.contract import probe_meter_of, task_of
from scpo_bench.errors import UserError
from scpo_bench.scpo.closed_form import ClosedForm, ProvenGuard
from scpo_bench.scpo.constraints import RolloutConfig, constraints_from
from scpo_bench.scpo.gradient_descent import GradientDescent, GradientDescentConfig
from scpo_bench.scpo.guard import Guard, GuardConfig
from scpo_bench.scpo.rollouts import BatchedRollouts, refuse_wrappers


@dataclass(frozen=True)
class SCPOConfig(RolloutConfig, GuardConfig, GradientDescentConfig):
    """The guard's fields, those of the proposal, and those of constraint evaluation."""

    constraint_noise: float = 0.0
    """Standard deviation of normal noise on every rollout's constraint values, as measured by the
    agent: to study noisy constraints on tasks whose own are exact.
    """

    def __post_init__(self) -> None:
        for part in (GuardConfig, GradientDescentConfig, RolloutConfig):
            part.__post_init__(self)
        require(self, "constraint_noise", low=0)


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
            self._constraints = constraints_from(rollouts, config, config.retries)
        return self._constraints

    def start_training(self) -> None:
        super().start_training()
        self.guard.start(self.w, self.constraints)

    def train(self) -> None:
        """One update: propose, and deploy what the guard decides."""
        decision = self.guard.update(self.w, self.propose, self.constraints, self.rng)
        self.deploy(decision.w)
        self.diagnostics = {**self.diagnostics, **decision.diagnostics}
