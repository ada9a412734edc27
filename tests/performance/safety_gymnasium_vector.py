"""Steps per second of vector environments: in one process, gymnasium's shared-memory workers, SB3's pipe workers.

    python tests/performance/safety_gymnasium_vector.py [--rounds 7] [--steps 400] [--workers 2] [ids ...]

Every round times each kind once, in turn, so that load from elsewhere hits all alike; printed are the medians of
environment steps per second (all workers together), the ratio to one worker of the same kind, and that ratio of the
fastest rounds, which load from elsewhere disturbs least.  Two workers need two idle cores to show anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import scpo_bench  # noqa: F401 - registers the ids


def build(env_id: str) -> Callable[[], gymnasium.Env]:
    """A function that makes one environment; a worker imports scpo_bench by it."""

    def make() -> gymnasium.Env:

        return gymnasium.make(env_id)

    return make


def gymnasium_vector(env_id: str, mode: str, count: int) -> Any:
    """gymnasium's vector environment; with ``async``, observations come through shared memory."""
    return gymnasium.make_vec(env_id, num_envs=count, vectorization_mode=mode)


def kinds(env_id: str, workers: int) -> dict[tuple[str, int], Any]:
    """The vector environments by kind and number of environments."""
    made: dict[tuple[str, int], Any] = {}
    for count in (1, workers):
        fns = [build(env_id)] * count
        made["SB3 DummyVecEnv (one process)", count] = DummyVecEnv(fns)
        made["SB3 SubprocVecEnv (pipes)", count] = SubprocVecEnv(fns, start_method="forkserver")
        made["gymnasium sync (one process)", count] = gymnasium_vector(env_id, "sync", count)
        made["gymnasium async (shared memory)", count] = gymnasium_vector(env_id, "async", count)
    return made


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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for env_id in arguments.ids:
        vectors = kinds(env_id, arguments.workers)
        for vector in vectors.values():
            vector.reset()
        space = gymnasium.make(env_id).action_space
        assert isinstance(space, gymnasium.spaces.Box)
        rng = np.random.default_rng(0)
        rates: dict[tuple[str, int], list[float]] = {key: [] for key in vectors}
        for _ in range(arguments.rounds):
            for key, vector in vectors.items():
                shape = (arguments.steps, key[1], *space.shape)
                actions = rng.uniform(space.low, space.high, size=shape).astype(space.dtype)
                rates[key].append(steps_per_second(vector, key[1], actions))
        print(f"{env_id}: environment steps/s, median of {arguments.rounds} rounds of {arguments.steps} steps")
        for kind in dict.fromkeys(kind for kind, _ in vectors):
            one, many = (np.array(rates[kind, count]) for count in (1, arguments.workers))
            print(
                f"  {kind:<34} 1: {np.median(one):>7.0f}   {arguments.workers}: {np.median(many):>7.0f}   "
                f"ratio {np.median(many / one):.2f}   of the fastest {many.max() / one.max():.2f}",
                flush=True,
            )
        for vector in vectors.values():
            vector.close()


if __name__ == "__main__":
    main()
