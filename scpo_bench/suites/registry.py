"""The names of agents and tasks.

An agent is an SB3 ``BaseAlgorithm`` or has the same interface (``contract.Agent``). Its name is
one of those below, an entry point of the group ``scpo_bench.agents``, ``module:Class`` or
``path/to/file.py:Class``; with ``filtered:`` before it, a safety filter acts on its actions.
:func:`agent_name` gives the one name under which an agent is recorded, however it was written.
Nothing is imported before :func:`load_agent` is called.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from scpo_bench.errors import UserError, nearest
from scpo_bench.records.consistency import TaskLimits
from scpo_bench.records.schema import Cell

CUSTOM_PREFIX = "scpo_bench/"
# filtered:NAME is the agent NAME behind a predictive safety filter (baselines/safety_filter.py).
FILTER_PREFIX = "filtered:"
AGENT_PATH = "SCPO_BENCH_AGENT_PATH"
"""Environment variable: folders in which agents' files are looked for after the working directory,
separated as in PATH.
"""


@dataclass(frozen=True)
class AgentSpec:
    """What is known of an agent without importing it."""

    name: str
    """As on the command line."""
    entry: str
    """module:Class."""
    summary: str
    sees: str = "unknown"
    """What it is told of the constraints in training (docs/protocol.md)."""
    source: str = ""
    """The paper that it is from."""
    needs_labels: bool = False
    """Works only where ``info["expert_action"]`` is given."""
    needs_batched: bool = False
    """Works only on tasks whose dynamics are pure functions."""


_COSTS = "costs"
_SIGNED = "signed values, simulated"
_AGENTS = (
    AgentSpec(
        name="scpo",
        entry="scpo_bench.scpo.agent:SCPO",
        summary="safe by certificate: projected updates",
        sees=_SIGNED,
        source="arXiv 2512.13788",
        needs_labels=True,
        needs_batched=True,
    ),
    AgentSpec(
        name="scpo-pointwise",
        entry="scpo_bench.scpo.agent:PointwiseSCPO",
        summary="SCPO, one constraint per start state and step",
        sees=_SIGNED,
        source="this project",
        needs_labels=True,
        needs_batched=True,
    ),
    AgentSpec(
        name="scpo-certified",
        entry="scpo_bench.scpo.agent:CertifiedSCPO",
        summary="the same, deployed on the certificate alone",
        sees=_SIGNED,
        source="this project",
        needs_labels=True,
        needs_batched=True,
    ),
    AgentSpec(
        name="scpo-proven",
        entry="scpo_bench.scpo.agent:ProvenSCPO",
        summary="SCPO in closed form, every policy proved",
        sees="plant",
        source="this project",
        needs_labels=True,
        needs_batched=True,
    ),
    AgentSpec(
        name="scpo-ppo",
        entry="scpo_bench.scpo.wrap:ProjectedPPO",
        summary="PPO with projected updates: any task",
        sees="signed values or costs, simulated",
        source="this project",
    ),
    AgentSpec(
        name="sgd",
        entry="scpo_bench.scpo.gradient_descent:GradientDescent",
        summary="SCPO without projection",
        sees="nothing",
        source="this project",
        needs_labels=True,
    ),
    AgentSpec(
        name="penalty",
        entry="scpo_bench.scpo.penalty:Penalty",
        summary="gradient descent with a soft penalty",
        sees="signed values and their gradients, simulated",
        source="arXiv 2512.13788, Figure 2",
        needs_labels=True,
        needs_batched=True,
    ),
    AgentSpec(
        name="ppo",
        entry="stable_baselines3:PPO",
        summary="unconstrained reference (Stable-Baselines3)",
        sees="nothing",
        source="arXiv 1707.06347",
    ),
    AgentSpec(
        name="ppo-lagrangian",
        entry="scpo_bench.baselines.ppo_lagrangian:PPOLagrangian",
        summary="learned multipliers",
        sees=_COSTS,
        source="Ray, Achiam, Amodei 2019",
    ),
    AgentSpec(
        name="ppo-pid",
        entry="scpo_bench.baselines.ppo_pid:PPOPID",
        summary="PID-controlled multipliers",
        sees=_COSTS,
        source="arXiv 2007.03964",
    ),
    AgentSpec(
        name="focops",
        entry="scpo_bench.baselines.focops:FOCOPS",
        summary="first-order constrained optimisation in policy space",
        sees=_COSTS,
        source="arXiv 2002.06506",
    ),
    AgentSpec(
        name="p3o",
        entry="scpo_bench.baselines.p3o:P3O",
        summary="PPO with an exact penalty on cost",
        sees=_COSTS,
        source="arXiv 2205.11814",
    ),
    AgentSpec(
        name="cpo",
        entry="scpo_bench.baselines.cpo:CPO",
        summary="constrained policy optimisation (exact dual)",
        sees=_COSTS,
        source="arXiv 1705.10528",
    ),
    AgentSpec(
        name="trpo-lagrangian",
        entry="scpo_bench.baselines.trpo_lagrangian:TRPOLagrangian",
        summary="trust-region steps, learned multipliers",
        sees=_COSTS,
        source="Ray, Achiam, Amodei 2019",
    ),
    AgentSpec(
        name="crpo",
        entry="scpo_bench.baselines.crpo:CRPO",
        summary="steps on reward or, beyond the limit, on cost",
        sees=_COSTS,
        source="arXiv 2011.05869",
    ),
    AgentSpec(
        name="cvpo",
        entry="scpo_bench.baselines.cvpo:CVPO",
        summary="constrained variational policy optimisation",
        sees=_COSTS,
        source="arXiv 2201.11927",
    ),
    AgentSpec(
        name="sac-lagrangian",
        entry="scpo_bench.baselines.sac_lagrangian:SACLagrangian",
        summary="soft actor-critic with a learned multiplier",
        sees=_COSTS,
        source="arXiv 1801.01290, 2201.11927",
    ),
)


@dataclass(frozen=True)
class TaskSpec:
    """What is known of a task without importing its environment."""

    id: str
    """Gymnasium id."""
    family: str
    cost_limit: float
    """Per episode; 0: any violated constraint value counts."""
    horizon: int
    summary: str
    batched: bool = False
    """Its dynamics are pure functions."""
    labelled: bool = False
    """Steps give ``info["expert_action"]``."""


_CUSTOM_TASKS = tuple(
    TaskSpec(f"{CUSTOM_PREFIX}{name}", "custom", 0.0, horizon, summary, True, labelled)
    for name, horizon, labelled, summary in (
        ("DoubleIntegratorImitation-v0", 30, True, "imitate a malicious expert within bounds"),
        ("DoubleIntegratorImitation-v1", 30, True, "the same, the backup alone near the target"),
        ("DoubleIntegratorDiverging-v1", 30, True, "imitate a diverging expert within bounds"),
        ("DoubleIntegratorRegulation-v0", 40, False, "regulate to a set-point within bounds"),
        ("HarmfulRegression-v0", 10, True, "fit labels of which a part is harmful"),
        ("HarmfulRegression-v1", 1, True, "fit the paper's function, which leaves the bounds"),
    )
)


@functools.cache
def agents() -> dict[str, AgentSpec]:
    """The registered agents by name: ours, then those of installed packages.

    A package registers an agent by an entry point of the group ``scpo_bench.agents``.
    """
    found = {spec.name: spec for spec in _AGENTS}
    for point in entry_points(group="scpo_bench.agents"):
        found.setdefault(point.name, AgentSpec(point.name, point.value, f"from {point.value}"))
    return found


def agent_spec(name: str) -> AgentSpec:
    """The spec of a registered name, or of ``module:Class`` or ``file.py:Class``."""
    if name.startswith(FILTER_PREFIX):
        inner = agent_spec(name.removeprefix(FILTER_PREFIX))
        summary = f"{inner.name} behind a safety filter"
        sees = f"{inner.sees}; the filter: plant"
        return AgentSpec(
            name, inner.entry, summary, sees, inner.source, inner.needs_labels, needs_batched=True
        )
    known = agents()
    if name in known:
        return known[name]
    if ":" in name:
        return AgentSpec(name, name, "third party")
    if name.endswith(".py"):
        raise UserError(f"agent '{name}': which class in it? expected {name}:Class")
    raise UserError(f"unknown agent '{name}'{nearest(name, known)}")


def agent_name(written: str) -> str:
    """The one name of an agent, under which it is recorded.

    A registered agent's own name stands for its ``module:Class``. A file is named by its path from
    the working directory. One that lies elsewhere is named without its folder, which is the user's
    own business and means nothing on another machine; the folder is added to ``AGENT_PATH``, where
    this command and its processes find the file. UserError if that name is another file's.
    """
    if written.startswith(FILTER_PREFIX):
        return FILTER_PREFIX + agent_name(written.removeprefix(FILTER_PREFIX))
    known = agents()
    if written in known:
        return written
    module, _, class_name = written.rpartition(":")
    if module.endswith(".py"):
        return f"{_name_of_file(module)}:{class_name}"
    return next((spec.name for spec in known.values() if spec.entry == written), written)


def _name_of_file(written: str) -> str:
    here, path = Path.cwd(), Path(os.path.abspath(written))
    for place in (path, path.resolve()):  # the working directory may have several paths
        if place.is_relative_to(here):
            return place.relative_to(here).as_posix()
    if path.is_file() and path.parent not in _agent_folders():
        os.environ[AGENT_PATH] = os.pathsep.join(map(str, [*_agent_folders(), path.parent]))
    found = _agent_file(path.name)
    if path.is_file() and found != path:
        raise UserError(
            f"agent file {written}: records would name it '{path.name}', as they name {found}; "
            "rename it"
        )
    return path.name


def _agent_folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get(AGENT_PATH, "").split(os.pathsep) if folder]


def _agent_file(name: str) -> Path | None:
    """The file of that name or path, in the working directory or on ``AGENT_PATH``."""
    places = (Path(os.path.abspath(folder / name)) for folder in (Path(), *_agent_folders()))
    return next((place for place in places if place.is_file()), None)


def built_in(name: str) -> bool:
    """Whether an agent is one that this package registers, behind the safety filter or not."""
    return agent_spec(name).entry in {spec.entry for spec in _AGENTS}


def source_file(module: str) -> Path | None:
    """The file of a module, or of the path of one; None if there is none.

    No code of the module, or of a package that it is in, is run to find it.
    """
    if module.endswith(".py"):
        return _agent_file(module)
    name, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no such name, or it cannot be one
        return None
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file, 64 hexadecimal digits; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def agent_source(name: str) -> str | None:
    """SHA-256 of the file that defines an agent; None for this package's own, or without a file.

    For ``module:Class`` it is the module's file. Other files that it imports are not covered.
    """
    if built_in(name):
        return None
    path = source_file(agent_spec(name).entry.rpartition(":")[0])
    return None if path is None else file_digest(path)


def load_agent(name: str) -> type[Any]:
    """The agent's class (see ``contract.Agent``). Runs its module's code, which the user named."""
    if name.startswith(FILTER_PREFIX):
        return _filtered(name)
    entry = agent_spec(name).entry
    module_name, _, class_name = entry.rpartition(":")
    try:
        module = _import(module_name)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        kind = "" if isinstance(error, ImportError | UserError) else f"{type(error).__name__}: "
        problem = f"cannot import '{module_name}' ({kind}{error})"
        raise UserError(f"agent '{name}': {problem}") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        problem = f"no class '{class_name}' in {module_name}{nearest(class_name, classes)}"
        raise UserError(f"agent '{name}': {problem}")
    return found


def _filtered(name: str) -> type[Any]:
    """The class of agent ``filtered:INNER``."""
    from stable_baselines3.common.base_class import BaseAlgorithm

    from scpo_bench.baselines.safety_filter import filtered

    inner = load_agent(name.removeprefix(FILTER_PREFIX))
    if not issubclass(inner, BaseAlgorithm):
        raise UserError(f"agent '{name}': the filter needs an agent that is an SB3 BaseAlgorithm")
    return filtered(inner)


def check_pair(agent: str, task: str) -> None:
    """Raise UserError if the agent cannot run on the task, as far as the names tell."""
    if agent.startswith(FILTER_PREFIX) and not task.startswith(f"{CUSTOM_PREFIX}DoubleIntegrator"):
        raise UserError(
            f"agent '{agent}': the filter's model is that of the double integrator, and {task} is "
            "another task"
        )


def _import(name: str) -> ModuleType:
    """The module ``name``, which may be the path of a file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = _agent_file(name)
    if path is None:
        raise UserError(f"no file {name}")
    spec = importlib.util.spec_from_file_location(f"scpo_bench_agent_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"no Python file {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for unpickling its agents
    spec.loader.exec_module(module)
    return module


def limits_of(cell: Cell) -> TaskLimits:
    """What every record of the cell keeps to; little is known of others' tasks, or with arguments.

    The custom tasks have rewards of at most 0, objectives of at least 0, and costs of 0 or 1 a
    step; the velocity tasks such costs.
    """
    spec = tasks().get(cell.task)
    if spec is None or cell.env:
        return TaskLimits()
    if spec.family == "custom":
        return TaskLimits(spec.horizon, 0.0, 1.0, 0.0)
    step_cost = 1.0 if spec.family == "velocity" else math.inf
    return TaskLimits(spec.horizon, highest_step_cost=step_cost)


@functools.cache
def tasks() -> dict[str, TaskSpec]:
    """Every task of this package by id: the custom ones and Safety-Gymnasium's."""
    from scpo_bench.envs.safety_gymnasium.tasks import TASKS

    found = {spec.id: spec for spec in _CUSTOM_TASKS}
    for task in TASKS.values():
        found[task.id] = TaskSpec(task.id, task.family, task.cost_limit, task.horizon, task.robot)
    return found


def task_spec(task_id: str) -> TaskSpec | None:
    """The spec of a task of this package; None for another id that Gymnasium knows, or may."""
    known = tasks()
    if task_id in known:
        return known[task_id]
    import gymnasium as gym

    if task_id.split(":")[-1] in gym.registry or ":" in task_id:
        return None
    # The ids share a long prefix, which would make any two of them similar.
    short = {k.removeprefix(CUSTOM_PREFIX): k for k in [*known, *gym.registry]}
    near = difflib.get_close_matches(task_id.removeprefix(CUSTOM_PREFIX), short, n=1, cutoff=0.5)
    hint = f"; did you mean '{short[near[0]]}'?" if near else "; `scpo-bench list tasks` shows them"
    raise UserError(f"unknown task '{task_id}'{hint}")
