"""Safety-Gymnasium 1.0.0's tasks on Python 3.11, gymnasium 1.x and mujoco 3.x.

Read in this order: ``tasks`` (ids and metadata), ``navigation`` and ``velocity`` (the
environments), ``package`` (loads the unmodified package), ``world`` and ``builder`` (what of it has
to change), ``state`` (pickles), ``fast`` (the fast path of the navigation tasks).
"""

from __future__ import annotations

import gymnasium
from gymnasium.envs.registration import EnvSpec

from scpo_bench.envs.safety_gymnasium.tasks import TASKS


def register_safety_gymnasium() -> None:
    """Register every id of safety-gymnasium with gymnasium.

    Ids that are already registered are left as they are.
    """
    for task in TASKS.values():
        if task.id in gymnasium.registry:
            continue
        velocity = task.family == "velocity"
        env = "velocity:SafetyVelocityEnv" if velocity else "navigation:SafetyNavigationEnv"
        # gymnasium.register() searches the whole registry per id (0.1 s in all); the ids are known
        # to be well-formed.
        gymnasium.registry[task.id] = EnvSpec(
            id=task.id,
            entry_point=f"scpo_bench.envs.safety_gymnasium.{env}",
            reward_threshold=task.reward_threshold,
            max_episode_steps=task.horizon,
            kwargs={"env_id": task.id},
        )
