"""What the on-policy agents share: collecting data with costs, advantages, fitting critics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from threadpoolctl import threadpool_limits
from torch import nn

from scpo_bench.baselines.actors import Actor, actor_of
from scpo_bench.baselines.constrained import ConstrainedAlgorithm, flat
from scpo_bench.baselines.networks import Adam, Array, Mlp, sequential_layers
from scpo_bench.baselines.rollout import Batch, Rollout
from scpo_bench.configuration import Range, SearchSpace, require
from scpo_bench.contract import check_transition, read_costs
from scpo_bench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Fields common to the on-policy agents.

    Defaults as in OmniSafe 0.5.0, configs/on-policy/PPOLag.yaml, but for those marked "ours".
    """

    search_space: ClassVar[SearchSpace] = {
        "critic_lr": Range(3e-4, 3e-3, log=True),
        "initial_log_std": Range(-3.0, -1.0),
        "target_kl": Range(2e-3, 5e-2, log=True),
    }

    cost_limit: float | tuple[float, ...] = 25.0
    """Limit on an episode's undiscounted cost, >= 0 or infinite; one per entry of ``cost_keys``."""
    cost_keys: tuple[str, ...] = ("cost",)
    """Keys of ``info`` the costs are read from, one per constraint."""
    steps_per_update: int = 20_000
    """Environment steps collected per update, all environments together, >= 1.

    Rounded up to a multiple of the number of environments.
    """
    gamma: float = 0.99
    """Discount of rewards per step, in [0, 1]."""
    gae_lambda: float = 0.95
    """GAE lambda of rewards, in [0, 1]."""
    cost_gamma: float = 0.99
    """Discount of costs per step, in [0, 1]."""
    cost_gae_lambda: float = 0.95
    """GAE lambda of costs, in [0, 1]."""
    critic_lr: float = 3e-4
    """Adam step size of reward and cost critics, > 0; constant."""
    critic_l2: float = 1e-3
    """Weight of the squared norm of each critic's parameters in its loss, >= 0."""
    critic_passes: int = 40
    """Passes over an update's data when fitting the critics, >= 1."""
    batch_size: int = 64
    """Steps per minibatch, >= 1."""
    max_grad_norm: float = 40.0
    """Each network's gradient is cut to this norm, > 0."""
    target_kl: float = 0.02
    """KL(old || new), mean over states, summed over action dimensions, > 0."""
    initial_log_std: float = 0.0
    """Log standard deviation of a Gaussian policy (``Box`` actions) at the start.

    The deviation is in half ranges of the action space, each action's own: OmniSafe scales actions
    to [-1, 1]. A ``log_std_init`` in ``policy_kwargs`` goes first, and is in action units.
    """
    return_scale: float = 1.0
    """Critics predict returns times this, > 0: small where episodes return thousands (ours).

    The advantages, and with them the policy, are in the returns' own unit.
    """

    def __post_init__(self) -> None:
        name, keys, limits = type(self).__name__, self.cost_keys, self.limits()
        if not keys or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{name}.cost_keys: expected a non-empty list of names, got {keys!r}")
        if len(limits) != len(keys) or not (limits >= 0).all():
            raise UserError(
                f"{name}.cost_limit: expected {len(keys)} number(s) >= 0, one per entry of "
                f"cost_keys, got {self.cost_limit!r}"
            )
        for field in ("steps_per_update", "critic_passes", "batch_size"):
            require(self, field, low=1)
        for field in ("gamma", "gae_lambda", "cost_gamma", "cost_gae_lambda"):
            require(self, field, low=0, high=1)
        for field in ("critic_lr", "max_grad_norm", "target_kl", "return_scale"):
            require(self, field, above=0)
        require(self, "critic_l2", low=0)

    def limits(self) -> NDArray[np.float64]:
        """Cost limits as an array [C]."""
        return np.atleast_1d(np.asarray(self.cost_limit, dtype=np.float64))

    def key_suffixes(self) -> list[str]:
        """What tells the diagnostics of several costs apart; nothing where there is one."""
        return [""] if len(self.cost_keys) == 1 else [f"_{key}" for key in self.cost_keys]


class ConstrainedOnPolicy(ConstrainedAlgorithm, OnPolicyAlgorithm):
    """Collection, advantages and critics; a subclass adds ``Config`` and ``train``.

    policy: "MlpPolicy" or a subclass of SB3's ``ActorCriticPolicy`` on flat observations with tanh
    or ReLU layers. The policy's own value network is the reward critic; ``cost_critics`` (same
    shape) belong to the agent.
    env: anything SB3 takes; ``info`` must hold the costs at every step.
    config, and errors: see ``ConstrainedAlgorithm``.
    Runs on the CPU: at these network sizes an accelerator is slower.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ActorCriticPolicy}
    config: OnPolicyConfig
    optimizers: dict[str, Adam]
    rollout_buffer: Rollout  # type: ignore[assignment]

    def _sb3_arguments(self, device: str) -> dict[str, Any]:
        if str(device) not in ("cpu", "auto"):
            raise UserError(f"device: {type(self).__name__} runs on 'cpu', got {device!r}")
        return {
            "device": "cpu",
            "learning_rate": self.config.critic_lr,
            "n_steps": 1,
            "gamma": self.config.gamma,
            "gae_lambda": self.config.gae_lambda,
            "ent_coef": 0.0,
            "vf_coef": 0.5,
            "max_grad_norm": self.config.max_grad_norm,
            "use_sde": False,
            "sde_sample_freq": -1,
            "rollout_buffer_class": Rollout,
            "rollout_buffer_kwargs": {"n_costs": len(self.config.cost_keys)},
            "_init_setup_model": False,
            "supported_action_spaces": (spaces.Box, spaces.Discrete),
        }

    def _setup_model(self) -> None:
        self.n_steps = -(-self.config.steps_per_update // self.n_envs)
        super()._setup_model()
        actor = actor_of(self.policy)
        space = self.action_space
        if isinstance(space, spaces.Box) and "log_std_init" not in self.policy_kwargs:
            half_range = torch.from_numpy((space.high - space.low) / 2)
            self.policy.log_std.data[:] = half_range.log() + self.config.initial_log_std
        value_layers, _ = self._value_layers()
        shapes = [(layer.in_features, layer.out_features) for layer in value_layers]
        # The activations between the layers are applied by Mlp.
        self.cost_critics = nn.ModuleList(
            nn.Sequential(*(nn.Linear(*shape) for shape in shapes)) for _ in self.config.cost_keys
        )
        for module in self.cost_critics.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, np.sqrt(2) if module.out_features > 1 else 1.0)
                nn.init.zeros_(module.bias)
        if not hasattr(self, "optimizers"):
            self.optimizers = {"actor": Adam(actor.mlp.theta.size)}
            self.optimizers |= {
                f"critic_{i}": Adam(c.theta.size) for i, c in enumerate(self._critics())
            }

    def _value_layers(self) -> tuple[list[nn.Linear], str]:
        """Layers and activation of the policy's value network."""
        extractor: Any = self.policy.mlp_extractor
        # A policy with a backup wraps SB3's extractor.
        extractor = getattr(extractor, "extractor", extractor)
        return sequential_layers(extractor.value_net, self.policy.value_net)

    def _critics(self) -> list[Mlp]:
        """Reward critic, then cost critics, as copies of their torch parameters."""
        layers, activation = self._value_layers()
        cost_layers = [
            [m for m in critic.modules() if isinstance(m, nn.Linear)]
            for critic in self.cost_critics
        ]
        return [Mlp(linears, activation) for linears in [layers, *cost_layers]]

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        """As SB3's, with one BLAS thread: at minibatches of 64, more take several times as long."""
        with threadpool_limits(limits=1):
            return super().learn(*args, **kwargs)

    # ---- collection ----

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """Fill ``rollout_buffer`` with n_rollout_steps of every environment.

        Values are computed later, for all steps at once.
        """
        assert self._last_obs is not None
        rollout: Rollout = rollout_buffer
        rollout.reset()
        actor, space = actor_of(self.policy), self.action_space
        self._start_update(self._last_episode_starts)
        callback.on_rollout_start()
        for t in range(n_rollout_steps):
            observations = flat(self._last_obs)
            actions = actor.sample(actor.head(observations), self.rng)
            applied = actions
            if isinstance(space, spaces.Box):
                applied = np.clip(actions, space.low, space.high)
            new_obs, rewards, dones, infos = env.step(applied)
            self.num_timesteps += env.num_envs
            costs = read_costs(infos, self.config.cost_keys)
            check_transition(self.num_timesteps, new_obs, rewards, costs, dones, infos)  # type: ignore[arg-type]
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            self.episode_costs.add(costs, dones)
            rollout.store(t, observations, actions, rewards, costs, dones, infos)
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    # ---- update ----

    def _batch(self, actor: Actor, critics: list[Mlp]) -> Batch:
        """The collected data with advantages and critic targets."""
        config, rollout = self.config, self.rollout_buffer
        n_costs = len(config.cost_keys)
        advantages, returns = rollout.advantages_and_returns(
            critics,
            flat(self._last_obs),
            [config.gamma] + [config.cost_gamma] * n_costs,
            [config.gae_lambda] + [config.cost_gae_lambda] * n_costs,
            config.return_scale,
        )
        size = rollout.ends.size
        observations = rollout.observations.reshape(size, -1)
        return Batch(
            observations,
            rollout.actions.reshape(size, *rollout.actions.shape[2:]),
            actor.offset(observations),
            advantages.reshape(1 + n_costs, size).astype(np.float32),
            returns.reshape(1 + n_costs, size).astype(np.float32),
        )

    def _minibatches(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Index arrays that cover 0..size-1 once, in random order."""
        order, step = self.rng.permutation(size), self.config.batch_size
        yield from (order[start : start + step] for start in range(0, size, step))

    def _critic_step(self, critics: list[Mlp], observations: Array, returns: Array) -> list[float]:
        """One Adam step of each critic on mean (V - return)^2 + l2 |theta|^2.

        observations: [b, O]; returns: [1 + C, b]. Gives the mean squared errors.
        """
        config, errors = self.config, []
        for i, critic in enumerate(critics):
            error = critic.forward(observations)[:, 0] - returns[i]
            critic.backward((error * (2.0 / len(error)))[:, None])
            if config.critic_l2 > 0:
                critic.grad += (2 * config.critic_l2) * critic.theta
            self.optimizers[f"critic_{i}"].update(
                critic.theta, critic.grad, config.critic_lr, config.max_grad_norm
            )
            errors.append(float(error @ error) / len(error))
        return errors

    def _finish(self, actor: Actor, critics: list[Mlp], diagnostics: dict[str, float]) -> None:
        """Write the networks back into the torch policy and publish this update's numbers."""
        for network in [actor.mlp, *critics]:
            network.write_back()
        self._n_updates += 1
        self._publish(diagnostics)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "cost_critics"], []
