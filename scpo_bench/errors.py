"""How a user's mistake is reported: one line with the place, the problem and the nearest choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_MESSAGE = 600


# Characters without a shape of their own that Python calls printable: fillers, joiners, selectors.
_INVISIBLE = frozenset(
    map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0))
) | frozenset(map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


def printable(text: object, limit: int = MAX_MESSAGE) -> str:
    """``text`` on one line, shortened to ``limit`` characters, with nothing hidden in it.

    Text from someone else's file must not control a terminal, break a row of a table, or look like
    another text: control, format (bidirectional, zero-width) and invisible characters are replaced.
    """
    full = str(text)
    shown = "".join(
        c if c.isprintable() and c not in _INVISIBLE else "\N{REPLACEMENT CHARACTER}"
        for c in full[:limit]
    )
    return shown + "..." * (len(full) > limit)


class UserError(ValueError):
    """A mistake in what the user wrote or asked for.

    The message names the field, what was expected, what was given and the nearest valid choice.
    The command line prints it as one line and exits with ``exit_status``.
    """

    exit_status = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


@contextmanager
def at(place: object) -> Iterator[None]:
    """Turn a ValueError raised inside into a UserError whose message starts with ``place``."""
    try:
        yield
    except ValueError as error:
        from pydantic import ValidationError

        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserError(f"{place}: {problem}") from None


def describe(error: OSError) -> str:
    """What the operating system refused: "results/run.json: Permission denied"."""
    problem = error.strerror or str(error) or type(error).__name__
    return problem if error.filename is None else f"{error.filename}: {problem}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to a message: "; did you mean 'x'?", or the choices if there are few."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(choices)}" if 0 < len(choices) <= 12 else ""


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found: "suites.core.tasks[0].steps: message, got X"."""
    problem = error.errors(include_url=False)[0]
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"])
    message = f"{place.removeprefix('.') or 'file'}: {problem['msg']}"
    # The message names what is missing or unknown; the input is the whole mapping around it, or the
    # whole file.
    if problem["type"] in ("missing", "unknown") or not place:
        return message
    try:
        given = repr(problem["input"])
    except (ValueError, RecursionError):  # integers of thousands of digits
        given = f"{type(problem['input']).__name__} of many digits or levels"
    return f"{message}, got {given if len(given) <= 80 else f'{given[:80]}...'}"
