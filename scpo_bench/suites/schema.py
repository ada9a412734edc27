"""benchmarks.yaml -> validated suites.

A setting can be given for all suites (``defaults:`` of the file), for a suite, and for one of its
tasks; the one nearest to the task applies, and only agents' configurations are merged, field by
field. A suite with ``extends: SUITE`` starts from that suite's settings and tasks, and a task with
``extends: TASK`` from the settings of an earlier task of the same suite. Only what is defined
earlier in the file can be extended, so there are no cycles.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)
from pydantic_core import PydanticCustomError

from scpo_bench.errors import UserError, at, nearest, printable
from scpo_bench.records.consistency import MAX_NAME
from scpo_bench.records.files import check_suite_name
from scpo_bench.records.plain_files import open_to_read
from scpo_bench.records.schema import canonical
from scpo_bench.suites.registry import agent_name, agent_spec, task_spec

PACKAGED_FILE = Path(__file__).with_name("benchmarks.yaml")
# Bounds on what a file may ask for, far above any real one: a slip, or a hostile file, ends in one
# line of text instead of filling the memory.
MAX_FILE_BYTES = 500_000
MAX_VALUES = 100_000  # with every YAML alias, default and extended suite written out
MAX_CELLS = 100_000

Count = Annotated[int, Field(ge=1, le=2**53)]


def _unknown(problem: object) -> PydanticCustomError:
    # Not as the template itself: a name in it may contain braces.
    return PydanticCustomError("unknown", "{problem}", {"problem": str(problem)})


def _name(name: str) -> str:
    if not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise _unknown(f"expected 1 to {MAX_NAME} printable characters, got {name[:40]!r}")
    return name


def _agent(name: str) -> str:
    try:
        agent_spec(name)
        return agent_name(name)
    except UserError as error:
        raise _unknown(error) from None


AgentName = Annotated[str, AfterValidator(_name), AfterValidator(_agent)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                hint = nearest(str(key), cls.model_fields)
                raise _unknown(f"unknown key '{printable(key, 80)}'{hint}")
        return data


class Settings(_Strict):
    """What can be set for a task, for all tasks of a suite, or for all suites."""

    agents: list[AgentName] = Field([], min_length=1)
    """Required."""
    steps: Count = 0
    """Simulation steps per run. Required."""
    seeds: Count = 0
    """Number of runs per agent, with seeds 0, 1, ... Required."""
    num_envs: Count = 1
    evaluation_episodes: Count = 10
    evaluation_interval: Count = 1
    cost_limit: float = Field(0.0, ge=0)
    """Per episode. Default: the task's own."""
    margin: float = Field(0.0, ge=0)
    """Safety margin in training, for every agent alike; see :class:`Cell`."""
    budget: Literal["interaction", "total"] = "interaction"
    """What ``steps`` counts: see :class:`Cell`."""
    start: Literal["backup", "zero", "random"] = "random"
    """The policy that training starts from: the task's backup controller, action zero everywhere,
    or a random initialisation.
    """
    normalize: bool = False
    env: dict[str, JsonValue] = {}
    """Keyword arguments of the environment."""
    config: dict[AgentName, dict[str, JsonValue]] = {}
    """agent -> the fields of its configuration that differ from the agent's defaults."""


_SETTINGS = frozenset(Settings.model_fields)


class TaskEntry(Settings):
    """One task of a suite. In a loaded suite every setting is filled in."""

    id: Annotated[str, AfterValidator(_name)]
    extends: str | None = None


def _task(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class _SuiteEntry(Settings):
    """A suite as it is written in the file."""

    extends: str | None = None
    description: str = ""
    tasks: list[Annotated[TaskEntry, BeforeValidator(_task)]] = Field([], min_length=1)


class _File(_Strict):
    version: Literal[1]
    defaults: Settings = Settings.model_construct()
    suites: dict[str, _SuiteEntry]


@dataclass(frozen=True)
class Suite:
    description: str
    tasks: list[TaskEntry]


@dataclass(frozen=True)
class Benchmarks:
    suites: dict[str, Suite]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML silently keeps the last of two equal keys; here a repeated key is a mistake."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        place = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{place}: a key must be a single value")
        if key_node.value in seen:
            raise UserError(f"{place}: '{key_node.value}' appears twice in one mapping")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _written_out(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """The number of values below ``node`` with every alias written out.

    A few lines of aliases of aliases can stand for billions of values.
    """
    size = sizes.setdefault(id(node), 0)
    if size is None:
        raise UserError(f"line {node.start_mark.line + 1}: an alias inside the value it names")
    if size == 0:
        sizes[id(node)] = None
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(_written_out(inner, sizes) for pair in node.value for inner in pair)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(_written_out(inner, sizes) for inner in node.value)
        sizes[id(node)] = size
    return size


def _parse(content: bytes) -> Any:
    loader = None
    try:
        loader = _UniqueKeyLoader(content.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MAX_VALUES:
            raise UserError(f"more than {MAX_VALUES} values, with aliases written out")
        return loader.construct_document(node)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:  # its text also shows what is in the file
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"not valid YAML ({line}{error.problem})") from None
    except Exception as error:  # PyYAML's constructors let through whatever goes wrong in them
        raise UserError(f"not valid YAML ({str(error)[:200]})") from None
    finally:
        if loader is not None:
            loader.dispose()


def default_file() -> Path:
    """benchmarks.yaml of the working directory if there is one, else the packaged one."""
    local = Path("benchmarks.yaml")
    return local if local.is_file() else PACKAGED_FILE


def load_benchmarks(path: Path) -> Benchmarks:
    """Read and validate a suites file.

    A UserError names the file, the field, what was expected and the nearest valid choice.
    """
    try:
        with open_to_read(path, follow=True) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with at(path.name):
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"larger than {MAX_FILE_BYTES} bytes")
        return Benchmarks(_resolve(_File.model_validate(_parse(content))))


Values = dict[str, Any]  # field -> value, for the fields that were given


def _given(layer: Settings) -> Values:
    return {name: getattr(layer, name) for name in layer.model_fields_set & _SETTINGS}


def _over(base: Values, own: Values) -> Values:
    """``own`` applied over ``base``."""
    config = dict(base.get("config", {}))
    for agent, fields in own.get("config", {}).items():
        config[agent] = {**config.get(agent, {}), **fields}
    return {**base, **own, "config": config}


def _resolve(file: _File) -> dict[str, Suite]:
    """The suites with defaults, extended suites and extended tasks filled in."""
    _check("defaults", file.defaults, set(file.defaults.config))
    suites: dict[str, Suite] = {}
    # What a suite that extends the key (or nothing: None) starts from.
    for_all: dict[str | None, Values] = {None: _over({}, _given(file.defaults))}
    for_task: dict[str | None, dict[str, Values]] = {None: {}}
    size = 0
    for name, suite in file.suites.items():
        check_suite_name("suites", name)
        where, base = f"suites.{name}", suite.extends
        if base not in for_all:
            hint = nearest(str(base), suites)
            raise UserError(f"{where}.extends: no suite '{base}' above this one{hint}")
        for field in ("description", "tasks"):
            if base is None and not getattr(suite, field):
                raise UserError(f"{where}.{field}: needed, since the suite extends no other")
        for_all[name] = _over(for_all[base], _given(suite))
        for_task[name] = _tasks(where, suite, for_task[base])
        entries = []
        for i, (task, values) in enumerate(for_task[name].items()):
            entry = _complete(f"{where}.tasks[{i}]", task, _over(for_all[name], values))
            entries.append(entry)
            size += 1 + len(entry.agents) + len(entry.env)
            size += sum(1 + len(fields) for fields in entry.config.values())
            if size > MAX_VALUES:
                raise UserError(f"more than {MAX_VALUES} values, with extended suites written out")
        for i, layer in enumerate(suite.tasks):
            _check(f"{where}.tasks[{i}]", layer, set(entries[i].agents))
        _check(where, suite, {agent for entry in entries for agent in entry.agents})
        inherited = suites[base].description if base else ""
        suites[name] = Suite(suite.description or inherited, entries)
    return suites


def _tasks(where: str, suite: _SuiteEntry, inherited: dict[str, Values]) -> dict[str, Values]:
    """The suite's tasks and what is set for each of them alone."""
    tasks: dict[str, Values] = {}
    for i, task in enumerate(suite.tasks):
        if task.id in tasks:
            raise UserError(f"{where}.tasks[{i}].id: '{task.id}' appears twice in the suite")
        if task.extends is None:
            base = inherited.get(task.id, {})
        elif task.extends in tasks:
            base = tasks[task.extends]
        else:
            hint = nearest(task.extends, tasks)
            raise UserError(
                f"{where}.tasks[{i}].extends: no task '{task.extends}' above this one{hint}"
            )
        tasks[task.id] = _over(base, _given(task))
    return tasks or inherited


def _complete(where: str, task: str, values: Values) -> TaskEntry:
    """The entry of a task whose settings are ``values``."""
    for name in ("agents", "steps", "seeds"):
        if name not in values:
            raise UserError(f"{where}.{name}: needed for the task, its suite or in `defaults`")
    with at(f"{where}.id"):
        spec = task_spec(task)
    if "cost_limit" not in values:
        if spec is None:
            raise UserError(f"{where}.cost_limit: needed, since {task} is no task of this package")
        values = {**values, "cost_limit": spec.cost_limit}
    return TaskEntry.model_construct(id=task, **values)


def _check(where: str, layer: Settings, running: set[str]) -> None:
    """Only agents that run are configured, and the settings have a JSON text."""
    for agent in layer.config:
        if agent not in running:
            hint = nearest(agent, sorted(running))
            raise UserError(f"{where}.config: '{agent}' is not among the agents{hint}")
    for name in ("env", "config"):  # they go into the cell's key and its record
        with at(f"{where}.{name}"):
            canonical(getattr(layer, name))
