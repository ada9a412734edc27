"""The tasks, registered in Gymnasium by ``import scpo_bench``."""

from __future__ import annotations

import warnings

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
    # Version 0 is a task of its own, and what the committed records are of: no reason to warn.
    warnings.filterwarnings(
        "ignore", r".*environment scpo_bench/.* is out of date", DeprecationWarning
    )
    imitation_v1 = "double_integrator_v1:DoubleIntegratorImitationV1"
    for name, env, arguments in (
        ("DoubleIntegratorImitation-v0", "double_integrator:DoubleIntegratorImitation", {}),
        ("DoubleIntegratorImitation-v1", imitation_v1, {}),
        ("DoubleIntegratorDiverging-v1", imitation_v1, {"expert": "diverging"}),
        ("DoubleIntegratorRegulation-v0", "double_integrator:DoubleIntegratorRegulation", {}),
        ("HarmfulRegression-v0", "harmful_regression:HarmfulRegression", {}),
        ("HarmfulRegression-v1", "harmful_regression:HarmfulRegressionV1", {}),
    ):
        if (task_id := f"scpo_bench/{name}") not in gym.registry:
            gym.register(
                id=task_id,
                entry_point=f"scpo_bench.envs.{env}Env",
                vector_entry_point=f"scpo_bench.envs.{env}VectorEnv",
                kwargs=arguments,
            )
