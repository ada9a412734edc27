"""A native Gymnasium vector environment as a Stable-Baselines3 VecEnv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv


class NativeVecEnv(VecEnv):
    """Wraps a SAME_STEP-autoresetting ``gymnasium.vector.VectorEnv``; ``task`` is the batched task,
    where there is one.

    Seeds: SB3 hands out one seed per environment; the native environment has one generator and
    takes the first.
    """

    def __init__(self, vector_env: VectorEnv[Any, Any, Any]) -> None:
        if vector_env.metadata.get("autoreset_mode") is not AutoresetMode.SAME_STEP:
            raise ValueError(
                "NativeVecEnv: expected a vector environment with autoreset mode SAME_STEP"
            )
        self.vector_env = (
            vector_env  # before super().__init__, which asks get_attr for the render mode
        )
        super().__init__(
            vector_env.num_envs, vector_env.single_observation_space, vector_env.single_action_space
        )
        self.task = getattr(vector_env.unwrapped, "task", None)
        self._actions: Any = None

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
            # What comes back with the new episode's first observation belongs to that episode.
            self.reset_infos[i] = {k: v for k, v in infos[i].items() if k == "expert_action"}
        return observations, rewards.astype(np.float32), dones, infos

    def _split(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        """Gymnasium's dictionary of arrays, with its ``_key`` masks, as one dictionary per
        environment.
        """
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
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        result = getattr(self.vector_env.unwrapped, method_name)(*args, **kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[Any]:
        return [None] * self.num_envs
