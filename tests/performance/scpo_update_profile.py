"""Where the time of SCPO's updates goes on a Safety-Gymnasium task; the gain of a second process.

    python tests/performance/scpo_update_profile.py [--task SafetyPointGoal1-v0] [--updates 6]

One process: the share of the time spent in environments' ``step`` and ``reset``, training and
rollouts together. Two processes: wall clock against one. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import functools
import time

import gymnasium as gym
import numpy as np
from threadpoolctl import threadpool_limits

PER_UPDATE = 2_000


class Timed(gym.Wrapper):
    """Adds up the time spent inside, over all instances of this process."""

    seconds = 0.0

    def step(self, action):
        began = time.perf_counter()
        result = self.env.step(action)
        Timed.seconds += time.perf_counter() - began
        return result

    def reset(self, **kwargs):
        began = time.perf_counter()
        result = self.env.reset(**kwargs)
        Timed.seconds += time.perf_counter() - began
        return result


def make(task: str) -> gym.Env:
    import scpo_bench  # noqa: F401 - registers the tasks

    return Timed(gym.make(task))


def learn(task: str, updates: int, workers: int) -> tuple[float, int, int]:
    """(seconds, interaction steps, probe steps) of training; start-up is not counted."""
    import torch

    from scpo_bench.runs.recorder import RecordingVecEnv
    from scpo_bench.runs.worker_env import WorkerVecEnv
    from scpo_bench.scpo.wrap import ProjectedPPO

    torch.set_num_threads(1)
    env = RecordingVecEnv(WorkerVecEnv([functools.partial(make, task)] * 4, workers))
    agent = ProjectedPPO(
        "MlpPolicy",
        env,
        seed=0,
        make_env=functools.partial(make, task),
        workers=workers,
        n_steps=PER_UPDATE // 4,
        batch_size=250,
        cost_limit=1_000.0,  # never reached: the work is timed, not its result
    )
    assert agent.constraints is not None
    agent._rollouts(np.zeros((2, agent.weights.dimension)), range(2))  # starts the processes
    env.probe_meter.steps, Timed.seconds = 0, 0.0
    began = time.perf_counter()
    agent.learn(updates * PER_UPDATE)
    seconds = time.perf_counter() - began
    env.close()
    return seconds, env.steps, env.probe_meter.steps


@threadpool_limits.wrap(limits=1)
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="SafetyPointGoal1-v0")
    parser.add_argument("--updates", type=int, default=6)
    arguments = parser.parse_args()
    one, steps, probes = learn(arguments.task, arguments.updates, 1)
    print(f"{arguments.task}, {arguments.updates} updates: {steps} interaction steps, ", end="")
    print(f"{probes} probe steps")
    print(f"one process: {one:.1f} s, {100 * Timed.seconds / one:.0f} % of it in environments")
    two, *_ = learn(arguments.task, arguments.updates, 2)
    print(f"two processes: {two:.1f} s, {one / two:.2f} times as fast")


if __name__ == "__main__":
    main()
