"""An agent's frozen configuration from keyword arguments, with errors that a user can act on."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from scpo_bench.errors import UserError, nearest

C = TypeVar("C")


@dataclass(frozen=True)
class Range:
    """The values of a numeric field that ``scpo-bench tune`` tries; integers if both ends are."""

    low: float
    high: float
    log: bool = False
    """Whether they are spread evenly in the logarithm."""


# What ``tune`` may set of an agent: field of its Config -> a range, or the choices.
SearchSpace = Mapping[str, Range | tuple[Any, ...]]


def resolve_config(config_class: type[C], values: dict[str, Any]) -> C:
    """``config_class(**values)``, with lists (from YAML or JSON) turned into tuples.

    A UserError for an unknown field names the nearest valid one.
    """
    known = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"{config_class.__name__}.{key}: unknown field{nearest(key, known)}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that the command line's ``option`` was given as ``text``."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    expected = "expected a JSON object such as '{\"n_steps\": 100}'"
    raise UserError(f"{option}: {expected}, got '{text[:40]}'")


def require(
    config: Any,
    name: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> None:
    """Raise UserError unless ``low <= config.name <= high`` and ``config.name > above``.

    NaN never passes.
    """
    value = getattr(config, name)
    place = f"{type(config).__name__}.{name}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{place}: expected a number, got {value!r}")
    for words, bound, holds in (
        ("at least", low, operator.ge),
        ("above", above, operator.gt),
        ("at most", high, operator.le),
    ):
        if bound is not None and not holds(value, bound):
            raise UserError(f"{place}: must be {words} {bound}, got {value!r}")


def require_choice(config: Any, name: str, choices: tuple[str, ...], value: Any = None) -> None:
    """Raise UserError unless ``config.name`` is one of ``choices``.

    value: to be checked in its place, where the field is a collection.
    """
    value = getattr(config, name) if value is None else value
    if value not in choices:
        place, hint = f"{type(config).__name__}.{name}", nearest(str(value), choices)
        raise UserError(f"{place}: expected one of {', '.join(choices)}, got {value!r}{hint}")
