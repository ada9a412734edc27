"""The fast path against the original code path, in one process, to the last bit.

Set SCPO_BENCH_EXHAUSTIVE=1 for three whole episodes per family and robot (half an hour).
"""

from __future__ import annotations

import os
from typing import Any

import gymnasium
import numpy as np
import pytest

import scpo_bench  # noqa: F401 - registers the ids
from scpo_bench.envs.safety_gymnasium.tasks import TASKS

mujoco = pytest.importorskip("mujoco")

EXHAUSTIVE = os.environ.get("SCPO_BENCH_EXHAUSTIVE") == "1"
EPISODES, STEPS = (3, 1000) if EXHAUSTIVE else (2, 36)
HARDEST = {"run": 0}  # level; 2 elsewhere: everything the easier levels have, and more of it
PAIRS = [
    task.id
    for task in TASKS.values()
    if task.variant == "plain"
    and task.family not in ("velocity", "race")
    and task.level == HARDEST.get(task.family, 2)
]
# Model arrays that may differ: the sky's, and the orientation of a camera that no observation uses
# (rounding)
NOT_COMPARED = {"cam_quat", "cam_mat0", "signature", "nbuffer", "names", "names_map", "paths"}
# MjData that is scratch space, timing, or follows from the camera above
WORKSPACE = ("timer", "map_", "solver", "maxuse", "nbuffer", "narena", "cam_x", "efc_", "iefc_")


@pytest.fixture(autouse=True)
def skyless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile worlds without a sky: it takes half a second and 190 MB, and changes no number."""
    from scpo_bench.envs.safety_gymnasium.fast.layout import mujoco_with_sky
    from scpo_bench.envs.safety_gymnasium.package import original

    monkeypatch.setattr(original().world, "mujoco", mujoco_with_sky(""))


def actions(space: gymnasium.spaces.Box, seed: int) -> Any:
    """Phases of held, random, extreme and zero actions: robots travel, turn, collide and rest."""
    rng = np.random.default_rng(seed)
    while True:
        kind = rng.integers(4)
        held = rng.uniform(space.low, space.high)
        for _ in range(int(rng.integers(5, 40))):
            if kind == 0:
                yield held
            elif kind == 1:
                yield rng.uniform(space.low, space.high)
            elif kind == 2:
                yield np.where(rng.random(space.shape) < 0.5, space.low, space.high)
            else:
                yield np.zeros(space.shape)


def arrays(struct: Any) -> dict[str, np.ndarray]:
    """The numeric contents of an MjModel or MjData by name."""
    found = {}
    for name in dir(struct):
        if name.startswith(("_", "tex", "mat", "name_", "ntex", "nnames")) or name in NOT_COMPARED:
            continue
        value = getattr(struct, name)
        if isinstance(value, (int, float, np.ndarray)):
            found[name] = np.asarray(value)
    return found


def assert_same_step(one: Any, other: Any) -> None:
    """Observation, reward, termination, truncation and info equal to the last bit."""
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1:4] == other[1:4]
    assert one[4] == other[4]


@pytest.mark.parametrize("env_id", PAIRS)
def test_fast_path_equals_the_original_over_episodes(env_id: str) -> None:
    """No observation, reward, cost, info or ending depends on the fast path."""
    fast, original = gymnasium.make(env_id), gymnasium.make(env_id, fast=False)
    assert fast.unwrapped.fast  # type: ignore[attr-defined]
    assert not original.unwrapped.fast  # type: ignore[attr-defined]
    for episode in range(EPISODES):
        # the last reset goes by the environments' own random state
        seed = 30 + episode if episode < EPISODES - 1 else None
        np.testing.assert_array_equal(fast.reset(seed=seed)[0], original.reset(seed=seed)[0])
        for step, action in enumerate(actions(fast.action_space, episode)):  # type: ignore[arg-type]
            one, other = fast.step(action), original.step(action)
            assert_same_step(one, other)
            if one[2] or one[3] or step + 1 == STEPS:
                break
    fast.close()
    original.close()


@pytest.mark.parametrize(
    ("env_id", "reached"),
    [
        ("SafetyPointGoal2-v0", "goal"),
        ("SafetyCarPush2-v0", "push_box"),
        ("SafetyPointButton2-v0", "button"),
        ("SafetyPointFadingHard2-v0", "goal"),
    ],
)
def test_reaching_goals_and_touching_things_stays_equal(env_id: str, reached: str) -> None:
    """New goals, contact costs and fading, which are rare in random episodes, are equal too."""
    fast, original = gymnasium.make(env_id), gymnasium.make(env_id, fast=False)
    pair = fast.unwrapped.task, original.unwrapped.task  # type: ignore[attr-defined]
    goals = costs = 0
    costly_kinds = set()
    for seed in range(2):
        fast.reset(seed=seed)
        original.reset(seed=seed)
        rng = np.random.default_rng(seed)
        things = [
            n
            for n in pair[0]._body_ids
            if n.startswith(("vase", "hazard", "button", "gremlin", "pillar"))
        ]
        for step in range(40):
            if step % 4 == 0:  # put the robot where something happens; both worlds alike
                name = f"button{pair[0].buttons.goal_button}" if reached == "button" else "goal"
                if reached == "push_box":
                    target = pair[0].data.body("goal").xpos[:2]
                    for task in pair:
                        task.data.joint("push_box").qpos[:2] = target
                if step % 8 == 0 or reached == "push_box":
                    name = str(rng.choice(things))
                target = pair[0].data.body(name).xpos[:2]
                offset = rng.uniform(-0.05, 0.05, 2)
                for task in pair:
                    place(task, target + offset)
            action = rng.uniform(fast.action_space.low, fast.action_space.high)  # type: ignore[attr-defined]
            one, other = fast.step(action), original.step(action)
            assert_same_step(one, other)
            goals += "goal_met" in one[4]
            costs += one[4]["cost"] > 0.0
            costly_kinds |= {
                key for key, value in one[4].items() if key.startswith("cost_") and value > 0.0
            }
            np.testing.assert_array_equal(pair[0].model.geom_rgba, pair[1].model.geom_rgba)
    assert goals >= 3
    assert costs >= 3
    assert len(costly_kinds) >= 2
    fast.close()
    original.close()


def place(task: Any, xy: np.ndarray) -> None:
    """Move the robot to a point of the plane.

    Point slides from its initial position; the other robots float.
    """
    model, data = task.model, task.data
    body = model.body("agent").id
    start = model.jnt_qposadr[model.body_jntadr[body]]
    free = model.jnt_type[model.body_jntadr[body]] == mujoco.mjtJoint.mjJNT_FREE
    if free:
        data.qpos[start : start + 2] = xy
    else:  # the slides' axes turn with the body's initial pose
        mat = np.zeros(9)
        mujoco.mju_quat2Mat(mat, model.body_quat[body])
        local = mat.reshape(3, 3).T @ np.array([*(xy - model.body_pos[body, :2]), 0.0])
        data.qpos[start : start + 2] = local[:2]


@pytest.mark.parametrize(
    "env_id",
    [
        "SafetyPointGoal2-v0",
        "SafetyCarButton1-v0",
        "SafetyDoggoPush2-v0",
        "SafetyRacecarCircle2-v0",
        "SafetyAntRun0-v0",
    ],
)
def test_a_written_layout_equals_a_compiled_one(env_id: str) -> None:
    """A reset that writes into the compiled model leaves nothing of the old layout."""
    fast, original = gymnasium.make(env_id), gymnasium.make(env_id, fast=False)
    for seed in (0, 1, 2):
        fast.reset(seed=seed)
        original.reset(seed=seed)
        for _ in range(
            5 if seed == 1 else 0
        ):  # leave traces: mocaps moved, goal replaced, warm start
            fast.step(fast.action_space.high)  # type: ignore[attr-defined]
            original.step(fast.action_space.high)  # type: ignore[attr-defined]
        for name in ("model", "data"):
            one = arrays(getattr(fast.unwrapped.task, name))  # type: ignore[attr-defined]
            other = arrays(getattr(original.unwrapped.task, name))  # type: ignore[attr-defined]
            assert one.keys() == other.keys()
            assert len(one) > 100
            different = [
                key
                for key in one
                if not np.array_equal(one[key], other[key], equal_nan=one[key].dtype.kind == "f")
                and not key.startswith(WORKSPACE)
                and "island" not in key
            ]
            assert different == []
        statistics = [env.unwrapped.task.model.stat for env in (fast, original)]  # type: ignore[attr-defined]
        for name in ("extent", "meaninertia", "meanmass", "meansize"):
            assert getattr(statistics[0], name) == getattr(statistics[1], name)
        np.testing.assert_allclose(
            fast.unwrapped.task.model.cam_mat0,  # type: ignore[attr-defined]
            original.unwrapped.task.model.cam_mat0,  # type: ignore[attr-defined]
            atol=1e-12,
        )
    fast.close()
    original.close()


def test_lidar_readings_by_hand() -> None:
    """The lidar's geometry: bins, reach, smoothing, occlusion, a point just below angle zero."""
    from scpo_bench.envs.safety_gymnasium.fast.lidar import PseudoLidar

    # robot at (1, 1, 0.1), turned by 90 degrees: its x axis is the world's y axis
    frame = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    origin = np.array([1.0, 1.0, 0.1])
    positions = np.array(
        [
            [0.0, 0.0, 0.0],
            [1.0, 2.5, 0.7],  # ahead at 1.5 m, whatever its height: angle 0
            [-1.0, 1.0, 0.0],  # to the left at 2 m: angle pi / 2, the start of bin 1 of 4
            [1.0, 6.0, 0.0],  # ahead at 5 m: beyond the reach
            [1.0 + 1e-17, 2.5, 0.0],
        ]
    )
    observation = np.full(9, -1.0)
    lidar = PseudoLidar(bodies_P=[1, 2, 3], starts_P=[1, 1, 5], bins=4, reach=3.0)
    lidar.measure(positions, origin)
    lidar.write_to(observation, frame)
    # first lidar: 1 - 1.5/3 in bin 0 and, aligned with the bin's start, wholly in bin 3; 1 - 2/3 in
    # bin 1 (and bin 0)
    np.testing.assert_allclose(
        observation, [-1.0, 0.5, 1 / 3, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0], atol=1e-12
    )

    just_below = PseudoLidar(bodies_P=[1], starts_P=[0], bins=4, reach=3.0)
    just_below.measure(np.array([[0.0, 0.0, 0.0], [1.5, -1e-17, 0.0]]), np.zeros(3))
    readings = np.empty(4)
    just_below.write_to(readings, np.eye(3))
    np.testing.assert_allclose(readings, [0.5, 0.0, 0.0, 0.5], atol=1e-12)


@pytest.mark.parametrize("env_id", ["SafetyPointButton2-v0", "SafetyPointCircle1-v0"])
def test_layouts_take_the_same_draws(env_id: str) -> None:
    """The fast layout sampler consumes the same random numbers as the original."""
    from scpo_bench.envs.safety_gymnasium.package import original

    env = gymnasium.make(env_id)
    env.reset(seed=0)
    ours = env.unwrapped.task.random_generator  # type: ignore[attr-defined]
    theirs: Any = original().random_generator()
    theirs.set_placements_info(ours.placements, ours.placements_extents, ours.placements_margin)
    for seed in range(2):
        ours.set_random_seed(seed)
        theirs.set_random_seed(seed)
        one, other = ours.build_layout(), theirs.build_layout()
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        if "goal" in one:
            del ours.layout["goal"], theirs.layout["goal"]
            assert [ours.sample_goal_position() for _ in range(5)] == [
                theirs.sample_goal_position() for _ in range(5)
            ]
        assert ours.uniform() == theirs.uniform()
    env.close()


def test_gymnasium_users_can_hold_the_arrays_they_got() -> None:
    """Observations already returned do not change: no preallocated array is handed out."""
    env = gymnasium.make("SafetyPointGoal1-v0")
    first, _ = env.reset(seed=0)
    kept = first.copy()
    for _ in range(5):
        env.step(env.action_space.high)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(first, kept)
    env.close()
