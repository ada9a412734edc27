"""The tasks: one environment per file, registered in Gymnasium by ``import scpo_bench``."""

from __future__ import annotations


def register_custom_tasks() -> None:
    """Register the project's own environments; entry points are strings, so nothing heavy is imported here."""
    import gymnasium as gym

    for name, module, stem in (
        ("scpo_bench/DoubleIntegratorImitation-v0", "double_integrator", "DoubleIntegratorImitation"),
        ("scpo_bench/DoubleIntegratorRegulation-v0", "double_integrator", "DoubleIntegratorRegulation"),
        ("scpo_bench/HarmfulRegression-v0", "harmful_regression", "HarmfulRegression"),
    ):
        if name not in gym.registry:
            gym.register(
                id=name,
                entry_point=f"scpo_bench.envs.{module}:{stem}Env",
                vector_entry_point=f"scpo_bench.envs.{module}:{stem}VectorEnv",
            )
