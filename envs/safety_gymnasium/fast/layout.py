"""Resets of the fast path: drawing a layout, and writing it into a world that is compiled once."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np

from scpo_bench.envs.safety_gymnasium.package import original, private_modules


class FastRandomGenerator:
    """RandomGenerator mixin: the same draws in the same order, compared as Python floats."""

    def sample_layout(self: Any) -> bool:
        """Try once to place every object; ``False`` if one finds no place in 100 draws."""
        layout: dict[str, np.ndarray] = {}
        placed: list[tuple[float, float, float]] = []  # x, y, keepout and margin, in m
        uniform = self.random_generator.uniform
        for name, (placements, keepout) in self.placements.items():
            rectangle = self._rectangle(placements, keepout)
            for _ in range(100):
                if rectangle is None:
                    x, y = self.draw_placement(placements, keepout).tolist()
                else:
                    x, y = uniform(rectangle[0], rectangle[2]), uniform(rectangle[1], rectangle[3])
                if _is_free(x, y, keepout, placed):
                    break
            else:
                return False
            layout[name] = np.array([x, y])
            placed.append((x, y, keepout + self.placements_margin))
        self.layout = layout
        return True

    def sample_goal_position(self: Any) -> bool:
        """Draw a goal once; ``False`` if it is too close to anything."""
        placements, keepout = self.placements["goal"]
        x, y = self.draw_placement(placements, keepout).tolist()
        placed = [
            (*xy.tolist(), self.placements[name][1] + self.placements_margin)
            for name, xy in self.layout.items()
        ]
        if not _is_free(x, y, keepout, placed):
            return False
        self.layout["goal"] = np.array([x, y])
        return True

    def _rectangle(
        self: Any, placements: list[Any] | None, keepout: float
    ) -> tuple[float, ...] | None:
        """Where to draw from: (x_min, y_min, x_max, y_max); ``None`` if there are several areas."""
        if placements is None:
            return self.constrain_placement(self.placements_extents, keepout)
        if len(placements) > 1:
            return None
        return self.constrain_placement(placements[0], keepout)


def _is_free(x: float, y: float, keepout: float, placed: list[tuple[float, float, float]]) -> bool:
    """Whether (x, y) keeps its distance from everything placed so far."""
    for other_x, other_y, other_keepout in placed:
        dx, dy = x - other_x, y - other_y
        if math.sqrt(dx * dx + dy * dy) < other_keepout + keepout:
            return False
    return True


class SkylessWorld:
    """World mixin: no sky texture. It takes 190 MB and half a second, and only frames show it."""

    def build(self: Any) -> None:
        """Compile the world."""
        module: Any = original().world
        with private_modules():  # holds the lock: all tasks share the private copy's module
            before = module.mujoco
            module.mujoco = mujoco_with_sky("")
            try:
                super().build()  # type: ignore[misc]
            finally:
                module.mujoco = before


def mujoco_with_sky(sky: str) -> SimpleNamespace:
    """What the package's ``world`` module needs of ``mujoco``; ``sky`` replaces the world's sky.

    sky: a texture element of MJCF, or "" for none.
    """

    def compile_with_sky(xml: str) -> Any:
        original_sky = r'<texture type="skybox"[^>]*>\s*(</texture>)?'
        return mujoco.MjModel.from_xml_string(re.sub(original_sky, sky, xml, count=1))

    compiler = SimpleNamespace(from_xml_string=compile_with_sky)
    return SimpleNamespace(MjModel=compiler, MjData=mujoco.MjData, mj_forward=mujoco.mj_forward)


class LayoutWriter:
    """Writes a drawn layout into the compiled model, where the original compiles a new one.

    Afterwards model and data equal newly compiled ones bit for bit, except for the orientation of
    the ``track`` camera (rounding).
    """

    def __init__(self, task: Any) -> None:
        model, config = task.model, task.world_info.world_config_dict
        self._model, self._data = model, task.data
        self._height = task.agent.z_height
        self._fixed, self._free, self._mocaps = (
            list(config[kind]) for kind in ("geoms", "free_geoms", "mocaps")
        )
        bodies = [model.body(name).id for name in ["agent", *self._fixed, *self._free]]
        self._bodies = np.array(bodies)
        # Markers (geom group above 5) have no mass; the compiler gives such a body its own pose as
        # inertial frame.
        self._massless = np.flatnonzero(model.body_mass[self._bodies] == 0.0)
        # Rows of the pose table that are also the initial position of a free joint, and where in
        # qpos.
        joints = [model.body_jntadr[body] for body in bodies]
        self._floating = [
            (row, model.jnt_qposadr[joint])
            for row, joint in enumerate(joints)
            if joint >= 0 and model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE
        ]
        self._mocap_geoms = np.array([model.geom(name).id for name in self._mocaps], dtype=int)
        self._mocap_bodies = model.geom_bodyid[self._mocap_geoms]
        self._welds = np.flatnonzero(model.eq_type == mujoco.mjtEq.mjEQ_WELD)
        self._track = model.camera("track").id
        self._rgba = model.geom_rgba.copy()

    def write(self, config: dict[str, Any]) -> None:
        """Set up model and data for the start of an episode in the layout of ``config``."""
        model, data = self._model, self._data
        things = [config["geoms"][name] for name in self._fixed]
        things += [config["free_geoms"][name] for name in self._free]
        positions = np.array(
            [[*config["agent_xy"], self._height], *(thing["pos"] for thing in things)]
        )
        rotations = _turns([config["agent_rot"], *(thing["rot"] for thing in things)])
        massless = self._bodies[self._massless]
        model.body_pos[self._bodies], model.body_quat[self._bodies] = positions, rotations
        model.body_ipos[massless] = positions[self._massless]
        model.body_iquat[massless] = rotations[self._massless]
        for row, start in self._floating:
            for initial in (model.qpos0, model.qpos_spring):
                initial[start : start + 3] = positions[row]
                initial[start + 3 : start + 7] = rotations[row]
        if self._mocaps:
            # Their bodies stay at the origin; the geom, and with it the inertial frame, is
            # displaced.
            mocaps = [config["mocaps"][name] for name in self._mocaps]
            displaced, turns = [m["pos"] for m in mocaps], _turns([m["rot"] for m in mocaps])
            model.geom_pos[self._mocap_geoms] = model.body_ipos[self._mocap_bodies] = displaced
            model.geom_quat[self._mocap_geoms] = model.body_iquat[self._mocap_bodies] = turns
            # mj_setConst takes the relative pose from the layout where it is unset.
            model.eq_data[self._welds, 3:10] = 0.0
        model.geom_rgba[:] = self._rgba
        self._aim_tracking_camera(config["agent_rot"])
        mujoco.mj_resetData(model, data)  # mj_setConst measures from data: mocaps at their origin
        mujoco.mj_setConst(model, data)
        mujoco.mj_resetData(model, data)
        mujoco.mj_forward(model, data)

    def _aim_tracking_camera(self, rotation: float) -> None:
        """2 m behind and above the robot in the world's directions, tilted down by 45 degrees."""
        angle = rotation + np.pi
        c, s = np.cos(angle), np.sin(angle)
        self._model.cam_pos[self._track] = [-2 * s, -2 * c, 2]
        x, y = np.array([c, -s, 0.0]), np.array([s, c, 1.0])
        z = np.cross(x, y)
        axes = np.column_stack([x, y / np.linalg.norm(y), z / np.linalg.norm(z)])
        mujoco.mju_mat2Quat(self._model.cam_quat[self._track], axes.ravel())


def _turns(angles: list[float]) -> np.ndarray:
    """[n, 4] quaternions of turns about the vertical.

    They have unit length, so MuJoCo's compiler leaves them as they are.
    """
    return np.array([[np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)] for angle in angles])
