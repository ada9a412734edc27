"""The fast path's task and robot: resets and steps, with the observation and costs mixed in."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from scpo_bench.envs.safety_gymnasium.fast.costs import FastCosts
from scpo_bench.envs.safety_gymnasium.fast.layout import (
    FastRandomGenerator,
    LayoutWriter,
    SkylessWorld,
)
from scpo_bench.envs.safety_gymnasium.fast.observation import FastObservation
from scpo_bench.envs.safety_gymnasium.package import original
from scpo_bench.envs.safety_gymnasium.world import CurrentAgent, CurrentTask, mixed

_SENSORS_OFF = int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
_RK4 = int(mujoco.mjtIntegrator.mjINT_RK4)  # the one that has no second half


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


class FastTask(FastObservation, FastCosts, CurrentTask):
    """Task mixin: fast steps, observations, costs and resets."""

    agent_mixins = (FastAgent,)
    world_mixins: tuple[type, ...] = ()
    _forward_state: bytes | None
    """The state of the last forward pass, if nothing moved since."""

    def _build_agent(self: Any, agent_name: str) -> None:
        self.random_generator = mixed(original().random_generator, FastRandomGenerator)()
        super()._build_agent(agent_name)

    def build_world(self: Any, config: dict[str, Any]) -> None:
        """Compile the world, once per environment."""
        world_class = mixed(original().world.World, *self.world_mixins)
        self.world = world_class(self.agent, self._obstacles, config)
        self.world.build()
        self.world_info.world_config_dict = config
        self._bind()

    def _build(self: Any) -> None:
        conf = self.placements_conf
        if conf.placements is None:
            self._build_placements_dict()
            self.random_generator.set_placements_info(conf.placements, conf.extents, conf.margin)
        self.world_info.layout = self.random_generator.build_layout()
        config = self._build_world_config(self.world_info.layout)
        if self.world is None:
            self.build_world(config)
        else:
            self.world_info.world_config_dict = config
            self._layout_writer.write(config)
        self._forget()
        self._needs_forward = True  # what follows may move joints (the Ant's pose)

    def _bind(self: Any) -> None:
        """Look up, once, what the package looks up by name in every step."""
        model = self.model
        self._layout_writer = LayoutWriter(self)
        self._needs_forward = False
        self._forget()
        self._agent_body = self.agent.body_id = model.body("agent").id
        self._body_ids = {model.body(i).name: i for i in range(model.nbody)}
        self._control_low, self._control_high = model.actuator_ctrlrange.T.copy()
        self._mocap_groups = []
        first = 0
        # MuJoCo numbers mocaps in the order of the world's bodies, which is this.
        for mocap in self._mocaps.values():
            self._mocap_groups.append((mocap, slice(first, first + mocap.num)))
            first += mocap.num
        self._bind_contacts()
        self._bind_observation()
        self._bind_costs()

    def rebind(self: Any) -> None:
        """After unpickling: make the lidar's arrays views of each other again."""
        self._bind_observation()
        self._forget()

    def _forget(self: Any) -> None:
        """Drop what was derived from positions, because something moved."""
        self._forward_state = self._offsets = self._goal_distance = self._contacts = None

    def _set_goal(self: Any, pos: np.ndarray) -> None:
        super()._set_goal(pos)  # type: ignore[misc]
        self._forget()

    def _forward(self: Any) -> None:
        """Bring positions, contacts and sensors up to date with the state."""
        mujoco.mj_forward(self.model, self.data)
        self._needs_forward = False
        self._forget()
        self._forward_state = self._state()

    def _state(self: Any) -> bytes:
        """Positions and velocities of the robot and of all that moves freely."""
        return self.data.qpos.tobytes() + self.data.qvel.tobytes()

    def simulation_forward(self: Any, action: np.ndarray) -> bool:
        """Apply an action and advance the physics.

        Returns whether the simulation failed (it never reports so).
        """
        model, data, draws = self.model, self.data, self.random_generator
        if self.debug:
            self.agent.debug()
        elif self.action_noise:
            noise = self.action_noise * draws.randn(self.agent.body_info.nu)
            self.agent.apply_action(action, noise)
        else:
            data.ctrl[:] = np.minimum(np.maximum(action, self._control_low), self._control_high)
        # Drawn even where certain: the original spends a draw per step, and the next goal depends
        # on it.
        conf = self.sim_conf
        steps = draws.random_generator.binomial(conf.frameskip_binom_n, conf.frameskip_binom_p)
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

    def _move_mocaps(self: Any, data: Any) -> None:
        """Gremlins circle: all of a kind are displaced alike from where they were placed."""
        phase, positions = data.time, data.mocap_pos
        for mocap, numbers in self._mocap_groups:
            x, y = np.sin(phase) * mocap.travel, np.cos(phase) * mocap.travel
            positions[numbers] = x, y, mocap.size

    def update_layout(self: Any) -> None:
        """Record where things are now, before a new goal is placed."""
        for name in self.world_info.layout:
            if "gremlin" not in name:
                self.world_info.layout[name] = self.data.xpos[self._body_ids[name], :2].copy()


class FastUnseenTask(FastTask):
    """FastTask for an environment that draws no frames."""

    world_mixins = (SkylessWorld,)
