"""What a user gets to see of a mistake of theirs: one line, naming the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_MESSAGE = 600


class UserError(ValueError):
    """A mistake in what the user wrote or asked for: field, expectation, what came, nearest choice.

    The command line prints it as one line and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # Names in it may come from a stranger's file: the message stays one printable line.
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} ...")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint to append to a message: "; did you mean 'x'?", or the choices where they are few."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(choices)}" if 0 < len(choices) <= 12 else ""


def first_problem(error: ValidationError) -> tuple[tuple[int | str, ...], str, Any]:
    """The first of pydantic's findings: (place, what was expected, what came, shortened)."""
    problem = error.errors(include_url=False)[0]
    came = repr(problem.get("input"))
    return problem["loc"], problem["msg"], came if len(came) <= 80 else f"{came[:80]}..."
