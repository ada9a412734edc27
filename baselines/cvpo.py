"""Constrained variational policy optimisation: reweight sampled actions within cost and KL bounds,
then fit the policy.

Source: Liu, Cen, Isenbaev, Liu, Wu, Li, Zhao 2022, arXiv 2201.11927. Defaults: the authors' later
code (FSRL), its Safety-Gymnasium base.
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

from scpo_bench.baselines.cvpo_dual import EStep, cost_threshold, e_step
from scpo_bench.baselines.cvpo_policy import (
    N_REWARD_CRITICS,
    CVPOPolicy,
    gaussian_kl_split,
    weighted_nll_split,
)
from scpo_bench.baselines.episode_costs import EpisodeCosts
from scpo_bench.baselines.multipliers import projected_ascent
from scpo_bench.baselines.normalisation import normalisation_state, restore_normalisation
from scpo_bench.baselines.replay import CostReplay
from scpo_bench.configuration import require, resolve_config
from scpo_bench.contract import check_transition, read_costs


@dataclass(frozen=True, kw_only=True)
class CVPOConfig:
    """Every field's default is the reference's unless it says otherwise."""

    cost_limit: float = 25.0
    """Limit on the undiscounted cost of an episode, >= 0 or infinite."""
    cost_keys: tuple[str, ...] = ("cost",)
    """Key of ``info`` the cost is read from; exactly one."""
    episode_steps: int | None = None
    """Episode length T in the threshold on Q_c; None: the environment's own time limit, or, where
    its spec states none, the mean length of this run's finished episodes.
    """
    steps_per_update: int = 1000
    """Environment steps collected between two training phases, all environments together (ours)."""
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
    """Ascent step of the M-step's multipliers on KL / bound - 1, > 0 (ours: relative, so free of
    the bounds' scale).
    """
    m_step_multiplier_max: float = 1000.0
    """They are kept in [0, this]."""
    actor_lr: float = 5e-4
    """Adam step size of the actor, > 0."""
    critic_lr: float = 1e-3
    """Adam step size of the critics, > 0."""
    pessimistic_cost: bool = True
    """Whether the higher of the two cost critics counts, in targets and E-step, or (False) their
    mean. The higher errs on the safe side, by as much as the two disagree: with a small limit that
    can be all of it.
    """
    tau: float = 0.05
    """Share by which target networks follow per gradient update, in (0, 1]."""
    net_arch: tuple[int, ...] = (128, 128)
    """Hidden widths of every network."""
    initial_std: float = 0.5
    """Standard deviation at the start, in half ranges of the action space, in (0.001, 10] (ours).
    """
    max_grad_norm: float = 40.0
    """Gradients of actor and critics are cut to this norm, > 0 (ours)."""
    return_scale: float = 1.0
    """Critics predict rewards and costs times this, > 0: small where episodes return thousands
    (ours).
    """

    def __post_init__(self) -> None:
        if len(self.cost_keys) != 1 or isinstance(self.cost_limit, tuple):
            raise ValueError(
                f"CVPOConfig.cost_keys: CVPO's dual is solved for one constraint, got {self.cost_keys!r} with limit "
                f"{self.cost_limit!r}; 'ppo-lagrangian' takes several"
            )
        for name in ("steps_per_update", "batch_size", "buffer_size", "n_step"):
            require(self, name, low=1)
        for name in (
            "updates_per_step",
            "kl_bound",
            "mean_kl_bound",
            "covariance_kl_bound",
            "m_step_multiplier_lr",
            "actor_lr",
            "critic_lr",
            "max_grad_norm",
            "return_scale",
        ):
            require(self, name, above=0)
        for name in ("cost_limit", "learning_starts", "m_step_multiplier_max"):
            require(self, name, low=0)
        require(self, "action_samples", low=2)
        require(self, "gamma", low=0, high=0.99999)
        require(self, "tau", above=0, high=1)
        require(self, "initial_std", above=0.001, high=10)


class CVPO(OffPolicyAlgorithm):
    """policy: "MlpPolicy" or a subclass of ``CVPOPolicy``; policy_kwargs may hold ``backup`` (see
    there).

    env: anything SB3 takes, with Box observations and a one-dimensional Box of actions; ``info``
    must hold the cost.
    config: fields of ``CVPOConfig``. Raises ValueError for unknown or out-of-range fields.
    ``learn`` raises KeyError for a missing cost, FloatingPointError (naming step, environment and
    field) for a non-finite observation, reward or cost.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": CVPOPolicy}
    Config: ClassVar[type[CVPOConfig]] = CVPOConfig
    policy: CVPOPolicy
    rng: np.random.Generator | None = None
    episode_costs: EpisodeCosts | None = None
    episode_steps: int | None = None
    mean_multiplier: float = 0.0
    covariance_multiplier: float = 0.0
    recoveries: int = 0
    """E-steps so far whose batch admitted no feasible reweighting."""

    def __init__(
        self,
        policy: str | type[CVPOPolicy],
        env: Any,
        *,
        seed: int | None = None,
        verbose: int = 0,
        device: str = "cpu",
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **config: Any,
    ) -> None:
        self.config: CVPOConfig = resolve_config(self.Config, config)
        super().__init__(
            policy,
            env,
            learning_rate=self.config.critic_lr,
            buffer_size=self.config.buffer_size,
            learning_starts=self.config.learning_starts,
            batch_size=self.config.batch_size,
            tau=self.config.tau,
            gamma=self.config.gamma,
            replay_buffer_class=CostReplay,  # type: ignore[arg-type]
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            support_multi_env=True,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
        )
        self.diagnostics: dict[str, float] = {}
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Networks, and whatever of the training state ``load`` has not already put in place."""
        config = self.config
        if (
            not isinstance(self.observation_space, spaces.Box)
            or len(self.action_space.shape or ()) != 1
        ):
            raise ValueError(
                f"env: CVPO needs Box observations and a one-dimensional Box of actions, got {self.observation_space}, "
                f"{self.action_space}"
            )
        self.train_freq = -(-config.steps_per_update // self.n_envs)
        self.gradient_steps = max(1, round(config.updates_per_step * config.steps_per_update))
        self.policy_kwargs = {
            "net_arch": list(config.net_arch),
            "initial_std": config.initial_std,
            "actor_lr": config.actor_lr,
            "critic_lr": config.critic_lr,
            **self.policy_kwargs,
        }
        seed = self.seed
        if self.rng is not None:  # loaded: neither generator nor environments start again
            self.seed = None
        super()._setup_model()
        self.seed = seed
        if self.episode_steps is None:
            spec = self.env.get_attr("spec")[0] if self.env is not None else None
            self.episode_steps = config.episode_steps or (spec and spec.max_episode_steps)
        if self.rng is None:
            self.rng = np.random.default_rng()
        if self.episode_costs is None or len(self.episode_costs.running_NC) != self.n_envs:
            self.episode_costs = EpisodeCosts(self.n_envs, 1)

    def set_random_seed(self, seed: int | None = None) -> None:
        """SB3's, and the agent's own generator (action noise, replay)."""
        super().set_random_seed(seed)
        if seed is not None:
            self.rng = np.random.default_rng(seed)

    def threshold(self) -> float:
        """d: the episodic limit as a threshold on the cost critics (``return_scale`` aside)."""
        assert self.episode_costs is not None
        steps = self.episode_steps or self.episode_costs.mean_length()
        return cost_threshold(self.config.cost_limit, self.config.gamma, steps)

    # ---- collection
    # -------------------------------------------------------------------------------------------------

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """SB3's, with this update's episode costs counted apart."""
        assert self.episode_costs is not None
        if bool(
            np.all(self._last_episode_starts)
        ):  # a reset from outside may have cut episodes short
            self.episode_costs.restart_episodes()
        self.episode_costs.start_update()
        return super().collect_rollouts(*args, **kwargs)

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The policy's own samples from the first step on, so that a run that starts at a backup
        starts safe.
        """
        assert self.rng is not None
        with torch.inference_mode():
            observations = torch.from_numpy(_flat(self._last_obs)).to(self.device)
            mean, std = (t.cpu().numpy() for t in self.policy.actor(observations))
        actions = mean + std * self.rng.standard_normal(mean.shape, dtype=np.float32)
        box: Any = self.action_space
        applied = np.clip(actions, box.low, box.high)
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
        assert self.episode_costs is not None
        costs = read_costs(infos, self.config.cost_keys)
        check_transition(self.num_timesteps, new_obs, reward, costs, dones, infos)
        self.episode_costs.add(costs, dones)
        normaliser = self._vec_normalize_env
        observations, raw_new, rewards = self._last_obs, new_obs, reward
        if normaliser is not None:
            observations, raw_new = self._last_original_obs, normaliser.get_original_obs()
            rewards = normaliser.get_original_reward()
        following = _flat(raw_new).copy()
        terminated = np.array(dones, dtype=np.bool_)
        for i in np.flatnonzero(dones):
            terminal = infos[i]["terminal_observation"]
            following[i] = np.ravel(
                np.asarray(terminal if normaliser is None else normaliser.unnormalize_obs(terminal))
            )
            terminated[i] = not infos[i].get("TimeLimit.truncated", False)
        replay_buffer.add(
            observations=_flat(observations),
            actions=buffer_action,
            rewards=rewards,
            costs=costs[:, 0],
            next_observations=following,
            terminated=terminated,
            ends=dones,
        )
        self._last_obs, self._last_original_obs, self._last_episode_starts = new_obs, raw_new, dones

    # ---- update
    # -----------------------------------------------------------------------------------------------------

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """One update:

        ``gradient_steps`` times critics, E-step, M-step and targets on a fresh batch.
        """
        assert self.episode_costs is not None
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
        self.diagnostics = {name: float(total) / gradient_steps for name, total in sums.items()}
        self.diagnostics |= {
            "episodic_cost": float(episodic_cost[0]),
            "episodes": float(len(self.episode_costs.finished)),
            "recoveries": float(self.recoveries),
            "mean_kl_multiplier": self.mean_multiplier,
            "covariance_kl_multiplier": self.covariance_multiplier,
            "gradient_updates": float(self._n_updates),
        }
        for name, value in self.diagnostics.items():
            self.logger.record(f"train/{name}", value)

    def _critic_step(self, batch_size: int) -> tuple[Tensor, dict[str, float]]:
        """Sample a batch and fit all four critics to n-step targets.

        Returns (observations [B, O], losses).
        """
        assert self.rng is not None
        replay: Any = self.replay_buffer
        normaliser, policy, scale = self._vec_normalize_env, self.policy, self.config.return_scale
        arguments = (batch_size, self.config.n_step, self.config.gamma, self.rng)
        if normaliser is None:
            batch = replay.sample(*arguments)
        else:
            batch = replay.sample(*arguments, normaliser.normalize_reward)
            batch.observations = _flat(normaliser.normalize_obs(batch.observations))
            batch.next_observations = _flat(normaliser.normalize_obs(batch.next_observations))
        observations, actions, rewards, costs, following, discounts = (
            torch.from_numpy(a).to(self.device)
            for a in (
                batch.observations,
                batch.actions,
                batch.rewards,
                batch.costs,
                batch.next_observations,
                batch.discounts,
            )
        )
        with torch.no_grad():
            next_mean, next_std = policy.actor_target(following)
            next_actions = self._clipped(self._samples(next_mean, next_std, 1))
            low_reward, high_cost = self._combined(policy.critics_target(following, next_actions))
            reward_target = scale * rewards + discounts * low_reward[:, 0]
            cost_target = scale * costs + discounts * high_cost[:, 0]
            targets = torch.stack([reward_target, reward_target, cost_target, cost_target])
        losses = policy.critics.regression(observations, actions, targets)
        torch.nn.utils.clip_grad_norm_(policy.critics.parameters(), self.config.max_grad_norm)
        policy.critic_optimizer.step()
        reward_loss, cost_loss = losses.view(2, 2).mean(dim=1).tolist()
        return observations, {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss}

    def _e_step(self, observations: Tensor, actions: Tensor) -> EStep:
        """The best weights of the old policy's samples. actions: [B, K, A]."""
        values = self.policy.critics_target(observations, self._clipped(actions))
        reward, cost = (v.cpu().numpy() for v in self._combined(values))
        return e_step(
            reward, cost, self.config.kl_bound, self.config.return_scale * self.threshold()
        )

    def _m_step(
        self, observations: Tensor, old_mean: Tensor, old_std: Tensor, actions: Tensor, best: EStep
    ) -> dict[str, float]:
        """One gradient step of the actor towards q, mean and covariance held by a KL bound each."""
        config, policy = self.config, self.policy
        weights = torch.from_numpy(best.weights).to(actions)
        mean, std = policy.actor(observations)
        kl_mean, kl_covariance = (
            kl.mean() for kl in gaussian_kl_split(mean, std, old_mean, old_std)
        )
        fit = weighted_nll_split(mean, std, old_mean, old_std, actions, weights)
        loss = fit + self.mean_multiplier * kl_mean + self.covariance_multiplier * kl_covariance
        policy.actor_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            policy.actor_optimizer.param_groups[0]["params"], config.max_grad_norm
        )
        policy.actor_optimizer.step()
        measured = {
            "kl_mean": kl_mean.item(),
            "kl_covariance": kl_covariance.item(),
            "std": std.mean().item(),
        }
        lr, highest = config.m_step_multiplier_lr, config.m_step_multiplier_max
        self.mean_multiplier = projected_ascent(
            self.mean_multiplier, measured["kl_mean"] / config.mean_kl_bound - 1, lr, highest
        )
        self.covariance_multiplier = projected_ascent(
            self.covariance_multiplier,
            measured["kl_covariance"] / config.covariance_kl_bound - 1,
            lr,
            highest,
        )
        finite_excess = (
            best.cost_excess / config.return_scale if np.isfinite(best.cost_excess) else 0.0
        )
        return measured | {
            "kl": measured["kl_mean"] + measured["kl_covariance"],
            "multiplier": best.lam,
            "eta": best.eta,
            "e_step_kl": best.kl,
            "cost_value_excess": finite_excess,
            "kkt_residual": best.kkt_residual,
            "dual_iterations": best.iterations,
            "recovery_share": float(best.recovery),
            "effective_sample_size": best.effective_sample_size(),
        }

    def _combined(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """All critics' values [4, ...] -> (lowest reward value, highest or mean cost value), each
        [...].
        """
        cost = values[N_REWARD_CRITICS:]
        return values[:N_REWARD_CRITICS].amin(dim=0), cost.amax(
            dim=0
        ) if self.config.pessimistic_cost else cost.mean(dim=0)

    def _samples(self, mean: Tensor, std: Tensor, k: int) -> Tensor:
        """[B, k, A] draws; the noise comes from the agent's own generator, which ``save`` keeps."""
        assert self.rng is not None
        noise = self.rng.standard_normal((len(mean), k, mean.shape[1]), dtype=np.float32)
        return mean.unsqueeze(1) + std.unsqueeze(1) * torch.from_numpy(noise).to(self.device)

    def _clipped(self, actions: Tensor) -> Tensor:
        """As the environment applies them: critics never see an action outside the action space."""
        actor = self.policy.actor
        return torch.clamp(
            actions, actor.centre - actor.half_range, actor.centre + actor.half_range
        )

    # ---- saving
    # -----------------------------------------------------------------------------------------------------

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.actor_optimizer", "policy.critic_optimizer", "replay_buffer"], []

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """SB3's zip file; also holds the replay buffer, multipliers, generator and ``VecNormalize``
        statistics.
        """
        self.normalisation = normalisation_state(self._vec_normalize_env)
        super().save(path, *args, **kwargs)

    @classmethod
    def load(
        cls, path: Any, env: Any = None, device: Any = "cpu", *args: Any, **kwargs: Any
    ) -> Any:
        """As SB3's; an ``env`` wrapped in ``VecNormalize`` gets the saved statistics back."""
        agent = super().load(path, env, device, *args, **kwargs)
        restore_normalisation(agent._vec_normalize_env, agent.normalisation)
        return agent


def _flat(observations: Any) -> NDArray[np.float32]:
    return np.asarray(observations, np.float32).reshape(len(observations), -1)
