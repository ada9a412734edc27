"""Constrained policy optimisation: a trust-region step on the linearised reward and cost.

Source: Achiam, Held, Tamar, Abbeel 2017, arXiv 1705.10528.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.baselines.actors import Actor
from scpo_bench.baselines.cpo_dual import Case, TrustRegionStep, trust_region_step
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.baselines.rollout import Batch
from scpo_bench.baselines.trust_region import Step, Surrogates, TrustRegion, TrustRegionConfig
from scpo_bench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CPOConfig(TrustRegionConfig):
    """Defaults as in OmniSafe 0.5.0, configs/on-policy/CPO.yaml."""

    line_search_steps: int = 20
    """Step lengths tried, >= 1; if all fail the policy stays as it was, exactly.

    The default is that of OmniSafe 0.5.0, algorithms/on_policy/second_order/cpo.py.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cost_keys) != 1:
            raise UserError(
                "CPOConfig.cost_keys: CPO's dual is solved for one constraint, got "
                f"{', '.join(self.cost_keys)}; 'ppo-lagrangian' takes several"
            )


class CPO(TrustRegion):
    """CPO with one constraint; with an infinite limit it is TRPO.

    The step solves max g.x subject to c + b.x <= 0 and x'Hx/2 <= delta, where g and b are the
    gradients of the reward's and the cost's surrogate and H is the Hessian of the KL, exactly.
    See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = CPOConfig
    config: CPOConfig
    case_counts: tuple[int, ...] = (0,) * len(Case)
    """Updates so far in which each case fired, in the order of ``Case``."""

    def _step(
        self,
        actor: Actor,
        batch: Batch,
        head: Array,
        advantages: Array,
        excess: NDArray[np.float64],
        episode_length: float,
    ) -> Step:
        g, b = (actor.gradient(head, batch.actions, signal / len(signal)) for signal in advantages)
        # b.x is a change of cost per step, so c is the episode's excess spread over its steps.
        c = float(excess[0]) / episode_length
        step, direction, (q, r, s) = self._solve(actor, batch, g, b, c)
        self.case_counts = tuple(n + (case is step.case) for n, case in zip(self.case_counts, Case))
        diagnostics = {
            "c": c if np.isfinite(c) else 0.0,
            "q": q,
            "r": r,
            "s": s,
            "case": step.case,
            "multiplier": step.cost_multiplier,
            "kl_multiplier": step.kl_multiplier,
        }
        for case, n in zip(Case, self.case_counts):
            diagnostics[f"updates_{case.name.lower()}"] = n
        return Step(direction, lambda at: acceptable(at, c), diagnostics)

    def _solve(
        self, actor: Actor, batch: Batch, g: Array, b: Array, c: float
    ) -> tuple[TrustRegionStep, Array, tuple[float, float, float]]:
        """The subproblem's solution, its step x [P], and (q, r, s)."""
        solve, delta = self._inverse_curvature(actor, batch), self._kl_bound(actor)
        on_g = solve(g)
        q = float(g @ on_g)
        if np.isneginf(c):  # no limit: TRPO's step, for which b is not needed
            step = trust_region_step(q, 0.0, 0.0, c, delta)
            return step, np.float32(step.on_reward) * on_g, (q, 0.0, 0.0)
        on_b = solve(b)
        r, s = float(g @ on_b), float(b @ on_b)
        step = trust_region_step(q, r, s, c, delta)
        return step, np.float32(step.on_reward) * on_g + np.float32(step.on_cost) * on_b, (q, r, s)


def acceptable(at: Surrogates, c: float) -> bool:
    """Whether a tried policy keeps the constraint and, from inside the limit, the reward.

    c: constraint value now, per step (feasible <= 0). While the policy is infeasible a step may
    lose reward: the way back to the limit costs some.
    Source: OmniSafe 0.5.0, algorithms/on_policy/second_order/cpo.py, ``_cpo_search_step``.
    """
    reward_gain, cost_gain = at.gains
    return bool((c > 0 or reward_gain >= 0) and cost_gain <= max(-c, 0.0))
