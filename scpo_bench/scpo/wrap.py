"""SCPO wrapped around a torch optimiser or a Stable-Baselines3 algorithm class.

Neither is changed. It makes its own update; that change is the proposal u, and its projection is
deployed. Where no constraint is active, the weights are those that it would have reached alone, to
the last bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from scpo_bench.configuration import require, resolve_config
from scpo_bench.contract import MONITOR, Floats, probe_meter_of, task_of
from scpo_bench.errors import UserError
from scpo_bench.scpo.bank import Candidate
from scpo_bench.scpo.constraints import Constraints, Exact, RolloutConfig
from scpo_bench.scpo.cost_gradient import cost_gradient
from scpo_bench.scpo.estimation import Evidence
from scpo_bench.scpo.evaluation import constraints_from
from scpo_bench.scpo.guard import Decision, Guard
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.rollouts import BatchedRollouts, EpisodeRollouts, refuse_wrappers
from scpo_bench.scpo.spaces import PolicyWeights, Weights

# Of GuardConfig, for ProjectedOptimizer: its constraints cost little.
OPTIMIZER_DEFAULTS: dict[str, Any] = {
    "directions": 64,
    "candidates": ("normals", "momentum", "start"),
    "probe_radius": 1e-2,
    "safe_probes": True,
}


def _update(
    guard: Guard,
    weights: Weights,
    own_update: Callable[[], Any],
    constraints: Constraints,
    rng: np.random.Generator,
    cost_gradients: Sequence[Floats] = (),
) -> tuple[Decision, Any]:
    """Run ``own_update``, set the weights to what the guard makes of it: (decision, its result)."""
    before, w = weights.copy(), weights.read()
    result = own_update()
    proposed, change = weights.copy(), weights.read() - w
    decision = guard.update(w, lambda: change, constraints, rng, cost_gradients)
    # Where nothing is projected, copies keep every bit.
    if decision.status == "unaltered":
        weights.restore(proposed)
    elif decision.status == "held":
        weights.restore(before)
    else:
        weights.write(decision.w)
    return decision, result


# Changes of the weights by their last bit, from which rounding is estimated, and the factor on it.
NUDGES = 4


class ProjectedOptimizer:
    """A torch optimiser whose steps are projected.

    ``ProjectedOptimizer(torch.optim.Adam(model.parameters()), constraints).step()``.
    constraints: a function without arguments that returns g [k] at the present parameters (which
    are set for it); g_i <= 0 is safe. It must not draw random numbers that training needs.
    names: of the constraints. config: fields of :class:`GuardConfig`. The first ``step`` raises
    :class:`~scpo_bench.scpo.guard.UnsafeStartError` if the parameters it starts from are unsafe;
    the constructor raises UserError for unknown fields. ``diagnostics`` holds the numbers of the
    last step. A learning-rate scheduler takes the wrapped optimiser.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        constraints: Callable[[], Tensor | Sequence[float] | Floats],
        *,
        names: Sequence[str] = (),
        seed: int = 0,
        **config: Any,
    ) -> None:
        self.optimizer = optimizer
        self.guard = Guard(resolve_config(GuardConfig, {**OPTIMIZER_DEFAULTS, **config}))
        self.diagnostics: dict[str, float] = {}
        self._weights = Weights([p for group in optimizer.param_groups for p in group["params"]])
        self._rng = np.random.default_rng(np.random.SeedSequence(seed))
        self._constraint_values = constraints
        known = tuple(names) or tuple(f"constraint_{i}" for i in range(len(self._values())))
        single = any(t.dtype != torch.float64 for t in self._weights.tensors)
        self._constraints = Exact(known, self._evaluate, self._rounding if single else None)

    def __getattr__(self, name: str) -> Any:  # zero_grad, state_dict, param_groups, ...
        return getattr(self.__dict__["optimizer"], name)

    def _values(self) -> Floats:
        with torch.no_grad():
            values = self._constraint_values()
        if isinstance(values, Tensor):
            values = values.detach().numpy()
        return np.asarray(values, dtype=np.float64).reshape(-1)

    def _evaluate(self, w: Floats) -> Floats:
        rows = []
        for row in w:
            self._weights.write(row)
            rows.append(self._values())
        return np.stack(rows)

    def _rounding(self, w: Floats) -> Floats:
        """How much g changes where no weight changes by more than its last bit: [k].

        The largest of a few such changes, times a factor: what rounding of weights and arithmetic
        does to a value.
        """
        values = [self._evaluate(w[None])[0]]
        for nudge in range(NUDGES):
            self._weights.write(w)
            self._weights.nudge(np.random.default_rng(nudge))
            values.append(self._values())
        return NUDGES * np.abs(np.stack(values) - values[0]).max(axis=0)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of the optimiser, projected. Returns what the optimiser returns."""
        arguments = () if closure is None else (closure,)
        own_step = functools.partial(self.optimizer.step, *arguments)
        decision, result = _update(
            self.guard, self._weights, own_step, self._constraints, self._rng
        )
        self.diagnostics = {**self.diagnostics, **decision.diagnostics}
        return result


@dataclass(frozen=True)
class ProjectedConfig(RolloutConfig, GuardConfig):
    """The guard's fields and those of rollouts, with defaults for policies judged by rollouts."""

    directions: int = 4
    candidates: tuple[Candidate, ...] = ("normals", "cost", "start", "momentum")
    probe_radius: float = 0.1
    safe_probes: bool = True
    smallest_probe: float = 0.3
    trust_radius: float = 1e3
    """In effect none: the algorithm chooses its own step size."""
    largest_L: float = 20.0
    margin: float = 0.1
    recheck: float = 0.0
    retries: int = 4
    probe_rollouts: int = 4
    rollout_budget: int = 32
    predicted_episodes: int = 10
    """As many as the suites judge a policy by."""
    reserve: float = 0.05
    cost_limit: float = 25.0
    """Limit on the cost of an episode, >= 0; on tasks with signed constraint values 0 means none of
    them may be positive.
    """

    def __post_init__(self) -> None:
        for part in (GuardConfig, RolloutConfig):
            part.__post_init__(self)
        require(self, "cost_limit", low=0)


class Projected(BaseAlgorithm):
    """Mixin that projects every update of an SB3 algorithm: ``class P(Projected, Algorithm)``.

    An update is one call of the algorithm's ``train``: for an off-policy algorithm choose
    ``train_freq`` and ``gradient_steps`` so that this happens now and then (``train_freq=1000,
    gradient_steps=1000``), because every update costs rollouts. Keyword arguments that are fields
    of :class:`ProjectedConfig` are the guard's; the rest, and a ``cost_limit`` if it knows one, are
    the algorithm's.
    make_env: creates the environments of the rollouts; by default, they are created from the
    specification of the training environments, with the wrappers it lists.
    workers: processes that run them; by default as many as step the training environments.

    Raises UserError for unknown fields, for wrappers that the rollouts would miss, for observations
    normalised by statistics that move (the policy would change between updates), for policies with
    running statistics, for discrete actions; UnsafeStartError in ``learn`` if the rollouts do not
    show the start policy to be safe.
    """

    Config: ClassVar[type[Any]]

    def __init_subclass__(cls) -> None:
        # The algorithm's own Config, which it reads its fields from, where it has one.
        cls.Config = getattr(super(), "Config", ProjectedConfig)

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
        if self.Config is not ProjectedConfig:
            ours -= {"cost_limit"} & {f.name for f in fields(self.Config)}
        self.guard = Guard(self.guard_config)
        self.diagnostics: dict[str, float] = {}
        self._make_env, self._workers = make_env, workers
        self._weights: PolicyWeights | None = None
        self._start_weights: Floats | None = None  # w = 0, for when the agent is loaded
        self._rollouts: BatchedRollouts | EpisodeRollouts | None = None
        self._constraints: Constraints | None = None
        self._evidence = Evidence()
        self._costs: list[Floats] = []  # [N] of each step of the present data collection
        super().__init__(policy, env, **{k: v for k, v in kwargs.items() if k not in ours})
        self._guard_rng = np.random.default_rng(np.random.SeedSequence([self.seed or 0, 1]))

    def _excluded_save_params(self) -> list[str]:
        ours = ["_weights", "_rollouts", "_constraints", "_make_env"]
        return [*super()._excluded_save_params(), *ours]

    @property
    def weights(self) -> PolicyWeights:
        if self._weights is None:
            self._weights = PolicyWeights(self.policy, self._start_weights)
            self._start_weights = self._weights.start
        return self._weights

    @property
    def constraints(self) -> Constraints:
        if self._constraints is None:
            config, meter, task = self.guard_config, probe_meter_of(self.env), task_of(self.env)
            assert self.env is not None
            if self._make_env is None:
                refuse_wrappers(self.env, f"; {MAKE_ENV}")
            if task is not None and self._make_env is None:
                self._rollouts = BatchedRollouts(
                    task, self.weights, config.evaluation_starts, config.sharpness, meter
                )
            else:
                self._rollouts = EpisodeRollouts(
                    self._make_env or _registered_env(self.env),
                    self.weights,
                    config.cost_limit,
                    self.seed or 0,
                    int(self._workers or getattr(self.env.unwrapped, "workers", None) or 1),
                    meter,
                    config.largest_cost,
                )
            self._constraints = constraints_from(
                self._rollouts, config, config, self.seed or 0, self._evidence
            )
        return self._constraints

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        normalizer = self.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_obs and normalizer.training:
            raise UserError(
                "SCPO: observation statistics that move change the policy between updates; do not "
                "normalise observations (normalize: false), or stop the statistics "
                "(VecNormalize.training = False)"
            )
        try:
            self.guard.start(self.weights.read(), self.constraints)
            return super().learn(*args, **kwargs)  # type: ignore[safe-super]
        finally:
            if self._rollouts is not None:
                self._rollouts.close()
            self._rollouts = self._constraints = None

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: Any = None) -> None:
        super()._update_info_buffer(infos, dones)
        if "cost" in self.guard_config.candidates:
            self._costs.append(np.array([info.get("cost", 0.0) for info in infos], np.float64))

    def train(self, *args: Any, **kwargs: Any) -> None:
        """The algorithm's own update; then the weights that the guard decides."""
        gradients = self._cost_gradients()
        train = super().train  # type: ignore[misc]

        def own_train() -> None:
            train(*args, **kwargs)
            self.weights.check_buffers()

        decision, _ = _update(
            self.guard, self.weights, own_train, self.constraints, self._guard_rng, gradients
        )
        policy: Any = self.policy
        if hasattr(policy, "actor_target") and decision.status != "unaltered":
            # A target left at the proposal would lead the next update back to it.
            policy.actor_target.load_state_dict(policy.actor.state_dict())
        self.diagnostics = {**self.diagnostics, **decision.diagnostics}
        for name, value in decision.diagnostics.items():
            self.logger.record(f"scpo/{name}", value)

    def _cost_gradients(self) -> list[Floats]:
        costs, self._costs = self._costs, []
        buffer = getattr(self, "rollout_buffer", None)
        if (
            not isinstance(buffer, RolloutBuffer)
            or len(costs) != buffer.buffer_size
            or not np.any(costs)
        ):
            return []
        costs_TN, last_starts_N = np.stack(costs), self._last_episode_starts
        return [
            cost_gradient(self.policy, self.weights, buffer, costs_TN, self.gamma, last_starts_N)  # type: ignore[attr-defined,arg-type]
        ]


class ProjectedPPO(Projected, PPO):
    """Agent ``scpo-ppo``: SCPO with PPO's changes as its proposals."""


@functools.cache
def projected(algorithm: type[BaseAlgorithm]) -> type[Any]:
    """A subclass of an SB3 algorithm whose updates are projected; see :class:`Projected`.

    ``projected(SAC)("MlpPolicy", env, cost_limit=25.0, train_freq=1000, gradient_steps=1000)``.
    """
    if algorithm is PPO:
        return ProjectedPPO
    return type(f"Projected{algorithm.__name__}", (Projected, algorithm), {})


MAKE_ENV = "give make_env, a function that creates the environments of SCPO's rollouts"


def _registered_env(env: VecEnv) -> Callable[[], gym.Env[Any, Any]]:
    """A function that creates one of the environments of ``env``, from its specification.

    Raises UserError where that would give another environment than the one trained on.
    """
    spec = copy.copy(env.get_attr("spec")[0])
    if spec is None:
        raise UserError(f"SCPO: the environment has no registered id; {MAKE_ENV}")
    spec.additional_wrappers = tuple(
        wrapper for wrapper in spec.additional_wrappers if wrapper.entry_point != MONITOR
    )
    for wrapper in spec.additional_wrappers:
        if wrapper.kwargs is None:
            raise UserError(
                f"SCPO: wrapper {wrapper.name} cannot be created again, since it is no "
                f"gymnasium.utils.RecordConstructorArgs; {MAKE_ENV}"
            )
    make_env = functools.partial(gym.make, spec)
    with contextlib.closing(make_env()) as example:
        spaces = example.observation_space, example.action_space
    if spaces != (env.observation_space, env.action_space):
        raise UserError(
            f"SCPO: the environment's spaces are not those of its specification, {spec.id}; "
            f"{MAKE_ENV}"
        )
    return make_env
