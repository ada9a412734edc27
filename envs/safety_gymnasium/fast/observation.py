"""The fast path's observation: sensor readings and lidars written into one flat array."""

from __future__ import annotations

import math
from typing import Any

import mujoco
import numpy as np

from scpo_bench.envs.safety_gymnasium.fast.lidar import PseudoLidar


class FastObservation:
    """Task mixin: the observation, and the distances that its lidars measure."""

    _offsets: np.ndarray | None
    _goal_distance: float | None

    def _bind_observation(self: Any) -> None:
        """Find out where each entry of the flat observation comes from."""
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
                reading = self.model.sensor(key).adr[0]
                if key == sensors.freejoint_pos_name:
                    reading += 2  # its height
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
        """The bodies that an obstacle's lidar measures."""
        if obstacle.name == "circle":
            return [0]  # its lidar measures the origin, which is where the world's body is
        if not hasattr(obstacle, "num"):
            return [self._body_ids[obstacle.name]]
        moved = "obj" if obstacle.type == "mocaps" else ""
        return [self._body_ids[f"{obstacle.name[:-1]}{i}{moved}"] for i in range(obstacle.num)]

    def _lidar_offsets(self: Any) -> np.ndarray:
        """[P, 3] offsets in m from the robot to the points of its lidars."""
        if self._offsets is None:
            xpos = self.data.xpos
            self._lidar.measure(xpos, xpos[self._agent_body])
            self._offsets = self._lidar.offsets_P3
        return self._offsets

    def dist_goal(self: Any) -> float:
        """Distance in the plane from the robot to the goal, in m; asked three times per step."""
        if self._goal_distance is None:
            x, y, _ = self._lidar_offsets()[self._goal_point].tolist()
            self._goal_distance = math.sqrt(x * x + y * y)
        return self._goal_distance

    def obs(self: Any) -> Any:
        """The observation: a flat array [n], or a dictionary with the camera's image."""
        if self._needs_forward:
            self._forward()
        flat = np.empty(self._observation_size)
        readings = self.data.sensordata
        flat[self._copied_to] = readings[self._copied_from]
        if self._angles_to.size:
            angles = readings[self._angles_from]
            flat[self._angles_to] = np.sin(angles)
            flat[self._angles_to + 1] = np.cos(angles)
        for start, reading in self._quaternions:
            mujoco.mju_quat2Mat(flat[start : start + 9], readings[reading : reading + 4])
        if self._lidar is not None:
            self._lidar_offsets()
            self._lidar.write_to(flat, self.data.xmat[self._agent_body].reshape(3, 3))
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
