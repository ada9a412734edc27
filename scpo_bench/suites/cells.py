"""Suites -> cells: what is to be run, and where its record goes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from scpo_bench.errors import UserError, at, nearest
from scpo_bench.records.files import RecordError, file_name, read_run
from scpo_bench.records.schema import Cell
from scpo_bench.suites.registry import (
    FILTER_PREFIX,
    agent_name,
    agent_source,
    agent_spec,
    check_pair,
    task_spec,
)
from scpo_bench.suites.schema import MAX_CELLS, Benchmarks, Suite, TaskEntry, Values

_SHARED_FIELDS = sorted(TaskEntry.model_fields.keys() & Cell.model_fields.keys() - {"config"})


def get_suite(benchmarks: Benchmarks, name: str) -> Suite:
    if name not in benchmarks.suites:
        raise UserError(f"unknown suite '{name}'{nearest(name, benchmarks.suites)}")
    return benchmarks.suites[name]


def cells(
    suite: Suite,
    agents: list[str] | None = None,
    tasks: list[str] | None = None,
    seeds: int | None = None,
) -> list[Cell]:
    """The suite's cells by task, agent and seed, restricted to the named agents and tasks.

    A named agent that the suite does not run, such as a third party's, is added to every task.
    Third parties' agents are read, for the digest of their source, but not imported.
    UserError for a task that the suite does not have, or if nothing is left.
    """
    known_tasks = [entry.id for entry in suite.tasks]
    for task in tasks or []:
        if task not in known_tasks:
            raise UserError(f"--tasks: the suite has no task '{task}'{nearest(task, known_tasks)}")
    listed = {agent for entry in suite.tasks for agent in entry.agents}
    with at("--agents"):
        agents = _named(agents or [])
    sources: dict[str, str | None] = {}
    found: list[Cell] = []
    for entry in suite.tasks:
        if tasks and entry.id not in tasks:
            continue
        wanted = entry.agents
        if agents:
            wanted = [a for a in agents if a in entry.agents or a not in listed]
        wanted, number = list(dict.fromkeys(wanted)), seeds or entry.seeds
        if len(found) + len(wanted) * number > MAX_CELLS:
            raise UserError(
                f"{len(wanted)} agents with {number} seeds on {entry.id}: more than "
                f"{MAX_CELLS} runs"
            )
        sources |= {agent: agent_source(agent) for agent in wanted if agent not in sources}
        found += [
            _cell(entry, agent, sources[agent], seed) for agent in wanted for seed in range(number)
        ]
    if not found:
        raise UserError(f"nothing to run: no task chosen has any of {', '.join(agents)}")
    return found


def _named(agents: Iterable[str]) -> list[str]:
    """The agents under their own names. UserError for one that is none."""
    for agent in agents:
        agent_spec(agent)
    return list(map(agent_name, agents))


def _cell(entry: TaskEntry, agent: str, source: str | None, seed: int) -> Cell:
    check_pair(agent, entry.id)
    fields = {name: getattr(entry, name) for name in _SHARED_FIELDS}
    # A filtered agent is configured as the agent behind the filter, unless it is itself.
    inner = entry.config.get(agent.removeprefix(FILTER_PREFIX), {})
    config = entry.config.get(agent, inner)
    return Cell(agent=agent, agent_source=source, task=entry.id, seed=seed, config=config, **fields)


def changed_agents(todo: Iterable[Cell], suite: str, results: Path) -> list[str]:
    """A line for each agent whose file is not the one that finished runs of it were made with."""
    earlier: Counter[str] = Counter()
    for cell in todo:
        with contextlib.suppress(RecordError):
            run = read_run(run_folder(results, suite, cell))
            same_agent = run.cell.agent == cell.agent
            if run.status == "finished" and same_agent:
                earlier[cell.agent] += run.cell.agent_source != cell.agent_source
    return [
        f"agent '{agent}' has changed: {number} finished {'run' if number == 1 else 'runs'} of its "
        "earlier source set aside"
        for agent, number in earlier.items()
        if number
    ]


def comparison(
    benchmarks: Benchmarks,
    agents: list[str],
    task: str,
    seeds: int,
    steps: int | None,
    cost_limit: float | None,
) -> tuple[str, Suite]:
    """(name, suite) for agents on one task.

    The settings are those of the first suite with this task, or plain defaults.
    """
    with at("AGENT"):
        agents = _named(agents)
    with at("--task"):
        spec = task_spec(task)
    found = [e for suite in benchmarks.suites.values() for e in suite.tasks if e.id == task]
    values: Values = {"steps": 100_000, "num_envs": 4, "evaluation_episodes": 10}
    if found:
        values = found[0].model_dump()
    elif spec is not None:
        values["cost_limit"] = spec.cost_limit
    elif cost_limit is None:
        raise UserError(f"--cost-limit: needed, since {task} is no task of this package")
    given = {"id": task, "agents": agents, "seeds": seeds, "steps": steps, "cost_limit": cost_limit}
    values |= {name: value for name, value in given.items() if value is not None}
    with at("compare"):
        entry = TaskEntry.model_validate(values)
    return f"compare-{file_name(task)}", Suite(f"comparison on {task}", [entry])


def run_folder(results: Path, suite: str, cell: Cell) -> Path:
    """results/SUITE/TASK/AGENT/seed-N, without the characters that file names cannot have."""
    return results / suite / file_name(cell.task) / file_name(cell.agent) / f"seed-{cell.seed}"
