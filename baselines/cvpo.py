"""Constrained variational policy optimisation (CVPO).

Each update reweights sampled actions within a cost and a KL bound (E-step, ``cvpo_dual``), then
fits the policy to them (M-step). Source: Liu, Cen, Isenbaev, Liu, Wu, Li, Zhao 2022, arXiv
2201.11927. Defaults: those of the authors' later code (FSRL) for Safety-Gymnasium.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import RolloutReturn
from torch import Tensor

from scpo_bench.baselines.constrained import ConstrainedAlgorithm, flat
from scpo_bench.baselines.cvpo_dual import EStep, cost_threshold, e_step
from scpo_bench.baselines.cvpo_policy import (
    N_REWARD_CRITICS,
    CVPOPolicy,
    gaussian_kl_split,
    weighted_nll_split,
)
from scpo_bench.baselines.multipliers import projected_ascent
from scpo_bench.baselines.replay import CostReplay
from scpo_bench.configuration import require
from scpo_bench.contract import check_transition, read_costs
from scpo_bench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CVPOConfig:
    """Every field's default is the reference's, except for those marked "ours"."""

    cost_limit: float = 25.0
    """Limit on the undiscounted cost of an episode, >= 0 or infinite."""
    cost_keys: tuple[str, ...] = ("cost",)
    """Key of ``info`` the cost is read from; exactly one."""
    episode_steps: int | None = None
    """Episode length T in the threshold on Q_c, or None.

    None: the environment's own time limit or, where its spec states none, the mean length of this
    run's finished episodes.
    """
    steps_per_update: int = 1000
    """Environment steps collected per update, all environments together, >= 1 (ours)."""
    updates_per_step: float = 0.2
    """Gradient updates per environment step, > 0."""
    learning_starts: int = 2000
    """Environment steps before the first gradient update; the starting policy takes them (ours)."""
    buffer_size: int = 200_000
    """Transitions kept for replay."""
    batch_size: int = 256
    """States per gradient update."""
    action_samples: int = 16
    """K actions per state in the E-step, >= 2."""
    n_step: int = 2
    """Steps per return, >= 1."""
    gamma: float = 0.99
    """Discount per step of rewards and costs, in [0, 1)."""
    kl_bound: float = 0.02
    """E-step: mean KL(q || old policy's samples), > 0."""
    mean_kl_bound: float = 0.005
    """M-step: KL due to the mean, summed over action dimensions, > 0."""
    covariance_kl_bound: float = 0.0005
    """M-step: KL due to the covariance, summed over action dimensions, > 0."""
    m_step_multiplier_lr: float = 0.01
    """Ascent step of the M-step's multipliers on KL / bound - 1, > 0.

    Ours: it is relative, so it does not depend on the bounds' scale.
    """
    m_step_multiplier_max: float = 1000.0
    """The M-step's multipliers are kept in [0, this]."""
    actor_lr: float = 5e-4
    """Adam step size of the actor, > 0."""
    critic_lr: float = 1e-3
    """Adam step size of the critics, > 0."""
    pessimistic_cost: bool = True
    """Whether the higher of the two cost critics is used, in targets and E-step, or their mean.

    The higher errs on the safe side by as much as the two disagree: with a small limit that can be
    the whole limit.
    """
    tau: float = 0.05
    """Share by which target networks move towards the networks per gradient update, in (0, 1]."""
    net_arch: tuple[int, ...] = (128, 128)
    """Hidden widths of every network."""
    initial_std: float = 0.5
    """Standard deviation at the start, in half ranges of the action space, (0.001, 10] (ours)."""
    max_grad_norm: float = 40.0
    """Gradients of actor and critics are clipped to this norm, > 0 (ours)."""
    return_scale: float = 1.0
    """Critics predict returns times this, > 0: small where episodes return thousands (ours)."""

    def __post_init__(self) -> None:
        if len(self.cost_keys) != 1 or isinstance(self.cost_limit, tuple):
            raise UserError(
                "CVPOConfig.cost_keys: CVPO's dual is solved for one constraint, got "
                f"{self.cost_keys} with limit {self.cost_limit}; 'ppo-lagrangian' takes several"
            )
        for name in ("steps_per_update", "batch_size", "buffer_size", "n_step"):
            require(self, name, low=1)
        for name in ("updates_per_step", "kl_bound", "mean_kl_bound", "covariance_kl_bound"):
            require(self, name, above=0)
        for name in ("m_step_multiplier_lr", "actor_lr", "critic_lr", "max_grad_norm"):
            require(self, name, above=0)
        require(self, "return_scale", above=0)
        for name in ("cost_limit", "learning_starts", "m_step_multiplier_max"):
            require(self, name, low=0)
        require(self, "action_samples", low=2)
        require(self, "gamma", low=0, high=0.99999)
        require(self, "tau", above=0, high=1)
        require(self, "initial_std", above=0.001, high=10)


class CVPO(ConstrainedAlgorithm, OffPolicyAlgorithm):
    """CVPO with one constraint.

    policy: "MlpPolicy" or a subclass of ``CVPOPolicy`` (see there for ``backup``).
    env: anything SB3 takes, with Box observations and a one-dimensional Box of actions; ``info``
    must hold the cost.
    config, and errors: see ``ConstrainedAlgorithm``.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": CVPOPolicy}
    Config: ClassVar[type[CVPOConfig]] = CVPOConfig
    config: CVPOConfig
    policy: CVPOPolicy
    replay_buffer: CostReplay  # type: ignore[assignment]
    episode_steps: int | None = None
    mean_multiplier: float = 0.0
    covariance_multiplier: float = 0.0
    recoveries: int = 0
    """E-steps so far whose batch admitted no feasible reweighting."""

    def _sb3_arguments(self, device: str) -> dict[str, Any]:
        return {
            "device": device,
            "learning_rate": self.config.critic_lr,
            "buffer_size": self.config.buffer_size,
            "learning_starts": self.config.learning_starts,
            "batch_size": self.config.batch_size,
            "tau": self.config.tau,
            "gamma": self.config.gamma,
            "replay_buffer_class": CostReplay,
            "support_multi_env": True,
            "sde_support": False,
            "supported_action_spaces": (spaces.Box,),
        }

    def _setup_model(self) -> None:
        config, observed, acted = self.config, self.observation_space, self.action_space
        if not isinstance(observed, spaces.Box) or len(acted.shape or ()) != 1:
            needed = "Box observations and a one-dimensional Box of actions"
            raise UserError(f"env: CVPO needs {needed}, got {observed}, {acted}")
        self.train_freq = -(-config.steps_per_update // self.n_envs)
        self.gradient_steps = max(1, round(config.updates_per_step * config.steps_per_update))
        self.policy_kwargs = {
            "net_arch": list(config.net_arch),
            "initial_std": config.initial_std,
            "actor_lr": config.actor_lr,
            "critic_lr": config.critic_lr,
            **self.policy_kwargs,
        }
        super()._setup_model()
        if self.episode_steps is None:
            spec = self.env.get_attr("spec")[0] if self.env is not None else None
            self.episode_steps = config.episode_steps or (spec and spec.max_episode_steps)

    def threshold(self) -> float:
        """d: the episodic limit as a threshold on Q_c, before ``return_scale``."""
        steps = self.episode_steps or self.episode_costs.mean_length()
        return cost_threshold(self.config.cost_limit, self.config.gamma, steps)

    # ---- collection ----

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """SB3's, with this update's episode costs counted separately."""
        self._start_update(self._last_episode_starts)
        return super().collect_rollouts(*args, **kwargs)

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The policy's own samples from the first step on: a run with a backup starts safe."""
        with torch.inference_mode():
            observations = torch.from_numpy(flat(self._last_obs)).to(self.device)
            mean, std = (t.cpu().numpy() for t in self.policy.actor(observations))
        actions = mean + std * self.rng.standard_normal(mean.shape, dtype=np.float32)
        assert isinstance(self.action_space, spaces.Box)
        applied = np.clip(actions, self.action_space.low, self.action_space.high)
        return applied, applied

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: NDArray[Any],
        new_obs: Any,
        reward: NDArray[Any],
        dones: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Store unnormalised values: ``VecNormalize`` statistics are applied when sampling."""
        costs = read_costs(infos, self.config.cost_keys)
        check_transition(self.num_timesteps, new_obs, reward, costs, dones, infos)
        self.episode_costs.add(costs, dones)
        normaliser = self._vec_normalize_env
        observations, raw_new, rewards = self._last_obs, new_obs, reward
        if normaliser is not None:
            observations, raw_new = self._last_original_obs, normaliser.get_original_obs()
            rewards = normaliser.get_original_reward()
        following = flat(raw_new).copy()
        terminated = np.array(dones, dtype=np.bool_)
        for i in np.flatnonzero(dones):
            terminal = infos[i]["terminal_observation"]
            if normaliser is not None:
                terminal = normaliser.unnormalize_obs(terminal)
            following[i] = np.ravel(np.asarray(terminal))
            terminated[i] = not infos[i].get("TimeLimit.truncated", False)
        replay_buffer.add(
            observations=flat(observations),
            actions=buffer_action,
            rewards=rewards,
            costs=costs[:, 0],
            next_observations=following,
            terminated=terminated,
            ends=dones,
        )
        self._last_obs, self._last_original_obs, self._last_episode_starts = new_obs, raw_new, dones

    # ---- update ----

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """One update: critics, E-step, M-step and targets, each time on a fresh batch."""
        sums: Counter[str] = Counter()
        for _ in range(gradient_steps):
            observations, numbers = self._critic_step(batch_size)
            with torch.no_grad():
                old_mean, old_std = self.policy.actor_target(observations)
                actions = self._samples(old_mean, old_std, self.config.action_samples)
                best = self._e_step(observations, actions)
            self.recoveries += best.recovery
            numbers |= self._m_step(observations, old_mean, old_std, actions, best)
            self.policy.follow(self.config.tau)
            sums.update(numbers)
        self._n_updates += gradient_steps

        episodic_cost, _ = self.episode_costs.estimate()
        diagnostics = {name: float(total) / gradient_steps for name, total in sums.items()} | {
            "episodic_cost": episodic_cost[0],
            "episodes": len(self.episode_costs.finished),
            "recoveries": self.recoveries,
            "mean_kl_multiplier": self.mean_multiplier,
            "covariance_kl_multiplier": self.covariance_multiplier,
            "gradient_updates": self._n_updates,
        }
        self._publish(diagnostics)

    def _critic_step(self, batch_size: int) -> tuple[Tensor, dict[str, float]]:
        """Sample a batch and take one step of all four critics towards n-step targets.

        Returns (observations [B, O], losses).
        """
        config, policy, scale = self.config, self.policy, self.config.return_scale
        batch = self.replay_buffer.sample(
            batch_size, config.n_step, config.gamma, self.rng, self._vec_normalize_env
        )
        observations, actions, rewards, costs, following, discounts = batch.tensors(self.device)
        with torch.no_grad():
            next_mean, next_std = policy.actor_target(following)
            next_actions = self._clipped(self._samples(next_mean, next_std, 1))
            low_reward, high_cost = self._combined(policy.critics_target(following, next_actions))
            reward_target = scale * rewards + discounts * low_reward[:, 0]
            cost_target = scale * costs + discounts * high_cost[:, 0]
            targets = torch.stack([reward_target, reward_target, cost_target, cost_target])
        losses = policy.critics.regression(observations, actions, targets)
        torch.nn.utils.clip_grad_norm_(policy.critics.parameters(), config.max_grad_norm)
        policy.critic_optimizer.step()
        reward_loss, cost_loss = losses.view(2, 2).mean(dim=1).tolist()
        return observations, {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss}

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
        config, policy = self.config, self.policy
        weights = torch.from_numpy(best.weights).to(actions)
        mean, std = policy.actor(observations)
        split = gaussian_kl_split(mean, std, old_mean, old_std)
        kl_mean, kl_covariance = (kl.mean() for kl in split)
        fit = weighted_nll_split(mean, std, old_mean, old_std, actions, weights)
        loss = fit + self.mean_multiplier * kl_mean + self.covariance_multiplier * kl_covariance
        policy.actor_optimizer.zero_grad()
        loss.backward()
        trained = policy.actor_optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        policy.actor_optimizer.step()
        lr, highest = config.m_step_multiplier_lr, config.m_step_multiplier_max
        by_mean, by_covariance = kl_mean.item(), kl_covariance.item()
        self.mean_multiplier = projected_ascent(
            self.mean_multiplier, by_mean / config.mean_kl_bound - 1, lr, highest
        )
        self.covariance_multiplier = projected_ascent(
            self.covariance_multiplier, by_covariance / config.covariance_kl_bound - 1, lr, highest
        )
        excess = best.cost_excess if np.isfinite(best.cost_excess) else 0.0
        return {
            "kl_mean": by_mean,
            "kl_covariance": by_covariance,
            "std": std.mean().item(),
            "kl": by_mean + by_covariance,
            "multiplier": best.lam,
            "eta": best.eta,
            "e_step_kl": best.kl,
            "cost_value_excess": excess / config.return_scale,
            "kkt_residual": best.kkt_residual,
            "dual_iterations": best.iterations,
            "recovery_share": float(best.recovery),
            "effective_sample_size": best.effective_sample_size(),
        }

    def _combined(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest reward value and highest or mean cost value [...] of all critics' [4, ...]."""
        reward, cost = values[:N_REWARD_CRITICS], values[N_REWARD_CRITICS:]
        combined = cost.amax(dim=0) if self.config.pessimistic_cost else cost.mean(dim=0)
        return reward.amin(dim=0), combined

    def _samples(self, mean: Tensor, std: Tensor, k: int) -> Tensor:
        """[B, k, A] draws; the noise comes from the agent's own generator, which ``save`` keeps."""
        noise = self.rng.standard_normal((len(mean), k, mean.shape[1]), dtype=np.float32)
        return mean.unsqueeze(1) + std.unsqueeze(1) * torch.from_numpy(noise).to(self.device)

    def _clipped(self, actions: Tensor) -> Tensor:
        """As the environment applies them: critics never see an action outside the action space."""
        centre, half_range = self.policy.actor.centre, self.policy.actor.half_range
        return torch.clamp(actions, centre - half_range, centre + half_range)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.actor_optimizer", "policy.critic_optimizer", "replay_buffer"], []
