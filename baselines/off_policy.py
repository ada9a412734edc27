"""What CVPO and SAC-Lagrangian share: collecting transitions with costs, and fitting critics."""

from __future__ import annotations

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
from scpo_bench.baselines.off_policy_networks import N_REWARD_CRITICS, GaussianPolicy
from scpo_bench.baselines.replay import CostReplay
from scpo_bench.configuration import Range, SearchSpace, require
from scpo_bench.contract import check_transition, read_costs
from scpo_bench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig:
    """Fields common to the off-policy agents.

    Defaults are those of FSRL 0.1.0's ``TrainCfg`` (fsrl/config/cvpo_cfg.py; all but buffer_size
    are the same in sacl_cfg.py), except where a field names another source or is marked "ours".
    """

    search_space: ClassVar[SearchSpace] = {
        "actor_lr": Range(1e-4, 3e-3, log=True),
        "critic_lr": Range(3e-4, 3e-3, log=True),
        "initial_std": Range(0.05, 0.5, log=True),
        "pessimistic_cost": (True, False),
    }

    cost_limit: float = 25.0
    """Limit on the undiscounted cost of an episode, >= 0 or infinite.

    FSRL 0.1.0, ``MujocoBaseCfg``.
    """
    cost_keys: tuple[str, ...] = ("cost",)
    """Key of ``info`` the cost is read from; exactly one."""
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
    n_step: int = 2
    """Steps per return, >= 1."""
    gamma: float = 0.99
    """Discount per step of rewards and costs, in [0, 1).

    FSRL 0.1.0, the default of fsrl/policy/cvpo.py and sac_lag.py; its ``TrainCfg`` has 0.97 and
    its Safety-Gymnasium configurations 0.98 to 0.995, by task.
    """
    actor_lr: float = 5e-4
    """Adam step size of the actor, > 0."""
    critic_lr: float = 1e-3
    """Adam step size of the critics, > 0."""
    pessimistic_cost: bool = False
    """Whether the higher of the two cost critics is used, for targets and policy, or their mean.

    The higher errs on the safe side by as much as the two disagree: with a small limit, or a
    discount close to 1, that can be the whole limit, and CVPO then does nothing but recover. Ours:
    FSRL 0.1.0 has one critic of each kind for CVPO, and the lower of two for SAC.
    """
    tau: float = 0.05
    """Share by which target critics move towards the critics per gradient update, in (0, 1]."""
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
                f"{type(self).__name__}.cost_keys: the off-policy agents take one constraint, got "
                f"{self.cost_keys} with limit {self.cost_limit}; 'ppo-lagrangian' takes several"
            )
        for name in ("steps_per_update", "batch_size", "buffer_size", "n_step"):
            require(self, name, low=1)
        for name in ("updates_per_step", "actor_lr", "critic_lr", "max_grad_norm", "return_scale"):
            require(self, name, above=0)
        for name in ("cost_limit", "learning_starts"):
            require(self, name, low=0)
        require(self, "gamma", low=0, high=0.99999)
        require(self, "tau", above=0, high=1)
        require(self, "initial_std", above=0.001, high=10)


class ConstrainedOffPolicy(ConstrainedAlgorithm, OffPolicyAlgorithm):
    """Collection, replay and critics with one constraint; a subclass adds ``Config`` and ``train``.

    policy: "MlpPolicy" or a subclass of ``GaussianPolicy`` (see there for ``backup``).
    env: anything SB3 takes, with Box observations and a one-dimensional Box of actions; ``info``
    must hold the cost.
    config, and errors: see ``ConstrainedAlgorithm``.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": GaussianPolicy}
    config: OffPolicyConfig
    policy: GaussianPolicy
    replay_buffer: CostReplay  # type: ignore[assignment]

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
            name, needed = (
                type(self).__name__,
                "Box observations and a one-dimensional Box of actions",
            )
            raise UserError(f"env: {name} needs {needed}, got {observed}, {acted}")
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

    def _critic_step(
        self, batch_size: int, temperature: float = 0.0
    ) -> tuple[Tensor, dict[str, float]]:
        """Sample a batch and take one step of all four critics towards n-step targets.

        The next actions are the present actor's (as in FSRL 0.1.0, fsrl/policy/cvpo.py and
        sac_lag.py), their values the target critics'. temperature: weight of the entropy in the
        next state, which SAC adds to the reward's target. Returns (observations [B, O], losses).
        """
        config, policy, scale = self.config, self.policy, self.config.return_scale
        batch = self.replay_buffer.sample(
            batch_size, config.n_step, config.gamma, self.rng, self._vec_normalize_env
        )
        observations, actions, rewards, costs, following, discounts = batch.tensors(self.device)
        with torch.no_grad():
            next_mean, next_std = policy.actor(following)
            next_actions = self._clipped(self._samples(next_mean, next_std, 1))
            low_reward, high_cost = self._combined(policy.critics_target(following, next_actions))
            next_reward = low_reward[:, 0]
            if temperature > 0:
                next_reward = next_reward + temperature * policy.actor.entropy(next_std)
            reward_target = scale * rewards + discounts * next_reward
            cost_target = scale * costs + discounts * high_cost[:, 0]
            targets = torch.stack([reward_target, reward_target, cost_target, cost_target])
        losses = policy.critics.regression(observations, actions, targets)
        torch.nn.utils.clip_grad_norm_(policy.critics.parameters(), config.max_grad_norm)
        policy.critic_optimizer.step()
        reward_loss, cost_loss = losses.view(2, 2).mean(dim=1).tolist()
        return observations, {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss}

    def _actor_step(self, loss: Tensor) -> None:
        """One Adam step of the actor down the gradient of ``loss``."""
        self.policy.actor_optimizer.zero_grad()
        loss.backward()
        trained = self.policy.actor_optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        self.policy.actor_optimizer.step()

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
