"""The Safety-Gymnasium adapter: ids, metadata, environment contract, pickling, errors, vectors.

Set SCPO_BENCH_EXHAUSTIVE=1 to run whole episodes on every id instead of on a sample.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import DependencyNotInstalled, ResetNeeded
from gymnasium.utils.env_checker import check_env

import scpo_bench  # noqa: F401 - registers the ids
from scpo_bench.envs.safety_gymnasium import register_safety_gymnasium
from scpo_bench.envs.safety_gymnasium.navigation import SafetyNavigationEnv
from scpo_bench.envs.safety_gymnasium.tasks import TASKS, task_metadata
from scpo_bench.envs.safety_gymnasium.velocity import SafetyVelocityEnv

pytest.importorskip("mujoco")
pytestmark = [
    # gymnasium says so of every -v0 beside a -v1
    pytest.mark.filterwarnings(
        "ignore:.*The environment Safety.*Velocity-v0 is out of date:DeprecationWarning"
    ),
]
CHECKER_REMARKS = pytest.mark.filterwarnings(
    "ignore:.*(infinity|normalized|render_modes|render_fps).*:UserWarning"
)

EXHAUSTIVE = os.environ.get("SCPO_BENCH_EXHAUSTIVE") == "1"
RUNNABLE = [task for task in TASKS.values() if not task.needs_missing_assets]
# Vision and debug variants are checked at the hardest level, which has all that the others have.
CHECKED = [
    task
    for task in RUNNABLE
    if EXHAUSTIVE or task.variant == "plain" or task.level == (0 if task.family == "run" else 2)
]
SAMPLE = [
    "SafetyPointGoal1-v0",
    "SafetyCarButton1-v0",
    "SafetyAntFadingHard2-v0",
    "SafetyDoggoRun0-v0",
    "SafetyRacecarCircle2-v0",
    "SafetyPointPush1Debug-v0",
    "SafetyHopperVelocity-v1",
    "SafetyHumanoidVelocity-v0",
    "SafetyAntVelocity-v1",
    "SafetySwimmerVelocity-v0",
]


@pytest.fixture(scope="session")
def gl() -> Iterator[None]:
    """Off-screen drawing; skips where no OpenGL backend can do it."""
    code = "import mujoco as m; m.Renderer(m.MjModel.from_xml_string('<mujoco/>')).close()"
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
            # Without a display, mujoco's default (GLFW) fails even where EGL works.
            patch.setenv("MUJOCO_GL", "egl")
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
        if tried.returncode != 0:
            pytest.skip("no OpenGL backend draws off screen here (MUJOCO_GL=egl was tried)")
        yield


@pytest.fixture
def skyless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile worlds without a sky: it takes half a second and 190 MB, and changes no number."""
    from scpo_bench.envs.safety_gymnasium.fast.layout import mujoco_with_sky
    from scpo_bench.envs.safety_gymnasium.package import original

    monkeypatch.setattr(original().world, "mujoco", mujoco_with_sky(""))


@pytest.fixture
def small_sky(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sky that compiles at once, for tests that draw frames."""
    from scpo_bench.envs.safety_gymnasium.fast.layout import mujoco_with_sky
    from scpo_bench.envs.safety_gymnasium.package import original

    sky = (
        '<texture type="skybox" builtin="gradient" rgb1="1 0 0" rgb2="0 0 1" width="8" height="8"/>'
    )
    monkeypatch.setattr(original().world, "mujoco", mujoco_with_sky(sky))


@pytest.fixture
def make() -> Iterator[Any]:
    """``gymnasium.make`` that closes what it made."""
    made = []

    def make_one(env_id: str, **kwargs: Any) -> gymnasium.Env:
        made.append(gymnasium.make(env_id, **kwargs))
        return made[-1]

    yield make_one
    for env in made:
        env.close()


def assert_equal(one: Any, other: Any) -> None:
    """Equal to the last bit: arrays, dictionaries of arrays, numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    else:
        np.testing.assert_array_equal(one, other)


# ---- Ids and metadata ----


def test_every_id_is_registered_under_safety_gymnasiums_own_name() -> None:
    """Every id that a suite or a paper names can be made, with the package's horizon."""
    assert len(TASKS) == 298
    for env_id, task in TASKS.items():
        spec = gymnasium.spec(env_id)
        assert spec.max_episode_steps == task.horizon
        assert spec.reward_threshold == task.reward_threshold
    families = {task.family for task in TASKS.values()}
    assert families == {
        "goal",
        "button",
        "push",
        "circle",
        "run",
        "race",
        "fading_easy",
        "fading_hard",
        "velocity",
    }


def test_registering_again_leaves_other_peoples_ids_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that somebody else registered is not replaced, and registering twice works."""
    theirs = dataclasses.replace(gymnasium.spec("SafetyPointGoal1-v0"), entry_point="theirs:Env")
    monkeypatch.setitem(gymnasium.registry, "SafetyPointGoal1-v0", theirs)
    register_safety_gymnasium()
    assert gymnasium.registry["SafetyPointGoal1-v0"] is theirs


def test_importing_the_ids_loads_no_simulator() -> None:
    """``import scpo_bench`` stays fast, and works without safety-gymnasium."""
    code = (
        "import sys, scpo_bench.envs.safety_gymnasium as s; s.register_safety_gymnasium();"
        "heavy = ('mujoco', 'safety_gymnasium', 'glfw', 'xmltodict');"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"


def test_metadata_of_some_ids() -> None:
    """Suites run with the right horizon, limit and threshold."""
    goal = task_metadata("SafetyPointGoal1-v0")
    assert (goal.family, goal.robot, goal.level, goal.variant) == ("goal", "Point", 1, "plain")
    assert (goal.horizon, goal.cost_limit, goal.velocity_threshold) == (1000, 25.0, None)
    assert task_metadata("SafetyCarCircle2Vision-v0").horizon == 500
    assert task_metadata("SafetyCarCircle2Vision-v0").base_id == "SafetyCarCircle2-v0"
    assert task_metadata("SafetySwimmerVelocity-v0").velocity_threshold == 0.04845
    assert task_metadata("SafetyHopperVelocity-v1").velocity_threshold == 0.7402
    with pytest.raises(KeyError, match="SafetyPointGoal1-v0"):
        task_metadata("SafetyPointGaol1-v0")


# ---- The environment contract ----


@pytest.mark.parametrize("env_id", [t.id for t in CHECKED if t.variant != "vision"])
@CHECKER_REMARKS
@pytest.mark.usefixtures("skyless")
def test_every_id_follows_the_contract(make: Any, env_id: str) -> None:
    """Every id can be built and stepped, passes gymnasium's checks, and reports its cost."""
    env = make(env_id)
    task = TASKS[env_id]
    assert env.observation_space.shape == (task.observation_size,)
    assert env.action_space.shape == (task.action_size,)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=5)
    assert observation in env.observation_space
    assert np.isfinite(observation).all()
    for action in (env.action_space.low, env.action_space.high, env.action_space.sample()):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space
        assert type(reward) is float
        assert type(terminated) is bool
        assert type(truncated) is bool
        assert type(info["cost"]) is float
        assert info["cost"] >= 0.0
        if task.family != "velocity":
            assert info["cost"] == info["cost_sum"]
        else:
            assert env.unwrapped._inner._velocity_threshold == task.velocity_threshold
        if terminated:
            break
    check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", [t.id for t in CHECKED if t.variant == "vision"])
@pytest.mark.usefixtures("skyless", "gl")
def test_every_vision_id_draws_its_observation(make: Any, env_id: str) -> None:
    """Every vision id renders, and its dictionary matches its space."""
    env = make(env_id)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=5)
    flat = sum(part.size for key, part in observation.items() if key != "vision")
    assert flat == TASKS[env_id].observation_size
    for _ in range(2):
        observation, _, _, _, info = env.step(env.action_space.sample())
        assert observation in env.observation_space
        assert info["cost"] >= 0.0
    assert observation["vision"].std() > 1.0, "the image is blank"


@CHECKER_REMARKS
@pytest.mark.usefixtures("small_sky", "gl")
def test_vision_and_rendering_equal_the_original_path(make: Any) -> None:
    """Frames of the fast path show the same world: its layout, sky and lidar markers."""
    fast, original = (make("SafetyPointFadingHard2Vision-v0", fast=fast) for fast in (True, False))
    for seed in (0, 1):
        assert_equal(fast.reset(seed=seed)[0], original.reset(seed=seed)[0])
        for _ in range(2):
            action = fast.action_space.sample()
            for one, other in zip(fast.step(action), original.step(action)):
                assert_equal(one, other)
    check_env(fast.unwrapped, skip_render_check=True)
    for mode, shape in (("rgb_array", (90, 120, 3)), ("depth_array", (90, 120))):
        env = make(
            "SafetyPointGoal1-v0", render_mode=mode, width=120, height=90, camera_name="fixedfar"
        )
        env.reset(seed=0)
        frame = env.render()
        assert frame.shape == shape
        assert frame.std() > 0.0
    robot = make("SafetyHopperVelocity-v1", render_mode="rgb_array")
    robot.reset(seed=0)
    robot.render()
    robot.step(
        robot.action_space.sample()
    )  # with a viewer open, the original draws the speed marker
    assert robot.render().std() > 0.0


@pytest.mark.usefixtures("skyless")
@pytest.mark.parametrize(
    "env_id", [t.id for t in RUNNABLE if t.variant != "vision"] if EXHAUSTIVE else SAMPLE
)
def test_an_episode_runs_and_a_pickle_continues_it_identically(make: Any, env_id: str) -> None:
    """A pickle holds the whole state, random state included, for checkpoints and workers."""
    env = make(env_id)
    env.action_space.seed(1)
    env.reset(seed=11)
    task = TASKS[env_id]
    length = 0
    twin: Any = None
    for step in range(task.horizon if EXHAUSTIVE else 130):
        if step == 40:
            twin = pickle.loads(pickle.dumps(env))
        action = env.action_space.sample()
        after = env.step(action)
        length += 1
        if twin is not None:
            for one, other in zip(after, twin.step(action)):
                assert_equal(one, other)
        if after[2] or after[3]:
            break
    assert length > 1
    if EXHAUSTIVE and not after[2]:
        assert after[3]
        assert length == task.horizon
    twin = twin or pickle.loads(pickle.dumps(env))
    assert_equal(env.reset()[0], twin.reset()[0])  # the next layout: np_random came along
    action = env.action_space.sample()
    assert_equal(env.step(action)[0], twin.step(action)[0])
    twin.close()


@pytest.mark.usefixtures("skyless")
@pytest.mark.parametrize("fast", [True, False])
def test_pickles_on_both_paths_and_before_the_first_reset(make: Any, fast: bool) -> None:
    """Both code paths can be pickled at any time, and a copy does not share the world."""
    env = make("SafetyCarFadingHard2-v0", fast=fast)
    fresh = pickle.loads(pickle.dumps(env))
    assert_equal(env.reset(seed=3)[0], fresh.reset(seed=3)[0])
    env.step(env.action_space.high)
    twin = copy.deepcopy(env)
    before = twin.unwrapped.task.data.qpos.copy()
    for _ in range(3):
        after = env.step(env.action_space.high)
    np.testing.assert_array_equal(twin.unwrapped.task.data.qpos, before)
    for _ in range(3):
        twin_after = twin.step(env.action_space.high)
    for one, other in zip(after, twin_after):
        assert_equal(one, other)
    np.testing.assert_array_equal(
        env.unwrapped.task.model.geom_rgba, twin.unwrapped.task.model.geom_rgba
    )
    fresh.close()
    twin.close()


@pytest.mark.usefixtures("skyless")
def test_the_seed_decides_every_layout(make: Any) -> None:
    """Runs can be repeated: no layout depends on numpy's global generator."""
    layouts = []
    for noise in (0, 1):
        np.random.seed(noise)  # noqa: NPY002 - the global generator must not matter
        env = make("SafetyPointGoal1-v0")
        layouts.append([env.reset(seed=9)[0], env.reset()[0], env.reset()[0]])
    assert_equal(np.array(layouts[0]), np.array(layouts[1]))
    assert not np.array_equal(layouts[0][0], layouts[0][1])
    assert not np.array_equal(layouts[0][1], layouts[0][2])
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    make("SafetyPointGoal1-v0").reset(seed=0)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    large = make("SafetyPointGoal1-v0")
    assert_equal(large.reset(seed=2**40)[0], large.reset(seed=2**40)[0])


@pytest.mark.usefixtures("skyless")
def test_a_layout_that_cannot_be_sampled_is_drawn_again(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rare layout that cannot be sampled does not stop a training run; other errors do."""
    from scpo_bench.envs.safety_gymnasium.package import original

    env = make("SafetyPointGoal1-v0")
    builder = env.unwrapped._builder
    real, seeds = builder.reset, []

    def fail_twice(*, seed: int) -> Any:
        seeds.append(seed)
        if len(seeds) == 1:
            raise original().resampling_error("Failed to sample layout of objects")
        if len(seeds) == 2:
            raise AssertionError("World has starting cost! {}")
        return real(seed=seed)

    monkeypatch.setattr(builder, "reset", fail_twice)
    observation, _ = env.reset(seed=4)
    drawn = np.random.Generator(np.random.PCG64(4)).integers(2**32, size=2)
    assert seeds == [4, *drawn.tolist()]
    monkeypatch.setattr(builder, "reset", real)
    assert_equal(observation, env.reset(seed=int(drawn[1]))[0])

    def always(*, seed: int) -> Any:
        raise original().resampling_error("no")

    monkeypatch.setattr(builder, "reset", always)
    with pytest.raises(RuntimeError, match="SafetyPointGoal1-v0: no valid layout"):
        env.reset(seed=4)

    def other(*, seed: int) -> Any:
        raise AssertionError("a defect")

    monkeypatch.setattr(builder, "reset", other)
    with pytest.raises(AssertionError, match="a defect"):
        env.reset(seed=4)


@pytest.mark.usefixtures("skyless")
def test_truncation_is_left_to_time_limit(make: Any) -> None:
    """``max_episode_steps`` decides the length of an episode, not the package's own counter."""
    longer = make("SafetyPointCircle0-v0", max_episode_steps=520)
    longer.reset(seed=0)
    ends = [longer.step(longer.action_space.sample())[3] for _ in range(520)]
    assert ends.index(True) == 519
    shorter = make("SafetyPointCircle0-v0", max_episode_steps=3)
    shorter.reset(seed=0)
    assert [shorter.step(shorter.action_space.sample())[3] for _ in range(3)] == [
        False,
        False,
        True,
    ]


# ---- Errors ----


def test_without_safety_gymnasium_make_says_how_to_install_it() -> None:
    """Without the package the error is the command that installs it."""
    code = textwrap.dedent("""
        import importlib.util
        import gymnasium, scpo_bench
        find = importlib.util.find_spec
        absent = "safety_gymnasium"
        importlib.util.find_spec = lambda name, *rest: None if name == absent else find(name, *rest)
        for env_id in ("SafetyPointGoal1-v0", "SafetyHopperVelocity-v1"):
            try:
                gymnasium.make(env_id)
            except gymnasium.error.DependencyNotInstalled as error:
                print(str(error).splitlines()[0])
    """)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install --no-deps safety-gymnasium" in line for line in lines)


@pytest.mark.parametrize(
    "env_id", ["SafetyPointRace0-v0", "SafetyAntRace2Vision-v0", "SafetyCarRace1Debug-v0"]
)
def test_race_tasks_say_that_the_wheel_lacks_an_asset(env_id: str) -> None:
    """A missing texture is reported as such, not as MuJoCo's complaint about a file."""
    with pytest.raises(DependencyNotInstalled, match=r"village_floor\.PNG.*wheel"):
        gymnasium.make(env_id)


def test_bad_arguments_are_refused(make: Any) -> None:
    """Mistakes are reported where they are made."""
    with pytest.raises(ValueError, match="render_mode"):
        SafetyNavigationEnv("SafetyPointGoal1-v0", render_mode="ascii")
    with pytest.raises(ValueError, match="camera"):
        SafetyNavigationEnv("SafetyPointGoal1-v0", camera_id=0, camera_name="track")
    with pytest.raises(ValueError, match="SafetyVelocityEnv"):
        SafetyNavigationEnv("SafetyHopperVelocity-v1")
    with pytest.raises(ValueError, match="SafetyNavigationEnv"):
        SafetyVelocityEnv("SafetyPointGoal1-v0")
    env = make("SafetyPointGoal1-v0").unwrapped
    with pytest.raises(ResetNeeded):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"[Aa]ction"):
        env.step(np.zeros(3))


def test_the_private_copy_stays_private(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed safety_gymnasium of another version works beside the private copy."""
    make("SafetyPointGoal0-v0").reset(seed=0)
    assert not [name for name in sys.modules if name.partition(".")[0] == "safety_gymnasium"]
    theirs = types.ModuleType("safety_gymnasium")
    monkeypatch.setitem(sys.modules, "safety_gymnasium", theirs)
    env = make("SafetyWalker2dVelocity-v1")
    env.reset(seed=0)
    navigation = make("SafetyPointRun0-v0")
    navigation.reset(seed=0)
    pickle.loads(pickle.dumps(navigation)).close()
    assert sys.modules["safety_gymnasium"] is theirs
    assert [name for name in sys.modules if name.startswith("safety_gymnasium.")] == []


# ---- Velocity ----


def test_velocity_cost_is_speed_above_the_threshold(make: Any) -> None:
    """The cost is in ``info``, 1 above the threshold and 0 below."""
    env = make("SafetyHalfCheetahVelocity-v1")
    env.reset(seed=0)
    threshold = TASKS["SafetyHalfCheetahVelocity-v1"].velocity_threshold
    for velocity, cost in ((0.5, 0.0), (8.0, 1.0)):
        env.unwrapped.data.qvel[0] = velocity
        *_, info = env.step(np.zeros(6, dtype=np.float32))
        assert info["cost"] == cost == float(info["x_velocity"] > threshold)


# ---- Vector environments ----


@pytest.mark.usefixtures("skyless")
def test_parallel_environments_return_the_last_observation_and_its_cost(make: Any) -> None:
    """Vector environments keep an episode's last observation and the last step's cost."""
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    env_id, horizon = "SafetyPointGoal1-v0", 4
    single = make(env_id, max_episode_steps=horizon)
    first, _ = single.reset(seed=21)
    action = single.action_space.high
    alone = [single.step(action) for _ in range(horizon)]
    following, _ = single.reset()

    vector = gymnasium.make_vec(
        env_id,
        num_envs=2,
        vectorization_mode="async",
        max_episode_steps=horizon,
        vector_kwargs={"shared_memory": True},
    )
    try:
        observations, _ = vector.reset(seed=[21, 22])
        assert_equal(observations[0], first)
        for step in range(horizon):
            observations, rewards, terminated, truncated, infos = vector.step(
                np.stack([action, action])
            )
            assert_equal(observations[0], alone[step][0])
            assert rewards[0] == alone[step][1]
            assert infos["cost"][0] == alone[step][4]["cost"]
            assert (terminated[0], truncated[0]) == (False, step == horizon - 1)
        observations, *_ = vector.step(np.stack([action, action]))
        assert_equal(observations[0], following)
    finally:
        vector.close()

    def build() -> gymnasium.Env:
        return gymnasium.make(env_id, max_episode_steps=horizon)

    for vec_env in (
        DummyVecEnv([build, build]),
        SubprocVecEnv([build, build], start_method="fork"),
    ):
        vec_env.seed(21)
        assert_equal(vec_env.reset()[0], first.astype(vec_env.observation_space.dtype))
        for step in range(horizon):
            observations, rewards, dones, infos = vec_env.step(np.stack([action, action]))
            assert infos[0]["cost"] == alone[step][4]["cost"]
        assert dones[0]
        assert infos[0]["TimeLimit.truncated"]
        assert_equal(infos[0]["terminal_observation"], alone[-1][0])
        assert_equal(observations[0], following)
        vec_env.close()
