"""SCPO around what one already uses: a torch optimiser, or a Stable-Baselines3 algorithm class.

Both leave the wrapped thing as it is. It makes its change; that change is the proposal u,
unaltered; what is deployed is its projection. Where no constraint is in the way, the weights are
those that it would have reached alone, to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from scpo_bench.advantages import discounted_sums, generalised_advantages, next_values
from scpo_bench.configuration import require, resolve_config
from scpo_bench.contract import probe_meter_of, task_of
from scpo_bench.scpo.constraints import Constraints, Exact, Expected
from scpo_bench.scpo.directions import Candidate
from scpo_bench.scpo.guard import Guard, GuardConfig
from scpo_bench.scpo.policy_rollouts import BatchedRollouts, EpisodeRollouts, PolicyWeights
from scpo_bench.scpo.projection import Floats


class ProjectedOptimizer:
    """``ProjectedOptimizer(torch.optim.Adam(model.parameters()), constraints).step()``: a torch
    optimiser whose steps are projected.

    constraints: a function without arguments that returns g [k] at the parameters as they then are
    (they are set for it); g_i <= 0 is safe. It must not draw random numbers that training needs.
    names: of the constraints. config: fields of :class:`GuardConfig`. The first ``step`` raises
    :class:`~scpo_bench.scpo.guard.UnsafeStartError` if the parameters it starts from are unsafe;
    the constructor raises ValueError for unknown fields. ``diagnostics`` holds the numbers of the
    last step. A learning-rate scheduler is given the optimiser that is wrapped.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        constraints: Callable[[], Any],
        *,
        names: Sequence[str] = (),
        seed: int = 0,
        **config: Any,
    ) -> None:
        self.optimizer = optimizer
        self.guard = Guard(
            resolve_config(GuardConfig, {"probe_radius": 1e-2, "safe_probes": True, **config})
        )
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._rng = np.random.default_rng(np.random.SeedSequence(seed))
        self._start = self._flat()
        self._constraints_at = constraints
        known = tuple(names) or tuple(f"constraint_{i}" for i in range(len(self._values())))
        self._constraints = Exact(known, self._evaluate)

    def __getattr__(
        self, name: str
    ) -> Any:  # zero_grad, state_dict, param_groups, ...: as the optimiser has them
        return getattr(self.__dict__["optimizer"], name)

    @property
    def diagnostics(self) -> dict[str, float]:
        return self.guard.diagnostics

    def _flat(self) -> Floats:
        return torch.cat([p.detach().reshape(-1) for p in self._parameters]).double().numpy()

    def _set(self, flat: Floats) -> None:
        parts = torch.as_tensor(flat).split([p.numel() for p in self._parameters])
        with torch.no_grad():
            for p, part in zip(self._parameters, parts):
                p.copy_(part.reshape(p.shape))

    def _values(self) -> Floats:
        with torch.no_grad():
            values = self._constraints_at()
        return np.asarray(
            values.detach() if isinstance(values, Tensor) else values, dtype=np.float64
        ).reshape(-1)

    def _evaluate(self, w: Floats) -> Floats:
        rows = []
        for row in w:
            self._set(self._start + row)
            rows.append(self._values())
        return np.stack(rows)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimiser, projected. Returns what the optimiser returns."""
        kept = [p.detach().clone() for p in self._parameters]
        here = self._flat() - self._start
        self.guard.start(here, self._constraints)
        self._restore(kept)
        result = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        proposed = [p.detach().clone() for p in self._parameters]
        if not self.guard.look_again(here, self._constraints):
            self._set(self._start + self.guard.recover())
            return result
        proposal = self._flat() - self._start - here
        change = self.guard.step(here, proposal, self._constraints, self._rng)
        if self.guard.unaltered:
            self._restore(proposed)
        elif change.any():
            self._set(self._start + here + change)
        else:
            self._restore(kept)
        return result

    def _restore(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self._parameters, values):
                p.copy_(value)


@dataclass(frozen=True)
class ProjectedConfig(GuardConfig):
    """The guard's fields, with defaults for policies whose constraints come from rollouts, and the
    fields of those rollouts.
    """

    directions: int = 4
    candidates: tuple[Candidate, ...] = ("normals", "cost", "start", "momentum")
    probe_radius: float = 0.1
    safe_probes: bool = True
    smallest_probe: float = 0.3
    trust_radius: float = 1e3
    """As good as none: the algorithm's own step size is its own affair."""
    margin: float = 0.1
    retries: int = 4
    cost_limit: float = 25.0
    """Limit on the cost of an episode, >= 0; on tasks with signed constraint values 0 means none of
    them may be positive.
    """
    level: float = 0.05
    """The probability with which an update may deploy a policy whose expected cost exceeds the
    limit.
    """
    rollouts: int = 4
    """Episodes of a first look at a policy, and of every probe."""
    rollout_budget: int = 32
    """Episodes of a look at most."""
    evaluation_starts: int = 512
    """On tasks whose dynamics are pure functions: start states of a constraint evaluation."""
    sharpness: float = 100.0
    """On such tasks: sharpness of the log-sum-exp maximum over states and steps, per unit of
    relative constraint value.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "cost_limit", low=0)
        require(self, "level", above=0, high=0.5)
        require(self, "rollouts", low=2)
        require(self, "rollout_budget", low=self.rollouts)
        require(self, "evaluation_starts", low=1)
        require(self, "sharpness", above=0)


@functools.cache
def projected(algorithm: type[BaseAlgorithm]) -> type[Any]:
    """A subclass of an SB3 algorithm whose updates are projected:

    ``projected(PPO)("MlpPolicy", env, cost_limit=25.0, n_steps=1024)``.

    An update is one call of the algorithm's ``train``: for an off-policy algorithm choose
    ``train_freq`` and ``gradient_steps`` so that this happens now and then (``train_freq=1000,
    gradient_steps=1000``), because every update costs rollouts. Keyword arguments that are fields
    of :class:`ProjectedConfig` are the guard's; the rest, and a ``cost_limit`` if it knows one, are
    the algorithm's.
    make_env: makes the environments of the rollouts; by default the task's registered id does.
    workers: processes that play them; by default as many as step the training environments.

    Raises ValueError for unknown fields, for observations normalised by statistics that move (the
    policy would change between updates), for discrete actions; UnsafeStartError in ``learn`` if the
    start policy does not show itself safe.
    """

    class Projected(algorithm):  # type: ignore[misc, valid-type]
        Config: ClassVar[type[Any]] = getattr(algorithm, "Config", ProjectedConfig)

        def __init__(
            self,
            policy: Any,
            env: Any,
            *,
            make_env: Callable[[], gym.Env[Any, Any]] | None = None,
            workers: int | None = None,
            **kwargs: Any,
        ) -> None:
            ours = {f.name for f in fields(ProjectedConfig)}
            self.guard_config = resolve_config(
                ProjectedConfig, {k: v for k, v in kwargs.items() if k in ours}
            )
            rest = {k: v for k, v in kwargs.items() if k not in ours}
            theirs = getattr(algorithm, "Config", None)
            if (
                theirs is not None
                and "cost_limit" in {f.name for f in fields(theirs)}
                and "cost_limit" in kwargs
            ):
                rest["cost_limit"] = kwargs["cost_limit"]
            self.guard = Guard(self.guard_config)
            self.diagnostics: dict[str, float] = {}
            self._make_env, self._workers = make_env, workers
            self._weights: PolicyWeights | None = None
            self._origin: dict[str, Tensor] | None = (
                None  # the start policy, for what is loaded later
            )
            self._rollouts: BatchedRollouts | EpisodeRollouts | None = None
            self._constraints: Constraints | None = None
            self._costs: list[Floats] = []  # [N] of each step of the rollout in hand
            super().__init__(policy, env, **rest)
            self._guard_rng = np.random.default_rng(np.random.SeedSequence([self.seed or 0, 1]))

        def _excluded_save_params(self) -> list[str]:
            return [
                *super()._excluded_save_params(),
                "_weights",
                "_rollouts",
                "_constraints",
                "_make_env",
            ]

        # ---- what the guard looks at
        # ----------------------------------------------------------------------------------

        @property
        def weights(self) -> PolicyWeights:
            if self._weights is None:
                if self._origin is None:
                    self._origin = {k: v.clone() for k, v in self.policy.state_dict().items()}
                now = {k: v.clone() for k, v in self.policy.state_dict().items()}
                self.policy.load_state_dict(self._origin)
                self._weights = PolicyWeights(self.policy)
                self.policy.load_state_dict(now)
            return self._weights

        @property
        def constraints(self) -> Constraints:
            if self._constraints is None:
                config = self.guard_config
                meter = probe_meter_of(self.env)
                task = task_of(self.env)
                if task is not None:
                    self._rollouts = BatchedRollouts(
                        task, self.weights, config.evaluation_starts, config.sharpness, meter
                    )
                    self._constraints = Exact(self._rollouts.names, self._rollouts)
                else:
                    make_env = self._make_env or _maker_of(self.env)
                    workers = int(
                        self._workers or getattr(self.env.unwrapped, "workers", None) or 1
                    )
                    self._rollouts = EpisodeRollouts(
                        make_env, self.weights, config.cost_limit, self.seed or 0, workers, meter
                    )
                    self._constraints = Expected(
                        self._rollouts.names,
                        self._rollouts,
                        config.level,
                        config.rollouts,
                        config.rollout_budget,
                        config.retries,
                    )
            return self._constraints

        # ---- training
        # ---------------------------------------------------------------------------------------------------

        def learn(self, *args: Any, **kwargs: Any) -> Any:
            normalizer = self.get_vec_normalize_env()
            if normalizer is not None and normalizer.norm_obs and normalizer.training:
                raise ValueError(
                    "SCPO: observation statistics that move change the policy between updates; do not normalise observations "
                    "(normalize: false), or stop the statistics (VecNormalize.training = False)"
                )
            try:
                self.guard.start(self.weights.read(), self.constraints)
                return super().learn(*args, **kwargs)
            finally:
                if self._rollouts is not None:
                    self._rollouts.close()
                self._rollouts = self._constraints = None

        def _update_info_buffer(self, infos: list[dict[str, Any]], dones: Any = None) -> None:
            super()._update_info_buffer(infos, dones)
            if "cost" in self.guard_config.candidates:
                self._costs.append(
                    np.array([info.get("cost", 0.0) for info in infos], dtype=np.float64)
                )

        def train(self, *args: Any, **kwargs: Any) -> None:
            """The algorithm's own update, then back to what the guard makes of it."""
            weights, guard = self.weights, self.guard
            here, kept = weights.read(), [p.detach().clone() for p in weights.parameters()]
            gradients = self._cost_gradients()
            super().train(*args, **kwargs)
            if not guard.look_again(here, self.constraints):
                weights.write(guard.recover())
            else:
                change = guard.step(
                    here, weights.read() - here, self.constraints, self._guard_rng, gradients
                )
                if guard.unaltered:
                    self._finish_update()
                    return
                if change.any():
                    weights.write(here + change)
                else:
                    with torch.no_grad():
                        for p, old in zip(weights.parameters(), kept):
                            p.copy_(old)
            target = getattr(self.policy, "actor_target", None)
            if (
                target is not None
            ):  # it would lead the next update back to where the guard has just left
                target.load_state_dict(self.policy.actor.state_dict())
            self._finish_update()

        def _finish_update(self) -> None:
            self.diagnostics = {**self.diagnostics, **self.guard.diagnostics}

        def _cost_gradients(self) -> list[Floats]:
            costs, self._costs = self._costs, []
            buffer = getattr(self, "rollout_buffer", None)
            if (
                not isinstance(buffer, RolloutBuffer)
                or len(costs) != buffer.buffer_size
                or not np.any(costs)
            ):
                return []
            return [
                cost_gradient(
                    self.policy,
                    self.weights,
                    buffer,
                    np.stack(costs),
                    self.gamma,
                    self._last_episode_starts,
                )
            ]

    Projected.__name__ = Projected.__qualname__ = f"Projected{algorithm.__name__}"
    return Projected


def _maker_of(env: Any) -> Callable[[], gym.Env[Any, Any]]:
    """A function that makes the environment that ``env`` holds several of, by its registered id."""
    spec = env.get_attr("spec")[0]
    hint = "give make_env, a function that makes the environments of SCPO's rollouts"
    if spec is None:
        raise ValueError(f"SCPO: the environment has no registered id; {hint}")
    make_env = functools.partial(
        gym.make, spec.id, max_episode_steps=spec.max_episode_steps, **spec.kwargs
    )
    with contextlib.closing(make_env()) as example:
        if (
            example.observation_space != env.observation_space
            or example.action_space != env.action_space
        ):
            raise ValueError(
                f"SCPO: the environment is wrapped, its spaces are not those of {spec.id}; {hint}"
            )
    return make_env


RIDGE = 1e-3  # of the cost critic's fit, relative to its features' mean square


def cost_gradient(
    policy: ActorCriticPolicy,
    weights: PolicyWeights,
    buffer: RolloutBuffer,
    costs_TN: Floats,
    gamma: float,
    last_starts_N: Any,
) -> Floats:
    """[d]: the policy gradient of the discounted cost, mean over steps of A_C grad log pi(a | s).

    The critic is a ridge regression of the cost to go on the value network's last hidden layer: one
    linear solve, and nothing to train.
    Source of the estimator: Schulman et al. 2016, arXiv 1506.02438 (generalised advantages, lambda
    0.95).
    """
    T, N = costs_TN.shape
    observations = torch.as_tensor(buffer.observations.reshape(T * N, *buffer.obs_shape))
    actions = torch.as_tensor(buffer.actions.reshape(T * N, -1))
    starts_TN = buffer.episode_starts.astype(bool)
    ends_TN = np.concatenate([starts_TN[1:], np.asarray(last_starts_N, dtype=bool)[None]])
    with torch.no_grad():
        features: Any = policy.extract_features(observations, policy.vf_features_extractor)
        phi = policy.mlp_extractor.forward_critic(features).double().numpy()
    phi = np.concatenate([phi, np.ones((len(phi), 1))], axis=1)
    to_go = discounted_sums(costs_TN, ends_TN, gamma).ravel()
    gram = phi.T @ phi
    critic = np.linalg.solve(
        gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), phi.T @ to_go
    )
    values_TN = (phi @ critic).reshape(T, N)
    following = next_values(values_TN, values_TN[-1], ends_TN, np.zeros((T, N)))
    advantages = generalised_advantages(
        costs_TN, values_TN, following, ends_TN, gamma, 0.95
    ).ravel()
    _, log_prob, _ = policy.evaluate_actions(observations, actions)
    return weights.gradient((torch.as_tensor(advantages, dtype=log_prob.dtype) * log_prob).mean())


ProjectedPPO = projected(PPO)
ProjectedPPO.__module__, ProjectedPPO.__doc__ = (
    __name__,
    "Agent ``scpo-ppo``: SCPO with PPO's changes as its proposals.",
)
