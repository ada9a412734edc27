"""Building safety-gymnasium's tasks on this stack, and moving their state in and out of pickles.

What the unmodified classes need on gymnasium 1.x (and what the fast path adds) comes in by
subclassing: ``mixed`` puts mixins in front of one of the package's classes.
"""

from __future__ import annotations

import functools
import io
import pickle
import warnings
from typing import Any

import mujoco
import numpy as np

from scpo_bench.envs.safety_gymnasium.package import original, private_modules

__all__ = [
    "builder_class",
    "dump_episode",
    "dump_robot",
    "load_episode",
    "load_robot",
    "mixed",
]

_FULL_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_EDITED_ARRAYS = (
    "body_pos",
    "geom_rgba",
)  # what tasks change in the model during an episode: the goal, fading
_EDITED_STATISTICS = ("extent", "meaninertia", "meanmass", "meansize")
# What MuJoCo computes before it integrates: after mj_step it lags the state by one physics step,
# and gymnasium's robots read it so (the position before an action is the body's, not the joints'),
# which a forward pass would not restore
_LAGGING = (
    *(
        "xpos",
        "xquat",
        "xmat",
        "xipos",
        "ximat",
        "geom_xpos",
        "geom_xmat",
        "site_xpos",
        "site_xmat",
        "subtree_com",
    ),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
    *("cinert", "cvel", "qfrc_actuator", "cfrc_ext", "cfrc_int", "cacc", "qacc"),
)


@functools.cache
def mixed(package_class: type, *mixins: type) -> type:
    """``package_class`` with ``mixins`` before it; it keeps its name, which the package compares
    and parses.
    """
    return type(
        package_class.__name__, (*mixins, package_class), {"mixed_from": (package_class, mixins)}
    )


class CurrentAgent:
    """Agent mixin: what the package's robots need on numpy 2."""

    def get_sensor(self: Any, name: str) -> np.ndarray:
        """A sensor's reading; shape () for joint angles, which the caller turns into a float."""
        reading = super().get_sensor(name)  # type: ignore[misc]
        angle = (
            self.sensor_conf.sensors_angle_components and name in self.sensor_info.hinge_pos_names
        )
        return reading.reshape(()) if angle else reading


class CurrentTask:
    """Task mixin: what the package's tasks need on gymnasium 1.x."""

    agent_mixins: tuple[type, ...] = (CurrentAgent,)

    def _build_agent(self: Any, agent_name: str) -> None:
        agent_class = mixed(getattr(original().agents, agent_name), *self.agent_mixins)
        with warnings.catch_warnings():
            # the constructor looks joints up by one-element arrays, which numpy 2 still takes, with
            # a warning
            warnings.simplefilter("ignore", DeprecationWarning)
            self.agent = agent_class(random_generator=self.random_generator)

    def build_world(self: Any, config: dict[str, Any]) -> None:
        """Compile the world for a configuration that an earlier reset has drawn (see
        ``dump_episode``).
        """
        self.world = original().world.World(self.agent, self._obstacles, config)
        self.world.build()

    def rebind(self: Any) -> None:
        """Called on a task that was unpickled, with its world in place."""

    def _get_viewer(self: Any, mode: str) -> Any:
        """The viewer of a mode, made when first asked for: its constructor wants the size of the
        frame now.
        """
        size = (self.model.vis.global_.offwidth, self.model.vis.global_.offheight)
        key = mode if mode == "human" else size
        viewer = self._viewers.get(key)
        if viewer is None:
            if mode == "human":
                viewer = original().keyboard_viewer(
                    self.model, self.data, self.agent.keyboard_control_callback
                )
            else:
                viewer = original().offscreen_viewer(self.model, self.data, *size)
            self._viewers[key] = viewer
        viewer.model, viewer.data = self.model, self.data  # the original reset makes new ones
        self.viewer = viewer
        return viewer


class SeededBuilder:
    """Builder mixin: no draw from numpy's global generator; the tasks are made from mixed classes."""

    task_mixins: tuple[type, ...] = ()

    def set_seed(self: Any, seed: int | None = None) -> None:
        """Seed the layout generator.

        The constructor asks without a seed; every reset of ours gives one.
        """
        super().set_seed(0 if seed is None else seed)  # type: ignore[misc]

    def _get_task(self: Any) -> Any:
        package = original()
        name = _task_class_name(self.task_id)
        # spaces.Box compares a float32 bound with float64's range: the overflow is harmless, the
        # warning is not
        with np.errstate(over="ignore"):
            task = mixed(getattr(package.tasks, name), *self.task_mixins)(config=self.config)
            task.build_observation_space()
        return task


def _task_class_name(task_id: str) -> str:
    """``SafetyPointFadingEasy1-v0`` -> ``FadingEasyLevel1``."""
    name = task_id.removeprefix("Safety").rpartition("-v")[0]
    for robot in ("Point", "Car", "Doggo", "Racecar", "Ant"):
        name = name.removeprefix(robot)
    return f"{name[:-1]}Level{name[-1]}"


@functools.cache
def builder_class(*, fast: bool, drawn: bool) -> type:
    """The package's Builder for this stack.

    Args:
        fast: use the fast path.
        drawn: frames will be drawn, so the world needs its sky.
    """
    from scpo_bench.envs.safety_gymnasium.fast import (  # it builds on this module
        FastTask,
        FastUnseenTask,
    )

    mixin: type = CurrentTask if not fast else FastTask if drawn else FastUnseenTask
    return type("Builder", (SeededBuilder, original().builder), {"task_mixins": (mixin,)})


class _EpisodePickler(pickle.Pickler):
    """Leaves out what is rebuilt on loading: model, data, viewers; names mixed classes by their
    parts.
    """

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, mujoco.MjModel):
            return ("model",)
        if isinstance(obj, mujoco.MjData):
            return ("data",)
        if isinstance(obj, type) and "mixed_from" in vars(obj):
            return ("class", obj.mixed_from)  # type: ignore[attr-defined]
        if isinstance(obj, (original().offscreen_viewer, original().keyboard_viewer)):
            return ("viewer",)
        return None


class _EpisodeUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, model: Any, data: Any) -> None:
        super().__init__(file)
        self._rebuilt = {"model": model, "data": data, "viewer": None}

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "class":
            package_class, mixins = pid[1]
            return mixed(package_class, *mixins)
        return self._rebuilt[pid[0]]


def dump_episode(builder: Any) -> dict[str, Any] | None:
    """The state of a builder and its task, physics included; ``None`` before the first reset.

    The compiled model is left out: its sky alone takes 190 MB.  It is compiled again from the
    world's configuration.
    """
    task = builder.task
    if task.world is None:
        return None
    model, data = task.model, task.data
    physics = np.empty(mujoco.mj_stateSize(model, _FULL_STATE))
    mujoco.mj_getState(model, data, physics, _FULL_STATE)
    file = io.BytesIO()
    with private_modules():
        _EpisodePickler(file).dump(vars(builder))
    return {
        "world": task.world_info.world_config_dict,
        "arrays": {name: getattr(model, name).copy() for name in _EDITED_ARRAYS},
        "statistics": {name: getattr(model.stat, name) for name in _EDITED_STATISTICS},
        "center": model.stat.center.copy(),
        "physics": physics,
        "objects": file.getvalue(),
    }


def load_episode(builder: Any, episode: dict[str, Any] | None) -> None:
    """Put a dumped state into a newly made builder of the same arguments."""
    if episode is None:
        return
    task = builder.task
    task.build_world(episode["world"])
    model, data = task.model, task.data
    for name, array in episode["arrays"].items():
        getattr(model, name)[:] = array
    for name, value in episode["statistics"].items():
        setattr(model.stat, name, value)
    model.stat.center[:] = episode["center"]
    mujoco.mj_setState(model, data, episode["physics"], _FULL_STATE)
    mujoco.mj_forward(model, data)
    with private_modules():
        state = _EpisodeUnpickler(io.BytesIO(episode["objects"]), model, data).load()
    vars(builder).update(state)
    builder.task.rebind()
    builder.task._viewers = {}
    builder.task.viewer = None


def dump_robot(robot: Any) -> dict[str, Any]:
    """The physics of one of gymnasium's MuJoCo robots.

    Not a pickle of MjData: loading one leaks its copy of the model (0.6 MB each on mujoco 3.10).
    """
    physics = np.empty(mujoco.mj_stateSize(robot.model, _FULL_STATE))
    mujoco.mj_getState(robot.model, robot.data, physics, _FULL_STATE)
    return {
        "physics": physics,
        "lagging": {name: getattr(robot.data, name).copy() for name in _LAGGING},
    }


def load_robot(robot: Any, state: dict[str, Any]) -> None:
    """Put dumped physics into a newly made robot of the same arguments."""
    mujoco.mj_setState(robot.model, robot.data, state["physics"], _FULL_STATE)
    mujoco.mj_forward(robot.model, robot.data)
    for name, array in state["lagging"].items():
        getattr(robot.data, name)[:] = array
