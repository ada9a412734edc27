"""What can be named on the command line: agents and tasks.

Light to import: it knows import paths, not the imports.

An agent is an SB3 ``BaseAlgorithm`` or anything with that surface. Named by its registry name, an
entry point of the group ``scpo_bench.agents``, ``module:Class``, or ``path/to/file.py:Class``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from scpo_bench.errors import UserError, nearest

CUSTOM_PREFIX = "scpo_bench/"


@dataclass(frozen=True)
class AgentSpec:
    """name: as on the command line. entry: module:Class. needs_labels: works only where
    ``info["expert_action"]`` is given.

    needs_batched: works only on tasks whose dynamics are pure functions.
    """

    name: str
    entry: str
    summary: str
    needs_labels: bool = False
    needs_batched: bool = False


_AGENTS = {
    spec.name: spec
    for spec in (
        AgentSpec(
            "scpo",
            "scpo_bench.scpo.agent:SCPO",
            "safe by certificate: every update projected",
            True,
            True,
        ),
        AgentSpec(
            "scpo-ppo",
            "scpo_bench.scpo.wrap:ProjectedPPO",
            "SCPO with PPO's changes as proposals: any task with costs",
        ),
        AgentSpec(
            "sgd",
            "scpo_bench.scpo.gradient_descent:GradientDescent",
            "SCPO's proposals, unprojected",
            True,
        ),
        AgentSpec("ppo", "stable_baselines3:PPO", "unconstrained reference (Stable-Baselines3)"),
        AgentSpec(
            "ppo-lagrangian",
            "scpo_bench.baselines.ppo_lagrangian:PPOLagrangian",
            "PPO with learned multipliers",
        ),
        AgentSpec(
            "cpo",
            "scpo_bench.baselines.cpo:CPO",
            "constrained policy optimisation (trust region, exact dual)",
        ),
        AgentSpec(
            "cvpo",
            "scpo_bench.baselines.cvpo:CVPO",
            "constrained variational policy optimisation (off-policy EM)",
        ),
    )
}


@dataclass(frozen=True)
class TaskSpec:
    """id: Gymnasium id. cost_limit: per episode; 0 where any violated constraint value counts.
    batched: pure-function dynamics.
    """

    id: str
    family: str
    cost_limit: float
    horizon: int
    summary: str
    batched: bool = False
    labelled: bool = False


_CUSTOM_TASKS = (
    TaskSpec(
        "scpo_bench/DoubleIntegratorImitation-v0",
        "custom",
        0.0,
        30,
        "imitate a malicious expert within bounds",
        True,
        True,
    ),
    TaskSpec(
        "scpo_bench/DoubleIntegratorRegulation-v0",
        "custom",
        0.0,
        40,
        "regulate to a set-point within bounds",
        True,
    ),
    TaskSpec(
        "scpo_bench/HarmfulRegression-v0",
        "custom",
        0.0,
        10,
        "fit labels of which a part is harmful",
        True,
        True,
    ),
)


def agents() -> dict[str, AgentSpec]:
    """The registered agents: ours, then those of installed packages (entry-point group
    ``scpo_bench.agents``).
    """
    found = dict(_AGENTS)
    for point in entry_points(group="scpo_bench.agents"):
        found.setdefault(point.name, AgentSpec(point.name, point.value, f"from {point.value}"))
    return found


def agent_spec(name: str) -> AgentSpec:
    """The spec of a registered name, or of ``module:Class`` / ``file.py:Class``.

    UserError if it is neither.
    """
    known = agents()
    if name in known:
        return known[name]
    if ":" in name:
        return AgentSpec(name, name, "third party")
    if name.endswith(".py"):
        raise UserError(f"agent '{name}': which class in it? expected {name}:Class")
    raise UserError(f"unknown agent '{name}'{nearest(name, list(known))}")


def load_agent(name: str) -> type[Any]:
    """The agent's class.

    Runs its module's code: the user asked for it by name. UserError if it cannot be found.
    """
    entry = agent_spec(name).entry
    module_name, _, class_name = entry.rpartition(":")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name).resolve()
            spec = importlib.util.spec_from_file_location(f"scpo_bench_agent_{path.stem}", path)
            if spec is None or spec.loader is None or not path.is_file():
                raise UserError(f"agent '{name}': no file {module_name}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # pickling an agent needs to find its class again
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever its module does when it is imported
        what = (
            f"{type(error).__name__}: {error}" if not isinstance(error, ImportError) else str(error)
        )
        raise UserError(
            f"agent '{name}': cannot import '{module_name}' ({' '.join(what.split())})"
        ) from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(
            f"agent '{name}': no class '{class_name}' in {module_name}{nearest(class_name, classes)}"
        )
    return found


def tasks() -> dict[str, TaskSpec]:
    """Every task this package knows: the custom ones and the Safety-Gymnasium ids."""
    from scpo_bench.envs.safety_gymnasium.tasks import TASKS

    found = {spec.id: spec for spec in _CUSTOM_TASKS}
    for task in TASKS.values():
        found[task.id] = TaskSpec(task.id, task.family, task.cost_limit, task.horizon, task.robot)
    return found


def task_spec(task_id: str) -> TaskSpec | None:
    """The spec of a known task, or None for another Gymnasium id.

    UserError if Gymnasium does not know it either.
    """
    known = tasks()
    if task_id in known:
        return known[task_id]
    import gymnasium as gym

    if task_id.split(":")[-1] in gym.registry or ":" in task_id:
        return None
    # Ids are long and share their beginnings: compare what tells them apart, too.
    short = {k.removeprefix(CUSTOM_PREFIX): k for k in [*known, *gym.registry]}
    near = difflib.get_close_matches(
        task_id.removeprefix(CUSTOM_PREFIX), list(short), n=1, cutoff=0.5
    )
    hint = f"; did you mean '{short[near[0]]}'?" if near else "; `scpo-bench list tasks` shows them"
    raise UserError(f"unknown task '{task_id}'{hint}")
