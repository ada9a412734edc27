"""Turning keyword arguments into an agent's frozen configuration, with errors a user can act on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from scpo_bench.errors import UserError, nearest

C = TypeVar("C")


def resolve_config(config_class: type[C], values: dict[str, Any]) -> C:
    """``config_class(**values)``; lists (from YAML or JSON) become tuples.

    Raises UserError naming the field and the nearest valid choice when a key is unknown.
    """
    known = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"{config_class.__name__}.{key}: unknown field{nearest(key, known)}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def require(
    config: Any,
    name: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
):
    """Raise UserError unless ``low <= config.name <= high`` and ``config.name > above`` (NaN never
    passes).
    """
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{type(config).__name__}.{name}: expected a number, got {value!r}")
    bounds = [
        ("at least", low, low is None or value >= low),
        ("above", above, above is None or value > above),
        ("at most", high, high is None or value <= high),
    ]
    for words, bound, holds in bounds:
        if not holds:
            raise UserError(
                f"{type(config).__name__}.{name}: must be {words} {bound}, got {value!r}"
            )


def require_choice(config: Any, name: str, choices: tuple[str, ...], value: Any = None) -> None:
    """Raise UserError, naming the nearest choice, unless ``config.name`` (or ``value``, an element
    of it) is one of ``choices``.
    """
    value = getattr(config, name) if value is None else value
    if value not in choices:
        raise UserError(
            f"{type(config).__name__}.{name}: expected one of {', '.join(choices)}, got {value!r}"
            f"{nearest(str(value), choices)}"
        )
