"""Re-runs recorded cells and compares the records."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scpo_bench.leaderboard.render import printable
from scpo_bench.records.consistency import check_bounds
from scpo_bench.records.files import RecordError, read_run, read_updates, run_folders
from scpo_bench.records.schema import TIMING_FIELDS, Run, Update
from scpo_bench.runs.harness import run_cell

_ABSENT = "(absent)"


def reproduce(folder: Path, sample: int | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Re-run the finished runs below ``folder``, or ``sample`` of them drawn at random.

    Yields (run folder, differences); no differences means reproduced exactly. Runs the agents that
    the records name. RecordError if there is nothing to run, or ``folder`` is a packed bundle.
    """
    finished = [path for path in run_folders(folder) if read_run(path).status == "finished"]
    if not finished:
        raise RecordError(f"{folder}: no finished runs to re-run (unpack a packed bundle first)")
    if sample is not None and sample < len(finished):
        finished = sorted(random.sample(finished, sample))
    for path in finished:
        run = read_run(path)
        with tempfile.TemporaryDirectory() as scratch:
            run_cell(run.cell, Path(scratch) / "run", run.suite)
            yield path, compare(path, Path(scratch) / "run")


def compare(folder_a: Path, folder_b: Path) -> list[str]:
    """How two records of one cell differ, timing aside; empty means reproduced exactly.

    Where they differ, so may package versions and machines, the usual reason: these are named too.
    RecordError if one cannot be read.
    """
    (a, updates_a), (b, updates_b) = _read(folder_a), _read(folder_b)
    found = list(_differences(_summary(a, updates_a), _summary(b, updates_b)))
    for one, other in zip(updates_a, updates_b):
        place = f"update {one.update}"
        if fields := list(_differences(_untimed(one), _untimed(other), f"{place}: ")):
            found += [*fields, f"{place} is the first of those that differ"]
            break
    found = found or list(_differences({"digest": a.digest}, {"digest": b.digest}))
    return found and [*found, *_differences(a.provenance, b.provenance, "provenance.")]


def _read(folder: Path) -> tuple[Run, list[Update]]:
    run, updates = read_run(folder), read_updates(folder)
    if reason := check_bounds(run, updates):
        raise RecordError(f"{folder}: {reason}")
    return run, updates


def _summary(run: Run, updates: list[Update]) -> dict[str, Any]:
    return {"cell": run.cell.model_dump(), "status": run.status, "updates": len(updates)}


def _untimed(update: Update) -> dict[str, Any]:
    return update.model_dump(exclude=set(TIMING_FIELDS))


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """One line per entry that differs, in the order of the entries; dictionaries entry by entry."""
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name, _ABSENT), b.get(name, _ABSENT)
        place = f"{prefix}{printable(name, 60)}"
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{place}.")
        elif left != right:
            yield f"{place}: {printable(left, 80)} against {printable(right, 80)}"
