"""A cell's agent: its construction, its start policy, its resolved configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from scpo_bench.contract import Agent, task_of
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy, backup_of
from scpo_bench.records.schema import Cell
from scpo_bench.suites.registry import agent_source, file_digest, load_agent


def make_agent(cell: Cell, env: VecEnv) -> Agent:
    """The cell's agent on ``env``, with the start policy that the cell asks for.

    UserError if the task has no such start policy, the agent cannot start from one, or its source
    is not the one that the cell names.
    """
    agent_class = load_agent(cell.agent)
    if cell.agent_source is not None and cell.agent_source != agent_source(cell.agent):
        raise UserError(
            f"agent '{cell.agent}': its source is not the one that this run is planned with; "
            "rerun the command"
        )
    # One branch of the seed tree per use: the agent's generators and its environments' must differ.
    seed = int(np.random.SeedSequence(cell.seed).generate_state(1)[0])
    config = dict(cell.config)
    config_class = getattr(agent_class, "Config", None)
    fields = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    names = [field.name for field in fields]
    if "cost_limit" in names:
        # One limit per cell: the agent is told the limit that its policies are judged by.
        config.setdefault("cost_limit", cell.cost_limit)
    if "margin" in names and cell.margin:
        # Agents that see the constraint values themselves; others get costs with this margin.
        config.setdefault("margin", cell.margin)
    policy: str | type[ActorCriticPolicy] = "MlpPolicy"
    if cell.start != "random":
        backup = _start_policy(cell, env)
        config["policy_kwargs"] = {**config.get("policy_kwargs", {}), "backup": backup}
        if getattr(agent_class, "policy_aliases", {}).get("MlpPolicy") is ActorCriticPolicy:
            policy = BackupActorCriticPolicy
    try:
        return agent_class(policy, env, seed=seed, **config)
    except TypeError as error:
        if cell.start != "random" and "backup" in str(error):
            raise UserError(
                f"start: '{cell.start}': agent '{cell.agent}' has no policy that starts at a backup"
            ) from None
        raise


def _start_policy(cell: Cell, env: VecEnv) -> AffineBackup:
    """The policy of ``start: backup`` or ``start: zero``. UserError if the task has none."""
    if cell.start == "zero":
        if not isinstance(env.action_space, Box) or not isinstance(env.observation_space, Box):
            raise UserError(
                f"start: 'zero' needs Box observations and actions, and {cell.task} has others; "
                "use 'random'"
            )
        sizes = (np.prod(env.action_space.shape), np.prod(env.observation_space.shape))
        return AffineBackup(np.zeros([int(size) for size in sizes]))
    task = task_of(env)
    if task is None:
        raise UserError(
            f"start: 'backup' needs a task with a backup controller, and {cell.task} has none; "
            "use 'zero' or 'random'"
        )
    return backup_of(task)


def resolved_config(agent: Agent) -> dict[str, Any]:
    """The agent's configuration with every default, if it has a ``config`` dataclass."""
    config = getattr(agent, "config", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return {}
    return dataclasses.asdict(config)


def source_digest(agent_class: type[Any]) -> str | None:
    """SHA-256 of the file that defines the agent: a run is not resumed with changed code."""
    with contextlib.suppress(OSError, TypeError):
        return file_digest(Path(inspect.getfile(agent_class)))
    return None
