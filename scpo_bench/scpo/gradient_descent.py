"""Gradient descent on a supervised loss: SCPO's proposals and, unprojected, agent ``sgd``.

One update: interact with the deployed policy, add the observed labels (``info["expert_action"]``)
to the data, let a torch optimiser propose a change of the parameters, deploy it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import safe_mean
from torch import nn

from scpo_bench.configuration import Range, SearchSpace, require, require_choice, resolve_config
from scpo_bench.contract import Floats, task_of
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy
from scpo_bench.scpo.spaces import ActorWeights, LastLayer, SpaceName, make_space

Labels = Literal["starts", "visited"]


@dataclass(frozen=True)
class GradientDescentConfig:
    """Defaults of agent ``sgd``, and of SCPO's proposals."""

    search_space: ClassVar[SearchSpace] = {"learning_rate": Range(0.03, 0.6, log=True)}

    n_steps: int = 30
    """Steps per environment between two updates."""
    labels: Labels = "starts"
    """Which labels are fitted: those at episode starts (a demonstration set that does not depend on
    the policy), or all of them.
    """
    buffer_size: int = 4096
    """Labels kept; the oldest are dropped first."""
    optimizer: str = "SGD"
    """Name of a class in torch.optim."""
    learning_rate: float = 0.1
    """Step size of that optimiser.

    In a whitened last layer the loss is a paraboloid of curvature 2 and 0.5 is a Newton step.
    """
    gradient_steps: int = 1
    """Optimiser steps per proposal."""
    space: SpaceName = "last_layer"
    """Which weights may change: last_layer (whitened), low_rank (adapters), all."""
    rank: int = 4
    """Rank of the adapters, for space low_rank."""
    features: int = 64
    """Width of the hidden layer."""
    feature_scale: float = 2.0
    """Standard deviation of the hidden layer's initial weights: how sharply features vary over the
    state.
    """
    feature_bias: float | None = None
    """Standard deviation of its initial biases: with ``feature_scale``, how far from the origin
    features still vary. None: half of feature_scale.
    """

    def __post_init__(self) -> None:
        for name in ("n_steps", "buffer_size", "gradient_steps", "rank", "features"):
            require(self, name, low=1)
        for name in ("learning_rate", "feature_scale"):
            require(self, name, above=0)
        if self.feature_bias is not None:
            require(self, "feature_bias", low=0)
        require_choice(self, "labels", get_args(Labels))
        require_choice(self, "space", get_args(SpaceName))
        optimizer = getattr(torch.optim, str(self.optimizer), None)
        if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
            raise UserError(
                f"{type(self).__name__}.optimizer: expected a class of torch.optim such as 'SGD', "
                f"got {self.optimizer!r}"
            )


class GradientDescent(BaseAlgorithm):
    """Supervised gradient descent as an SB3 algorithm.

    ``GradientDescent("MlpPolicy", env, policy_kwargs={"backup": module}, learning_rate=0.2)``.
    Needs an environment that labels its observations in ``info["expert_action"]``, on reset too.
    Raises UserError for unknown or ill-typed configuration fields and for an environment without
    labels.
    """

    Config: ClassVar[type[GradientDescentConfig]] = GradientDescentConfig
    policy_aliases: ClassVar[dict[str, Any]] = {"MlpPolicy": BackupActorCriticPolicy}

    def __init__(
        self,
        policy: Any,
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
        super().__init__(
            policy,
            env,
            learning_rate=self.config.learning_rate,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            tensorboard_log=tensorboard_log,
            support_multi_env=True,
        )
        self.diagnostics: dict[str, float] = {}
        self.w: Floats = np.zeros(0)
        # Observations [n, obs_dim] and labels [n, action_dim], oldest first.
        self._data: tuple[NDArray[Any], NDArray[Any]] | None = None
        self._reference: NDArray[Any] | None = None
        self._optimizer_state: dict[str, Any] | None = None
        self._space: LastLayer | ActorWeights | None = None
        self.rng = np.random.default_rng(np.random.SeedSequence(seed))
        if _init_setup_model:
            self._setup_model()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_space"]

    def _setup_model(self) -> None:
        self.set_random_seed(self.seed)
        observation_dim = self.observation_space.shape[0]  # type: ignore[index]
        kwargs = {
            "net_arch": {"pi": [self.config.features], "vf": []},
            "ortho_init": False,
            # Without a backup the start policy is zero action everywhere; whether that is safe is
            # for the constraints to say.
            "backup": AffineBackup(np.zeros((self.action_space.shape[0], observation_dim))),  # type: ignore[index]
            **self.policy_kwargs,
        }
        policy = BackupActorCriticPolicy(
            self.observation_space, self.action_space, lambda _: 0.0, **kwargs
        )
        self.policy = policy.to(self.device)
        scale, bias = self.config.feature_scale, self.config.feature_bias
        with torch.no_grad():
            for layer in policy.mlp_extractor.extractor.policy_net:  # type: ignore[union-attr]
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0.0, scale / np.sqrt(layer.in_features / observation_dim))
                    layer.bias.normal_(0.0, scale / 2 if bias is None else bias)

    @property
    def space(self) -> LastLayer | ActorWeights:
        """Built on first use from the policy as it then is: after loading, from the loaded one."""
        if self._space is None:
            policy: Any = self.policy
            self._space = make_space(
                self.config.space, policy, self._reference_observations(), self.config.rank
            )
            if len(self.w) == 0:
                self.w = np.zeros(self._space.dimension)
        return self._space

    def _reference_observations(self) -> torch.Tensor:
        """Observations [n, obs_dim] over which a step's effect on the actions is measured."""
        if self._reference is None:
            task = task_of(self.env)
            # A batched task says where its episodes start; elsewhere the labelled observations have
            # to do.
            if task is not None:
                self._reference = np.stack(task.reference_states(1024), axis=-1)
            else:
                assert self._data is not None
                self._reference = self._data[0].copy()
        return torch.as_tensor(self._reference, dtype=torch.float64)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "sgd",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        total, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        # When training continues, the labels of these observations are already in the data.
        if reset_num_timesteps or self._data is None:
            self._add_labels(np.asarray(self._last_obs), self._reset_labels(range(self.n_envs)))
        self.start_training()
        callback.on_training_start(locals(), globals())
        updates = 0
        while self.num_timesteps < total:
            callback.on_rollout_start()
            if not self._collect(callback):
                break
            callback.on_rollout_end()
            self.train()
            updates += 1
            if log_interval and updates % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

    def dump_logs(self) -> None:
        """Write the last update's numbers, and SB3's of the last episodes, to the logger."""
        for name, value in self.diagnostics.items():
            self.logger.record(f"train/{name}", value)
        for name, key in (("rollout/ep_rew_mean", "r"), ("rollout/ep_len_mean", "l")):
            if self.ep_info_buffer:
                self.logger.record(name, safe_mean([info[key] for info in self.ep_info_buffer]))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    def _reset_labels(self, indices: Sequence[int] | NDArray[np.intp]) -> NDArray[Any]:
        """[len(indices), action_dim] from the infos of the last resets."""
        infos = self.env.unwrapped.reset_infos  # type: ignore[union-attr]
        try:
            return np.stack([infos[i]["expert_action"] for i in indices])
        except KeyError:
            raise UserError(
                f"{type(self).__name__}: the environment gives no info['expert_action']; a "
                "supervised agent needs labels"
            ) from None

    def _collect(self, callback: BaseCallback) -> bool:
        """Run the deployed policy for n_steps per environment and keep the labels.

        False: a callback asked to stop.
        """
        assert self.env is not None
        for _ in range(self.config.n_steps):
            actions, _ = self.predict(self._last_obs, deterministic=True)  # type: ignore[arg-type]
            observations, rewards, dones, infos = self.env.step(actions)
            self.num_timesteps += self.env.num_envs
            self._update_info_buffer(infos, dones)
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._last_obs = np.asarray(observations)
            ended = np.flatnonzero(dones)
            if self.config.labels == "visited":
                labels = np.stack([info["expert_action"] for info in infos])
                if len(ended):
                    labels[ended] = self._reset_labels(ended)
                self._add_labels(self._last_obs, labels)
            elif len(ended):
                self._add_labels(self._last_obs[ended], self._reset_labels(ended))
        return True

    def _add_labels(self, observations: NDArray[Any], labels: NDArray[Any]) -> None:
        if self._data is None:
            self._data = observations.copy(), labels.copy()
            return
        keep = self.config.buffer_size
        known, known_labels = self._data
        self._data = (
            np.concatenate([known, observations])[-keep:],
            np.concatenate([known_labels, labels])[-keep:],
        )

    def loss(self, w: torch.Tensor) -> torch.Tensor:
        """Mean squared distance |pi_w(x) - label|^2 over the data, for w [d].

        Of unclipped actions: clipping would hide the error.
        """
        assert self._data is not None
        x, y = (torch.as_tensor(part, dtype=torch.float64) for part in self._data)
        return (self.space.policies(w[None])(x[None])[0] - y).square().sum(dim=-1).mean()

    def propose(self) -> Floats:
        """u [d], the change that the optimiser would make. Records the loss at the present w."""
        w = nn.Parameter(torch.as_tensor(self.w.copy()))
        optimizer = getattr(torch.optim, self.config.optimizer)([w], lr=self.config.learning_rate)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        losses = []
        for _ in range(self.config.gradient_steps):
            optimizer.zero_grad()
            loss = self.loss(w)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self._optimizer_state = optimizer.state_dict()
        self.diagnostics = {**self.diagnostics, "loss": losses[0]}
        return w.detach().numpy() - self.w

    def deploy(self, w: Floats) -> None:
        """Make w the policy that acts."""
        self.w = w
        self.space.write(w)

    def start_training(self) -> None:
        """Called once before the first data collection, when the first labels are known."""
        self.deploy(self.w if len(self.w) else np.zeros(self.space.dimension))

    def train(self) -> None:
        """One update."""
        proposal = self.propose()
        self.deploy(self.w + proposal)
        length = float(np.linalg.norm(proposal))
        self.diagnostics = {**self.diagnostics, "proposal_norm": length, "step_norm": length}
