"""Steps per second of vector environments: in one process, gymnasium's shared-memory workers, SB3's pipe workers, ours.

    python tests/performance/safety_gymnasium_vector.py [--rounds 21] [--steps 50] [--envs 16] [--workers 2] [ids ...]

The same number of environments everywhere. gymnasium and SB3 have one process per environment; ours has several environments in
each, so that a message pays for many steps. Every round times each kind once, in turn, so that load from elsewhere hits all alike;
printed are the medians of environment steps per second and, for ours, the ratio to one worker of the median rounds and of the fastest
ones, which load from elsewhere disturbs least. Two workers need two idle cores to show anything.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import scpo_bench  # noqa: F401 - registers the ids
from scpo_bench.worker_env import WorkerVecEnv


def kinds(env_id: str, count: int, workers: int) -> dict[str, Any]:
    """The vector environments by kind."""
    fns: list[Any] = [functools.partial(gymnasium.make, env_id)] * count
    return {
        "SB3 DummyVecEnv (one process)": DummyVecEnv(fns),
        "SB3 SubprocVecEnv (pipes)": SubprocVecEnv(fns, start_method="forkserver"),
        "gymnasium async (shared memory)": gymnasium.make_vec(env_id, num_envs=count, vectorization_mode="async"),
        "WorkerVecEnv, 1 worker": WorkerVecEnv(fns, 1),
        f"WorkerVecEnv, {workers} workers": WorkerVecEnv(fns, workers),
    }


def steps_per_second(env: Any, count: int, actions: np.ndarray) -> float:
    """Environment steps per second over ``actions`` [T, count, k]."""
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return len(actions) * count / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", default=["SafetyHopperVelocity-v1", "SafetyPointGoal1-v0"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=50)
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
        for kind, rate in rates.items():
            print(f"  {kind:<34} {np.median(rate):>7.0f}")
        *_, one, many = rates.values()
        print(
            f"  workers: {np.median(many) / np.median(one):.2f} times one, of the fastest {max(many) / max(one):.2f}", flush=True
        )
        for vector in vectors.values():
            vector.close()


if __name__ == "__main__":
    main()
