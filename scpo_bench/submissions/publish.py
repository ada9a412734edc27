"""Adds the records of a bundle to a results folder: all of them, or none.

What may be added: consistent records of agents that are not this package's, under the conditions
that the suite plans, with all of its seeds. Nothing that is there is replaced, and nothing is run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scpo_bench.errors import UserError, nearest, printable
from scpo_bench.leaderboard.escaping import shell_command
from scpo_bench.records.comparable import Plan
from scpo_bench.records.files import RecordError, read_run, run_folders
from scpo_bench.records.plain_files import (
    check_folder,
    check_writable,
    create,
    make_folder,
    read_file,
    write_all,
)
from scpo_bench.records.schema import Cell, Run
from scpo_bench.submissions.contents import (
    MANIFEST_FILE,
    MAX_BYTES,
    RECORD_FILES,
    Refused,
    list_contents,
    read_manifest,
    unpack,
)
from scpo_bench.submissions.verify import Report, verify
from scpo_bench.suites.cells import cells, run_folder
from scpo_bench.suites.registry import built_in
from scpo_bench.suites.schema import Benchmarks


@dataclass(frozen=True)
class Publication:
    """What :func:`publish` found and did. With problems or refusals, nothing was added."""

    report: Report
    """Of the verification of the bundle."""
    refusals: list[str] = field(default_factory=list)
    """Why consistent records cannot be added, a line each."""
    added: list[Path] = field(default_factory=list)
    """Their run folders in the results."""
    present: list[Path] = field(default_factory=list)
    """Run folders that held the same records already."""

    @property
    def ok(self) -> bool:
        return self.report.ok and not self.refusals


def publish(bundle: Path, results: Path, benchmarks: Benchmarks) -> Publication:
    """Add the records of a bundle (folder or .tar.gz) to ``results``, or say why not.

    Everything is checked before the first record is written. Each record appears whole; after a
    kill, the same call adds those that are missing. Raises RecordError for what must not be read
    and where a folder of ``results`` is a link, UserError for a suite that ``benchmarks`` does not
    have, OSError where ``results`` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="scpo-bench-publish-") as temporary:
        # A copy, so that what is added is what was checked.
        root = _copy(bundle, Path(temporary))
        report = replace(verify(root), path=bundle)
        if not report.ok:
            return Publication(report)
        suite = read_manifest(root).suite
        if suite not in benchmarks.suites:
            hint = nearest(suite, benchmarks.suites)
            raise UserError(f"{bundle}: unknown suite '{printable(suite, 80)}'{hint}")
        planned = cells(benchmarks.suites[suite])
        runs = {folder: read_run(folder) for folder in run_folders(root)}
        places = {folder: run_folder(results, suite, run.cell) for folder, run in runs.items()}
        there = {folder: _recorded(results, place) for folder, place in places.items()}
        new = [folder for folder, run in runs.items() if not _same(run, there[folder])]
        refusals = [
            *_unplanned(runs.values(), planned),
            *_missing_seeds(runs, new, planned),
            *_taken(runs, places, there, new),
        ]
        if refusals:
            return Publication(report, list(dict.fromkeys(refusals)))
        if new:
            check_writable("--results", results)
        for folder in new:
            _add(folder, results, places[folder])
    added = [places[folder] for folder in new]
    return Publication(report, [], added, [p for f, p in places.items() if f not in new])


def lines(publication: Publication) -> Iterator[str]:
    """A publication as text, with what to do next."""
    report, added = publication.report, publication.added
    yield str(report)
    if not publication.ok:
        yield from (f"  refused: {printable(line)}" for line in publication.refusals)
        yield "nothing was added"
        return
    yield from (f"added {place}" for place in added)
    present = len(publication.present)
    yield f"{len(added)} records added, {present} already there; tier: {report.tier}"
    for agent in sorted({place.parent for place in added}):
        yield f"to repeat them: {shell_command(['verify', str(agent), '--rerun'], {})}"
    if added:
        yield "next: make leaderboard"


def _copy(bundle: Path, target: Path) -> Path:
    """The bundle, in or below ``target``. RecordError for what is no bundle."""
    if not bundle.exists():
        raise RecordError(f"{bundle}: not found")
    root = bundle
    if not bundle.is_dir():
        unpack(bundle, target)
        inside = list(target.iterdir())
        root = inside[0] if len(inside) == 1 else target
    if not (root / MANIFEST_FILE).is_file():
        raise Refused(f"{bundle}: has no {MANIFEST_FILE}, so it is not a bundle")
    if root != bundle:
        return root
    for name in list_contents(bundle).files:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        _write(copy, read_file(bundle / name, MAX_BYTES[copy.name]))
    return target


# Checks. Each yields refusals.


def _unplanned(runs: Iterable[Run], planned: Sequence[Cell]) -> Iterator[str]:
    plan = Plan.of(planned)
    for run in runs:
        if reason := plan.difference(run.cell):
            yield f"{_label(run.cell)}: {reason}"


def _missing_seeds(
    runs: Mapping[Path, Run], new: Collection[Path], planned: Sequence[Cell]
) -> Iterator[str]:
    """Of each set-up with a new record: a choice among the seeds would be a choice of results."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for cell in planned:
        seeds[cell.task].add(cell.seed)
    set_ups = {folder: run.cell.model_copy(update={"seed": 0}) for folder, run in runs.items()}
    for key in dict.fromkeys(set_ups[folder].key() for folder in new):
        own = [folder for folder, cell in set_ups.items() if cell.key() == key]
        finished = {runs[f].cell.seed for f in own if runs[f].status == "finished"}
        cell = set_ups[own[0]]
        if missing := sorted(seeds[cell.task] - finished):
            named = ", ".join(map(str, missing))
            yield f"{cell.agent} on {cell.task}: missing or not finished: seeds {named}"


def _taken(
    runs: Mapping[Path, Run],
    places: Mapping[Path, Path],
    there: Mapping[Path, Run | str | None],
    new: Iterable[Path],
) -> Iterator[str]:
    """New records of this package's agents, and those whose place is another record's."""
    first: dict[Path, Path] = {}
    for folder in new:
        run, place, other = runs[folder], places[folder], there[folder]
        if other is not None:
            reason = other if isinstance(other, str) else "another record is there"
            yield f"{_label(run.cell)}: {place}: {reason}; nothing is replaced"
        elif first.setdefault(place, folder) != folder:
            yield f"{_label(run.cell)}: twice in the bundle"
        elif _is_ours(run.cell.agent):
            options = {"agents": run.cell.agent, "tasks": run.cell.task}
            command = shell_command(["run", run.suite], options)
            yield f"{run.cell.agent} is an agent of this package; run it yourself: {command}"


def _label(cell: Cell) -> str:
    return f"{cell.agent} on {cell.task}, seed {cell.seed}"


def _is_ours(agent: str) -> bool:
    with contextlib.suppress(UserError):  # an agent that is not known here
        return built_in(agent)
    return False


def _recorded(results: Path, place: Path) -> Run | str | None:
    """The record that is at ``place``, why it cannot be read, or None for nothing.

    RecordError where a folder on the way is a link or no folder.
    """
    folder = results
    try:
        for part in place.relative_to(results).parts:
            folder = folder / part
            check_folder(folder)
    except FileNotFoundError:
        return None
    try:
        return read_run(place)
    except RecordError as error:
        return f"cannot be read ({error})"


def _same(run: Run, there: Run | str | None) -> bool:
    return isinstance(there, Run) and (run.key, run.digest) == (there.key, there.digest)


# Writing.


def _add(record: Path, results: Path, place: Path) -> None:
    """Copy a record to ``place``, where it appears whole. OSError if something is there."""
    make_folder(results, place.parent)
    # Folders with a "~" are no part of the records, so what a kill leaves is not read as one.
    temporary = place.with_name(f"{place.name}~{secrets.token_hex(8)}")
    temporary.mkdir()
    try:
        for name in RECORD_FILES:
            if (record / name).exists():
                _write(temporary / name, read_file(record / name, MAX_BYTES[name]))
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with create(path) as file:
        write_all(file, data)
        os.fsync(file.fileno())
