"""Whether a record's cell can be run without running code that the record's author chose.

This package's agents on tasks that need no import are run without asking. Everything else that a
cell names is code: an agent in a file, in a module or of another distribution, or a task's module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from scpo_bench.errors import UserError
from scpo_bench.records.schema import Cell
from scpo_bench.suites.registry import agent_spec, built_in, file_digest, source_file

WRITES_FILES = "tensorboard_log"
"""Setting of Stable-Baselines3's agents: a folder that they write to."""


def check_trust(
    cells: Iterable[Cell], trust_code: bool, announce: Callable[[str], object] = print
) -> None:
    """Announce what the cells name of other code, a line each; UserError if it is not trusted.

    To be called before any of the cells is run. Nothing is imported or run here.
    """
    lines = list(dict.fromkeys(line for cell in cells for line in _other_code(cell)))
    if lines and not trust_code:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(
            f"nothing was run: the records name code that is not this package's: {lines[0]}{more}; "
            "read it, then give --trust-code to run it"
        )
    for line in lines:
        announce(line)


def _other_code(cell: Cell) -> Iterator[str]:
    """What a run of the cell would import besides this package, or write outside of its folder."""
    try:
        if not built_in(cell.agent):
            path = source_file(agent_spec(cell.agent).entry.rpartition(":")[0])
            yield f"agent '{cell.agent}': {_source(path, cell.agent_source)}"
    except UserError:
        yield f"agent '{cell.agent}': not known here"
    if ":" in cell.task:
        path = source_file(cell.task.rpartition(":")[0])
        yield f"task '{cell.task}': {_source(path, None)}"
    if WRITES_FILES in cell.config:
        yield f"agent '{cell.agent}': {WRITES_FILES} writes to '{cell.config[WRITES_FILES]}'"


def _source(path: Path | None, recorded: str | None) -> str:
    if path is None:
        return "no source file found here"
    digest = file_digest(path)
    same = "the record names no digest"
    if recorded is not None:
        same = "as recorded" if digest == recorded else f"NOT as recorded, which is {recorded}"
    return f"{path}, SHA-256 {digest or 'unknown'} ({same})"
