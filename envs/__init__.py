"""The tasks, registered in Gymnasium by ``import scpo_bench``."""

from __future__ import annotations

import gymnasium as gym

from scpo_bench.envs.safety_gymnasium import register_safety_gymnasium


def register_tasks() -> None:
    """Register every task in Gymnasium without importing anything heavy.

    Calling it again changes nothing.
    """
    register_custom_tasks()
    register_safety_gymnasium()


def register_custom_tasks() -> None:
    """Register the project's own environments."""
    for module, stem in (
        ("double_integrator", "DoubleIntegratorImitation"),
        ("double_integrator", "DoubleIntegratorRegulation"),
        ("harmful_regression", "HarmfulRegression"),
    ):
        if (task_id := f"scpo_bench/{stem}-v0") not in gym.registry:
            gym.register(
                id=task_id,
                entry_point=f"scpo_bench.envs.{module}:{stem}Env",
                vector_entry_point=f"scpo_bench.envs.{module}:{stem}VectorEnv",
            )
