"""Steps per second of vector environments: in one process, gymnasium's shared-memory workers, SB3's
pipe workers, ours.

    python tests/performance/safety_gymnasium_vector.py [--rounds 15] [--steps 200] [--envs 16]
    [--workers 2] [ids ...]

The same number of environments everywhere. gymnasium and SB3 have one process per environment; ours
has several environments in each, so that a message pays for many steps, and moves some of them as
one process lags, where it can. The last line of a table
is what the machine has to give: as many processes as workers, each stepping its share without ever
waiting for another. Every round times each kind once, in turn, so that load from elsewhere hits all
alike; printed are the medians of environment steps
per second, and the ratios to one worker: the median of the rounds' ratios, the ratio of the median
rounds, and that of the fastest ones, which load from elsewhere disturbs least. Workers need idle
cores to show anything; where two cores are threads of one, or shared with others, the last line is
below two as well.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import scpo_bench  # noqa: F401 - registers the ids
from scpo_bench.runs.worker_env import WorkerVecEnv

_own: list[Any] = []  # in a process of Apart: its vector environment


class Apart:
    """Processes that step an equal share of the environments each, without waiting for one another."""

    def __init__(self, env_id: str, count: int, processes: int) -> None:
        self._shares = np.array_split(np.arange(count), processes)
        context = multiprocessing.get_context("forkserver")
        self._pools = [
            ProcessPoolExecutor(1, context, initializer=_make, initargs=(env_id, len(share)))
            for share in self._shares
        ]

    def reset(self) -> None:
        """Start the processes."""
        self.run(np.zeros((0, sum(map(len, self._shares)), 0)))

    def run(self, actions: np.ndarray) -> None:
        """All of ``actions`` [T, count, k]."""
        for future in [
            pool.submit(_run, actions[:, share]) for pool, share in zip(self._pools, self._shares)
        ]:
            future.result()

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools:
            pool.shutdown()


def _make(env_id: str, count: int) -> None:
    _own.append(WorkerVecEnv([functools.partial(gymnasium.make, env_id)] * count, 1))
    _own[0].reset()


def _run(actions: np.ndarray) -> None:
    for action in actions:
        _own[0].step(action)


def _hidden(make: Any) -> Any:
    """A function of which WorkerVecEnv cannot know that what it makes is always the same, and so
    may be moved.
    """
    return lambda: make()


def kinds(env_id: str, count: int, workers: int) -> dict[str, Any]:
    """The vector environments by kind."""
    fns: list[Any] = [functools.partial(gymnasium.make, env_id)] * count
    return {
        "SB3 DummyVecEnv (one process)": DummyVecEnv(fns),
        "SB3 SubprocVecEnv (pipes)": SubprocVecEnv(fns, start_method="forkserver"),
        "gymnasium async (shared memory)": gymnasium.make_vec(
            env_id, num_envs=count, vectorization_mode="async"
        ),
        "WorkerVecEnv, 1 worker": WorkerVecEnv(fns, 1),
        f"WorkerVecEnv, {workers} workers": WorkerVecEnv(fns, workers),
        f"WorkerVecEnv, {workers} workers, none moved": WorkerVecEnv(
            [_hidden(fn) for fn in fns], workers
        ),
        f"{workers} processes, each on its own": Apart(env_id, count, workers),
    }


def steps_per_second(env: Any, count: int, actions: np.ndarray) -> float:
    """Environment steps per second over ``actions`` [T, count, k]."""
    start = time.perf_counter()
    if isinstance(env, Apart):
        env.run(actions)
    else:
        for action in actions:
            env.step(action)
    return len(actions) * count / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "ids", nargs="*", default=["SafetyHopperVelocity-v1", "SafetyPointGoal1-v0"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for env_id in arguments.ids:
        vectors = kinds(env_id, arguments.envs, arguments.workers)
        for vector in vectors.values():
            vector.reset()
        space = gymnasium.make(env_id).action_space
        assert isinstance(space, gymnasium.spaces.Box)
        rng = np.random.default_rng(0)
        rates: dict[str, list[float]] = {kind: [] for kind in vectors}
        for _ in range(arguments.rounds):
            shape = (arguments.steps, arguments.envs, *space.shape)
            actions = rng.uniform(space.low, space.high, size=shape).astype(space.dtype)
            for kind, vector in vectors.items():
                rates[kind].append(steps_per_second(vector, arguments.envs, actions))
        print(
            f"{env_id}: environment steps/s, median of {arguments.rounds} rounds of {arguments.steps} steps of {arguments.envs}"
        )
        one = np.array(rates["WorkerVecEnv, 1 worker"])
        for kind, measured in rates.items():
            rate = np.array(measured)
            print(
                f"  {kind:<36} {np.median(rate):>7.0f}   times one worker: {np.median(rate / one):.2f} in the median round, "
                f"medians {np.median(rate) / np.median(one):.2f}, fastest {max(rate) / max(one):.2f}",
                flush=True,
            )
        for vector in vectors.values():
            vector.close()


if __name__ == "__main__":
    main()
