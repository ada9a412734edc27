"""benchmarks.yaml -> validated suites."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from scpo_bench.errors import UserError, nearest
from scpo_bench.records.schema import canonical
from scpo_bench.suites.registry import agent_spec, task_spec

PACKAGED_FILE = Path(__file__).with_name("benchmarks.yaml")
# Bounds on what a file may ask for: far above any real one, so that a slip (or a hostile file) ends
# in a line of text.
MAX_FILE_BYTES = 1_000_000
MAX_VALUES = 100_000  # with every alias written out
MAX_CELLS = 100_000
MAX_MESSAGE = 600


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
    """The policy that training starts from: the task's backup controller, action zero everywhere,
    or a random initialisation.
    """
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
            raise UserError(f"{place}: a key must be a single value")
        if key_node.value in seen:
            raise UserError(f"{place}: '{key_node.value}' stands twice in one mapping")
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


def _written_out(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Number of values below ``node`` with every alias written out: a few lines of aliases of
    aliases can stand for billions.
    """
    size = sizes.setdefault(id(node), 0)
    if size is None:
        raise UserError(f"line {node.start_mark.line + 1}: an alias inside of what it stands for")
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
            raise UserError(f"more than {MAX_VALUES} values, with aliases written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def default_file() -> Path:
    """benchmarks.yaml of the working directory if there is one, else the packaged one."""
    local = Path("benchmarks.yaml")
    return local if local.is_file() else PACKAGED_FILE


def load_benchmarks(path: Path) -> Benchmarks:
    """Read and validate a benchmarks file.

    UserError names file, field, expectation and nearest choice.
    """
    name = path.name
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"larger than {MAX_FILE_BYTES} bytes")
        benchmarks = Benchmarks.model_validate(_parse(content.decode("utf-8")))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise UserError(f"{name}: {_explain(error)}") from None
    # What PyYAML's constructors raise on a value under a wrong tag is whatever happens to go wrong.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{name}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
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
                raise UserError(
                    f"{where}.tasks[{i}].config: '{agent}' is not among its agents{nearest(agent, entry.agents)}"
                )
        _check_settings(f"{where}.tasks[{i}].env", entry.env)
        _check_settings(f"{where}.tasks[{i}].config", entry.config)
        spec = _named(f"{where}.tasks[{i}].id", task_spec, entry.id)
        if spec is None and entry.cost_limit is None:
            raise UserError(
                f"{where}.tasks[{i}].cost_limit: needed, since {entry.id} is no task of this package"
            )
    _check_settings(f"{where}.config", suite.config)
    for agent in suite.config:
        if agent not in used:
            raise UserError(
                f"{where}.config: '{agent}' runs in no task of the suite{nearest(agent, sorted(used))}"
            )


def _check_settings(where: str, settings: Any) -> None:
    """Settings go into the cell's key and its record, so they must have a JSON text."""
    try:
        canonical(settings)
    except ValueError as error:  # nan, infinity, integers of thousands of digits
        raise UserError(f"{where}: {error}") from None


def _named(where: str, look_up: Any, name: str) -> Any:
    try:
        return look_up(name)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
