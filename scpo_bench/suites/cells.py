"""Suites -> cells: what is to be run, and where its record goes."""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue

from scpo_bench.errors import UserError, nearest
from scpo_bench.records.schema import Cell
from scpo_bench.suites.registry import agent_spec, task_spec
from scpo_bench.suites.schema import MAX_CELLS, Benchmarks, Suite, TaskEntry, _named


def get_suite(benchmarks: Benchmarks, name: str) -> Suite:
    if name not in benchmarks.suites:
        raise UserError(f"unknown suite '{name}'{nearest(name, list(benchmarks.suites))}")
    return benchmarks.suites[name]


def cells(
    suite: Suite,
    agents: list[str] | None = None,
    tasks: list[str] | None = None,
    seeds: int | None = None,
) -> list[Cell]:
    """The suite's cells, task by task, agent by agent, seed by seed; restricted to the named agents
    and tasks if any are.

    An agent that the suite does not run is added to every task (a third party's, say). UserError
    for a task that the suite does not have, or where nothing is left.
    """
    known_tasks = [entry.id for entry in suite.tasks]
    for task in tasks or []:
        if task not in known_tasks:
            raise UserError(f"--tasks: the suite has no task '{task}'{nearest(task, known_tasks)}")
    listed = {agent for entry in suite.tasks for agent in entry.agents}
    for agent in agents or []:
        _named("--agents", agent_spec, agent)
    found: list[Cell] = []
    for entry in suite.tasks:
        if tasks and entry.id not in tasks:
            continue
        wanted = (
            entry.agents
            if not agents
            else [a for a in agents if a in entry.agents or a not in listed]
        )
        number = seeds or entry.seeds or suite.seeds
        if len(found) + len(wanted) * number > MAX_CELLS:
            raise UserError(
                f"{len(wanted)} agents with {number} seeds on {entry.id}: more than {MAX_CELLS} runs"
            )
        for agent in wanted:
            found += [_cell(suite, entry, agent, seed) for seed in range(number)]
    if not found:
        raise UserError(
            f"nothing to run: none of {', '.join(agents or [])} runs on the chosen tasks"
        )
    return found


def comparison(
    benchmarks: Benchmarks,
    agents: list[str],
    task: str,
    seeds: int,
    steps: int | None,
    cost_limit: float | None,
) -> tuple[str, Suite]:
    """(name, suite) for agents on one task, with the settings that the first suite with this task
    gives it, or plain defaults.
    """
    for agent in agents:
        _named("AGENT", agent_spec, agent)
    spec = _named("--task", task_spec, task)
    if spec is None and cost_limit is None:
        raise UserError(f"--cost-limit: needed, since {task} is no task of this package")
    base = {"id": task, "steps": 100_000, "num_envs": 4, "evaluation_episodes": 10}
    config: dict[str, dict[str, JsonValue]] = {}
    for suite in benchmarks.suites.values():
        entry = next((e for e in suite.tasks if e.id == task), None)
        if entry is not None:
            base = {
                **entry.model_dump(exclude={"config", "agents"}),
                "start": entry.start or suite.start,
            }
            config = {a: {**suite.config.get(a, {}), **entry.config.get(a, {})} for a in agents}
            break
    given = {"steps": steps, "cost_limit": cost_limit}
    base.update({key: value for key, value in given.items() if value is not None})
    new_entry = TaskEntry.model_validate(
        {**base, "agents": agents, "config": {a: c for a, c in config.items() if c}}
    )
    suite = Suite(description=f"comparison on {task}", seeds=seeds, tasks=[new_entry])
    return f"compare-{_file_name(task)}", suite


def _cell(suite: Suite, entry: TaskEntry, agent: str, seed: int) -> Cell:
    limit = entry.cost_limit
    if limit is None:
        spec = task_spec(entry.id)
        assert spec is not None  # load_benchmarks has asked for a limit otherwise
        limit = spec.cost_limit
    return Cell(
        agent=agent,
        task=entry.id,
        seed=seed,
        steps=entry.steps,
        start=entry.start or suite.start,
        num_envs=entry.num_envs,
        evaluation_episodes=entry.evaluation_episodes,
        evaluation_interval=entry.evaluation_interval,
        cost_limit=limit,
        normalize=entry.normalize,
        env=entry.env,
        config={**suite.config.get(agent, {}), **entry.config.get(agent, {})},
    )


def run_folder(results: Path, suite: str, cell: Cell) -> Path:
    """results/<suite>/<task>/<agent>/seed-<n>, with the characters that file names cannot have
    replaced.
    """
    return results / suite / _file_name(cell.task) / _file_name(cell.agent) / f"seed-{cell.seed}"


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "." for c in name).strip(".")
