"""Environments in several processes: the same numbers as in one, and errors that arrive."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import time

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.records.schema import Cell
from scpo_bench.runs.environments import make_training_env
from scpo_bench.runs.harness import run_cell
from scpo_bench.runs.worker_env import WorkerError, WorkerVecEnv

# Its rewards are not float32 numbers, its episodes end after 30 steps, its infos hold labels.
MAKE = functools.partial(gym.make, "scpo_bench/DoubleIntegratorImitation-v0", noise_std=0.1)


class Fragile(gym.Env):
    """Fails in its third step, and in every later one."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    fails = True
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {"options": options}

    def step(self, action):
        self.steps += 1
        if self.fails and self.steps >= 3:
            raise ArithmeticError("the third step")
        return np.zeros(1, np.float32), float(self.steps), False, False, {"cost": 0.0}


class Steady(Fragile):
    """Never fails."""

    fails = False


STILL = np.zeros((2, 1), np.float32)


def roll(env, steps, seed=0):
    """Everything that random actions get back."""
    rng = np.random.default_rng(seed)
    low, high = env.action_space.low, env.action_space.high
    seen = []
    for _ in range(steps):
        actions = rng.uniform(low, high, (env.num_envs, *low.shape)).astype(np.float32)
        *arrays, infos = env.step(actions)
        assert [array.dtype for array in arrays] == [np.float32, np.float32, bool]
        seen += [*arrays, *values_of(infos), *values_of(env.reset_infos)]
    return seen


def values_of(infos):
    """Every value of the infos, with the names that they have."""
    assert isinstance(infos, list)
    return [value for info in infos for item in sorted(info.items()) for value in item]


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_equals_dummy_vec_env(workers):
    """Whatever steps the environments, an agent must see the same over two episodes and resets."""
    ours, theirs = WorkerVecEnv([MAKE] * 3, workers), DummyVecEnv([MAKE] * 3)
    assert ours.workers == min(workers, 3)
    for env in (ours, theirs):
        env.seed(5)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    assert_equal(values_of(ours.reset_infos), values_of(theirs.reset_infos))
    assert_equal(roll(ours, 70), roll(theirs, 70))
    # Seeds count once: the next reset continues the generators.
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    ours.close()


def test_one_environment_can_be_reached():
    """Attributes and methods must be those of the environment with that index, in any process."""
    env = WorkerVecEnv([Steady] * 5, 2)
    env.reset()
    env.set_attr("steps", 10, indices=[1, 4])
    assert env.get_attr("steps") == [0, 10, 0, 0, 10]
    assert env.get_attr("steps", indices=4) == [10]
    reset = env.env_method("reset", options={"a": 1}, indices=[3])
    assert reset[0][1] == {"options": {"a": 1}}
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 5
    rewards = env.step(np.zeros((5, 1)))[1]
    assert rewards.tolist() == [1, 11, 1, 1, 11]
    env.set_options([{"index": i} for i in range(5)])
    env.reset()
    assert [info["options"] for info in env.reset_infos] == [{"index": i} for i in range(5)]
    env.close()


def test_pickled_in_mid_episode_continues_identically():
    """A checkpoint must hold the environments' state, wherever they are stepped."""
    env = WorkerVecEnv([MAKE] * 3, 2)
    env.seed(5)
    env.reset()
    roll(env, 17)
    copy = pickle.loads(pickle.dumps(env))
    assert_equal(roll(env, 60, seed=1), roll(copy, 60, seed=1))
    env.close()
    copy.close()


def test_an_environments_failure_arrives_with_its_traceback():
    """A failure in another process must name the error and where it happened."""
    env = WorkerVecEnv([Steady, Fragile], 2)
    env.reset()
    env.step(STILL)
    env.step(STILL)
    with pytest.raises(
        WorkerError, match=r"^ArithmeticError: the third step\nTraceback.*\n(.*\n)*.*in step\n"
    ):
        env.step(STILL)
    env.close()
    env.close()  # a second time does no harm


def test_a_failed_step_leaves_no_answer_behind():
    """After two environments failed in one step, answers must belong to what is asked next."""
    env = WorkerVecEnv([Fragile] * 3, 3)
    env.reset()
    env.set_attr("steps", 5)
    with pytest.raises(ArithmeticError, match="the third step"):
        env.step(np.zeros((3, 1)))
    env.set_attr("steps", 0)
    assert env.reset().shape == (3, 1)
    assert env.step(np.zeros((3, 1)))[1].tolist() == [1, 1, 1]
    env.close()


def test_a_process_that_dies_is_an_error():
    """Killed (for lack of memory, say) while it steps, it must not be waited for."""
    env = WorkerVecEnv([MAKE] * 2, 2)
    env.reset()
    env._processes[1]._process.kill()
    for _ in range(2):
        with pytest.raises(WorkerError, match="a worker process died with exit code -9"):
            env.step(STILL)
    env.close()


def test_an_environment_that_cannot_be_made_starts_no_process():
    """The mistake must arrive as what it is, not as that of a worker."""

    def refuse():
        raise ValueError("no such robot")

    before = len(multiprocessing.active_children())
    with pytest.raises(ValueError, match="no such robot"):
        WorkerVecEnv([refuse] * 2, 2)
    assert len(multiprocessing.active_children()) == before


@pytest.mark.parametrize("forget", [False, True])
def test_processes_end_with_the_environment(forget):
    """Neither close() nor forgetting to call it may leave a process behind."""
    before = {p.pid for p in multiprocessing.active_children()}
    env = WorkerVecEnv([MAKE] * 2, 2)
    env.reset()
    assert len({p.pid for p in multiprocessing.active_children()} - before) == 1
    if not forget:
        env.close()
    del env
    deadline = time.monotonic() + 10
    while (
        time.monotonic() < deadline and {p.pid for p in multiprocessing.active_children()} - before
    ):
        time.sleep(0.05)
    assert not {p.pid for p in multiprocessing.active_children()} - before


@pytest.mark.parametrize("task", ["SafetyPointGoal1-v0", "SafetyHopperVelocity-v1"])
def test_a_record_does_not_depend_on_the_workers(tmp_path, task):
    """``--workers`` must not show in a record."""
    cell = Cell(
        agent="cpo",
        task=task,
        seed=1,
        steps=1200,
        num_envs=4,
        cost_limit=25.0,
        normalize=True,
        evaluation_episodes=2,
        config={"steps_per_update": 400},
    )
    kinds = []
    for workers in (1, 2):
        env = make_training_env(cell, workers)
        kinds.append(type(env))
        env.close()
    assert kinds == [DummyVecEnv, WorkerVecEnv]
    before = len(multiprocessing.active_children())
    runs = [run_cell(cell, tmp_path / str(workers), "s", workers=workers) for workers in (1, 2)]
    assert len(multiprocessing.active_children()) == before
    assert [run.status for run in runs] == ["finished", "finished"]
    assert runs[0].digest == runs[1].digest
