"""SCPO: every proposed update is projected into the set of steps that a certificate shows to be
safe.

Source: Cao, Borrelli, Joa, "Constrained Policy Optimization via Sampling-Based Weight-Space
Projection", arXiv 2512.13788. Where the paper is silent, this file is the definition. Deviations,
each an option: ``verified`` mode looks at a step's constraints before deploying it (they are the
next update's starting point, so this costs nothing); L may be sampled or adapted instead of
declared; the certificate carries an explicit error for slopes that are difference quotients;
constraints are log-sum-exp maxima of relative values; the step may live in a subspace of the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scpo_bench.configuration import require
from scpo_bench.contract import probe_meter_of, task_of
from scpo_bench.scpo.constraints import Constraints, Exact, Expected
from scpo_bench.scpo.gradient_descent import GradientDescent, GradientDescentConfig
from scpo_bench.scpo.guard import Guard, GuardConfig, UnsafeStartError
from scpo_bench.scpo.rollouts import BatchedEvaluator, NoisyRollouts

__all__ = ["SCPO", "SCPOConfig", "UnsafeStartError"]


@dataclass(frozen=True)
class SCPOConfig(GuardConfig, GradientDescentConfig):
    """The guard's fields and those of the proposal, and how constraints are evaluated."""

    sharpness: float = 100.0
    """Sharpness of the log-sum-exp maximum over states and steps, per unit of relative constraint
    value.
    """
    evaluation_starts: int = 512
    """Start states of a constraint evaluation.

    Too few leave gaps in which a policy that passes them all is unsafe: with 128 on the imitation
    task, 2 of 11 runs deployed policies that violated from starts between the evaluated ones.
    """
    constraint_noise: float = 0.0
    """Standard deviation of normal noise on every rollout's constraint values, as measured by the
    agent: to study noisy constraints on tasks whose own are exact. With any, g is estimated (the
    fields below).
    """
    level: float = 0.05
    """Noisy constraints: the probability with which an update may deploy an unsafe policy."""
    rollouts: int = 8
    """Noisy constraints: rollouts of a first look, and of every probe."""
    rollout_budget: int = 512
    """Noisy constraints: rollouts of a look at most."""

    def __post_init__(self) -> None:
        GuardConfig.__post_init__(self)
        GradientDescentConfig.__post_init__(self)
        require(self, "sharpness", above=0)
        require(self, "evaluation_starts", low=1)
        require(self, "constraint_noise", low=0)
        require(self, "level", above=0, high=0.5)
        require(self, "rollouts", low=2)
        require(self, "rollout_budget", low=self.rollouts)


class SCPO(GradientDescent):
    """``SCPO("MlpPolicy", env, policy_kwargs={"backup": module})`` on a vector environment whose
    dynamics are pure functions.

    The supervised objective of :class:`GradientDescent`, projected. Raises
    :class:`UnsafeStartError` in ``learn`` if the start policy violates a constraint, naming it and
    its value; ValueError if the environment offers no way to evaluate constraints.
    """

    Config: ClassVar[type[GradientDescentConfig]] = SCPOConfig
    config: SCPOConfig

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        self._evaluator: BatchedEvaluator | None = None
        self._constraints: Constraints | None = None
        super().__init__(policy, env, **kwargs)
        self.guard = Guard(self.config)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_evaluator", "_constraints"]

    @property
    def evaluator(self) -> BatchedEvaluator:
        if self._evaluator is None:
            task = task_of(self.env)
            if task is None:
                raise ValueError(
                    "SCPO: constraints are evaluated in batches, and this environment offers no batched task"
                )
            # The harness counts probe steps itself, through the meter that it hangs on the
            # environment.
            meter = probe_meter_of(self.env)
            self._evaluator = BatchedEvaluator(
                task, self.config.evaluation_starts, self.config.sharpness, meter
            )
        return self._evaluator

    @property
    def constraints(self) -> Constraints:
        if self._constraints is None:
            config, evaluator = self.config, self.evaluator
            if config.constraint_noise == 0:
                self._constraints = Exact(evaluator.names, lambda w: evaluator(self.space, w))
            else:
                noisy = NoisyRollouts(
                    lambda w: evaluator(self.space, w),
                    config.constraint_noise,
                    self.seed or 0,
                    evaluator,
                )
                self._constraints = Expected(
                    evaluator.names,
                    noisy,
                    config.level,
                    config.rollouts,
                    config.rollout_budget,
                    config.retries,
                )
        return self._constraints

    def start_training(self) -> None:
        super().start_training()
        self.guard.start(self.w, self.constraints)

    def train(self) -> None:
        """One update: propose, and deploy what the guard makes of it."""
        if not self.guard.look_again(self.w, self.constraints):
            self.deploy(self.guard.recover())
            self.diagnostics = {**self.diagnostics, **self.guard.diagnostics}
            return
        proposal, loss = self.propose()
        self.deploy(self.w + self.guard.step(self.w, proposal, self.constraints, self.rng))
        self.diagnostics = {"loss": loss, **self.guard.diagnostics}
