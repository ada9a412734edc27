"""The paper's baseline: supervised gradient descent with a soft penalty on violations.

Source: Cao, Borrelli, Joa, arXiv 2512.13788, Figure 2 ("soft penalty", weight 1). How the paper
aggregates violations is not public; the sum below is this project's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from scpo_bench.configuration import Range, SearchSpace, require
from scpo_bench.contract import ProbeMeter, probe_meter_of, task_of
from scpo_bench.errors import UserError
from scpo_bench.scpo.gradient_descent import GradientDescent, GradientDescentConfig
from scpo_bench.scpo.rollouts import BatchedRollouts, refuse_wrappers


@dataclass(frozen=True)
class PenaltyConfig(GradientDescentConfig):
    """The fields of gradient descent, and those of the penalty."""

    search_space: ClassVar[SearchSpace] = {"learning_rate": Range(0.001, 0.1, log=True)}

    weight: float = 1.0
    """Of the penalty, relative to the loss (the paper's: 1)."""
    evaluation_starts: int = 64
    """Design starts at which violations are penalised (the paper's: 64)."""
    margin: float = 0.0
    """How far below zero constraint values are not penalised, in their units (the paper's: 0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "weight", low=0)
        require(self, "margin", low=0)
        require(self, "evaluation_starts", low=1)


class Penalty(GradientDescent):
    """Gradient descent on loss + weight * sum of max(0, c + margin)^2.

    The sum is over the constraints' values c at the design starts and at the steps of a rollout
    from each of them. It is a sum, not a mean: with a mean, weight 1 would trade a violation at a
    point evenly against the error there, and hardly restrain it. Unlike SCPO, the penalty needs
    gradients of the constraints, through the dynamics: those of a task whose functions are pure.
    Its rollouts are charged as probes. Raises UserError for an environment without such a task.
    """

    Config: ClassVar[type[GradientDescentConfig]] = PenaltyConfig
    config: PenaltyConfig

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        self._rollouts: BatchedRollouts | None = None
        super().__init__(policy, env, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_rollouts"]

    @property
    def rollouts(self) -> BatchedRollouts:
        if self._rollouts is None:
            assert self.env is not None
            refuse_wrappers(self.env)
            if (task := task_of(self.env)) is None:
                raise UserError(
                    "Penalty: it differentiates through a task's pure functions, and this "
                    "environment offers no batched task"
                )
            # The last two are for calls, of which there are none: only single values are used.
            meter, sharpness = ProbeMeter(), 1.0
            self._rollouts = BatchedRollouts(
                task, self.space, self.config.evaluation_starts, sharpness, meter
            )
        return self._rollouts

    def penalty(self, w: torch.Tensor) -> torch.Tensor:
        """Sum of max(0, c + margin)^2 over the constraint values of the policy w [d]; a scalar."""
        values = self.rollouts.constraint_values(w[None])
        meter = probe_meter_of(self.env)
        meter.steps += values.shape[-1]
        meter.violations += int((values > 0).any())
        return (values + self.config.margin).clamp(min=0).square().sum()

    def loss(self, w: torch.Tensor) -> torch.Tensor:
        penalty = self.penalty(w)
        self.diagnostics = {**self.diagnostics, "penalty": penalty.item()}
        return super().loss(w) + self.config.weight * penalty
