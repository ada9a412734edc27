"""The navigation tasks (Goal, Button, Push, Circle, Run, Fading) as Gymnasium environments."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled, ResetNeeded

from scpo_bench.envs.safety_gymnasium.tasks import RENDER_MODES, task_metadata

RESET_ATTEMPTS = 100
_SEED_END = 2**32  # numpy's RandomState, which draws the layouts, takes seeds below this


class SafetyNavigationEnv(gymnasium.Env):
    """Safety-Gymnasium's navigation and vision tasks.

    Description:
        A robot (Point, Car, Racecar, Doggo, Ant) on a plane with a goal, buttons, a box, a circle
        or a track, and with things to keep away from. Levels 1 and 2 add constraints. The tasks
        themselves are those of the unmodified package (https://www.safety-gymnasium.com, arXiv
        2310.12567); this class adapts them to gymnasium 1.x.

    Observation space:
        ``Box(-inf, inf, (n,), float64)``: sensor readings (m/s^2, m/s, rad/s, direction of the
        magnetic field, joint angles as sine and cosine, joint velocities in rad/s), then 16 lidar
        bins in [0, 1] per kind of object, 1 being closest.  Vision variants: a dictionary of the
        same parts and ``vision`` (256, 256, 3) uint8.

    Action space:
        ``Box(low, high, (k,), float64)``: the robot's actuators; bounds as in the robot's MuJoCo
        model.

    Dynamics:
        MuJoCo, 10 physics steps per action.

    Reward:
        As the task defines it: progress towards the goal and a bonus for reaching it, speed along
        the circle or track.

    Cost and constraints:
        ``info["cost"]`` is 1.0 where any constraint is violated in the step and else 0.0;
        ``info["cost_<kind>"]`` and ``info["cost_sum"]`` are the package's own.
        ``info["goal_met"]`` is present in steps that reach the goal.

    Starting state:
        A random layout, drawn from the seed. ``reset(seed=s)`` with ``s < 2**32`` gives the layout
        that the official stack gives for ``s``; a reset without a seed draws the layout's seed from
        ``self.np_random``.  Where a layout cannot be sampled or starts with a cost, the next seed
        comes from ``self.np_random``.

    Episode end:
        Terminated when the Ant falls, when no new goal can be placed, or in Race when the goal is
        reached. Truncation is left to ``TimeLimit`` (1000 steps; Circle, Run and Race 500).

    Arguments:
        env_id: one of ``TASKS``.
        render_mode: ``human``, ``rgb_array``, ``depth_array`` or ``None``.
        width, height: size in pixels of rendered frames.
        camera_id, camera_name: camera of rendered frames (at most one of both); default ``vision``,
        the robot's own.
        fast: ``False`` runs the package's own code for steps and resets, as Race always does; the
        numbers are the same. The fast path keeps one compiled model across resets: what you change
        in ``task.model`` (friction, say) stays, where the original compiles a new model.
        config: further settings of the package, e.g. ``{"vision_env_conf.vision_size": (64, 64)}``.

    Version history:
        v0: the tasks of safety-gymnasium 1.0.0.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 30}  # noqa: RUF012 - as Gymnasium's

    def __init__(
        self,
        env_id: str,
        render_mode: str | None = None,
        width: int = 256,
        height: int = 256,
        camera_id: int | None = None,
        camera_name: str | None = None,
        fast: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the task (the world itself is compiled at the first reset).

        Raises:
            DependencyNotInstalled: safety-gymnasium, or an asset that its wheel lacks, is not
            installed.
            ValueError: a velocity task, an unknown render mode, or two cameras.
        """
        self.task_info = task_metadata(env_id)
        if self.task_info.family == "velocity":
            raise ValueError(f"{env_id} is a velocity task; SafetyVelocityEnv builds it")
        if render_mode is not None and render_mode not in RENDER_MODES:
            choices = ", ".join(RENDER_MODES)
            raise ValueError(f"render_mode: expected one of {choices}, got {render_mode!r}")
        if camera_id is not None and camera_name is not None:
            raise ValueError("camera_id and camera_name: expected at most one of them")
        self.render_mode = render_mode
        self.fast = fast and not self.task_info.needs_missing_assets
        camera = {"camera_id": camera_id, "camera_name": camera_name}
        self._render_arguments = {"width": width, "height": height, **camera}
        self._config = dict(config or {})
        self._builder = self._build()
        self.observation_space = self._builder.observation_space
        self.action_space = self._builder.action_space

    def _build(self) -> Any:
        from scpo_bench.envs.safety_gymnasium.builder import builder_class
        from scpo_bench.envs.safety_gymnasium.package import original

        package = original()
        if self.task_info.needs_missing_assets:
            asset = os.path.join("assets", "textures", "village_floor.PNG")
            if not os.path.exists(os.path.join(package.root, asset)):
                raise DependencyNotInstalled(
                    f"{self.task_info.id} needs safety_gymnasium/{asset}, which the published "
                    "wheel of safety-gymnasium 1.0.0 lacks; copy its assets/textures from the "
                    "source repository"
                )
        drawn = self.render_mode is not None or self.task_info.variant == "vision"
        builder = builder_class(fast=self.fast, drawn=drawn)(
            task_id=self.task_info.base_id, config=self.task_info.config | self._config
        )
        builder.task.num_steps = math.inf  # TimeLimit truncates
        return builder

    @property
    def task(self) -> Any:
        """safety-gymnasium's task object: its configuration, MuJoCo model and data."""
        return self._builder.task

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode in a new layout; ``options`` is not used.

        Raises:
            RuntimeError: 100 layouts in a row could not be sampled.
        """
        from scpo_bench.envs.safety_gymnasium.package import original

        super().reset(seed=seed)
        layout_seed = seed if seed is not None and seed < _SEED_END else self._draw_seed()
        for _ in range(RESET_ATTEMPTS):
            try:
                observation, info = self._builder.reset(seed=layout_seed)
            except AssertionError as error:
                resampled = isinstance(error, original().resampling_error)
                if not resampled and "starting cost" not in str(error):
                    raise
                layout_seed = self._draw_seed()
            else:
                if self.render_mode == "human":
                    self.render()
                return observation, info
        raise RuntimeError(f"{self.task_info.id}: no valid layout in {RESET_ATTEMPTS} attempts")

    def _draw_seed(self) -> int:
        return int(self.np_random.integers(_SEED_END))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Apply one action for 10 physics steps.

        Raises:
            ResetNeeded: the episode is over, or none has begun.
            ValueError: the action has the wrong shape.
        """
        builder = self._builder
        if builder.terminated:
            raise ResetNeeded("call reset() before step(): the episode is over or has not begun")
        observation, reward, cost, terminated, truncated, info = builder.step(np.asarray(action))
        info["cost"] = float(cost)
        if self.render_mode == "human":
            self.render()
        return observation, float(reward), terminated, truncated, info

    def render(self) -> np.ndarray | None:
        """A frame, or ``None`` where the mode is ``human``.

        Returns (height, width, 3) uint8 or, for ``depth_array``, (height, width) float32.

        Raises:
            ResetNeeded: nothing has been built yet.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() without a render_mode draws nothing: gymnasium.make(id, render_mode=...)"
            )
            return None
        if self.task.world is None:
            raise ResetNeeded("call reset() before render()")
        cost = self._builder.cost
        return self.task.render(mode=self.render_mode, cost=cost, **self._render_arguments)

    def close(self) -> None:
        """Free the renderers."""
        for viewer in self.task._viewers.values():
            viewer.close()
        self.task._viewers.clear()
        self.task.viewer = None

    def __getstate__(self) -> dict[str, Any]:
        """The whole state, without renderers: an unpickled copy continues as this one would."""
        from scpo_bench.envs.safety_gymnasium.state import dump_episode

        state = self.__dict__.copy()
        state["_builder"] = dump_episode(self._builder)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the world and put the state back."""
        from scpo_bench.envs.safety_gymnasium.state import load_episode

        episode = state.pop("_builder")
        self.__dict__.update(state)
        self._builder = self._build()
        load_episode(self._builder, episode)
