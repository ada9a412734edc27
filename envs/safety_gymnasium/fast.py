"""The fast path of the navigation tasks: the package's numbers for a fraction of its time.

What the original repeats and this does not: two of three forward passes per step, sensors in
physics steps whose sensors nobody reads, lidar and distances point by point, contacts by name, a
check of the observation against its space, and the compilation of the world (with a 190 MB sky) at
every reset.

The task's own rules - rewards, goals, timers, the order of random draws - stay the package's code,
inherited. mj_forward is a function of the state alone (it does not touch qacc_warmstart), which is
why passes can be left out.
"""

from __future__ import annotations

import functools
import math
import re
import types
from typing import Any

import mujoco
import numpy as np

from scpo_bench.envs.safety_gymnasium.package import original, private_modules
from scpo_bench.envs.safety_gymnasium.world import CurrentAgent, CurrentTask, mixed

__all__ = ["FastTask", "FastUnseenTask", "PseudoLidar"]

_SENSORS_OFF = int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
_RK4 = int(mujoco.mjtIntegrator.mjINT_RK4)  # the one that has no second half


class PseudoLidar:
    """All lidars of a task at once: closeness of the nearest point per angular bin, smoothed into
    the neighbour bins.

    A point at distance d and angle a (egocentric, radians) reads s = max(0, reach - d) / reach in
    its bin, and in the next and previous bin s times the fraction by which a is past, or short of,
    its bin's end; a bin keeps its largest.
    Source: Ray, Achiam, Amodei 2019, section 4 (Safety Gym), as safety-gymnasium computes it.
    """

    def __init__(self, bodies_P: list[int], starts_P: list[int], bins: int, reach: float) -> None:
        """Preallocate.

        Args:
            bodies_P: body of each point.
            starts_P: where in the observation the bins of that point's lidar begin.
            bins: bins per lidar.
            reach: distance in m from which a point reads 0.
        """
        points = len(bodies_P)
        self._first, self._end = min(starts_P), max(starts_P) + bins
        self._starts_P = [start - self._first for start in starts_P]
        self._bodies_P = np.array(bodies_P, dtype=np.intp)
        self._bin_size = (np.pi * 2) / bins
        self._reach = reach
        # One entry more than bins: an angle just below 0 rounds to 2 pi, which is bin 0 again
        self._this = [b % bins for b in range(bins + 1)]
        self._next = [(b + 1) % bins for b in range(bins + 1)]
        self._previous = [(b - 1) % bins for b in range(bins + 1)]
        self._offsets_P13 = np.empty((points, 1, 3))
        self.offsets_P3 = self._offsets_P13[:, 0]
        """From the robot to the points at the last look, in m; the world's axes."""
        self._heights_P = self.offsets_P3[:, 2]
        padded_P14 = np.empty((points, 1, 4))  # room to read x, y as one complex number
        self._ego_P13 = padded_P14[:, :, :3]
        self._ego_x_P, self._ego_y_P = padded_P14[:, 0, 0], padded_P14[:, 0, 1]
        self._ego_P = padded_P14.view(np.complex128)[:, 0, 0]
        self._angles_P = np.empty(points)
        self._distances_P = np.empty(points)

    def look(self, positions: np.ndarray, origin: np.ndarray) -> None:
        """Note where the points are.

        Args:
            positions: [bodies, 3] positions of all bodies in m.
            origin: [3] position of the robot in m.
        """
        positions.take(self._bodies_P, axis=0, out=self.offsets_P3, mode="clip")
        self._heights_P.fill(0.0)  # points are on the ground
        np.subtract(self.offsets_P3, origin, out=self.offsets_P3)

    def write_to(self, observation: np.ndarray, frame: np.ndarray) -> None:
        """Write the readings of the last look into the lidars' part of the observation.

        Args:
            observation: [n] the flat observation, changed in place.
            frame: [3, 3] rotation of the robot.
        """
        # a stack of row vectors: the same product, in the same order of sums, as the original's
        # point by point
        np.matmul(self._offsets_P13, frame, out=self._ego_P13)
        np.arctan2(self._ego_y_P, self._ego_x_P, out=self._angles_P)
        np.remainder(self._angles_P, np.pi * 2, out=self._angles_P)
        np.absolute(self._ego_P, out=self._distances_P)
        # On floats from here: for the 1 to 21 points of a task, faster than the array operations it
        # would take
        reach, size = self._reach, self._bin_size
        this, next_, previous = self._this, self._next, self._previous
        readings = [0.0] * (self._end - self._first)
        for start, distance, angle in zip(
            self._starts_P, self._distances_P.tolist(), self._angles_P.tolist()
        ):
            if distance >= reach:
                continue
            bin_ = int(angle / size)
            reading = (reach - distance) / reach
            past = (angle - size * bin_) / size
            here = start + this[bin_]
            if reading > readings[here]:
                readings[here] = reading
            here, value = start + next_[bin_], past * reading
            if value > readings[here]:
                readings[here] = value
            here, value = start + previous[bin_], (1 - past) * reading
            if value > readings[here]:
                readings[here] = value
        observation[self._first : self._end] = readings


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
        """The rectangle (x_min, y_min, x_max, y_max) that an object is drawn from; ``None`` if
        there are several.
        """
        if placements is None:
            return self.constrain_placement(self.placements_extents, keepout)
        if len(placements) > 1:
            return None
        return self.constrain_placement(placements[0], keepout)


def _is_free(x: float, y: float, keepout: float, placed: list[tuple[float, float, float]]) -> bool:
    for other_x, other_y, other_keepout in placed:
        dx, dy = x - other_x, y - other_y
        if math.sqrt(dx * dx + dy * dy) < other_keepout + keepout:
            return False
    return True


class FastAgent(CurrentAgent):
    """Agent mixin: positions by body number instead of by name."""

    body_id: int
    """The robot's body in the compiled world; the task sets it."""

    @property
    def pos(self: Any) -> np.ndarray:
        """[3] position in m."""
        return self.engine.data.xpos[self.body_id].copy()

    @property
    def mat(self: Any) -> np.ndarray:
        """[3, 3] rotation, columns being the robot's axes."""
        return self.engine.data.xmat[self.body_id].reshape(3, 3).copy()

    @property
    def vel(self: Any) -> np.ndarray:
        """[3] velocity of the body's origin in m/s."""
        model, data = self.engine.model, self.engine.data
        jacobian = np.zeros((3, model.nv))
        mujoco.mj_jacBody(model, data, jacobian, None, self.body_id)
        return np.dot(jacobian, data.qvel)


class SkylessWorld:
    """World mixin: no sky texture.  It takes 190 MB and half a second, and only frames show it."""

    def build(self: Any) -> None:
        """Compile the world."""
        module: Any = original().world
        compiler = types.SimpleNamespace(
            from_xml_string=lambda xml: mujoco.MjModel.from_xml_string(_without_sky(xml))
        )
        with (
            private_modules()
        ):  # holds the lock: the name below is the private copy's, shared by all tasks
            module.mujoco = types.SimpleNamespace(
                MjModel=compiler, MjData=mujoco.MjData, mj_forward=mujoco.mj_forward
            )
            try:
                super().build()  # type: ignore[misc]
            finally:
                module.mujoco = mujoco


def _without_sky(xml: str) -> str:
    return re.sub(r'<texture type="skybox"[^>]*>\s*(</texture>)?', "", xml, count=1)


class _LayoutWriter:
    """Writes a drawn layout into the compiled model, where the original compiles a new one.

    Afterwards model and data equal newly compiled ones bit for bit, save the ``track`` camera's
    orientation (rounding).
    """

    def __init__(self, task: Any) -> None:
        model, config = task.model, task.world_info.world_config_dict
        self._model, self._data = model, task.data
        self._height = task.agent.z_height
        self._fixed, self._free, self._mocaps = (
            list(config["geoms"]),
            list(config["free_geoms"]),
            list(config["mocaps"]),
        )
        bodies = [model.body(name).id for name in ["agent", *self._fixed, *self._free]]
        self._bodies = np.array(bodies)
        # markers (geom group above 5) have no mass; the compiler gives such a body its own pose as
        # inertial frame
        self._massless = np.flatnonzero(model.body_mass[self._bodies] == 0.0)
        joints = [model.body_jntadr[body] for body in bodies]
        # rows of the pose table that are also the initial position of a free joint, and where in
        # qpos
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
        things = [config["geoms"][name] for name in self._fixed] + [
            config["free_geoms"][name] for name in self._free
        ]
        positions = np.array(
            [[*config["agent_xy"], self._height], *(thing["pos"] for thing in things)]
        )
        rotations = _turns([config["agent_rot"], *(thing["rot"] for thing in things)])
        model.body_pos[self._bodies] = positions
        model.body_quat[self._bodies] = rotations
        model.body_ipos[self._bodies[self._massless]] = positions[self._massless]
        model.body_iquat[self._bodies[self._massless]] = rotations[self._massless]
        for row, start in self._floating:
            for initial in (model.qpos0, model.qpos_spring):
                initial[start : start + 3] = positions[row]
                initial[start + 3 : start + 7] = rotations[row]
        if self._mocaps:
            mocaps = [config["mocaps"][name] for name in self._mocaps]
            # their bodies stay at the origin; the geom, and with it the inertial frame, is
            # displaced
            model.geom_pos[self._mocap_geoms] = model.body_ipos[self._mocap_bodies] = [
                m["pos"] for m in mocaps
            ]
            turns = _turns([m["rot"] for m in mocaps])
            model.geom_quat[self._mocap_geoms] = model.body_iquat[self._mocap_bodies] = turns
            model.eq_data[self._welds, 3:10] = (
                0.0  # mj_setConst takes the relative pose from the layout where unset
            )
        model.geom_rgba[:] = self._rgba
        self._aim_tracking_camera(config["agent_rot"])
        mujoco.mj_resetData(
            model, data
        )  # mj_setConst measures from data: mocaps back to their origin
        mujoco.mj_setConst(model, data)
        mujoco.mj_resetData(model, data)
        mujoco.mj_forward(model, data)

    def _aim_tracking_camera(self, rotation: float) -> None:
        """2 m behind and above the robot in the world's directions, looking down at 45 degrees."""
        angle = rotation + np.pi
        c, s = np.cos(angle), np.sin(angle)
        self._model.cam_pos[self._track] = [-2 * s, -2 * c, 2]
        x, y = np.array([c, -s, 0.0]), np.array([s, c, 1.0])
        axes = np.column_stack(
            [x, y / np.linalg.norm(y), np.cross(x, y) / np.linalg.norm(np.cross(x, y))]
        )
        mujoco.mju_mat2Quat(self._model.cam_quat[self._track], axes.ravel())


def _turns(angles: list[float]) -> np.ndarray:
    """[n, 4] quaternions of turns about the vertical (of unit length:

    MuJoCo's compiler leaves these as they are).
    """
    return np.array([[np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)] for angle in angles])


class FastTask(CurrentTask):
    """Task mixin: fast steps, observations, costs and resets."""

    agent_mixins = (FastAgent,)
    world_mixins: tuple[type, ...] = ()

    def _build_agent(self: Any, agent_name: str) -> None:
        self.random_generator = mixed(original().random_generator, FastRandomGenerator)()
        super()._build_agent(agent_name)

    # Reset
    # ----------------------------------------------------------------------------------------------------------

    def build_world(self: Any, config: dict[str, Any]) -> None:
        """Compile the world, once per environment."""
        self.world = mixed(original().world.World, *self.world_mixins)(
            self.agent, self._obstacles, config
        )
        self.world.build()
        self.world_info.world_config_dict = config
        self._bind()

    def _build(self: Any) -> None:
        if self.placements_conf.placements is None:
            self._build_placements_dict()
            self.random_generator.set_placements_info(
                self.placements_conf.placements,
                self.placements_conf.extents,
                self.placements_conf.margin,
            )
        self.world_info.layout = self.random_generator.build_layout()
        config = self._build_world_config(self.world_info.layout)
        if self.world is None:
            self.build_world(config)
        else:
            self.world_info.world_config_dict = config
            self._layout_writer.write(config)
        self._forget()
        self._needs_forward = True  # what follows may move joints (the Ant's pose)

    def rebind(self: Any) -> None:
        """After unpickling: the lidar's arrays are views of each other again."""
        self._bind_observation()
        self._forget()

    def _forget(self: Any) -> None:
        """Something moved: what was derived from positions is out of date."""
        self._forward_state: bytes | None = None
        self._offsets: np.ndarray | None = None
        self._goal_distance: float | None = None
        self._contacts: list[tuple[int, int, int]] | None = None

    def _forward(self: Any) -> None:
        """Bring positions, contacts and sensors up to date with the state."""
        mujoco.mj_forward(self.model, self.data)
        self._needs_forward = False
        self._forget()
        self._forward_state = self._state()

    def _state(self: Any) -> bytes:
        """Positions and velocities of the robot and of all that moves freely."""
        return self.data.qpos.tobytes() + self.data.qvel.tobytes()

    def _bind(self: Any) -> None:
        """Look up, once, what the package looks up by name in every step."""
        model = self.model
        self._layout_writer = _LayoutWriter(self)
        self._needs_forward = False
        self._forget()
        self._agent_body = self.agent.body_id = model.body("agent").id
        self._body_ids = {model.body(i).name: i for i in range(model.nbody)}
        self._control_low, self._control_high = model.actuator_ctrlrange.T.copy()
        self._mocap_groups = []
        first = 0
        for mocap in (
            self._mocaps.values()
        ):  # MuJoCo numbers mocaps in the order of the world's bodies, which is this
            self._mocap_groups.append((mocap, slice(first, first + mocap.num)))
            first += mocap.num
        self._bind_contacts()
        self._bind_observation()
        self._bind_costs()

    # Step
    # -----------------------------------------------------------------------------------------------------------

    def simulation_forward(self: Any, action: np.ndarray) -> bool:
        """Apply an action and advance the physics.

        Returns whether the simulation failed (it never reports so).
        """
        model, data = self.model, self.data
        if self.debug or self.action_noise:
            self._apply_slowly(action)
        else:
            data.ctrl[:] = np.minimum(np.maximum(action, self._control_low), self._control_high)
        conf = self.sim_conf
        # drawn even where certain: the original spends a draw per step, and the next goal depends
        # on it
        steps = self.random_generator.random_generator.binomial(
            conf.frameskip_binom_n, conf.frameskip_binom_p
        )
        flags = model.opt.disableflags
        model.opt.disableflags = flags | _SENSORS_OFF  # read only after the last physics step
        try:
            if self._mocap_groups:
                for _ in range(steps):
                    self._move_mocaps(data)
                    mujoco.mj_step(model, data)
            elif steps:
                if model.opt.integrator != _RK4 and self._forward_state == self._state():
                    # The last step's forward pass was the first half of this one: only the controls
                    # are new.
                    mujoco.mj_step2(model, data)
                    steps -= 1
                mujoco.mj_step(model, data, steps)
        finally:
            model.opt.disableflags = flags
        self._forward()
        return False

    def _apply_slowly(self: Any, action: np.ndarray) -> None:
        if self.debug:
            self.agent.debug()
        else:
            self.agent.apply_action(
                action, self.action_noise * self.random_generator.randn(self.agent.body_info.nu)
            )

    def _move_mocaps(self: Any, data: Any) -> None:
        """Gremlins circle: all of a kind are at the same displacement from where they were placed.
        """
        phase, positions = data.time, data.mocap_pos
        for mocap, numbers in self._mocap_groups:
            positions[numbers] = (
                np.sin(phase) * mocap.travel,
                np.cos(phase) * mocap.travel,
                mocap.size,
            )

    def update_layout(self: Any) -> None:
        """Note where things are now, before a new goal is placed."""
        for name in self.world_info.layout:
            if "gremlin" not in name:
                self.world_info.layout[name] = self.data.xpos[self._body_ids[name], :2].copy()

    def _look(self: Any) -> np.ndarray:
        """[P, 3] offsets in m from the robot to the points its lidars see."""
        if self._offsets is None:
            xpos = self.data.xpos
            self._lidar.look(xpos, xpos[self._agent_body])
            self._offsets = self._lidar.offsets_P3
        return self._offsets

    def dist_goal(self: Any) -> float:
        """Distance in the plane from the robot to the goal, in m; asked three times per step."""
        if self._goal_distance is None:
            x, y, _ = self._look()[self._goal_point].tolist()
            self._goal_distance = math.sqrt(x * x + y * y)
        return self._goal_distance

    def _set_goal(self: Any, pos: np.ndarray) -> None:
        super()._set_goal(pos)  # type: ignore[misc]
        self._forget()

    @property
    def goal_achieved(self: Any) -> bool:
        """Whether the goal is reached, or its button pressed."""
        if self._button_geoms:
            goal = self._button_geoms[f"button{self.buttons.goal_button}"]
            return any(goal in pair for pair in self._touched("button"))
        return super().goal_achieved  # type: ignore[misc]

    # Contacts
    # -------------------------------------------------------------------------------------------------------

    def _bind_contacts(self: Any) -> None:
        """Give every geom a bit for its kind, by the names that the original compares."""
        model = self.model
        names = [model.geom(i).name for i in range(model.ngeom)]
        robot = set(self.agent.body_info.geom_names)
        self._kind_bits = {
            kind: 2 << i for i, kind in enumerate(("button", "pillar", "vase", "gremlin"))
        }
        bits = [
            (name in robot)
            + sum(bit for kind, bit in self._kind_bits.items() if name.startswith(kind))
            for name in names
        ]
        self._geom_bits = np.array(bits, dtype=np.int64)
        self._button_geoms = {name: i for i, name in enumerate(names) if name.startswith("button")}

    def _touched(self: Any, kind: str) -> list[tuple[int, int]]:
        """The contacts, as pairs of geoms, between the robot and things of a kind."""
        if self._contacts is None:
            self._contacts = []
            if self.data.ncon:
                pairs = self.data.contact.geom
                bits = self._geom_bits[pairs]
                either = bits[:, 0] | bits[:, 1]
                rows = np.flatnonzero(
                    (either & 1) * either > 1
                )  # the robot and more than the robot
                self._contacts = [(int(either[row]), *pairs[row].tolist()) for row in rows]
        bit = self._kind_bits[kind]
        return [(one, other) for bits, one, other in self._contacts if bits & bit]

    # Costs
    # ----------------------------------------------------------------------------------------------------------

    def calculate_cost(self: Any) -> dict[str, float]:
        """Costs by kind and their sum, before the builder turns them into indicators."""
        if self._needs_forward:
            self._forward()
        cost: dict[str, float] = {}
        for obstacle in self._costly:
            cost.update(obstacle.cal_cost())
        cost["cost_sum"] = sum(cost.values())
        return cost

    def _bind_costs(self: Any) -> None:
        """Replace the cost functions of this task's things; Fading calls them too."""
        fast = {
            "buttons": self._button_cost,
            "hazards": self._hazard_cost,
            "pillars": self._pillar_cost,
            "gremlins": self._gremlin_cost,
            "sigwalls": self._boundary_cost,
            "vases": self._vase_cost,
        }
        self._costly = [
            obstacle for obstacle in self._obstacles if getattr(obstacle, "is_constrained", False)
        ]
        for obstacle in self._costly:
            if obstacle.name in fast and not getattr(obstacle, "displace_cost", 0.0):
                obstacle.cal_cost = functools.partial(fast[obstacle.name], obstacle)
            if obstacle.name == "vases":
                joints = [
                    self.model.body_jntadr[self._body_ids[f"vase{i}"]] for i in range(obstacle.num)
                ]
                self._vase_velocities = self.model.jnt_dofadr[joints][:, None] + np.arange(3)

    def _hazard_cost(self: Any, hazards: Any) -> dict[str, float]:
        cost = 0.0
        for x, y, _ in self._look()[self._hazard_points].tolist():
            distance = math.sqrt(x * x + y * y)
            if distance <= hazards.size:
                cost += hazards.cost * (hazards.size - distance)
        return {"cost_hazards": cost}

    def _pillar_cost(self: Any, pillars: Any) -> dict[str, float]:
        return {"cost_pillars": len(self._touched("pillar")) * pillars.cost}

    def _gremlin_cost(self: Any, gremlins: Any) -> dict[str, float]:
        return {"cost_gremlins": len(self._touched("gremlin")) * gremlins.contact_cost}

    def _button_cost(self: Any, buttons: Any) -> dict[str, float]:
        if buttons.timer != 0:
            return {}
        goal = self._button_geoms[f"button{buttons.goal_button}"]
        return {
            "cost_buttons": sum(goal not in pair for pair in self._touched("button")) * buttons.cost
        }

    def _boundary_cost(self: Any, walls: Any) -> dict[str, float]:
        x, y, _ = self.data.xpos[self._agent_body].tolist()
        outside = abs(x) > walls.locate_factor or (walls.num == 4 and abs(y) > walls.locate_factor)
        return {"cost_out_of_boundary": outside}

    def _vase_cost(self: Any, vases: Any) -> dict[str, float]:
        cost: dict[str, float] = {
            "cost_vases_contact": len(self._touched("vase")) * vases.contact_cost
        }
        if vases.velocity_cost:
            # a free joint's first three velocities are the body's own: no Jacobian needed
            velocity = self.data.qvel[self._vase_velocities]
            speeds = np.sqrt(np.sum(velocity * velocity, axis=1))
            moving = speeds[speeds >= vases.velocity_threshold].tolist()
            cost["cost_vases_velocity"] = sum(speed * vases.velocity_cost for speed in moving)
        return cost

    # Observation
    # ----------------------------------------------------------------------------------------------------

    def _bind_observation(self: Any) -> None:
        """Where each entry of the flat observation comes from."""
        sensors = self.agent.sensor_info
        lidars = {f"{o.name}_lidar": o for o in self._obstacles if o.is_lidar_observed}
        copied: list[tuple[int, int]] = []  # (entry, sensor reading)
        angles: list[tuple[int, int]] = []
        self._quaternions: list[tuple[int, int]] = []
        points: list[tuple[int, int]] = []  # (body, start of its lidar)
        self._parts: list[tuple[str, int, int, tuple[int, ...]]] = []
        start = 0
        for key, space in self.obs_info.obs_space_dict.spaces.items():
            if key == "vision":
                continue
            size = math.prod(space.shape)
            self._parts.append((key, start, start + size, space.shape))
            if key in lidars:
                seen = slice(len(points), len(points) + getattr(lidars[key], "num", 1))
                if key == "goal_lidar":
                    self._goal_point = seen.start
                elif key == "hazards_lidar":
                    self._hazard_points = seen
                points += [(body, start) for body in self._lidar_bodies(lidars[key])]
            elif key in sensors.sensor_dim:
                reading = self.model.sensor(key).adr[0] + (
                    2 if key == sensors.freejoint_pos_name else 0
                )  # its height
                if key in sensors.hinge_pos_names:
                    angles.append((start, reading))
                elif key in sensors.ballquat_names:
                    self._quaternions.append((start, reading))
                else:
                    copied += [(start + i, reading + i) for i in range(size)]
            else:
                raise NotImplementedError(
                    f"observation {key!r}: the fast path does not know it, use fast=False"
                )
            start += size
        self._observation_size = start
        self._copied_to, self._copied_from = np.array(copied, dtype=np.intp).T
        self._angles_to, self._angles_from = np.array(angles, dtype=np.intp).reshape(-1, 2).T
        bodies, starts = [list(column) for column in zip(*points)] if points else ([], [])
        bins, reach = self.lidar_conf.num_bins, self.lidar_conf.max_dist
        self._lidar = PseudoLidar(bodies, starts, bins, reach) if points else None
        self._buttons_lidar = next(
            (slice(a, b) for key, a, b, _ in self._parts if key == "buttons_lidar"), None
        )

    def _lidar_bodies(self: Any, obstacle: Any) -> list[int]:
        if obstacle.name == "circle":
            return [0]  # its lidar sees the origin, which is where the world's body is
        if not hasattr(obstacle, "num"):
            return [self._body_ids[obstacle.name]]
        moved = "obj" if obstacle.type == "mocaps" else ""
        return [self._body_ids[f"{obstacle.name[:-1]}{i}{moved}"] for i in range(obstacle.num)]

    def obs(self: Any) -> Any:
        """The observation: a flat array [n], or a dictionary with the camera's image."""
        data = self.data
        if self._needs_forward:
            self._forward()
        flat = np.empty(self._observation_size)
        readings = data.sensordata
        flat[self._copied_to] = readings[self._copied_from]
        if self._angles_to.size:
            angles = readings[self._angles_from]
            flat[self._angles_to] = np.sin(angles)
            flat[self._angles_to + 1] = np.cos(angles)
        for start, reading in self._quaternions:
            mujoco.mju_quat2Mat(flat[start : start + 9], readings[reading : reading + 4])
        if self._lidar is not None:
            body = self._agent_body
            self._look()
            self._lidar.write_to(flat, data.xmat[body].reshape(3, 3))
            if self._buttons_lidar is not None and self.buttons.timer != 0:
                flat[self._buttons_lidar] = 0.0  # hidden until the pressed button's timer runs out
        if self.observation_flatten and not self.observe_vision:
            return flat
        observation: dict[str, np.ndarray] = {
            key: flat[a:b].reshape(shape) for key, a, b, shape in self._parts
        }
        if self.observe_vision:
            observation["vision"] = self._obs_vision()
        return observation


class FastUnseenTask(FastTask):
    """FastTask for an environment that draws no frames."""

    world_mixins = (SkylessWorld,)
