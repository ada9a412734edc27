"""Re-runs recorded cells and compares the records."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from scpo_bench.errors import printable
from scpo_bench.records.consistency import check_bounds
from scpo_bench.records.files import (
    RecordError,
    read_run,
    read_updates,
    run_folders,
    updates_file,
)
from scpo_bench.records.schema import Cell, Run, Update
from scpo_bench.runs.harness import run_cell
from scpo_bench.runs.trust import check_trust
from scpo_bench.submissions.tiers import Comparison, Ends, Tier, compare
from scpo_bench.suites.registry import agent_source

SHOWN_DIFFERENCES = 6


def reproduce(
    folder: Path,
    sample: int | None = None,
    trust_code: bool = False,
    announce: Callable[[str], object] = print,
) -> Iterator[tuple[Path, Comparison]]:
    """Re-run the finished runs below ``folder``, or ``sample`` of them drawn at random.

    Yields (run folder, comparison). RecordError if there is nothing to run, or ``folder`` is a
    packed bundle. If any finished run, drawn or not, names code that is not this package's, it is
    announced with ``trust_code``; without, a UserError names it, and nothing is run.
    """
    runs = {path: read_run(path) for path in run_folders(folder)}
    finished = {path: run for path, run in runs.items() if run.status == "finished"}
    if not finished:
        raise RecordError(f"{folder}: no finished runs to re-run (unpack a packed bundle first)")
    check_trust((run.cell for run in finished.values()), trust_code, announce)
    chosen = list(finished)
    if sample is not None and sample < len(chosen):
        chosen = sorted(random.sample(chosen, sample))
    for path in chosen:
        run = finished[path]
        setup = [other for other, one in finished.items() if _setup(one) == _setup(run)]
        with tempfile.TemporaryDirectory() as scratch:
            run_cell(_runnable(run.cell), Path(scratch) / "run", run.suite)
            yield path, compare_folders(path, Path(scratch) / "run", setup)


def compare_folders(recorded: Path, rerun: Path, setup: list[Path] | None = None) -> Comparison:
    """How two records of one cell differ. RecordError if one cannot be read.

    setup: folders of all recorded seeds of the cell.
    """
    one, other = _read(recorded), _read(rerun, may_have_failed=True)
    comparison = compare(one, other)
    if comparison.tier is Tier.DIFFERENT and setup:
        ends = Ends.of([_read(path)[1] for path in setup])
        comparison = compare(one, other, ends)
    return comparison


def lines(path: Path, comparison: Comparison) -> list[str]:
    """A comparison as text: the tier, all differences of provenance, the first of the numbers."""
    tier, provenance, found = comparison
    head = printable(f"{path}: {tier}")
    if tier is Tier.EXACT:
        return [head]
    if tier is Tier.DIFFERENT and not provenance:
        provenance = ["provenance: the same"]
    shown = found[:SHOWN_DIFFERENCES]
    # The last line says why the tier is no better.
    if len(found) > len(shown):
        shown = [*shown, f"... {len(found) - len(shown) - 1} more", found[-1]]
    return [head, *(f"  {printable(line)}" for line in [*provenance, *shown])]


def _setup(run: Run) -> tuple[str, str]:
    return run.suite, run.cell.model_copy(update={"seed": 0}).key()


def _runnable(cell: Cell) -> Cell:
    """The cell with its agent as it is here: whether that is the recorded one was announced."""
    if cell.agent_source is None:
        return cell
    return cell.model_copy(update={"agent_source": agent_source(cell.agent)})


def _read(folder: Path, may_have_failed: bool = False) -> tuple[Run, list[Update]]:
    run = read_run(folder)
    without = may_have_failed and not updates_file(folder).exists()
    updates = [] if without else read_updates(folder)
    if reason := check_bounds(run, updates):
        raise RecordError(f"{folder}: {reason}")
    return run, updates
