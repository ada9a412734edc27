"""The vector environments of a cell, for training and for evaluation."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from scpo_bench.records.schema import Cell
from scpo_bench.runs.worker_env import WorkerVecEnv


def has_vector_env(task: str) -> bool:
    """Whether the task is registered with a native vector environment."""
    module, _, name = task.rpartition(":")
    if module:  # "module:Id": importing the module registers the task
        importlib.import_module(module)
    return gym.spec(name).vector_entry_point is not None


def make_vector_env(
    task: str, num_envs: int, arguments: dict[str, Any]
) -> VectorEnv[Any, Any, Any]:
    """The task's native vector environment."""
    mode = gym.VectorizeMode.VECTOR_ENTRY_POINT
    return gym.make_vec(task, num_envs=num_envs, vectorization_mode=mode, **arguments)


def make_training_env(cell: Cell, workers: int = 1) -> VecEnv:
    """The cell's environments: native where the task has a vector environment.

    workers: processes that step them otherwise; what they return does not depend on it.
    """
    if has_vector_env(cell.task):
        return NativeVecEnv(make_vector_env(cell.task, cell.num_envs, cell.env))
    make_envs = [functools.partial(gym.make, cell.task, **cell.env)] * cell.num_envs
    return WorkerVecEnv(make_envs, workers) if workers > 1 else DummyVecEnv(list(make_envs))


class NativeVecEnv(VecEnv):
    """A gymnasium ``VectorEnv`` with SAME_STEP autoreset as a Stable-Baselines3 VecEnv.

    ``task`` is its batched task, or None. SB3 hands out one seed per environment; the vector
    environment has one generator and takes the first.
    """

    def __init__(self, vector_env: VectorEnv[Any, Any, Any]) -> None:
        if vector_env.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
            raise ValueError(
                "NativeVecEnv: expected a vector environment with autoreset mode SAME_STEP"
            )
        self.vector_env = vector_env  # first: super().__init__ asks get_attr for the render mode
        super().__init__(
            vector_env.num_envs, vector_env.single_observation_space, vector_env.single_action_space
        )
        self.task = getattr(vector_env, "task", None)  # none behind a wrapper: it changes the task

    def reset(self) -> Any:
        observations, info = self.vector_env.reset(
            seed=self._seeds[0], options=self._options[0] or None
        )
        self.reset_infos = self._split(info)
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: Any) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        observations, rewards, terminated, truncated, info = self.vector_env.step(self._actions)
        dones = terminated | truncated
        infos = self._split(info)
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = infos[i].pop("final_obs")
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            # The label belongs to the new episode's first observation.
            self.reset_infos[i] = {k: v for k, v in infos[i].items() if k == "expert_action"}
        return observations, rewards.astype(np.float32), dones, infos

    def _split(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """One dictionary per environment, of gymnasium's arrays and their ``_key`` masks."""
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for key, values in info.items():
            if key.startswith("_"):
                continue
            mask = info.get(f"_{key}")
            for i in range(self.num_envs) if mask is None or mask.all() else np.flatnonzero(mask):
                infos[i][key] = values[i]
        return infos

    def close(self) -> None:
        self.vector_env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        value = getattr(self.vector_env.unwrapped, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.vector_env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        result = getattr(self.vector_env.unwrapped, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]
