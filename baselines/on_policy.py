"""What PPO-Lagrangian and CPO share: collecting one update's data with costs, their advantages, and
fitting critics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from threadpoolctl import threadpool_limits
from torch import nn

from scpo_bench.advantages import generalised_advantages, next_values
from scpo_bench.baselines.actors import Actor, actor_of
from scpo_bench.baselines.episode_costs import EpisodeCosts
from scpo_bench.baselines.networks import Adam, Array, Mlp, sequential_layers
from scpo_bench.baselines.normalisation import normalisation_state, restore_normalisation
from scpo_bench.configuration import require, resolve_config
from scpo_bench.contract import check_transition, read_costs


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Fields common to the on-policy agents.

    Defaults: OmniSafe 0.5.0's, which its published table uses.
    """

    cost_limit: float | tuple[float, ...] = 25.0
    """Limit on the undiscounted cost of an episode, >= 0 or infinite; one number per entry of
    ``cost_keys``.
    """
    cost_keys: tuple[str, ...] = ("cost",)
    """Keys of ``info`` the costs are read from, one per constraint."""
    steps_per_update: int = 20_000
    """Environment steps collected per update, all environments together (rounded up to a multiple
    of their number).
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
    """KL(old || new), mean over states, summed over action dimensions, > 0.

    How it is kept is the agent's affair.
    """
    initial_log_std: float = 0.0
    """Log standard deviation of a Gaussian policy at the start, in action units (``Box`` actions
    only).
    """
    return_scale: float = 1.0
    """Critics predict returns times this, > 0: small where episodes return thousands (the policy
    does not see it).
    """

    def __post_init__(self) -> None:
        if not self.cost_keys or not all(isinstance(key, str) for key in self.cost_keys):
            raise ValueError(
                f"{type(self).__name__}.cost_keys: expected a non-empty list of names, got {self.cost_keys!r}"
            )
        limits = self.limits()
        if len(limits) != len(self.cost_keys) or not (limits >= 0).all():
            raise ValueError(
                f"{type(self).__name__}.cost_limit: expected {len(self.cost_keys)} number(s) >= 0, one per entry of "
                f"cost_keys, got {self.cost_limit!r}"
            )
        for name in ("steps_per_update", "critic_passes", "batch_size"):
            require(self, name, low=1)
        for name in ("gamma", "gae_lambda", "cost_gamma", "cost_gae_lambda"):
            require(self, name, low=0, high=1)
        for name in ("critic_lr", "max_grad_norm", "target_kl", "return_scale"):
            require(self, name, above=0)
        require(self, "critic_l2", low=0)

    def limits(self) -> NDArray[np.float64]:
        """Cost limits as an array [C]."""
        return np.atleast_1d(np.asarray(self.cost_limit, dtype=np.float64))


class Rollout:
    """One update's data:

    T steps of N environments. Signal 0 is the reward, signals 1..C are the costs.

    The constructor's signature is what Stable-Baselines3 calls a ``rollout_buffer_class`` with.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: Any,
        action_space: Any,
        device: Any = None,
        gae_lambda: float = 1.0,
        gamma: float = 1.0,
        n_envs: int = 1,
        n_costs: int = 1,
    ) -> None:
        shape = (buffer_size, n_envs)
        discrete = isinstance(action_space, spaces.Discrete)
        self.observations = np.zeros((*shape, int(np.prod(observation_space.shape))), np.float32)
        self.actions = (
            np.zeros(shape, np.int64)
            if discrete
            else np.zeros((*shape, *action_space.shape), np.float32)
        )
        self.signals = np.zeros((1 + n_costs, *shape))
        self.ends = np.zeros(shape, np.bool_)
        self.reset()

    def reset(self) -> None:
        self.truncated_at: list[tuple[int, int]] = []
        self.truncated_observations: list[Array] = []


@dataclass
class Batch:
    """What an update learns from, flattened to B = T*N steps."""

    observations: Array
    """[B, O]"""
    actions: NDArray[Any]
    """[B, A], as sampled (before clipping to the action space), or [B] integers."""
    offset: Array | float
    """The backup's actions [B, A], or 0."""
    advantages: Array
    """[1 + C, B], of the reward and of each cost, unnormalised."""
    returns: Array
    """[1 + C, B], the critics' targets (times ``return_scale``)."""


class ConstrainedOnPolicy(OnPolicyAlgorithm):
    """Collection, advantages and critics; a subclass adds ``Config`` and ``train``.

    policy: "MlpPolicy" or a subclass of SB3's ``ActorCriticPolicy`` on flat observations with tanh
    or ReLU layers. The policy's own value network is the reward critic; ``cost_critics`` (same
    shape) belong to the agent.
    env: anything SB3 takes; ``info`` must hold the costs at every step.
    config: fields of ``Config``. Raises ValueError for unknown or out-of-range fields. ``learn``
    raises KeyError for a missing cost, and FloatingPointError (naming step, environment and field)
    for a non-finite observation, reward or cost.
    Runs on the CPU: at these network sizes an accelerator is slower.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": ActorCriticPolicy}
    Config: ClassVar[type[OnPolicyConfig]] = OnPolicyConfig
    config: Any  # an instance of Config: each subclass narrows it

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
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
        self.config = resolve_config(self.Config, config)
        if str(device) not in ("cpu", "auto"):
            raise ValueError(f"device: {type(self).__name__} runs on 'cpu', got {device!r}")
        super().__init__(
            policy,
            env,
            learning_rate=self.config.critic_lr,
            n_steps=1,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
            ent_coef=0.0,
            vf_coef=0.5,
            max_grad_norm=self.config.max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=Rollout,  # type: ignore[arg-type]
            rollout_buffer_kwargs={"n_costs": len(self.config.cost_keys)},
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device="cpu",
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete),
        )
        self.diagnostics: dict[str, float] = {}
        self.rng: np.random.Generator | None = None
        self.optimizers: dict[str, Adam] = {}
        self.episode_costs: EpisodeCosts | None = None
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Networks, and whatever of the training state ``load`` has not already put in place."""
        self.n_steps = -(-self.config.steps_per_update // self.n_envs)
        self.policy_kwargs = {"log_std_init": self.config.initial_log_std, **self.policy_kwargs}
        seed = self.seed
        if self.rng is not None:  # loaded: neither generator nor environments start again
            self.seed = None
        super()._setup_model()
        self.seed = seed
        actor = actor_of(self.policy)
        value_layers, _ = self._value_layers()
        self.cost_critics = nn.ModuleList(
            nn.Sequential(
                *[nn.Linear(layer.in_features, layer.out_features) for layer in value_layers]
            )
            for _ in self.config.cost_keys
        )  # the activations between the layers are applied by Mlp
        for module in self.cost_critics.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, np.sqrt(2) if module.out_features > 1 else 1.0)
                nn.init.zeros_(module.bias)
        if self.rng is None:
            self.rng = np.random.default_rng()
        if not self.optimizers:
            self.optimizers = {"actor": Adam(actor.mlp.theta.size)}
            self.optimizers |= {
                f"critic_{i}": Adam(c.theta.size) for i, c in enumerate(self._critics())
            }
        if self.episode_costs is None or len(self.episode_costs.running_NC) != self.n_envs:
            self.episode_costs = EpisodeCosts(self.n_envs, len(self.config.cost_keys))

    def _value_layers(self) -> tuple[list[nn.Linear], str]:
        extractor: Any = self.policy.mlp_extractor
        extractor = getattr(
            extractor, "extractor", extractor
        )  # a policy with a backup wraps SB3's extractor
        return sequential_layers(extractor.value_net, self.policy.value_net)

    def _critics(self) -> list[Mlp]:
        """Reward critic, then cost critics, as copies of their torch parameters."""
        layers, activation = self._value_layers()
        cost_layers = [
            [m for m in critic.modules() if isinstance(m, nn.Linear)]
            for critic in self.cost_critics
        ]
        return [Mlp(linears, activation) for linears in [layers, *cost_layers]]

    def set_random_seed(self, seed: int | None = None) -> None:
        """SB3's, and the agent's own generator (action noise, minibatches)."""
        super().set_random_seed(seed)
        if seed is not None:
            self.rng = np.random.default_rng(seed)

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        """As SB3's. One BLAS thread: at minibatches of 64 more threads take several times as long.
        """
        with threadpool_limits(limits=1):
            return super().learn(*args, **kwargs)

    # ---- collection
    # -------------------------------------------------------------------------------------------------

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """Fill ``rollout_buffer`` with n_rollout_steps of every environment.

        Values are computed later, in one go.
        """
        assert self._last_obs is not None
        assert self.rng is not None
        assert self.episode_costs is not None
        rollout: Rollout = rollout_buffer
        rollout.reset()
        actor = actor_of(self.policy)
        costs_of, space = self.episode_costs, self.action_space
        if np.all(self._last_episode_starts):  # a reset from outside may have cut episodes short
            costs_of.restart_episodes()
        costs_of.start_update()
        callback.on_rollout_start()
        for t in range(n_rollout_steps):
            observations = self._flat(self._last_obs)
            actions = actor.sample(actor.head(observations), self.rng)
            applied = (
                np.clip(actions, space.low, space.high)
                if isinstance(space, spaces.Box)
                else actions
            )
            new_obs, rewards, dones, infos = env.step(applied)
            self.num_timesteps += env.num_envs
            costs = read_costs(infos, self.config.cost_keys)
            check_transition(self.num_timesteps, new_obs, rewards, costs, dones, infos)  # type: ignore[arg-type]
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            costs_of.add(costs, dones)
            rollout.observations[t], rollout.actions[t] = observations, actions
            rollout.signals[0, t], rollout.signals[1:, t], rollout.ends[t] = rewards, costs.T, dones
            for i in np.flatnonzero(dones):
                if infos[i].get("TimeLimit.truncated", False):
                    rollout.truncated_at.append((t, int(i)))
                    rollout.truncated_observations.append(
                        self._flat(infos[i]["terminal_observation"][None])[0]
                    )
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    @staticmethod
    def _flat(observations: Any) -> Array:
        return np.asarray(observations, np.float32).reshape(len(observations), -1)

    # ---- what an update learns from
    # ---------------------------------------------------------------------------------

    def _batch(self, actor: Actor, critics: list[Mlp]) -> Batch:
        rollout: Any = self.rollout_buffer
        scale, (T, N) = self.config.return_scale, rollout.ends.shape
        observations = rollout.observations.reshape(T * N, -1)
        last = self._flat(self._last_obs)
        values = (
            np.stack([critic.forward(observations).reshape(T, N) for critic in critics]) / scale
        )
        last_values = np.stack([critic.forward(last)[:, 0] for critic in critics]) / scale
        end_values = np.zeros_like(values)
        if rollout.truncated_at:
            rows, columns = np.array(rollout.truncated_at).T
            at_truncation = np.stack(rollout.truncated_observations)
            end_values[:, rows, columns] = (
                np.stack([c.forward(at_truncation)[:, 0] for c in critics]) / scale
            )
        n_costs = len(self.config.cost_keys)
        advantages = generalised_advantages(
            rollout.signals,
            values,
            next_values(values, last_values, rollout.ends, end_values),
            rollout.ends,
            [self.config.gamma] + [self.config.cost_gamma] * n_costs,
            [self.config.gae_lambda] + [self.config.cost_gae_lambda] * n_costs,
        )
        returns = (advantages + values) * scale
        actions = rollout.actions.reshape(T * N, *rollout.actions.shape[2:])
        flat = (1 + n_costs, T * N)
        return Batch(
            observations,
            actions,
            actor.offset(observations),
            advantages.reshape(flat).astype(np.float32),
            returns.reshape(flat).astype(np.float32),
        )

    def _minibatches(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Index arrays that cover 0..size-1 once, in random order."""
        assert self.rng is not None
        order = self.rng.permutation(size)
        yield from (
            order[start : start + self.config.batch_size]
            for start in range(0, size, self.config.batch_size)
        )

    def _critic_step(self, critics: list[Mlp], observations: Array, returns: Array) -> list[float]:
        """One Adam step of each critic on mean (V - return)^2 + l2 |theta|^2; gives the errors.
        returns: [1 + C, b].
        """
        errors = []
        for i, critic in enumerate(critics):
            error = critic.forward(observations)[:, 0] - returns[i]
            critic.backward((error * (2.0 / len(error)))[:, None])
            if self.config.critic_l2 > 0:
                critic.grad += (2 * self.config.critic_l2) * critic.theta
            self.optimizers[f"critic_{i}"].update(
                critic.theta, critic.grad, self.config.critic_lr, self.config.max_grad_norm
            )
            errors.append(float(error @ error) / len(error))
        return errors

    def _finish(self, actor: Actor, critics: list[Mlp], diagnostics: dict[str, float]) -> None:
        """Write the networks back into the torch policy and publish this update's numbers."""
        for network in [actor.mlp, *critics]:
            network.write_back()
        self._n_updates += 1
        self.diagnostics = {name: float(value) for name, value in diagnostics.items()}
        for name, value in self.diagnostics.items():
            self.logger.record(f"train/{name}", value)

    # ---- saving
    # -----------------------------------------------------------------------------------------------------

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "cost_critics"], []

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """SB3's zip file; also holds optimiser states, multipliers, generators and ``VecNormalize``
        statistics.
        """
        self.normalisation = normalisation_state(self._vec_normalize_env)
        super().save(path, *args, **kwargs)

    @classmethod
    def load(
        cls, path: Any, env: Any = None, device: Any = "cpu", *args: Any, **kwargs: Any
    ) -> Any:
        """As SB3's; an ``env`` wrapped in ``VecNormalize`` gets the saved statistics back.

        ``force_reset=False`` keeps the last observation: for an env that is itself in the state it
        was saved in.
        """
        agent = super().load(path, env, device, *args, **kwargs)
        restore_normalisation(agent._vec_normalize_env, agent.normalisation)
        return agent


def flat_gradient(actor: Actor, head: Array, actions: NDArray[Any], weights: Array) -> Array:
    """sum_b weights_b grad log pi(a_b | s_b), a copy [P]."""
    actor.backward(head, actions, weights)
    return actor.mlp.grad.copy()
