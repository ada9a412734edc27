"""Rollouts of any Stable-Baselines3 policy: what the guard looks at when nothing but a policy and a
task is given.

Two ways, one meaning: where the dynamics are pure functions, all starts as one array
(:class:`BatchedRollouts`); else whole episodes of Gymnasium environments, in several processes
(:class:`EpisodeRollouts`). Both act as the deployed policy does when it is evaluated:
deterministically, through ``predict``.
"""

from __future__ import annotations

import copy
import functools
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import Tensor, nn

from scpo_bench.contract import BatchedTask, ProbeMeter
from scpo_bench.envs.batched import BatchedTaskVectorEnv
from scpo_bench.runs.processes import end_with_parent
from scpo_bench.scpo.projection import Floats

# Observations that a policy is given at once, always: an action must not depend, by rounding, on
# who else is playing. Also the episodes that are played side by side, the unit of work, where there
# are several policies; of a single one the unit is half as large, so that two processes have
# something to share.
ROWS = 4


class PolicyWeights:
    """The weights that shape a policy's deterministic action, as a vector w [d] that is zero at the
    start.

    Which they are is found by differentiating an action: value functions and exploration noise have
    no part in it. ValueError if the policy's actions cannot be differentiated (discrete actions).
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        action = self._act()
        if not action.requires_grad:
            raise ValueError(
                f"SCPO: the actions of {type(policy).__name__} cannot be differentiated; it needs a Box action space"
            )
        named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(action.sum(), [p for _, p in named], allow_unused=True)
        self._names = [
            name for (name, _), gradient in zip(named, gradients) if gradient is not None
        ]
        self._start = self._flat(policy)
        self.dimension = len(self._start)

    def _act(self) -> Tensor:
        space = self.policy.observation_space
        observation = self.policy.obs_to_tensor(np.zeros(space.shape, space.dtype))[0]
        return self.policy._predict(observation, deterministic=True)

    def copy_policy(self) -> Any:
        """A policy of the same kind, to act with other weights."""
        with torch.no_grad():
            # SB3's policies keep their last distribution; one with a gradient graph could not be
            # copied
            self._act()
        return copy.deepcopy(self.policy)

    def parameters(self, policy: Any = None) -> list[Tensor]:
        """The tensors, of ``policy`` (a copy of the one given at first) if given."""
        of = dict((policy or self.policy).named_parameters())
        return [of[name] for name in self._names]

    def _flat(self, policy: Any) -> Floats:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters(policy)]).double().numpy()

    def read(self) -> Floats:
        """w of the policy as it is."""
        return self._flat(self.policy) - self._start

    def write(self, w: Floats, policy: Any = None) -> None:
        """Set the weights to those of w, in the policy's own precision."""
        flat = torch.as_tensor(self._start + w)
        with torch.no_grad():
            for p, part in zip(
                self.parameters(policy), flat.split([p.numel() for p in self.parameters(policy)])
            ):
                p.copy_(part.reshape(p.shape))

    def gradient(self, loss: Tensor) -> Floats:
        """[d]: of a scalar that was computed with the policy."""
        parts = torch.autograd.grad(loss, self.parameters(), allow_unused=True)
        return (
            torch.cat(
                [
                    torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
                    for g, p in zip(parts, self.parameters())
                ]
            )
            .double()
            .numpy()
        )


def acting(policy: Any) -> Callable[[Any], Any]:
    """observations [n, ...] -> the actions [n, ...] of ``policy.predict(observations,
    deterministic=True)``, at half its cost.

    ``predict`` also checks, converts and builds a distribution; a Gaussian's most likely action is
    its mean, and needs none of that.
    """
    policy.set_training_mode(False)
    plain = (
        isinstance(policy, ActorCriticPolicy)
        and type(getattr(policy, "action_dist", None)) is DiagGaussianDistribution
    )
    if not plain or type(policy.features_extractor) is not FlattenExtractor:
        return lambda observations: policy.predict(observations, deterministic=True)[0]
    low, high = policy.action_space.low, policy.action_space.high
    mean_action = _mean_action(policy)

    def act(observations: Any) -> Any:
        with torch.inference_mode():
            mean = mean_action(torch.as_tensor(observations).float().flatten(1))
        return mean.numpy().reshape(-1, *low.shape).clip(low, high)

    return act


def _mean_action(policy: ActorCriticPolicy) -> Callable[[Tensor], Tensor]:
    """features [n, f] -> mean actions [n, a].

    A plain network's layers are called as functions: modules cost more than their sums.
    """
    layers = [*getattr(policy.mlp_extractor, "policy_net", ()), policy.action_net]
    functions: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
        nn.Tanh: torch.tanh,
        nn.ReLU: torch.relu,
    }
    if type(policy.mlp_extractor) is not MlpExtractor or not all(
        type(m) in (*functions, nn.Linear) for m in layers
    ):
        return lambda features: policy.action_net(policy.mlp_extractor.forward_actor(features))
    # The weights are written in place, so these references stay those of the policy.
    calls = [
        functools.partial(nn.functional.linear, weight=m.weight.detach(), bias=m.bias.detach())
        if isinstance(m, nn.Linear)
        else functions[type(m)]
        for m in layers
    ]

    def mean(features: Tensor) -> Tensor:
        for call in calls:
            features = call(features)
        return features

    return mean


class BatchedRollouts:
    """All design starts of a batched task at once.

    Constraints: the task's own; g is the log-sum-exp maximum over starts and steps.
    """

    def __init__(
        self,
        task: BatchedTask,
        weights: PolicyWeights,
        starts: int,
        sharpness: float,
        meter: ProbeMeter,
    ) -> None:
        self.names = task.constraint_names
        self._env = BatchedTaskVectorEnv(task, starts)
        self._starts = {"states": np.stack(task.design_starts(starts), axis=-1)}
        self._weights, self._sharpness, self._meter = weights, sharpness, meter
        self._policy = weights.copy_policy()
        self._act = acting(self._policy)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_act"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._act = acting(self._policy)

    def __call__(self, w: Floats) -> Floats:
        """g [M, k] for policies w [M, d]."""
        return np.stack([self._one(row) for row in w])

    def _one(self, w: Floats) -> Floats:
        self._weights.write(w, self._policy)
        observations, _ = self._env.reset(options=self._starts)
        seen = []
        for _ in range(self._env.task.constraint_horizon):
            observations, _, _, _, info = self._env.step(self._act(observations))
            seen.append(info["constraint_values"])
        values = np.concatenate(seen)  # [T * starts, k]
        worst = values.max(axis=0)
        self._meter.steps += len(values)
        self._meter.violations += bool((worst > 0).any())
        return (
            worst + np.log(np.exp(self._sharpness * (values - worst)).sum(axis=0)) / self._sharpness
        )

    def close(self) -> None:
        self._env.close()


Unit = tuple[int, list[int]]  # (row of w, seeds of episodes)


@dataclass(frozen=True)
class Episode:
    """What one episode came to. worst: the largest signed constraint values [k], or None where the
    task has none.
    """

    steps: int
    cost: float
    worst: Floats | None


class EpisodeRollouts:
    """Whole episodes: one per policy and stream, started from a seed of the stream's own.

    y = (episode cost - cost_limit) / max(cost_limit, 1), constraint "cost"; where cost_limit is 0,
    the largest signed constraint values of the episode (``info["constraint_values"]``). workers:
    processes, this one among them; the result does not depend on them.
    ValueError if cost_limit is 0 and the task has no signed values: then there is no room in which
    to take a step.
    """

    def __init__(
        self,
        make_env: Callable[[], gym.Env[Any, Any]],
        weights: PolicyWeights,
        cost_limit: float,
        seed: int,
        workers: int,
        meter: ProbeMeter,
    ) -> None:
        self._make_env, self._weights = make_env, weights
        self._cost_limit, self._seed, self._meter, self._workers = (
            cost_limit,
            seed,
            meter,
            max(workers, 1),
        )
        self._here: _Player | None = None
        self._pool: ProcessPoolExecutor | None = None
        self.names = self._constraint_names()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_here": None,
            "_pool": None,
        }  # environments and processes are made anew

    def _open(self) -> _Player:
        """This process's player; the others are started beside it."""
        if self._here is None:
            self._here = _Player(self._make_env, self._weights)
            if self._workers > 1:
                source = cloudpickle.dumps((self._make_env, self._weights))
                self._pool = ProcessPoolExecutor(
                    self._workers - 1, get_context("forkserver"), _start_worker, (source,)
                )
        return self._here

    def _constraint_names(self) -> tuple[str, ...]:
        if self._cost_limit > 0:
            return ("cost",)
        env = self._open().env(0)
        env.reset(seed=0)
        info = env.step(env.action_space.sample() * 0)[-1]
        if "constraint_values" not in info:
            raise ValueError(
                "SCPO: cost_limit 0 leaves no room to step in on a task without info['constraint_values']; give cost_limit > 0"
            )
        return tuple(f"constraint_{i}" for i in range(len(info["constraint_values"])))

    def __call__(self, w: Floats, streams: Sequence[int]) -> Floats:
        """y [M, n, k] for policies w [M, d] and n streams."""
        here = self._open()
        seeds = [self._episode_seed(stream) for stream in streams]
        size = ROWS if len(w) > 1 else ROWS // 2
        units = [
            (row, seeds[first : first + size])
            for row in range(len(w))
            for first in range(0, len(seeds), size)
        ]
        shares = [
            units[i * len(units) // self._workers : (i + 1) * len(units) // self._workers]
            for i in range(self._workers)
        ]
        waiting = [self._pool.submit(_play, w, share) for share in shares[1:]] if self._pool else []
        episodes = here.play(w, shares[0])
        for future in waiting:
            episodes += future.result()
        y = np.array([self._values(episode) for episode in episodes])
        self._meter.steps += sum(episode.steps for episode in episodes)
        self._meter.violations += sum(bool((values > 0).any()) for values in y)
        return y.reshape(len(w), len(streams), -1)

    def _episode_seed(self, stream: int) -> int:
        return int(np.random.SeedSequence([self._seed, stream]).generate_state(1)[0])

    def _values(self, episode: Episode) -> Any:
        if self._cost_limit > 0:
            return [(episode.cost - self._cost_limit) / max(self._cost_limit, 1.0)]
        return episode.worst

    def close(self) -> None:
        if self._here is not None:
            self._here.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Player:
    """One process's environments, and a policy of its own to act in them."""

    def __init__(self, make_env: Callable[[], gym.Env[Any, Any]], weights: PolicyWeights) -> None:
        self._make_env, self._weights = make_env, weights
        self._policy = weights.copy_policy()
        self._act = acting(self._policy)
        self._envs: list[gym.Env[Any, Any]] = []

    def env(self, i: int) -> gym.Env[Any, Any]:
        while len(self._envs) <= i:
            self._envs.append(self._make_env())
        return self._envs[i]

    def play(self, w: Floats, units: Sequence[Unit]) -> list[Episode]:
        """The episodes of ``units``, in order, of policies w [M, d]."""
        episodes: list[Episode] = []
        for row, seeds in units:
            self._weights.write(w[row], self._policy)
            episodes += self._side_by_side(seeds)
        return episodes

    def _side_by_side(self, seeds: Sequence[int]) -> list[Episode]:
        envs = [self.env(i) for i in range(len(seeds))]
        starts = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
        observations = np.zeros((ROWS, *starts[0].shape), starts[0].dtype)
        observations[: len(starts)] = starts
        steps, costs = [0] * len(seeds), [0.0] * len(seeds)
        worst: list[Any] = [None] * len(seeds)
        going = list(range(len(seeds)))
        while going:
            actions = self._act(observations)
            for i in tuple(going):
                observations[i], _, terminated, truncated, info = envs[i].step(actions[i])
                steps[i] += 1
                costs[i] += info["cost"]
                if "constraint_values" in info:
                    values = info["constraint_values"]
                    worst[i] = (
                        np.array(values) if worst[i] is None else np.maximum(worst[i], values)
                    )
                if terminated or truncated:
                    going.remove(i)
        return [Episode(n, float(cost), of) for n, cost, of in zip(steps, costs, worst)]

    def close(self) -> None:
        for env in self._envs:
            env.close()


_player: _Player | None = None  # a worker process's


def _start_worker(source: bytes) -> None:
    global _player
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    end_with_parent()
    torch.set_num_threads(1)
    _player = _Player(*cloudpickle.loads(source))


def _play(w: Floats, units: Sequence[Unit]) -> list[Episode]:
    assert _player is not None
    return _player.play(w, units)
