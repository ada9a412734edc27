"""benchmarks.yaml -> validated suites -> cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from scpo_bench.records import Cell, canonical
from scpo_bench.registry import agent_spec, nearest, task_spec

PACKAGED_FILE = Path(__file__).with_name("benchmarks.yaml")
# Bounds on what a file may ask for: far above any real one, so that a slip (or a hostile file) ends in a line of text.
MAX_FILE_BYTES = 1_000_000
MAX_VALUES = 100_000  # with every alias written out
MAX_CELLS = 100_000
MAX_MESSAGE = 600


class BenchmarkError(ValueError):
    """A mistake in benchmarks.yaml or in what was asked of it, in one line: field, expectation, what came, nearest choice."""

    def __init__(self, message: str) -> None:
        # Names in it come from the file: whatever they hold, the message stays one printable line.
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ...")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    start: Literal["backup", "zero", "random"] | None = None
    """Default: the suite's."""
    seeds: int | None = Field(None, ge=1)
    """Default: the suite's."""
    normalize: bool = False
    env: dict[str, JsonValue] = {}
    config: dict[str, dict[str, JsonValue]] = {}
    """agent -> overrides of its configuration."""


class Suite(_Strict):
    description: str
    seeds: int = Field(ge=1)
    start: Literal["backup", "zero", "random"] = "random"
    """The policy that training starts from: the task's backup controller, action zero everywhere, or a random initialisation."""
    tasks: list[TaskEntry] = Field(min_length=1)
    config: dict[str, dict[str, JsonValue]] = {}
    """agent -> overrides of its configuration, for every task of the suite."""


class Benchmarks(_Strict):
    version: Literal[1]
    suites: dict[str, Suite]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; here a repeated key is a mistake."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        place = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise BenchmarkError(f"{place}: a key must be a single value")
        if key_node.value in seen:
            raise BenchmarkError(f"{place}: '{key_node.value}' stands twice in one mapping")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


def _written_out(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Number of values below ``node`` with every alias written out: a few lines of aliases of aliases can stand for billions."""
    size = sizes.setdefault(id(node), 0)
    if size is None:
        raise BenchmarkError(f"line {node.start_mark.line + 1}: an alias inside of what it stands for")
    if size == 0:
        sizes[id(node)] = None
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(_written_out(inner, sizes) for pair in node.value for inner in pair)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(_written_out(inner, sizes) for inner in node.value)
        sizes[id(node)] = size
    return size


def _parse(text: str) -> Any:
    loader = _UniqueKeyLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MAX_VALUES:
            raise BenchmarkError(f"more than {MAX_VALUES} values, with aliases written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def default_file() -> Path:
    """benchmarks.yaml of the working directory if there is one, else the packaged one."""
    local = Path("benchmarks.yaml")
    return local if local.is_file() else PACKAGED_FILE


def load_benchmarks(path: Path) -> Benchmarks:
    """Read and validate a benchmarks file. BenchmarkError names file, field, expectation and nearest choice."""
    name = path.name
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise BenchmarkError(f"larger than {MAX_FILE_BYTES} bytes")
        benchmarks = Benchmarks.model_validate(_parse(content.decode("utf-8")))
    except BenchmarkError as error:
        raise BenchmarkError(f"{name}: {error}") from None
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise BenchmarkError(f"{name}: {_explain(error)}") from None
    # What PyYAML's constructors raise on a value under a wrong tag is whatever happens to go wrong.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
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
        _check_settings(f"{where}.tasks[{i}].env", entry.env)
        _check_settings(f"{where}.tasks[{i}].config", entry.config)
        spec = _named(f"{where}.tasks[{i}].id", task_spec, entry.id)
        if spec is None and entry.cost_limit is None:
            raise BenchmarkError(f"{where}.tasks[{i}].cost_limit: needed, since {entry.id} is no task of this package")
    _check_settings(f"{where}.config", suite.config)
    for agent in suite.config:
        if agent not in used:
            raise BenchmarkError(f"{where}.config: '{agent}' runs in no task of the suite{nearest(agent, sorted(used))}")


def _check_settings(where: str, settings: Any) -> None:
    """Settings go into the cell's key and its record, so they must have a JSON text."""
    try:
        canonical(settings)
    except ValueError as error:  # nan, infinity, integers of thousands of digits
        raise BenchmarkError(f"{where}: {error}") from None


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
    found: list[Cell] = []
    for entry in suite.tasks:
        if tasks and entry.id not in tasks:
            continue
        wanted = entry.agents if not agents else [a for a in agents if a in entry.agents or a not in listed]
        number = seeds or entry.seeds or suite.seeds
        if len(found) + len(wanted) * number > MAX_CELLS:
            raise BenchmarkError(f"{len(wanted)} agents with {number} seeds on {entry.id}: more than {MAX_CELLS} runs")
        for agent in wanted:
            found += [_cell(suite, entry, agent, seed) for seed in range(number)]
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
    config: dict[str, dict[str, JsonValue]] = {}
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
