"""Constrained policy optimisation: a trust-region step on the linearised reward and cost.

Source: Achiam, Held, Tamar, Abbeel 2017, arXiv 1705.10528. Defaults as in OmniSafe 0.5.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from scpo_bench.baselines.actors import Actor, actor_of
from scpo_bench.baselines.cpo_dual import (
    Case,
    TrustRegionStep,
    conjugate_gradient,
    trust_region_step,
)
from scpo_bench.baselines.networks import Array
from scpo_bench.baselines.on_policy import ConstrainedOnPolicy, OnPolicyConfig
from scpo_bench.baselines.rollout import Batch
from scpo_bench.configuration import require
from scpo_bench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CPOConfig(OnPolicyConfig):
    """``target_kl`` is the trust region's radius delta."""

    critic_lr: float = 1e-3
    """Adam step size of reward and cost critics, > 0; constant."""
    critic_passes: int = 10
    """Passes over an update's data when fitting the critics, >= 1."""
    batch_size: int = 128
    """Steps per critic minibatch, >= 1."""
    target_kl: float = 0.01
    """Trust region: KL(old || new), mean over states, summed over action dimensions, > 0."""
    cg_iterations: int = 15
    """Conjugate gradient iterations per linear system, >= 1."""
    cg_damping: float = 0.1
    """Added to the Fisher matrix's diagonal, >= 0."""
    fisher_stride: int = 1
    """The Fisher matrix uses every n-th collected state, >= 1."""
    line_search_steps: int = 15
    """Step lengths tried, >= 1; if all fail the policy stays as it was, exactly."""
    line_search_shrink: float = 0.8
    """Ratio of one tried step length to the one before, in (0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cost_keys) != 1:
            raise UserError(
                "CPOConfig.cost_keys: CPO's dual is solved for one constraint, got "
                f"{', '.join(self.cost_keys)}; 'ppo-lagrangian' takes several"
            )
        for name in ("cg_iterations", "fisher_stride", "line_search_steps"):
            require(self, name, low=1)
        require(self, "cg_damping", low=0)
        require(self, "line_search_shrink", above=0, high=0.999)


@dataclass(frozen=True)
class Surrogates:
    """Changes at a tried policy, relative to the old one: importance-weighted means per step."""

    reward_gain: float
    cost_gain: float
    kl: float

    def finite(self) -> bool:
        return bool(np.isfinite([self.reward_gain, self.cost_gain, self.kl]).all())


class CPO(ConstrainedOnPolicy):
    """CPO with one constraint; with an infinite limit it is TRPO.

    See ``ConstrainedOnPolicy`` for the arguments and errors.
    """

    Config: ClassVar[type[OnPolicyConfig]] = CPOConfig
    config: CPOConfig
    case_counts: tuple[int, ...] = (0,) * len(Case)
    """Updates so far in which each case fired, in the order of ``Case``."""

    def train(self) -> None:
        """One update: solve the subproblem, search along the step, fit the critics."""
        config = self.config
        actor, critics = actor_of(self.policy), self._critics()
        batch = self._batch(actor, critics)
        reward, cost = batch.advantages
        reward_advantages = (reward - reward.mean()) / (reward.std() + 1e-8)
        cost_advantages = cost - cost.mean()  # not scaled: b must keep the unit of c
        n_steps = len(cost_advantages)

        head = actor.head(batch.observations, batch.offset)
        g = actor.gradient(head, batch.actions, reward_advantages / n_steps)
        b = actor.gradient(head, batch.actions, cost_advantages / n_steps)
        # b.x is a change of cost per step, so c is the episode's excess spread over its steps.
        episodic_cost, episode_length = self.episode_costs.estimate()
        c = float(episodic_cost[0] - config.limits()[0]) / episode_length

        step, direction, (q, r, s) = self._solve(actor, batch, g, b, c)
        advantages = (reward_advantages, cost_advantages)
        accepted, fraction, tried = self._line_search(actor, batch, head, direction, *advantages, c)

        errors = [0.0, 0.0]
        for _ in range(config.critic_passes):
            for index in self._minibatches(n_steps):
                observations, returns = batch.observations[index], batch.returns[:, index]
                errors = self._critic_step(critics, observations, returns)

        self.case_counts = tuple(n + (case is step.case) for n, case in zip(self.case_counts, Case))
        diagnostics = {
            "episodic_cost": episodic_cost[0],
            "episodes": len(self.episode_costs.finished),
            "c": c if np.isfinite(c) else 0.0,
            "q": q,
            "r": r,
            "s": s,
            "case": step.case,
            "multiplier": step.cost_multiplier,
            "kl_multiplier": step.kl_multiplier,
            "kl": accepted.kl,
            "reward_gain": accepted.reward_gain,
            "cost_gain": accepted.cost_gain,
            "step_fraction": fraction,
            "line_search_tried": tried,
            "entropy": actor.entropy(head),
            "reward_critic_error": errors[0],
            "cost_critic_error": errors[1],
        }
        for case, n in zip(Case, self.case_counts):
            diagnostics[f"updates_{case.name.lower()}"] = n
        self._finish(actor, critics, diagnostics)

    def _solve(
        self, actor: Actor, batch: Batch, g: Array, b: Array, c: float
    ) -> tuple[TrustRegionStep, Array, tuple[float, float, float]]:
        """The subproblem's solution, its step x [P], and (q, r, s)."""
        config, stride = self.config, self.config.fisher_stride
        offset = batch.offset[::stride] if isinstance(batch.offset, np.ndarray) else batch.offset
        fisher_head = actor.head(batch.observations[::stride], offset)

        def curvature(v: Array) -> Array:
            return actor.fisher_product(fisher_head, v) + np.float32(config.cg_damping) * v

        on_g = conjugate_gradient(curvature, g, config.cg_iterations)
        q = float(g @ on_g)
        if np.isneginf(c):  # no limit: TRPO's step, for which b is not needed
            length = np.float32(np.sqrt(2 * config.target_kl / q) if q > 0 else 0.0)
            return trust_region_step(q, 0.0, 0.0, c, config.target_kl), length * on_g, (q, 0.0, 0.0)
        on_b = conjugate_gradient(curvature, b, config.cg_iterations)
        r, s = float(g @ on_b), float(b @ on_b)
        step = trust_region_step(q, r, s, c, config.target_kl)
        return step, np.float32(step.on_reward) * on_g + np.float32(step.on_cost) * on_b, (q, r, s)

    def _line_search(
        self,
        actor: Actor,
        batch: Batch,
        old_head: Array,
        direction: Array,
        reward_advantages: Array,
        cost_advantages: Array,
        c: float,
    ) -> tuple[Surrogates, float, int]:
        """Take the longest step that keeps the KL bound, the constraint and the reward.

        While the policy is infeasible (c > 0) a step may lose reward: the way back to the limit
        costs some. Returns (surrogates, step fraction, lengths tried). On failure theta is restored
        exactly, and the fraction is 0.
        Source: OmniSafe 0.5.0, algorithms/on_policy/second_order/cpo.py, ``_cpo_search_step``.
        """
        config, theta = self.config, actor.mlp.theta
        old_theta, old_extra = theta.copy(), actor.dist_extra()
        old_log_prob = actor.log_prob(old_head, batch.actions)
        fraction = 1.0
        for tried in range(1, config.line_search_steps + 1):
            theta[:] = old_theta + np.float32(fraction) * direction
            # A non-finite trial counts as too long a step.
            with np.errstate(over="ignore", invalid="ignore"):
                head = actor.head(batch.observations, batch.offset)
                change = np.exp(actor.log_prob(head, batch.actions) - old_log_prob) - 1.0
                at = Surrogates(
                    float(np.mean(change * reward_advantages, dtype=np.float64)),
                    float(np.mean(change * cost_advantages, dtype=np.float64)),
                    actor.kl(old_head, old_extra, head),
                )
            keeps_reward = c > 0 or at.reward_gain >= 0
            keeps_cost = at.cost_gain <= max(-c, 0.0)
            if at.finite() and at.kl <= config.target_kl and keeps_reward and keeps_cost:
                return at, fraction, tried
            fraction *= config.line_search_shrink
        theta[:] = old_theta
        return Surrogates(0.0, 0.0, 0.0), 0.0, config.line_search_steps
