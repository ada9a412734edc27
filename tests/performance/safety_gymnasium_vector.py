"""Steps per second and memory of vector environments that use one process or several.

    python tests/performance/safety_gymnasium_vector.py [ids ...] [--rounds 15] [--steps 200]
        [--envs 4 16] [--workers 2]

SB3's and gymnasium's classes have one process per environment; ``WorkerVecEnv`` has several
environments in each of ``--workers`` processes. Every round times each kind once, in turn, so that
other load on the machine affects all alike. Printed are the median of the environment steps per
second, the median of the rounds' ratios to one process, and the memory of the other processes
(proportional set size). Several processes need idle cores to show anything.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import scpo_bench  # noqa: F401 - registers the ids
from scpo_bench.runs.worker_env import WorkerVecEnv

ONE = "SB3 DummyVecEnv (one process)"


def make(kind: str, env_id: str, count: int, workers: int) -> Any:
    """The vector environment of that kind."""
    fns: list[Any] = [functools.partial(gymnasium.make, env_id)] * count
    if kind == ONE:
        return DummyVecEnv(fns)
    if kind == "SB3 SubprocVecEnv":
        return SubprocVecEnv(fns, start_method="forkserver")
    if kind == "gymnasium AsyncVectorEnv":
        return gymnasium.make_vec(env_id, num_envs=count, vectorization_mode="async")
    return WorkerVecEnv(fns, workers)


KINDS = (ONE, "SB3 SubprocVecEnv", "gymnasium AsyncVectorEnv", "WorkerVecEnv")


def memory_mb(processes: list[Any]) -> float:
    """Proportional set size of the processes."""
    lines = [
        line
        for process in processes
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    ]
    return sum(int(line.split()[1]) for line in lines) / 1024


def steps_per_second(env: Any, actions: np.ndarray) -> float:
    """Environment steps per second over ``actions`` [T, count, k]."""
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    return len(actions) * actions.shape[1] / (time.perf_counter() - start)


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
    parser.add_argument("--envs", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    for env_id in arguments.ids:
        for count in arguments.envs:
            measure(env_id, count, arguments.rounds, arguments.steps, arguments.workers)


def measure(env_id: str, count: int, rounds: int, steps: int, workers: int) -> None:
    """Print the table of one task and number of environments."""
    vectors, memory = {}, {}
    for kind in KINDS:
        before = set(multiprocessing.active_children())
        vectors[kind] = make(kind, env_id, count, workers)
        vectors[kind].reset()
        memory[kind] = memory_mb([*(set(multiprocessing.active_children()) - before)])
    space = vectors[ONE].action_space
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        shape = (steps, count, *space.shape)
        actions = rng.uniform(space.low, space.high, size=shape).astype(space.dtype)
        for kind, vector in vectors.items():
            rates[kind].append(steps_per_second(vector, actions))
    print(f"{env_id}, {count} environments, {rounds} rounds of {steps} steps")
    for kind in KINDS:
        ratio = np.median(np.array(rates[kind]) / rates[ONE])
        print(
            f"  {kind:<30} {np.median(rates[kind]):>7.0f} steps/s, {ratio:.2f} times one process, "
            f"{memory[kind]:.0f} MB",
            flush=True,
        )
    for vector in vectors.values():
        vector.close()


if __name__ == "__main__":
    main()
