"""The Safety-Gymnasium tasks as data: every id with its horizon, cost limit and sizes.

This module imports nothing heavy. Source of ids, horizons and thresholds: safety-gymnasium 1.0.0
(Ji et al., NeurIPS 2023, arXiv 2310.12567); the cost limit of 25 per episode is the one its
published results use. The sizes are checked against the built tasks by
tests/test_safety_gymnasium.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from scpo_bench.errors import nearest

Variant = Literal["plain", "vision", "debug"]

COST_LIMIT = 25.0
RENDER_MODES = ("human", "rgb_array", "depth_array")
LIDAR_BINS = 16

# Robot: (length of its sensor readings, number of actuators)
_ROBOTS = {"Point": (12, 2), "Car": (24, 2), "Doggo": (56, 12), "Racecar": (12, 2), "Ant": (40, 8)}
_DEBUG_ROBOTS = ("Point", "Car", "Racecar")  # those with a keyboard mapping

# Task name: (family, horizon, lidars observed at levels 0, 1, 2)
_NAVIGATION: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "Button": ("button", 1000, (2, 4, 4)),
    "Push": ("push", 1000, (2, 4, 4)),
    "Goal": ("goal", 1000, (1, 3, 3)),
    "Circle": ("circle", 500, (1, 1, 1)),
    "Run": ("run", 500, (0,)),
    "Race": ("race", 500, (1, 2, 2)),
    "FadingEasy": ("fading_easy", 1000, (1, 3, 3)),
    "FadingHard": ("fading_hard", 1000, (1, 3, 3)),
}

# Robot: (observation size, action size, threshold in m/s of -v0, of -v1, reward threshold)
_VELOCITY: dict[str, tuple[int, int, float, float, float | None]] = {
    "HalfCheetah": (17, 6, 2.8795, 3.2096, 4800.0),
    "Hopper": (11, 3, 0.37315, 0.7402, 3800.0),
    "Swimmer": (8, 2, 0.04845, 0.2282, 360.0),
    "Walker2d": (17, 6, 1.7075, 2.3415, None),
    "Ant": (27, 8, 2.5745, 2.6222, 6000.0),
    "Humanoid": (376, 17, 2.3475, 1.4149, None),
}


@dataclass(frozen=True)
class SafetyTask:
    """What a suite needs to know about one Safety-Gymnasium id without building it."""

    id: str
    """The id, as safety-gymnasium names it and as ``gymnasium.make`` takes it."""
    family: str
    """goal, button, push, circle, run, race, fading_easy, fading_hard or velocity."""
    robot: str
    """The robot's name as in the id, e.g. ``Point`` or ``HalfCheetah``."""
    level: int | None
    """0: unconstrained (except Run0); 1 and 2: harder; ``None`` for velocity tasks."""
    variant: Variant
    """``vision`` observes a 256 x 256 camera image as well, ``debug`` is steered by keyboard."""
    horizon: int
    """Steps after which an episode is truncated."""
    observation_size: int
    """Length of the flat observation; for ``vision`` of its parts other than the image."""
    action_size: int
    cost_limit: float = COST_LIMIT
    """Cost units per episode at which an episode counts as safe."""
    velocity_threshold: float | None = None
    """Speed in m/s above which a step of a velocity task costs 1."""
    reward_threshold: float | None = None
    """Return at which gymnasium calls the task solved."""

    @property
    def version(self) -> int:
        """The number after ``-v`` in the id."""
        return int(self.id.rpartition("-v")[2])

    @property
    def base_id(self) -> str:
        """The id of the plain variant."""
        return self.id.replace(self.variant.capitalize() + "-v", "-v")

    @property
    def needs_missing_assets(self) -> bool:
        """Whether it needs textures that the published wheel of safety-gymnasium 1.0.0 lacks."""
        return self.family == "race"

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that safety-gymnasium builds a navigation task from."""
        config: dict[str, Any] = {"agent_name": self.robot}
        if self.family == "race":
            config["floor_conf.type"] = "village"
        if self.variant == "vision":
            config |= {"observe_vision": True, "observation_flatten": False}
        elif self.variant == "debug":
            config["debug"] = True
        return config


def _navigation_tasks() -> Iterator[SafetyTask]:
    for name, (family, horizon, lidars_by_level) in _NAVIGATION.items():
        for level, lidars in enumerate(lidars_by_level):
            for robot, (sensors, actions) in _ROBOTS.items():
                variants: list[Variant] = ["plain", "vision"]
                if robot in _DEBUG_ROBOTS:
                    variants.append("debug")
                for variant in variants:
                    suffix = "" if variant == "plain" else variant.capitalize()
                    yield SafetyTask(
                        id=f"Safety{robot}{name}{level}{suffix}-v0",
                        family=family,
                        robot=robot,
                        level=level,
                        variant=variant,
                        horizon=horizon,
                        observation_size=sensors + LIDAR_BINS * lidars,
                        action_size=actions,
                    )


def _velocity_tasks() -> Iterator[SafetyTask]:
    for version in (0, 1):
        for robot, (observations, actions, *thresholds, reward_threshold) in _VELOCITY.items():
            yield SafetyTask(
                id=f"Safety{robot}Velocity-v{version}",
                family="velocity",
                robot=robot,
                level=None,
                variant="plain",
                horizon=1000,
                observation_size=observations,
                action_size=actions,
                velocity_threshold=thresholds[version],
                reward_threshold=reward_threshold,
            )


TASKS: dict[str, SafetyTask] = {
    task.id: task for task in (*_navigation_tasks(), *_velocity_tasks())
}
"""All 298 ids of safety-gymnasium 1.0.0 (single agent), by id."""


def task_metadata(env_id: str) -> SafetyTask:
    """The metadata of one id.

    Raises:
        KeyError: no such id; the message names the nearest one.
    """
    if env_id not in TASKS:
        raise KeyError(f"unknown Safety-Gymnasium id {env_id!r}{nearest(env_id, TASKS)}")
    return TASKS[env_id]
