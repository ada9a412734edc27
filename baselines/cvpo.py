"""Constrained variational policy optimisation (CVPO).

Each gradient step reweights actions of the old policy within a cost and a KL bound (E-step,
``cvpo_dual``), then fits the policy to them (M-step, ``cvpo_m_step``). The old policy is the one
that collected the last data: it stays as it is for all gradient steps between two collections, so
the M-step's bounds hold for what is deployed. Source: Liu, Cen, Isenbaev, Liu, Wu, Li, Zhao 2022,
arXiv 2201.11927; references for details: FSRL 0.1.0, fsrl/policy/cvpo.py, and cvpo-safe-rl (the
paper's own code), safe_rl/policy/cvpo.py.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from scpo_bench.baselines.cvpo_dual import EStep, cost_threshold, e_step
from scpo_bench.baselines.cvpo_m_step import (
    gaussian_kl_split,
    multipliers,
    pull_back,
    weighted_moments,
    weighted_nll_split,
)
from scpo_bench.baselines.off_policy import ConstrainedOffPolicy, OffPolicyConfig
from scpo_bench.configuration import Range, SearchSpace, require

TRUST_REGION_STATES = 16_384
"""Replayed states on which an update's KL is measured and held, at most as many as are stored.

A few states can have most of the mean KL, so fewer would measure it too coarsely.
"""


@dataclass(frozen=True, kw_only=True)
class CVPOConfig(OffPolicyConfig):
    """See ``OffPolicyConfig`` for the source of the defaults."""

    search_space: ClassVar[SearchSpace] = {
        **OffPolicyConfig.search_space,
        "kl_bound": Range(0.01, 0.5, log=True),
        "mean_kl_bound": Range(0.002, 0.2, log=True),
        "covariance_kl_bound": Range(1e-4, 1e-2, log=True),
    }

    episode_steps: int | None = None
    """Episode length T in the threshold on Q_c, or None.

    None: the environment's own time limit or, where its spec states none, the mean length of this
    run's finished episodes.
    """
    action_samples: int = 16
    """K actions per state in the E-step, >= 2."""
    kl_bound: float = 0.02
    """E-step: mean KL(q || old policy's samples), > 0."""
    mean_kl_bound: float = 0.005
    """M-step: KL due to the mean between the policies before and after an update, > 0.

    Mean over replayed states, summed over action dimensions.
    """
    covariance_kl_bound: float = 0.0005
    """M-step: the same, due to the covariance, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kl_bound", "mean_kl_bound", "covariance_kl_bound"):
            require(self, name, above=0)
        require(self, "action_samples", low=2)


class CVPO(ConstrainedOffPolicy):
    """CVPO with one constraint. See ``ConstrainedOffPolicy`` for the arguments and errors."""

    Config: ClassVar[type[CVPOConfig]] = CVPOConfig
    config: CVPOConfig
    episode_steps: int | None = None
    recoveries: int = 0
    """E-steps so far whose batch admitted no feasible reweighting."""

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.episode_steps is None:
            spec = self.env.get_attr("spec")[0] if self.env is not None else None
            self.episode_steps = self.config.episode_steps or (spec and spec.max_episode_steps)

    def threshold(self) -> float:
        """d: the episodic limit as a threshold on Q_c, before ``return_scale``."""
        steps = self.episode_steps or self.episode_costs.mean_length()
        return cost_threshold(self.config.cost_limit, self.config.gamma, steps)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """One update: critics, E-step, M-step and targets, each time on a fresh batch.

        The actor is then moved back towards the old policy as far as the KL bounds ask for: an
        optimiser's steps have a size of their own, which may exceed them whatever the multipliers.
        """
        config, policy = self.config, self.policy
        old = copy.deepcopy(policy.actor)
        sums: Counter[str] = Counter()
        for _ in range(gradient_steps):
            observations, numbers = self._critic_step(batch_size)
            with torch.no_grad():
                old_mean, old_std = old(observations)
                actions = self._samples(old_mean, old_std, config.action_samples)
                best = self._e_step(observations, actions)
            self.recoveries += best.recovery
            numbers |= self._m_step(observations, old_mean, old_std, actions, best)
            policy.follow(config.tau)
            sums.update(numbers)
        self._n_updates += gradient_steps

        replay = self.replay_buffer
        size = min(TRUST_REGION_STATES, replay.stored * replay.n_envs)
        states = replay.sample(size, 1, config.gamma, self.rng, self._vec_normalize_env)
        bounds = config.mean_kl_bound, config.covariance_kl_bound
        observations = torch.from_numpy(states.observations).to(self.device)
        kl_mean, kl_covariance, share = pull_back(policy.actor, old, observations, *bounds)
        episodic_cost, _ = self.episode_costs.estimate()
        diagnostics = {name: float(total) / gradient_steps for name, total in sums.items()} | {
            "kl": kl_mean + kl_covariance,
            "kl_mean": kl_mean,
            "kl_covariance": kl_covariance,
            "kl_mean_bound": bounds[0],
            "kl_covariance_bound": bounds[1],
            "step_fraction": share,
            "episodic_cost": episodic_cost[0],
            "episodes": len(self.episode_costs.finished),
            "recoveries": self.recoveries,
            "gradient_updates": self._n_updates,
        }
        self._publish(diagnostics)

    def _e_step(self, observations: Tensor, actions: Tensor) -> EStep:
        """The best weights of the old policy's samples. actions: [B, K, A]."""
        values = self.policy.critics_target(observations, self._clipped(actions))
        reward, cost = (v.cpu().numpy() for v in self._combined(values))
        threshold = self.config.return_scale * self.threshold()
        return e_step(reward, cost, self.config.kl_bound, threshold)

    def _m_step(
        self, observations: Tensor, old_mean: Tensor, old_std: Tensor, actions: Tensor, best: EStep
    ) -> dict[str, float]:
        """One gradient step of the actor towards q; mean and covariance have a KL bound each."""
        config = self.config
        weights = torch.from_numpy(best.weights).to(actions)
        first, second = weighted_moments(actions, weights, old_mean, old_std)
        by_mean, by_covariance = multipliers(
            first, second, config.mean_kl_bound, config.covariance_kl_bound
        )
        mean, std = self.policy.actor(observations)
        split = gaussian_kl_split(mean, std, old_mean, old_std)
        kl_mean, kl_covariance = (kl.mean() for kl in split)
        fit = weighted_nll_split((mean - old_mean) / old_std, std / old_std, first, second)
        self._actor_step(fit + by_mean * kl_mean + by_covariance * kl_covariance)
        excess = best.cost_excess if np.isfinite(best.cost_excess) else 0.0
        return {
            "mean_kl_multiplier": by_mean,
            "covariance_kl_multiplier": by_covariance,
            "std": std.mean().item(),
            "multiplier": best.lam,
            "eta": best.eta,
            "e_step_kl": best.kl,
            "cost_value_excess": excess / config.return_scale,
            "kkt_residual": best.kkt_residual,
            "dual_iterations": best.iterations,
            "recovery_share": float(best.recovery),
            "effective_sample_size": best.effective_sample_size(),
        }
