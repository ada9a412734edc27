"""Constraint values by rollouts: of any parameter space, on any task.

Where the task's dynamics are pure functions, all start states are one array
(:class:`BatchedRollouts`); elsewhere whole episodes of Gymnasium environments are played, in
several processes (:class:`EpisodeRollouts`). Policies act deterministically.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from scpo_bench.contract import BatchedTask, Floats, ProbeMeter
from scpo_bench.scpo.spaces import ParameterSpace

# Policies are evaluated in groups of about this many (policy, start) pairs: the working set then
# stays in the processor's cache.
PAIRS_AT_ONCE = 8192
# Episodes played side by side. The policy always gets this many observations: an action must not
# depend, by rounding, on which other episodes are still running.
ROWS = 4


class Rollouts(Protocol):
    """y = constraint values of policies under numbered streams of noise.

    names: of the k constraints. exact: there is no noise, and every stream gives the same values.
    """

    names: tuple[str, ...]
    exact: bool

    def __call__(self, w: Floats, streams: Sequence[int]) -> Floats:
        """y [M, n, k] for policies w [M, d] and n streams; equal streams mean equal noise."""
        ...

    def close(self) -> None: ...


class BatchedRollouts:
    """Rollouts from all design starts of a task whose dynamics are pure functions.

    y_i = (1 / sharpness) log sum exp(sharpness * c_i) over start states and steps, with c_i the
    task's signed, relative constraint values: a smooth upper bound on their maximum, so y_i <= 0
    implies that no evaluated step violates constraint i. Disturbances are left out.
    noise_std: standard deviation of normal noise that is added to y, one draw per stream. Every
    stream is then charged as rollouts of its own.
    """

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
        self._task, self._space, self._sharpness, self._meter = task, space, sharpness, meter
        self._noise_std, self._seed = noise_std, seed
        self._starts = tuple(
            torch.as_tensor(s, dtype=torch.float64) for s in task.design_starts(starts)
        )

    def __call__(self, w: Floats, streams: Sequence[int] = (0,)) -> Floats:
        n = len(self._starts[0])
        at_once = max(1, PAIRS_AT_ONCE // n) if self._space.vectorized else 1
        with torch.no_grad():
            values = [self.constraint_values(part) for part in torch.as_tensor(w).split(at_once)]
            worst = torch.cat([part.amax(dim=(1, 2)) for part in values])
            y = torch.cat([self._smooth_maximum(part) for part in values]).numpy()
        self._meter.steps += len(w) * n * self._task.constraint_horizon * len(streams)
        self._meter.violations += int((worst > 0).sum())
        noise = [
            np.random.default_rng([self._seed, stream]).normal(size=len(self.names))
            for stream in streams
        ]
        return y[:, None] + self._noise_std * np.stack(noise)

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

    def _smooth_maximum(self, values: Tensor) -> Tensor:
        """[M, k] of values [M, k, T * N]."""
        if not self._space.vectorized:
            v = values[0].T.contiguous().numpy()
            worst = v.max(axis=0)
            g = worst + np.log(np.exp(self._sharpness * (v - worst)).sum(axis=0)) / self._sharpness
            return torch.as_tensor(g)[None]
        return torch.logsumexp(self._sharpness * values, dim=-1) / self._sharpness

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Episode:
    """The result of one episode.

    worst: the largest signed constraint values [k], or None where the task has none.
    """

    steps: int
    cost: float
    worst: Floats | None


Play = tuple[Floats, list[int]]  # (w [d], seeds of episodes)


class EpisodeRollouts:
    """Whole episodes: one per policy and stream, started from a seed of the stream's own.

    y = (episode cost - cost_limit) / max(cost_limit, 1), constraint "cost"; where cost_limit is 0,
    the largest signed constraint values of the episode (``info["constraint_values"]``). With
    ``workers`` > 1 that many processes play them; the result does not depend on it.
    Raises ValueError if cost_limit is 0 and the task has no signed values: then there is no room in
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
    ) -> None:
        self._make_env, self._space, self._meter = make_env, space, meter
        self._cost_limit, self._seed, self._workers = cost_limit, seed, workers
        self._local: _Worker | None = None
        self._pool: ProcessPoolExecutor | None = None
        self.names = self._constraint_names()

    def __getstate__(self) -> dict[str, Any]:
        # Environments and processes are created anew.
        return {**self.__dict__, "_local": None, "_pool": None}

    def _here(self) -> _Worker:
        if self._local is None:
            self._local = _Worker(self._make_env, self._space)
        return self._local

    def _constraint_names(self) -> tuple[str, ...]:
        if self._cost_limit > 0:
            return ("cost",)
        env = self._here().env(0)
        env.reset(seed=0)
        info = env.step(env.action_space.sample() * 0)[-1]
        if "constraint_values" not in info:
            raise ValueError(
                "SCPO: cost_limit 0 leaves no room to step in on a task without "
                "info['constraint_values']; give cost_limit > 0"
            )
        return tuple(f"constraint_{i}" for i in range(len(info["constraint_values"])))

    def __call__(self, w: Floats, streams: Sequence[int]) -> Floats:
        seeds = [
            int(np.random.SeedSequence([self._seed, stream]).generate_state(1)[0])
            for stream in streams
        ]
        # Of a single policy, half as many at once: two processes then have something to share.
        size = ROWS if len(w) > 1 else ROWS // 2
        plays = [
            (row, seeds[first : first + size]) for row in w for first in range(0, len(seeds), size)
        ]
        if self._workers > 1:
            if self._pool is None:
                source = cloudpickle.dumps((self._make_env, self._space))
                self._pool = ProcessPoolExecutor(
                    self._workers, get_context("forkserver"), _start_worker, (source,)
                )
            played = list(self._pool.map(_play, plays))
        else:
            played = [self._here().play(play) for play in plays]
        episodes = [episode for group in played for episode in group]
        y = np.array([self._values(episode) for episode in episodes])
        self._meter.steps += sum(episode.steps for episode in episodes)
        self._meter.violations += int((y > 0).any(axis=1).sum())
        return y.reshape(len(w), len(streams), -1)

    def _values(self, episode: Episode) -> Any:
        if self._cost_limit > 0:
            return [(episode.cost - self._cost_limit) / max(self._cost_limit, 1.0)]
        return episode.worst

    def close(self) -> None:
        if self._local is not None:
            self._local.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Worker:
    """One process's environments, and the policies that act in them."""

    def __init__(self, make_env: Callable[[], gym.Env[Any, Any]], space: ParameterSpace) -> None:
        self._make_env, self._space = make_env, space
        self._envs: list[gym.Env[Any, Any]] = []

    def env(self, i: int) -> gym.Env[Any, Any]:
        while len(self._envs) <= i:
            self._envs.append(self._make_env())
        return self._envs[i]

    def play(self, play: Play) -> list[Episode]:
        """Its episodes, side by side: one prediction serves them all."""
        w, seeds = play
        act = self._space.policies(torch.as_tensor(w)[None])
        envs = [self.env(i) for i in range(len(seeds))]
        starts = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
        observations = np.zeros((ROWS, *starts[0].shape), starts[0].dtype)
        observations[: len(starts)] = starts
        steps, costs = [0] * len(seeds), [0.0] * len(seeds)
        worst: list[Any] = [None] * len(seeds)
        running = list(range(len(seeds)))
        while running:
            actions = act(torch.as_tensor(observations)[None])[0].numpy()
            for i in tuple(running):
                observations[i], _, terminated, truncated, info = envs[i].step(actions[i])
                steps[i] += 1
                costs[i] += info["cost"]
                if "constraint_values" in info:
                    values = np.array(info["constraint_values"])
                    worst[i] = values if worst[i] is None else np.maximum(worst[i], values)
                if terminated or truncated:
                    running.remove(i)
        return [Episode(n, float(cost), most) for n, cost, most in zip(steps, costs, worst)]

    def close(self) -> None:
        for env in self._envs:
            env.close()


_worker: _Worker | None = None  # of a worker process


def _start_worker(source: bytes) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = _Worker(*cloudpickle.loads(source))


def _end_with_parent() -> None:
    """A killed parent must not leave its workers behind."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _play(play: Play) -> list[Episode]:
    assert _worker is not None
    return _worker.play(play)
