"""PPO-Lagrangian and CPO against OmniSafe 0.5.0, side by side: steps per second.

    python tests/performance/baselines_vs_omnisafe.py [--task SafetyHopperVelocity-v1]
        [--agents ppo-lagrangian cpo] [--num-envs 1 4] [--omnisafe-python PATH]

Two updates of 20000 steps. Both sides: default settings (20000 steps per update, 64x64 tanh;
PPO-Lagrangian 40 passes of batch 64 with early stop, CPO 10 critic passes of batch 128),
observation normalisation with clip 5, one process, the same number of environments; OmniSafe with
``--threads`` torch threads (its own default of 16 is slower on a small machine), ours with one. Run
it on an otherwise idle machine.

OmniSafe's environment is created on first use: see side_by_side.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from side_by_side import (
    THEIR_NAMES,
    make_environments,
    normalised,
    omnisafe_python,
    train_omnisafe,
)

UPDATES, STEPS_PER_UPDATE = 2, 20_000


def run_omnisafe(
    python: Path, agent: str, task: str, num_envs: int, threads: int
) -> dict[str, float]:
    """Steps per second, and seconds per update spent in rollout and update."""
    train = {"total_steps": UPDATES * STEPS_PER_UPDATE, "vector_env_nums": num_envs}
    settings = {"train_cfgs": {**train, "torch_threads": threads}}
    trained = train_omnisafe(python, agent, task, settings)
    rows, seconds = trained.progress, trained.seconds
    rollout = sum(float(row["Time/Rollout"]) for row in rows) / len(rows)
    update = sum(float(row["Time/Update"]) for row in rows) / len(rows)
    return {
        "steps_per_s": UPDATES * STEPS_PER_UPDATE / seconds,
        "rollout_s": rollout,
        "update_s": update,
    }


def run_ours(agent: str, task: str, num_envs: int) -> dict[str, float]:
    """As ``run_omnisafe``, in this process, with one torch thread."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    from scpo_bench.baselines.cpo import CPO
    from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian

    torch.set_num_threads(1)

    class Stopwatch(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.at: list[float] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.at.append(time.perf_counter())

        def _on_rollout_end(self) -> None:
            self.at.append(time.perf_counter())

    stopwatch = Stopwatch()
    agent_class = {"ppo-lagrangian": PPOLagrangian, "cpo": CPO}[agent]
    learner = agent_class("MlpPolicy", normalised(make_environments(task, num_envs)), seed=0)
    start = time.perf_counter()
    learner.learn(UPDATES * STEPS_PER_UPDATE, stopwatch)
    end = time.perf_counter()
    marks = [*stopwatch.at, end]
    rollout = sum(marks[i + 1] - marks[i] for i in range(0, len(marks) - 1, 2)) / UPDATES
    update = sum(marks[i + 1] - marks[i] for i in range(1, len(marks) - 1, 2)) / UPDATES
    passes = {"passes": learner.diagnostics["passes"]} if agent == "ppo-lagrangian" else {}
    return {
        "steps_per_s": UPDATES * STEPS_PER_UPDATE / (end - start),
        "rollout_s": rollout,
        "update_s": update,
    } | passes


def raw_speed(task: str, steps: int = 10_000) -> float:
    """Steps per second of one bare environment under random actions, resets included."""
    import gymnasium as gym

    from scpo_bench.envs.safety_gymnasium import register_safety_gymnasium

    register_safety_gymnasium()
    env = gym.make(task)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(steps)]
    start = time.perf_counter()
    for action in actions:
        *_, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="SafetyHopperVelocity-v1")
    parser.add_argument("--agents", nargs="+", default=list(THEIR_NAMES), choices=list(THEIR_NAMES))
    parser.add_argument("--num-envs", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--omnisafe-python")
    arguments = parser.parse_args()
    python = omnisafe_python(arguments.omnisafe_python)
    raw = raw_speed(arguments.task)
    load = os.getloadavg()[0]
    print(f"{arguments.task}: one bare environment {raw:.0f} steps/s; load average {load:.1f}")
    worst = float("inf")
    for agent in arguments.agents:
        for num_envs in arguments.num_envs:
            ours = run_ours(agent, arguments.task, num_envs)
            theirs = run_omnisafe(python, agent, arguments.task, num_envs, arguments.threads)
            ratio = ours["steps_per_s"] / theirs["steps_per_s"]
            worst = min(worst, ratio)
            share = STEPS_PER_UPDATE / ours["rollout_s"] / raw
            print(
                f"{agent}, {num_envs} environment(s): {ratio:.1f} times OmniSafe; "
                f"rollout at {share:.0%} of the raw speed"
            )
            for name, figures in (("ours", ours), ("omnisafe", theirs)):
                print(
                    f"  {name}: {json.dumps({k: round(v, 2) for k, v in figures.items()})}",
                    flush=True,
                )
    print(f"lowest ratio {worst:.1f}; at least 4 required: {'ok' if worst >= 4 else 'FAILED'}")
    sys.exit(worst < 4)


if __name__ == "__main__":
    main()
