"""The package's builder of navigation tasks, on gymnasium 1.x and with the fast path."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from scpo_bench.envs.safety_gymnasium.fast.task import FastTask, FastUnseenTask
from scpo_bench.envs.safety_gymnasium.package import original
from scpo_bench.envs.safety_gymnasium.world import CurrentTask, mixed


class SeededBuilder:
    """Builder mixin: builds mixed task classes, and draws nothing from numpy's global generator."""

    task_mixins: tuple[type, ...] = ()

    def set_seed(self: Any, seed: int | None = None) -> None:
        """Seed the layout generator.

        The constructor asks without a seed; every reset of ours gives one.
        """
        super().set_seed(0 if seed is None else seed)  # type: ignore[misc]

    def _get_task(self: Any) -> Any:
        task_class = getattr(original().tasks, _task_class_name(self.task_id))
        # spaces.Box compares a float32 bound with float64's range: the overflow is harmless, the
        # warning is not.
        with np.errstate(over="ignore"):
            task = mixed(task_class, *self.task_mixins)(config=self.config)
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
    mixin: type = CurrentTask if not fast else FastTask if drawn else FastUnseenTask
    return type("Builder", (SeededBuilder, original().builder), {"task_mixins": (mixin,)})
