"""Constraint evaluation: g(theta) by rollouts, for many policies at once.

g_i(theta) = (1 / sharpness) log sum exp(sharpness * c_i) over all start states and steps, with c_i
the task's signed, relative
constraint values: a smooth upper bound on their maximum, so g_i <= 0 implies that no evaluated step
violates constraint i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scpo_bench.contract import BatchedTask, ProbeMeter
from scpo_bench.scpo.projection import Floats
from scpo_bench.scpo.spaces import ParameterSpace

# Policies are evaluated in groups of about this many (policy, start) pairs: the working set then
# stays in the processor's cache.
PAIRS_AT_ONCE = 8192


class BatchedEvaluator:
    """g for tasks whose dynamics are pure functions: all policies and all start states in one
    computation.
    """

    def __init__(self, task: BatchedTask, starts: int, sharpness: float, meter: ProbeMeter) -> None:
        self.task = task
        self.names = task.constraint_names
        self.sharpness = sharpness
        self.meter = meter
        self._starts = tuple(
            torch.as_tensor(s, dtype=torch.float64) for s in task.design_starts(starts)
        )

    def __call__(self, space: ParameterSpace, w: Floats) -> Floats:
        """g: [M, k] for policies w [M, d]. Charges the meter."""
        with torch.no_grad():
            return self._evaluate(space, torch.as_tensor(w, dtype=torch.float64))

    def _evaluate(self, space: ParameterSpace, w: Tensor) -> Floats:
        n = len(self._starts[0])
        group = max(1, PAIRS_AT_ONCE // n)
        g = torch.cat(
            [self._smooth_worst(self.constraint_values(space, part)) for part in w.split(group)]
        )
        return g.numpy()

    def constraint_values(self, space: ParameterSpace, w: Tensor) -> Tensor:
        """Every constraint value of every rollout:

        [M, k, T * N]. Differentiable, if autograd is on.
        """
        m, n = len(w), len(self._starts[0])
        state = tuple(s.expand(m, n) for s in self._starts)
        horizon = self.task.constraint_horizon
        seen = []
        for step in range(horizon):
            action = space.actions(w, torch.stack(state, dim=-1)).unbind(dim=-1)
            following = self.task.next_state(state, action)
            seen.append(
                torch.stack(
                    self.task.constraint_values(state, action, following, step + 1 == horizon),
                    dim=1,
                )
            )
            state = following
        self.meter.steps += m * n * horizon
        return torch.cat(seen, dim=-1)

    def _smooth_worst(self, values: Tensor) -> Tensor:
        self.meter.violations += int((values.amax(dim=(1, 2)) > 0).sum())
        return torch.logsumexp(self.sharpness * values, dim=-1) / self.sharpness


class NoisyRollouts:
    """Rollouts of a batched task whose constraint values are measured with normal noise: y = g(w) +
    ``std`` e, e ~ N(0, 1) per stream.

    Every stream is a rollout from all start states, and charged as one.
    """

    def __init__(
        self,
        evaluate: Callable[[Floats], Floats],
        std: float,
        seed: int,
        evaluator: BatchedEvaluator,
    ) -> None:
        self._evaluate, self._std, self._seed, self._evaluator = evaluate, std, seed, evaluator

    def __call__(self, w: Floats, streams: Sequence[int]) -> Floats:
        """y [M, n, k] for policies w [M, d] and n streams."""
        meter, k = self._evaluator.meter, len(self._evaluator.names)
        before = meter.steps
        g = self._evaluate(w)
        meter.steps += (meter.steps - before) * (len(streams) - 1)
        noise = np.stack(
            [np.random.default_rng([self._seed, stream]).normal(size=k) for stream in streams]
        )
        return g[:, None] + self._std * noise
