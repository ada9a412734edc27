"""Random stepping over random tasks, seeds and actions: no crash, no NaN, no memory growth.

    python tests/performance/safety_gymnasium_soak.py --minutes 20 [--seed 0] [--vision]
        [--original 0.1]

Tasks are made, used for up to 400 steps with resets, sometimes replaced by their own pickle, and
closed. Actions are random, extreme, zero, held, or beyond the bounds. Memory is the process's
resident set after a collection and, on glibc, after the allocator has given its free pages back
(raw readings vary by the 50 to 100 MB that it keeps of a compilation); the raw one is printed as
well. Growth is counted from the end of the warm-up (a tenth of the time, 60 s at least) to the end,
as medians of each tenth. ``--original`` gives that share of the environments the original code
path; it makes memory harder to judge, since MuJoCo keeps what it compiled last, with the sky
(190 MB) if that was the original path's. Exit status 1 on a crash, a value that is not finite, or
growth beyond 50 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import pickle
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np

import scpo_bench  # noqa: F401 - registers the ids
from scpo_bench.envs.safety_gymnasium.tasks import TASKS

GROWTH_LIMIT_MB = 50.0


def resident_mb() -> float:
    """The process's resident memory in MB (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def give_back_free_pages() -> None:
    """Ask glibc's allocator to; elsewhere, nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def action_of(
    rng: np.random.Generator, kind: int, space: gymnasium.spaces.Box, held: np.ndarray
) -> np.ndarray:
    """One action of a kind: random, a corner, zero, held, far outside, or an edge per component."""
    if kind == 0:
        return rng.uniform(space.low, space.high)
    if kind == 1:
        return np.where(rng.random(space.shape) < 0.5, space.low, space.high)
    if kind == 2:
        return np.zeros(space.shape)
    if kind == 3:
        return held
    if kind == 4:
        return 1e3 * rng.standard_normal(space.shape)
    return rng.choice([np.nextafter(1.0, 0.0), -1.0, 1.0, 1e-300], size=space.shape)


def check_finite(env_id: str, observation: object, reward: float, cost: float) -> None:
    """Raise if anything is not finite."""
    parts = observation.values() if isinstance(observation, dict) else [observation]
    if not all(np.isfinite(part).all() for part in parts):
        raise FloatingPointError(f"{env_id}: observation not finite")
    if not (np.isfinite(reward) and np.isfinite(cost) and cost >= 0.0):
        raise FloatingPointError(f"{env_id}: reward {reward}, cost {cost}")


def use_one_task(
    rng: np.random.Generator, ids: list[str], tally: dict[str, int], original: float
) -> None:
    """Make a task, step it for a while, close it."""
    env_id = str(rng.choice(ids))
    fast = bool(rng.random() >= original)
    env = gymnasium.make(env_id, disable_env_checker=True, fast=fast)
    tally["environments"] += 1
    observation, _ = env.reset(seed=int(rng.integers(2**32)))
    space = env.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    held = rng.uniform(space.low, space.high)
    for step in range(int(rng.integers(50, 400))):
        if step % 20 == 0:
            kind = int(rng.integers(6))
            held = rng.uniform(space.low, space.high)
        action = action_of(rng, kind, space, held).astype(space.dtype)
        observation, reward, terminated, truncated, info = env.step(action)
        check_finite(env_id, observation, float(reward), info["cost"])
        tally["steps"] += 1
        tally["costly steps"] += info["cost"] > 0.0
        tally["goals"] += "goal_met" in info
        if rng.random() < 0.005:
            copy = pickle.loads(pickle.dumps(env))
            env.close()
            env = copy
            tally["pickles"] += 1
        if terminated or truncated or rng.random() < 0.01:
            env.reset(seed=int(rng.integers(2**32)) if rng.random() < 0.5 else None)
            tally["resets"] += 1
    env.close()


def main() -> None:
    """Run, print a line per tenth, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--vision", action="store_true", help="include the vision ids (needs an OpenGL backend)"
    )
    parser.add_argument(
        "--original", type=float, default=0.0, help="share of environments on the original path"
    )
    arguments = parser.parse_args()
    ids = [
        task.id
        for task in TASKS.values()
        if not task.needs_missing_assets and (arguments.vision or task.variant != "vision")
    ]
    rng = np.random.default_rng(arguments.seed)
    tally = dict.fromkeys(
        ("environments", "steps", "resets", "goals", "costly steps", "pickles"), 0
    )
    seconds = 60 * arguments.minutes
    warm_up = max(60.0, seconds / 10)
    start = time.monotonic()
    readings: list[tuple[float, float]] = []
    shown = 0
    while (elapsed := time.monotonic() - start) < seconds:
        use_one_task(rng, ids, tally, arguments.original)
        gc.collect()
        raw = resident_mb()
        give_back_free_pages()
        readings.append((elapsed, resident_mb()))
        if elapsed >= shown * seconds / 10:
            shown += 1
            print(
                f"{elapsed / 60:5.1f} min  {readings[-1][1]:7.1f} MB (raw {raw:.1f})  {tally}",
                flush=True,
            )
    times, memory = np.array(readings).T
    first = memory[(times >= warm_up) & (times < warm_up + seconds / 10)]
    last = memory[times >= seconds * 0.9]
    if not (len(first) and len(last)):
        sys.exit("too short to judge memory: give it 3 minutes or more")
    growth = float(np.median(last) - np.median(first))
    print(
        f"resident memory: {np.median(first):.1f} MB after warm-up, "
        f"{np.median(last):.1f} MB at the end, {growth:+.1f}"
    )
    if growth > GROWTH_LIMIT_MB:
        sys.exit(f"memory grew by {growth:.1f} MB, more than {GROWTH_LIMIT_MB}")


if __name__ == "__main__":
    main()
