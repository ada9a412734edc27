"""The velocity tasks, MuJoCo robots with a speed limit, as Gymnasium environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from scpo_bench.envs.safety_gymnasium.tasks import RENDER_MODES, task_metadata


class SafetyVelocityEnv(gymnasium.Env):
    """Safety-Gymnasium's velocity tasks: run, but not faster than a threshold.

    Description:
        Gymnasium's HalfCheetah, Hopper, Swimmer, Walker2d, Ant and Humanoid (their v4) with a limit
        on the speed.

    Observation space:
        ``Box(-inf, inf, (n,), float64)``, as in gymnasium's v4 of the robot (positions m, angles
        rad, their rates).

    Action space:
        ``Box(low, high, (k,), float32)``: joint torques, scaled by the gears of the model.

    Dynamics:
        MuJoCo; 4 or 5 physics steps per action, as in gymnasium's v4.

    Reward:
        As in gymnasium's v4: forward speed in m/s, minus control cost, plus 1 (Humanoid 5) per
        healthy step.

    Cost and constraints:
        ``info["cost"]`` is 1.0 in steps faster than ``task_info.velocity_threshold`` (m/s; forward
        speed, for Ant, Humanoid and Swimmer-v0 speed in the plane) and else 0.0.

    Starting state:
        Gymnasium's v4: the resting pose and noise from ``self.np_random``.

    Episode end:
        Terminated when unhealthy (Hopper, Walker2d, Ant, Humanoid); truncation is left to
        ``TimeLimit`` (1000).

    Arguments:
        env_id: one of ``TASKS`` of the family velocity.
        render_mode: ``human``, ``rgb_array``, ``depth_array`` or ``None``.
        fast: accepted as in the navigation tasks; there is only one code path here.
        **kwargs: passed to gymnasium's v4 environment, e.g.
        ``exclude_current_positions_from_observation``.

    Version history:
        v0: the package's first thresholds.  v1: its revised ones; Swimmer's limit is on the forward
        speed.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 20}  # noqa: RUF012 - as Gymnasium's

    def __init__(
        self, env_id: str, render_mode: str | None = None, fast: bool = True, **kwargs: Any
    ) -> None:
        """Build the robot's environment.

        Raises:
            DependencyNotInstalled: safety-gymnasium is not installed.
            ValueError: not a velocity task.
        """
        self.task_info = task_metadata(env_id)
        if self.task_info.family != "velocity":
            raise ValueError(f"{env_id} is not a velocity task; SafetyNavigationEnv builds it")
        self.render_mode = render_mode
        self.fast = fast
        self._arguments = kwargs
        self._inner = self._build()
        self.metadata = self._inner.metadata
        self.observation_space = self._inner.observation_space
        self.action_space = self._inner.action_space

    def _build(self) -> Any:
        from scpo_bench.envs.safety_gymnasium.package import original

        robot_class = original().velocity_class(self.task_info.robot, self.task_info.version)
        return robot_class(render_mode=self.render_mode, **self._arguments)

    @property
    def model(self) -> Any:
        """The ``mujoco.MjModel``."""
        return self._inner.model

    @property
    def data(self) -> Any:
        """The ``mujoco.MjData``."""
        return self._inner.data

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; the noise of the pose comes from ``self.np_random``."""
        super().reset(seed=seed)
        self._inner.np_random = self.np_random
        return self._inner.reset(options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Apply one action.  The package's ``info`` keys pass through.

        Raises:
            ValueError: the action has the wrong shape.
        """
        action = np.asarray(action)
        observation, reward, cost, terminated, truncated, info = self._inner.step(action)
        info["cost"] = float(cost)
        return observation, float(reward), bool(terminated), truncated, info

    def render(self) -> np.ndarray | None:
        """A frame of the robot, as gymnasium's v4 draws it."""
        return self._inner.render()

    def close(self) -> None:
        """Free the renderers."""
        self._inner.close()

    def __getstate__(self) -> dict[str, Any]:
        """The whole state, without renderers: an unpickled copy continues as this one would."""
        from scpo_bench.envs.safety_gymnasium.state import dump_robot

        state = self.__dict__.copy()
        state["_inner"] = dump_robot(self._inner)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the robot and put the state back."""
        from scpo_bench.envs.safety_gymnasium.state import load_robot

        robot = state.pop("_inner")
        self.__dict__.update(state)
        self._inner = self._build()
        load_robot(self._inner, robot)
