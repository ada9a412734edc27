"""benchmarks.yaml -> validated suites -> cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scpo_bench.records import Cell
from scpo_bench.registry import agent_spec, nearest, task_spec

PACKAGED_FILE = Path(__file__).with_name("benchmarks.yaml")
MAX_FILE_BYTES = 1_000_000


class BenchmarkError(ValueError):
    """A mistake in benchmarks.yaml or in what was asked of it, in one line: field, expectation, what came, nearest choice."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskEntry(_Strict):
    """One task of a suite."""

    id: str
    agents: list[str] = Field(min_length=1)
    steps: int = Field(ge=1)
    """Interaction steps per run."""
    num_envs: int = Field(1, ge=1)
    evaluation_episodes: int = Field(10, ge=1)
    evaluation_interval: int = Field(1, ge=1)
    cost_limit: float | None = Field(None, ge=0)
    """Default: the task's own."""
    start: Literal["backup", "random"] | None = None
    """Default: the suite's."""
    seeds: int | None = Field(None, ge=1)
    """Default: the suite's."""
    normalize: bool = False
    env: dict[str, Any] = {}
    config: dict[str, dict[str, Any]] = {}
    """agent -> overrides of its configuration."""


class Suite(_Strict):
    description: str
    seeds: int = Field(ge=1)
    start: Literal["backup", "random"] = "random"
    tasks: list[TaskEntry] = Field(min_length=1)
    config: dict[str, dict[str, Any]] = {}
    """agent -> overrides of its configuration, for every task of the suite."""


class Benchmarks(_Strict):
    version: Literal[1]
    suites: dict[str, Suite]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; here a repeated key is a mistake."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = key_node.value
        if key in seen:
            raise BenchmarkError(f"line {key_node.start_mark.line + 1}: '{key}' stands twice in one mapping")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def default_file() -> Path:
    """benchmarks.yaml of the working directory if there is one, else the packaged one."""
    local = Path("benchmarks.yaml")
    return local if local.is_file() else PACKAGED_FILE


def load_benchmarks(path: Path) -> Benchmarks:
    """Read and validate a benchmarks file. BenchmarkError names file, field, expectation and nearest choice."""
    name = path.name
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BenchmarkError(f"{name}: larger than {MAX_FILE_BYTES} bytes")
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        benchmarks = Benchmarks.model_validate(data)
    except BenchmarkError as error:
        raise BenchmarkError(f"{name}: {error}") from None
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, ValidationError):
            raise BenchmarkError(f"{name}: {_explain(error)}") from None
        raise BenchmarkError(f"{name}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    for suite_name, suite in benchmarks.suites.items():
        _check_names(name, suite_name, suite)
    return benchmarks


def _place(parts: tuple[Any, ...]) -> str:
    """("suites", "core", "tasks", 0) -> "suites.core.tasks[0]"."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "file"


def _explain(error: ValidationError) -> str:
    """pydantic's first finding as one line."""
    problem = error.errors(include_url=False)[0]
    where = _place(problem["loc"])
    if problem["type"] == "extra_forbidden":
        models: dict[int, type[BaseModel]] = {1: Benchmarks, 3: Suite}
        fields = models.get(len(problem["loc"]), TaskEntry).model_fields
        return f"{where}: unknown key{nearest(str(problem['loc'][-1]), list(fields))}"
    came = "" if problem["type"] == "missing" else f", got {str(problem['input'])[:60]!r}"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{came}"


def _check_names(file: str, suite_name: str, suite: Suite) -> None:
    where = f"{file}: suites.{suite_name}"
    used = {agent for entry in suite.tasks for agent in entry.agents}
    for i, entry in enumerate(suite.tasks):
        for j, agent in enumerate(entry.agents):
            _named(f"{where}.tasks[{i}].agents[{j}]", agent_spec, agent)
        for agent in entry.config:
            if agent not in entry.agents:
                raise BenchmarkError(
                    f"{where}.tasks[{i}].config: '{agent}' is not among its agents{nearest(agent, entry.agents)}"
                )
        spec = _named(f"{where}.tasks[{i}].id", task_spec, entry.id)
        if spec is None and entry.cost_limit is None:
            raise BenchmarkError(f"{where}.tasks[{i}].cost_limit: needed, since {entry.id} is no task of this package")
    for agent in suite.config:
        if agent not in used:
            raise BenchmarkError(f"{where}.config: '{agent}' runs in no task of the suite{nearest(agent, sorted(used))}")


def _named(where: str, look_up: Any, name: str) -> Any:
    try:
        return look_up(name)
    except ValueError as error:
        raise BenchmarkError(f"{where}: {error}") from None


def get_suite(benchmarks: Benchmarks, name: str) -> Suite:
    if name not in benchmarks.suites:
        raise BenchmarkError(f"unknown suite '{name}'{nearest(name, list(benchmarks.suites))}")
    return benchmarks.suites[name]


def cells(suite: Suite, agents: list[str] | None = None, tasks: list[str] | None = None, seeds: int | None = None) -> list[Cell]:
    """The suite's cells, task by task, agent by agent, seed by seed; restricted to the named agents and tasks if any are.

    An agent that the suite does not run is added to every task (a third party's, say). BenchmarkError for a task that the suite
    does not have, or where nothing is left.
    """
    known_tasks = [entry.id for entry in suite.tasks]
    for task in tasks or []:
        if task not in known_tasks:
            raise BenchmarkError(f"--tasks: the suite has no task '{task}'{nearest(task, known_tasks)}")
    listed = {agent for entry in suite.tasks for agent in entry.agents}
    for agent in agents or []:
        _named("--agents", agent_spec, agent)
    found = []
    for entry in suite.tasks:
        if tasks and entry.id not in tasks:
            continue
        wanted = entry.agents if not agents else [a for a in agents if a in entry.agents or a not in listed]
        for agent in wanted:
            found += [_cell(suite, entry, agent, seed) for seed in range(seeds or entry.seeds or suite.seeds)]
    if not found:
        raise BenchmarkError(f"nothing to run: none of {', '.join(agents or [])} runs on the chosen tasks")
    return found


def comparison(
    benchmarks: Benchmarks, agents: list[str], task: str, seeds: int, steps: int | None, cost_limit: float | None
) -> tuple[str, Suite]:
    """(name, suite) for agents on one task, with the settings that the first suite with this task gives it, or plain defaults."""
    for agent in agents:
        _named("AGENT", agent_spec, agent)
    spec = _named("--task", task_spec, task)
    if spec is None and cost_limit is None:
        raise BenchmarkError(f"--cost-limit: needed, since {task} is no task of this package")
    base = {"id": task, "steps": 100_000, "num_envs": 4, "evaluation_episodes": 10}
    config: dict[str, dict[str, Any]] = {}
    for suite in benchmarks.suites.values():
        entry = next((e for e in suite.tasks if e.id == task), None)
        if entry is not None:
            base = {**entry.model_dump(exclude={"config", "agents"}), "start": entry.start or suite.start}
            config = {a: {**suite.config.get(a, {}), **entry.config.get(a, {})} for a in agents}
            break
    given = {"steps": steps, "cost_limit": cost_limit}
    base.update({key: value for key, value in given.items() if value is not None})
    new_entry = TaskEntry.model_validate({**base, "agents": agents, "config": {a: c for a, c in config.items() if c}})
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
    """results/<suite>/<task>/<agent>/seed-<n>, with the characters that file names cannot have replaced."""
    return results / suite / _file_name(cell.task) / _file_name(cell.agent) / f"seed-{cell.seed}"


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "." for c in name).strip(".")
