"""Constraint values by rollouts: of any parameter space, on any task.

Where the task's dynamics are pure functions, all start states are one array
(:class:`BatchedRollouts`); elsewhere whole episodes of Gymnasium environments are run, in
several processes (:class:`EpisodeRollouts`). Policies act deterministically.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Protocol

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor, VecNormalize
from torch import Tensor

from scpo_bench.contract import BatchedTask, Components, Floats, ProbeMeter
from scpo_bench.errors import UserError
from scpo_bench.processes import end_with_parent
from scpo_bench.scpo.spaces import ParameterSpace, Policies

# Policies are evaluated in groups of about this many (policy, start) pairs: the working set then
# stays in the processor's cache.
PAIRS_AT_ONCE = 8192
# Episodes run side by side. The policy always gets this many observations: an action must not
# depend, by rounding, on which other episodes are still running.
ROWS = 4


class Rollouts(Protocol):
    """y = constraint values of policies under numbered streams of noise.

    names: of the k constraints. exact: there is no noise, and every stream gives the same values.
    span: smallest and largest possible y where y counts costs, infinite if unknown; else None.
    """

    names: tuple[str, ...]
    exact: bool
    span: tuple[float, float] | None

    def __call__(self, w: Floats, streams: Sequence[int]) -> Floats:
        """y [M, n, k] for policies w [M, d] and n streams; equal streams mean equal noise."""
        ...

    def close(self) -> None: ...


def refuse_wrappers(env: VecEnv, remedy: str = "") -> None:
    """Raise UserError for a wrapper of the vector environment that rollouts would leave out.

    What it does to costs, actions or observations would not be seen, and an unsafe policy could be
    certified. The harness's recorder, VecMonitor, and VecNormalize of rewards alone do none of it.
    """
    while isinstance(env, VecEnvWrapper):
        recorder = "probe_meter" in vars(env)
        rewards_only = isinstance(env, VecNormalize) and not env.norm_obs
        if not (recorder or rewards_only or isinstance(env, VecMonitor)):
            raise UserError(f"SCPO: its rollouts do not see wrapper {type(env).__name__}{remedy}")
        env = env.venv


class BatchedRollouts:
    """Rollouts from all design starts of a task whose dynamics are pure functions.

    y_i = (1 / sharpness) log sum exp(sharpness * c_i) over start states and steps, with c_i the
    task's signed, relative constraint values: a smooth upper bound on their maximum, so y_i <= 0
    implies that no evaluated step violates constraint i. Disturbances are left out.
    noise_std: standard deviation of normal noise that is added to y, one draw per stream. Every
    stream is then charged as rollouts of its own.
    """

    span: tuple[float, float] | None = None

    def __init__(
        self,
        task: BatchedTask,
        space: ParameterSpace,
        starts: int,
        sharpness: float,
        meter: ProbeMeter,
        noise_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.names, self.exact = task.constraint_names, noise_std == 0
        self.convex_starts = task.convex_starts
        self._task, self._space, self._sharpness, self._meter = task, space, sharpness, meter
        self._noise_std, self._seed = noise_std, seed
        self._starts = tuple(
            torch.as_tensor(s, dtype=torch.float64) for s in task.design_starts(starts)
        )
        self.starts = len(self._starts[0])

    @property
    def start_states(self) -> tuple[Floats, ...]:
        """One array [n] per component."""
        return tuple(component.numpy().copy() for component in self._starts)

    @start_states.setter
    def start_states(self, states: tuple[Floats, ...]) -> None:
        self._starts = tuple(torch.as_tensor(component) for component in states)

    def add_starts(self, n: int, rng: np.random.Generator) -> None:
        """n more start states, sampled."""
        more = self.sample_states(n, rng)
        self._starts = tuple(
            torch.cat([s, torch.as_tensor(m, dtype=s.dtype)]) for s, m in zip(self._starts, more)
        )
        self.starts += n

    def set_starts(self, which: NDArray[np.intp], states: Sequence[Floats]) -> None:
        """Replace start states. states: one array [len(which)] per component."""
        for component, new in zip(self._starts, states):
            component[which] = torch.as_tensor(new, dtype=component.dtype)

    def sample_states(self, n: int, rng: np.random.Generator) -> Components:
        """n start states as the task's own episodes begin."""
        return self._task.sample_starts(n, rng)

    @functools.cached_property
    def bound_names(self) -> NDArray[np.intp]:
        """[P], the index of the name of each of one start's constraints, in their order."""
        width = self._task.action_space.shape[0]
        one = tuple(s[None, :1] for s in self._starts)
        bounds = self._bounds_of(lambda x: x.new_zeros(*x.shape[:-1], width), one)
        return np.array([name for name, _ in bounds])

    def bounds(self, w: Floats, starts: NDArray[np.intp] | Components | None = None) -> Floats:
        """Every signed bound's value for policies w [M, d]: [M, n P], start after start.

        starts: [n], indices of the start states, or the states themselves; by default all.
        """
        chosen = self._starts
        if isinstance(starts, tuple):
            chosen = tuple(torch.as_tensor(s, dtype=torch.float64) for s in starts)
        elif starts is not None:
            chosen = tuple(s[starts] for s in self._starts)
        n, parts = len(chosen[0]), []
        with torch.no_grad():
            for part in torch.as_tensor(w).split(self._at_once(n)):
                state = tuple(s.expand(len(part), -1) for s in chosen)
                values = [value for _, value in self._bounds_of(self._space.policies(part), state)]
                parts.append(torch.stack(values, dim=-1).reshape(len(part), -1))
        result = torch.cat(parts).numpy()
        self._meter.violations += int((result > 0).any(axis=1).sum())
        self._meter.steps += len(w) * n * self._task.constraint_horizon
        return result

    def _bounds_of(self, act: Policies, state: Components) -> Iterator[tuple[int, Tensor]]:
        horizon = self._task.constraint_horizon
        for step in range(horizon):
            action = act(torch.stack(state, dim=-1)).double().unbind(dim=-1)
            following = self._task.next_state(state, action)
            yield from self._task.bounds(state, action, following, step + 1 == horizon)
            state = following

    def _at_once(self, starts: int) -> int:
        return max(1, PAIRS_AT_ONCE // starts) if self._space.vectorized else 1

    def __call__(self, w: Floats, streams: Sequence[int] = (0,)) -> Floats:
        n, k = self.starts, len(self.names)
        smooth = []
        with torch.no_grad():
            for part in torch.as_tensor(w).split(self._at_once(n)):
                values = self.constraint_values(part)
                self._meter.violations += int((values.amax(dim=(1, 2)) > 0).sum())
                smooth.append(torch.logsumexp(self._sharpness * values, dim=-1) / self._sharpness)
        self._meter.steps += len(w) * n * self._task.constraint_horizon * len(streams)
        noise = [np.random.default_rng([self._seed, stream]).normal(size=k) for stream in streams]
        return torch.cat(smooth).numpy()[:, None] + self._noise_std * np.stack(noise)

    def constraint_values(self, w: Tensor) -> Tensor:
        """Every constraint value of every rollout of policies w [M, d]: [M, k, T * N]."""
        act = self._space.policies(w)
        state = tuple(s.expand(len(w), -1) for s in self._starts)
        horizon = self._task.constraint_horizon
        values = []
        for step in range(horizon):
            action = act(torch.stack(state, dim=-1)).double().unbind(dim=-1)
            following = self._task.next_state(state, action)
            last = step + 1 == horizon
            values.append(
                torch.stack(self._task.constraint_values(state, action, following, last), dim=1)
            )
            state = following
        return torch.cat(values, dim=-1)

    def close(self) -> None:
        pass


class EpisodeRollouts:
    """Whole episodes: one per policy and stream, started from a seed of the stream's own.

    y = (episode cost - cost_limit) / max(cost_limit, 1), constraint "cost"; where cost_limit is 0,
    the largest signed constraint values of the episode (``info["constraint_values"]``). With
    ``workers`` > 1 that many processes run them; the result does not depend on it.
    largest_cost: of an episode; 0: its number of steps, if the environment's specification has one.
    Raises UserError if cost_limit is 0 and the task has no signed values: then there is no room in
    which to take a step.
    """

    exact = False

    def __init__(
        self,
        make_env: Callable[[], gym.Env[Any, Any]],
        space: ParameterSpace,
        cost_limit: float,
        seed: int,
        workers: int,
        meter: ProbeMeter,
        largest_cost: float = 0.0,
    ) -> None:
        self._seed, self._workers, self._meter = seed, workers, meter
        self._episodes = _Episodes(make_env, space, cost_limit)
        self._pool: ProcessPoolExecutor | None = None
        self.names = self._episodes.constraint_names()
        self.span = self._episodes.span(largest_cost)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # processes are started anew

    def __call__(self, w: Floats, streams: Sequence[int]) -> Floats:
        roots = [np.random.SeedSequence([self._seed, stream]) for stream in streams]
        seeds = [int(root.generate_state(1)[0]) for root in roots]
        # Of a single policy, half as many at once: two processes then have something to share.
        size = ROWS if len(w) > 1 else ROWS // 2
        groups = [seeds[first : first + size] for first in range(0, len(seeds), size)]
        rows, seeds_of = zip(*((row, group) for row in w for group in groups))
        if self._workers == 1:
            results = list(map(self._episodes.run, rows, seeds_of))
        else:
            if self._pool is None:
                source = cloudpickle.dumps(self._episodes)
                self._pool = ProcessPoolExecutor(
                    self._workers, get_context("forkserver"), _start_worker, (source,)
                )
            results = list(self._pool.map(_run, rows, seeds_of))
        y = np.concatenate([values for values, _ in results])
        self._meter.steps += sum(steps for _, steps in results)
        self._meter.violations += int((y > 0).any(axis=1).sum())
        return y.reshape(len(w), len(streams), -1)

    def close(self) -> None:
        self._episodes.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Episodes:
    """One process's environments, and the policies that act in them."""

    def __init__(
        self, make_env: Callable[[], gym.Env[Any, Any]], space: ParameterSpace, cost_limit: float
    ) -> None:
        self._make_env, self._space, self._cost_limit = make_env, space, cost_limit
        self._envs: list[gym.Env[Any, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_envs": []}  # environments are created anew

    def _env(self, i: int) -> gym.Env[Any, Any]:
        while len(self._envs) <= i:
            self._envs.append(self._make_env())
        return self._envs[i]

    def constraint_names(self) -> tuple[str, ...]:
        if self._cost_limit > 0:
            return ("cost",)
        env = self._env(0)
        env.reset(seed=0)
        info = env.step(env.action_space.sample() * 0)[-1]
        if "constraint_values" not in info:
            raise UserError(
                "SCPO: cost_limit 0 leaves no room to step in on a task without "
                "info['constraint_values']; give cost_limit > 0"
            )
        return tuple(f"constraint_{i}" for i in range(len(info["constraint_values"])))

    def span(self, largest_cost: float) -> tuple[float, float] | None:
        """The smallest and the largest y: of no cost, and of ``largest_cost``."""
        if self._cost_limit == 0:
            return None
        spec = self._env(0).spec
        largest = largest_cost or (spec and spec.max_episode_steps) or np.inf
        return self._relative(0.0), self._relative(largest)

    def _relative(self, cost: Any) -> Any:
        return (cost - self._cost_limit) / max(self._cost_limit, 1.0)

    def run(self, w: Floats, seeds: Sequence[int]) -> tuple[Floats, int]:
        """(y [n, k], steps) of n episodes of policy w [d], side by side."""
        act = self._space.policies(torch.as_tensor(w)[None])
        envs = [self._env(i) for i in range(len(seeds))]
        starts = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
        observations = np.zeros((ROWS, *starts[0].shape), starts[0].dtype)
        observations[: len(starts)] = starts
        costs: list[list[float]] = [[] for _ in envs]
        values: list[list[Floats]] = [[] for _ in envs]
        running = list(range(len(seeds)))
        while running:
            actions = act(torch.as_tensor(observations)[None])[0].numpy()
            for i in tuple(running):
                observations[i], _, terminated, truncated, info = envs[i].step(actions[i])
                costs[i].append(info["cost"])
                if self._cost_limit == 0:
                    values[i].append(np.array(info["constraint_values"]))
                if terminated or truncated:
                    running.remove(i)
        steps = sum(map(len, costs))
        if self._cost_limit == 0:
            return np.stack([np.max(episode, axis=0) for episode in values]), steps
        return self._relative(np.array([[sum(episode)] for episode in costs])), steps

    def close(self) -> None:
        for env in self._envs:
            env.close()


_episodes: _Episodes | None = None  # of a worker process


def _start_worker(source: bytes) -> None:
    global _episodes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    end_with_parent()
    torch.set_num_threads(1)
    _episodes = cloudpickle.loads(source)


def _run(w: Floats, seeds: Sequence[int]) -> tuple[Floats, int]:
    assert _episodes is not None
    return _episodes.run(w, seeds)
