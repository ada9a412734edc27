"""What safety-gymnasium's robots and tasks need on gymnasium 1.x and numpy 2.

The package's classes stay unmodified: ``mixed`` subclasses them with mixins. The fast path adds its
own in the same way.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np

from scpo_bench.envs.safety_gymnasium.package import original


@functools.cache
def mixed(package_class: type, *mixins: type) -> type:
    """``package_class`` with ``mixins`` before it.

    It keeps its name, which the package compares and parses.
    """
    bases, parts = (*mixins, package_class), {"mixed_from": (package_class, mixins)}
    return type(package_class.__name__, bases, parts)


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
            # The constructor looks joints up by one-element arrays, which numpy 2 still takes, with
            # a warning.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.agent = agent_class(random_generator=self.random_generator)

    def build_world(self: Any, config: dict[str, Any]) -> None:
        """Compile the world of a configuration that an earlier reset has drawn."""
        self.world = original().world.World(self.agent, self._obstacles, config)
        self.world.build()

    def rebind(self: Any) -> None:
        """Called on a task that was unpickled, with its world in place."""

    def _get_viewer(self: Any, mode: str) -> Any:
        """The viewer of a mode, created when first asked for, with the size of the frame."""
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
