"""Environments in several processes: the same numbers as in one, and errors that arrive."""

import functools
import multiprocessing
import pickle
import time

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.envs.safety_gymnasium.velocity import SafetyVelocityEnv
from scpo_bench.records.schema import Cell
from scpo_bench.runs.harness import run_cell
from scpo_bench.runs.shared_line import NAP_S, ROOM
from scpo_bench.runs.worker_env import WorkerError, WorkerVecEnv

MAKE = functools.partial(gym.make, "scpo_bench/DoubleIntegratorRegulation-v0")


class Fragile(gym.Env):
    """Fails in its third step."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 3:
            raise ArithmeticError("the third step")
        return np.zeros(1, np.float32), 0.0, False, False, {"cost": 0.0}


def roll(env, steps, seed=0):
    """Everything that random actions get back."""
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        actions = rng.uniform(-2, 2, (env.num_envs, *env.action_space.shape)).astype(np.float32)
        observations, rewards, dones, infos = env.step(
            np.clip(actions, env.action_space.low, env.action_space.high)
        )
        terminal = [
            info["terminal_observation"] for info in infos if "terminal_observation" in info
        ]
        limits = [info["TimeLimit.truncated"] for info in infos]
        seen += [observations, rewards, dones, [info["cost"] for info in infos], limits, *terminal]
    return seen


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_equals_dummy_vec_env(workers):
    """Observations, rewards, ends, costs and terminal observations over two episodes, and the infos
    of resets.
    """
    ours, theirs = WorkerVecEnv([MAKE] * 3, workers), DummyVecEnv([MAKE] * 3)
    for env in (ours, theirs):
        env.seed(5)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    assert_equal(roll(ours, 90), roll(theirs, 90))
    assert [sorted(info) for info in ours.reset_infos] == [
        sorted(info) for info in theirs.reset_infos
    ]
    assert ours.get_attr("spec")[2].id == theirs.get_attr("spec")[2].id
    assert ours.env_is_wrapped(gym.wrappers.OrderEnforcing) == theirs.env_is_wrapped(
        gym.wrappers.OrderEnforcing
    )
    ours.close()


def test_pickled_in_mid_episode_goes_on_identically():
    """What a checkpoint does: the copy, in new processes, continues as the original does."""
    env = WorkerVecEnv([MAKE] * 3, 2)
    env.seed(5)
    env.reset()
    roll(env, 17)
    copy = pickle.loads(pickle.dumps(env))
    assert_equal(roll(env, 60, seed=1), roll(copy, 60, seed=1))
    env.close()
    copy.close()


def test_an_environments_failure_arrives_with_its_traceback():
    """A failure in another process names the error and where it happened; closing still works."""
    env = WorkerVecEnv([Steady, Fragile], 2)
    env.reset()
    still = np.zeros((2, 1), np.float32)
    env.step(still)
    env.step(still)
    with pytest.raises(
        WorkerError, match=r"^ArithmeticError: the third step\nTraceback.*\n(.*\n)*.*in step\n"
    ):
        env.step(still)
    env.close()
    env.close()


class Steady(Fragile):
    """Never fails."""

    steps = 10


def test_a_process_that_dies_is_an_error():
    """Killed, as for lack of memory, while it steps: no waiting for an answer that will not come.
    """
    env = WorkerVecEnv([MAKE] * 2, 2)
    env.reset()
    env._processes[0].kill()
    with pytest.raises(WorkerError, match="process 1 died with exit code -9"):
        env.step(np.zeros((2, *env.action_space.shape), np.float32))
    with pytest.raises(WorkerError, match="process 1 died with exit code -9"):
        env.env_method("reset", options={"long": "x" * (ROOM + 1)}, indices=1)
    env.close()


def test_long_messages_and_long_pauses():
    """What does not fit into the shared memory goes another way, and a process that sleeps is
    woken.
    """
    env = WorkerVecEnv([Steady] * 2, 2)
    env.reset()
    time.sleep(2 * NAP_S)
    for size in (1, ROOM - 200, ROOM, 5 * ROOM):
        env.set_attr("steps", bytes(size))
        assert env.get_attr("steps") == [bytes(size)] * 2
    env.set_attr("steps", 10)
    assert [info["cost"] for info in env.step(np.zeros((2, 1), np.float32))[3]] == [0.0, 0.0]
    env.close()


class Lagging(SafetyVelocityEnv):
    """In each ten steps slow in one process, in the next ten in the other, so that environments are
    moved to and fro.
    """

    fails = False
    snapshot_functions = SafetyVelocityEnv.snapshot_functions

    def step(self, action):
        result = super().step(action)
        if self.fails:
            raise ArithmeticError("asked for")
        steps = round(self.data.time / self._inner.dt)
        if steps // 10 % 2 == (multiprocessing.parent_process() is None):
            time.sleep(2e-3)
        return result


class Heir(SafetyVelocityEnv):
    """Could count something."""


def lagging(robot, count=4):
    """Functions that make ``count`` of them."""
    task = f"Safety{robot}Velocity-v1"
    spec = gym.envs.registration.EnvSpec(
        "Lagging-v0", Lagging, max_episode_steps=60, kwargs={"env_id": task}
    )
    return [functools.partial(gym.make, spec) for _ in range(count)]


def roll_counting_moves(env, steps, seed=0):
    """What ``roll`` gives, and how often each environment has moved."""
    moves, seen = np.zeros(env.num_envs, int), []
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        owners = env._arrays["owners"].copy()
        seen += roll(env, 1, seed=int(rng.integers(1000)))
        moves += owners != env._arrays["owners"]
    return seen, moves


@pytest.mark.parametrize(("robot", "workers"), [("Hopper", 3), ("Ant", 2), ("Humanoid", 2)])
def test_moved_environments_go_on_identically(robot, workers):
    """Physics, time limits and generators move along, over ends of episodes, and a checkpoint finds
    each where it is.
    """
    makes = lagging(robot, 2 * workers)
    ours, theirs = WorkerVecEnv(makes, workers), DummyVecEnv(makes)
    for env in (ours, theirs):
        env.seed(5)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    seen, moves = roll_counting_moves(ours, 150)
    rng = np.random.default_rng(0)
    expected = [
        entry for _ in range(150) for entry in roll(theirs, 1, seed=int(rng.integers(1000)))
    ]
    assert_equal(seen, expected)
    assert (moves[1::2] > 2).all()  # of each process's two environments, the second
    assert (moves[::2] == 0).all()
    copy = pickle.loads(pickle.dumps(ours))
    expected = roll(theirs, 70, seed=1)
    assert_equal(roll(ours, 70, seed=1), expected)
    assert_equal(roll(copy, 70, seed=1), expected)
    np.testing.assert_array_equal(
        ours.reset(), theirs.reset()
    )  # without seeds: from where the generators are
    assert_equal(roll(ours, 70, seed=2), roll(theirs, 70, seed=2))
    ours.close()
    copy.close()


@pytest.mark.parametrize(
    "kind", ["another function", "a subclass", "a wrapper", "arguments", "a renderer"]
)
def test_what_may_have_other_state_is_not_moved(kind):
    """A function that edits what it makes, a class or a wrapper with state of its own: their copies
    would not be copies.
    """
    task = "SafetyHopperVelocity-v1"
    make = functools.partial(gym.make, task)
    wrapped = gym.wrappers.TimeAwareObservation(gym.make(task))
    makes = {
        "another function": [lambda: make()] * 4,
        "a subclass": [
            functools.partial(
                gym.make, gym.envs.registration.EnvSpec("S-v0", Heir, kwargs={"env_id": task})
            )
        ]
        * 4,
        "a wrapper": [functools.partial(gym.make, wrapped.spec)] * 4,
        "arguments": [make, make, make, functools.partial(gym.make, task, max_episode_steps=10)],
        "a renderer": [functools.partial(gym.make, task, render_mode="rgb_array")] * 4,
    }[kind]
    env = WorkerVecEnv(makes, 2)
    assert not env._arrays["movable"].any()
    env.close()


def test_an_environment_reached_into_stays_where_it_is():
    """What was set is in no snapshot: the environment, and a pickle's, keeps it and its process."""
    first = WorkerVecEnv(lagging("Hopper"), 2)
    first.reset()
    first.set_attr("mark", "set", indices=[1])
    for env in (first, pickle.loads(pickle.dumps(first))):
        _, moves = roll_counting_moves(env, 60)
        assert moves[1] == 0
        assert moves[3] > 0
        assert env.get_attr("mark", indices=[1]) == ["set"]
        env.close()


def test_a_failed_step_leaves_the_others_in_order():
    """Two environments fail in one step: one error is raised, and what comes after is answers to
    what is asked then.
    """
    env = WorkerVecEnv(lagging("Hopper"), 2)
    expected = DummyVecEnv(lagging("Hopper"))
    env.reset()
    env.set_attr("fails", True, indices=[0, 2])
    with pytest.raises((ArithmeticError, WorkerError), match="asked for"):
        roll(env, 1)
    env.set_attr("fails", False, indices=[0, 2])
    env.seed(5)
    expected.seed(5)
    np.testing.assert_array_equal(env.reset(), expected.reset())
    assert_equal(roll(env, 30), roll(expected, 30))
    env.close()


@pytest.mark.parametrize("forget", [False, True])
def test_processes_end_with_the_environment(forget):
    """close() leaves nobody behind, nor does forgetting to call it: the pipe's end tells."""
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


def test_image_observations_are_refused_with_the_reason():
    """Shared memory is for arrays of one shape."""

    class Worded(Steady):
        observation_space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1)})

    with pytest.raises(ValueError, match="needs Box observations and actions, got Dict"):
        WorkerVecEnv([Worded], 1)


@pytest.mark.parametrize("task", ["SafetyPointGoal1-v0", "SafetyHopperVelocity-v1"])
def test_record_does_not_depend_on_the_number_of_processes(tmp_path, task):
    """The harness, on tasks of Safety-Gymnasium: equal digests with one process and with two."""
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
    runs = [run_cell(cell, tmp_path / str(workers), "s", workers=workers) for workers in (1, 2)]
    assert [run.status for run in runs] == ["finished", "finished"]
    assert runs[0].digest == runs[1].digest
