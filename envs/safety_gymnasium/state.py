"""Moving the state of a Safety-Gymnasium environment in and out of pickles.

MuJoCo's model and data are not pickled: the sky in a compiled model alone takes 190 MB. The model
is compiled again from the world's configuration, and the state is put back into it.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import mujoco
import numpy as np

from scpo_bench.envs.safety_gymnasium.package import original, private_modules
from scpo_bench.envs.safety_gymnasium.world import mixed

_FULL_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
# What tasks change in the model during an episode: the position of the goal, fading colours.
_EDITED_ARRAYS = ("body_pos", "geom_rgba")
_EDITED_STATISTICS = ("extent", "meaninertia", "meanmass", "meansize")
# What MuJoCo computes before it integrates. After mj_step it lags the state by one physics step,
# and gymnasium's robots read it so (the position before an action is the body's, not the joints');
# a forward pass would not restore it.
_POSES = "xpos xquat xmat xipos ximat geom_xpos geom_xmat site_xpos site_xmat subtree_com"
_VIEWS = "cam_xpos cam_xmat light_xpos light_xdir"
_FORCES = "cinert cvel qfrc_actuator cfrc_ext cfrc_int cacc qacc"
_LAGGING = " ".join((_POSES, _VIEWS, _FORCES)).split()


class _EpisodePickler(pickle.Pickler):
    """Leaves out model, data and viewers, rebuilt on loading; pickles mixed classes by parts."""

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
    """The state of a builder and its task, physics included; ``None`` before the first reset."""
    task = builder.task
    if task.world is None:
        return None
    model = task.model
    file = io.BytesIO()
    with private_modules():
        _EpisodePickler(file).dump(vars(builder))
    return {
        "world": task.world_info.world_config_dict,
        "arrays": {name: getattr(model, name).copy() for name in _EDITED_ARRAYS},
        "statistics": {name: getattr(model.stat, name) for name in _EDITED_STATISTICS},
        "center": model.stat.center.copy(),
        "physics": _dump_physics(task),
        "objects": file.getvalue(),
    }


def load_episode(builder: Any, episode: dict[str, Any] | None) -> None:
    """Put a dumped state into a newly built builder of the same arguments."""
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
    _load_physics(task, episode["physics"])
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
    lagging = {name: getattr(robot.data, name).copy() for name in _LAGGING}
    return {"physics": _dump_physics(robot), "lagging": lagging}


def load_robot(robot: Any, state: dict[str, Any]) -> None:
    """Put dumped physics into a newly built robot of the same arguments."""
    _load_physics(robot, state["physics"])
    for name, array in state["lagging"].items():
        getattr(robot.data, name)[:] = array


def _dump_physics(owner: Any) -> np.ndarray:
    """MuJoCo's integration state of ``owner.data``."""
    physics = np.empty(mujoco.mj_stateSize(owner.model, _FULL_STATE))
    mujoco.mj_getState(owner.model, owner.data, physics, _FULL_STATE)
    return physics


def _load_physics(owner: Any, physics: np.ndarray) -> None:
    mujoco.mj_setState(owner.model, owner.data, physics, _FULL_STATE)
    mujoco.mj_forward(owner.model, owner.data)
