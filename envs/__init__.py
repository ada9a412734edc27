"""The tasks: one environment per file, registered in Gymnasium by ``import scpo_bench``."""

from __future__ import annotations

import gymnasium as gym

from scpo_bench.envs.safety_gymnasium import register_safety_gymnasium


def register_tasks() -> None:
    """Register every task in Gymnasium; nothing heavy is imported.

    Calling it again changes nothing.
    """
    register_custom_tasks()
    register_safety_gymnasium()


def register_custom_tasks() -> None:
    """Register the project's own environments."""
    for name, module, stem in (
        (
            "scpo_bench/DoubleIntegratorImitation-v0",
            "double_integrator",
            "DoubleIntegratorImitation",
        ),
        (
            "scpo_bench/DoubleIntegratorRegulation-v0",
            "double_integrator",
            "DoubleIntegratorRegulation",
        ),
        ("scpo_bench/HarmfulRegression-v0", "harmful_regression", "HarmfulRegression"),
    ):
        if name not in gym.registry:
            gym.register(
                id=name,
                entry_point=f"scpo_bench.envs.{module}:{stem}Env",
                vector_entry_point=f"scpo_bench.envs.{module}:{stem}VectorEnv",
            )
