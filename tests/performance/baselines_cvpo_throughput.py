"""CVPO's gradient updates per second on one core.

    OPENBLAS_NUM_THREADS=1 python tests/performance/baselines_cvpo_throughput.py

Batch 256, K = 16, 128x128, two critics each for reward and cost. Required: at least 50 updates/s,
and the exact dual at most 15 % of their time. Time is the process's own (one thread, so it is one
core's), best of five repetitions, so that other processes on the machine do not decide. The time of
the matrix products alone is printed for comparison.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from scpo_bench.baselines import cvpo as cvpo_module
from scpo_bench.baselines.cvpo import CVPO

BATCH, K, WIDTH, UPDATES = 256, 16, 128, 100


class Random(gym.Env[Any, Any]):
    """Sizes of HalfCheetahVelocity; costs and rewards conflict, so the constraint is active."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (17,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (6,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.elapsed = 0
        return self.np_random.random(17, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.elapsed += 1
        observation = self.np_random.random(17, dtype=np.float32)
        return (
            observation,
            float(action[0]),
            False,
            self.elapsed >= 100,
            {"cost": float(action[0] > 0)},
        )


def matrix_products_s() -> float:
    """Seconds for the E-step's hidden layer alone, best of 20.

    Four products [4096, 128] x [128, 128], in cache-sized slices.
    """
    hidden, weight = torch.randn(8, 4, 512, WIDTH), torch.randn(4, WIDTH, WIDTH)
    best = float("inf")
    for _ in range(20):
        start = time.process_time()
        for part in hidden:
            torch.bmm(part, weight)
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    torch.set_num_threads(1)
    agent = CVPO(
        "MlpPolicy",
        Random(),
        seed=0,
        cost_limit=20.0,
        episode_steps=100,
        steps_per_update=2000,
        learning_starts=2000,
        batch_size=BATCH,
        action_samples=K,
        net_arch=(WIDTH, WIDTH),
    )
    agent.learn(2001)
    dual_s = 0.0
    solve = cvpo_module.e_step

    def timed(*arguments: Any) -> Any:
        nonlocal dual_s
        start = time.process_time()
        result = solve(*arguments)
        dual_s += time.process_time() - start
        return result

    cvpo_module.e_step = timed
    best = (0.0, 0.0)
    for _ in range(5):
        dual_s = 0.0
        start = time.process_time()
        agent.train(UPDATES, BATCH)
        elapsed = time.process_time() - start
        best = max(best, (UPDATES / elapsed, dual_s / elapsed))
    rate, share = best
    iterations, load = agent.diagnostics["dual_iterations"], os.getloadavg()[0]
    print(
        f"{rate:.1f} gradient updates/s, dual {share:.1%} of the time ({iterations:.1f} iterations)"
    )
    milliseconds = matrix_products_s() * 1e3
    print(f"the E-step's hidden layer alone: {milliseconds:.1f} ms; load average {load:.1f}")
    ok = rate >= 50 and share <= 0.15
    print("ok" if ok else "FAILED: at least 50 updates/s and at most 15 % required")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
