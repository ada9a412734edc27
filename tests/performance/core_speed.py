"""The speed of the core: ``python tests/performance/core_speed.py``.

The projection against the same problem through cvxpy; steps of 4096 double integrators; the share
of an SCPO update that rollouts take; the time of ``scpo-bench --help``. Printed are medians, and
the best times, because other load on the machine only adds time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.policies import AffineBackup
from scpo_bench.runs.environments import NativeVecEnv
from scpo_bench.scpo.agent import SCPO
from scpo_bench.scpo.projection import Certificate, project

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_projection import reference


def projection(k: int = 4, m: int = 16, repeats: int = 60) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(repeats):
        certificate = Certificate(
            -rng.exponential(0.1, k),
            rng.normal(size=(k, m)),
            np.full((k, m), 1e-3),
            np.full(k, 5.0),
            np.eye(m),
        )
        target = rng.normal(size=m)
        target /= max(1.0, np.linalg.norm(target))
        for times, call in ((ours, project), (theirs, reference)):
            began = time.perf_counter()
            call(certificate, target)
            times.append(time.perf_counter() - began)
    a, b = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    best = min(ours) * 1e3
    print(
        f"projection k={k} m={m}: {a:.2f} ms (best {best:.2f}), cvxpy {b:.2f} ms, ratio {b / a:.1f}"
    )


def stepping(num_envs: int = 4096, steps: int = 300) -> None:
    env = gym.make_vec(
        "scpo_bench/DoubleIntegratorImitation-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
    )
    env.reset(seed=0)
    actions = np.zeros((num_envs, 1), np.float32)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(steps):
            env.step(actions)
        rates.append(num_envs * steps / (time.perf_counter() - began) / 1e6)
    print(
        f"native double integrator, {num_envs} environments: {statistics.median(rates):.1f} "
        f"M steps/s (best {max(rates):.1f})"
    )


def update_share(updates: int = 10) -> None:
    env = NativeVecEnv(
        gym.make_vec(
            "scpo_bench/DoubleIntegratorImitation-v0",
            num_envs=32,
            vectorization_mode="vector_entry_point",
        )
    )
    agent = SCPO(
        "MlpPolicy",
        env,
        seed=0,
        policy_kwargs={"backup": AffineBackup(*env.task.backup_gain())},
        learning_rate=0.3,
        directions=64,
        candidates=(),
        probe_radius=1e-3,
    )
    agent.learn(32 * 30 * 3)
    evaluate, spent = agent.constraints.values, 0.0

    def timed(w):
        nonlocal spent
        began = time.perf_counter()
        result = evaluate(w)
        spent += time.perf_counter() - began
        return result

    agent.constraints.values = timed
    began = time.perf_counter()
    for _ in range(updates):
        agent.train()
    total = time.perf_counter() - began
    print(f"SCPO update: {total / updates * 1e3:.0f} ms, {spent / total:.0%} of it in rollouts")


def help_time(repeats: int = 7) -> None:
    command = Path(sys.executable).with_name("scpo-bench")
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([command, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    print(f"scpo-bench --help: {statistics.median(times):.2f} s (best {min(times):.2f})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    projection()
    stepping()
    update_share()
    help_time()
