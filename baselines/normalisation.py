"""Saving and restoring ``VecNormalize`` statistics together with an agent."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from stable_baselines3.common.vec_env import VecNormalize

FIELDS = ("obs_rms", "ret_rms", "returns")


def normalisation_state(env: VecNormalize | None) -> dict[str, Any] | None:
    """A copy of the running statistics and returns of ``env``; None where it does not normalise."""
    if env is None:
        return None
    return {name: deepcopy(getattr(env, name)) for name in FIELDS if hasattr(env, name)}


def restore_normalisation(env: VecNormalize | None, state: dict[str, Any] | None) -> None:
    """Put a saved state back; does nothing where either side has none."""
    if env is not None and state is not None:
        for name, value in state.items():
            if name != "returns" or len(value) == env.num_envs:
                setattr(env, name, deepcopy(value))
