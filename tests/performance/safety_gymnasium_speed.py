"""Speed of the fast path against the original code path.

    python tests/performance/safety_gymnasium_speed.py [--rounds 15] [--steps 200] [ids ...]

Prints a table: steps/s of both paths and their ratio, then milliseconds per reset of both and their
ratio. A round times the same steps, from the same seed with the same actions, on one path and then
the other; a ratio is the median of the rounds' ratios, so that other load affects both alike.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import gymnasium
import numpy as np

import scpo_bench  # noqa: F401 - registers the ids

TASKS = (
    "SafetyPointGoal1-v0",
    "SafetyPointButton1-v0",
    "SafetyCarGoal1-v0",
    "SafetyPointGoal2-v0",
    "SafetyPointCircle1-v0",
)
RESET_ROUNDS = 5


def timed_steps(env: Any, actions: list[np.ndarray], seed: int) -> float:
    """Seconds for the actions, resets apart."""
    env.reset(seed=seed)
    seconds = 0.0
    for action in actions:
        start = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action)
        seconds += time.perf_counter() - start
        if terminated or truncated:
            env.reset(seed=seed)
    return seconds


def timed_reset(env: Any, seed: int) -> float:
    """Seconds for one reset (not the first, which compiles the world on both paths)."""
    start = time.perf_counter()
    env.reset(seed=seed)
    return time.perf_counter() - start


def measure(env_id: str, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds and ratios of one task."""
    fast, original = gymnasium.make(env_id), gymnasium.make(env_id, fast=False)
    fast.action_space.seed(0)
    fast.reset(seed=0)
    original.reset(seed=0)
    times: dict[str, list[float]] = {
        "fast": [],
        "original": [],
        "fast_reset": [],
        "original_reset": [],
    }
    for seed in range(rounds):
        actions = [fast.action_space.sample() for _ in range(steps)]
        times["fast"].append(timed_steps(fast, actions, seed))
        times["original"].append(timed_steps(original, actions, seed))
        if seed < RESET_ROUNDS:
            times["fast_reset"].append(timed_reset(fast, seed + 1000))
            times["original_reset"].append(timed_reset(original, seed + 1000))
    fast.close()
    original.close()
    medians = {name: float(np.median(values)) for name, values in times.items()}
    medians["speedup"] = float(np.median(np.array(times["original"]) / times["fast"]))
    medians["reset_speedup"] = float(
        np.median(np.array(times["original_reset"]) / times["fast_reset"])
    )
    return medians


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    print(
        f"{'task':<24} {'fast':>8} {'original':>9} {'ratio':>6}   "
        f"{'reset ms':>9} {'original':>9} {'ratio':>6}"
    )
    for env_id in arguments.ids:
        m = measure(env_id, arguments.rounds, arguments.steps)
        print(
            f"{env_id:<24} {arguments.steps / m['fast']:>6.0f}/s "
            f"{arguments.steps / m['original']:>7.0f}/s {m['speedup']:>6.2f}   "
            f"{1e3 * m['fast_reset']:>9.2f} {1e3 * m['original_reset']:>9.1f} "
            f"{m['reset_speedup']:>6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
