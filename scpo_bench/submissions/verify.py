"""Checks records that others made.

Records are untrusted input; nothing in them is executed.

Tiers. *consistent*: the schema holds, and every key, digest, counter and aggregate was recomputed
and agrees. *reproduced-exact*: a re-run gave the same digests (see
:mod:`scpo_bench.submissions.reproduce`). Consistency shows that a record was not damaged or edited
afterwards; only a re-run shows that its runs took place.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scpo_bench.leaderboard.render import plain_rows, printable
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.records.comparable import Plan
from scpo_bench.records.consistency import check_bounds, check_record, misplaced
from scpo_bench.records.files import (
    COMPRESSED_UPDATES_FILE,
    MAX_LINE_BYTES,
    RUN_FILE,
    UPDATES_FILE,
    RecordError,
    open_updates,
    read_run,
    read_updates,
)
from scpo_bench.records.plain_files import open_to_read
from scpo_bench.records.schema import Cell, Run, Update, canonical
from scpo_bench.submissions.contents import (
    MANIFEST_FILE,
    Manifest,
    Refused,
    list_contents,
    read_manifest,
    unpack,
)
from scpo_bench.suites.registry import limits_of

_AGGREGATE_TOLERANCE = 1e-6
Planner = Callable[[str], Sequence[Cell] | None]


class Finding(NamedTuple):
    line: str
    note: bool = False
    """Worth knowing, but does not make the records inconsistent."""

    def at(self, place: str) -> Finding:
        return self if place == "." else self._replace(line=f"{place}: {self.line}")


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. No problems means consistent."""

    path: Path
    runs: int
    finished: int
    sealed: bool
    """There was a manifest with the hashes of all files, and they were checked."""
    findings: list[Finding]

    @property
    def problems(self) -> list[str]:
        return [finding.line for finding in self.findings if not finding.note]

    @property
    def notes(self) -> list[str]:
        return [finding.line for finding in self.findings if finding.note]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def tier(self) -> str | None:
        return "consistent" if self.ok else None

    def __str__(self) -> str:
        sealed = ", every file as in the manifest" if self.sealed else ""
        number = len(self.problems)
        verdict = f"NOT consistent, {number} problems" if number else f"consistent{sealed}"
        lines = [f"{self.path}: {self.runs} runs, {self.finished} finished: {verdict}"]
        lines += [f"  problem: {printable(line)}" for line in self.problems]
        return "\n".join([*lines, *(f"  note: {printable(line)}" for line in self.notes)])


def verify(path: Path, plan_of: Planner = lambda suite: None) -> Report:
    """Check a run folder, a results folder, or a bundle (folder or .tar.gz).

    plan_of: suite -> its planned cells, None for one that is not known here. Records that its
    tables leave out are noted; they may be consistent all the same.

    Raises :class:`~scpo_bench.submissions.contents.Refused` (a RecordError) for what must not be
    read, RecordError where there are no records.
    """
    with _folder_of(path) as root:
        return _verify_folder(root, path, plan_of)


@contextmanager
def _folder_of(path: Path) -> Iterator[Path]:
    """``path``, or where it is a file, a temporary folder with the bundle packed in it."""
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise RecordError(f"{path}: not found")
    with tempfile.TemporaryDirectory(prefix="scpo-bench-verify-") as temporary:
        unpack(path, Path(temporary))
        inside = list(Path(temporary).iterdir())
        root = inside[0] if len(inside) == 1 else Path(temporary)
        if not (root / MANIFEST_FILE).is_file():
            raise Refused(f"{path}: has no {MANIFEST_FILE}, so it is not a bundle")
        yield root


def _verify_folder(root: Path, shown: Path, plan_of: Planner) -> Report:
    """shown: the path to name in messages; ``root`` may be a temporary folder."""
    files, bundles, ignored = list_contents(root)
    sealed = MANIFEST_FILE in files
    paths = sorted(map(PurePosixPath, files))
    places = [path.parent.as_posix() for path in paths if path.name == RUN_FILE]
    if not places and not bundles:
        raise RecordError(f"{shown}: contains no records (no {RUN_FILE})")
    findings = [Finding(line, note=True) for line in ignored]
    findings += _check_strays(files, set(places))
    runs: dict[str, Run] = {}
    for place in places:
        folder = root / place
        try:
            runs[place] = _read_bounded(folder)
            findings += [finding.at(place) for finding in _check_record(folder, runs[place])]
        except RecordError as error:
            findings.append(Finding(str(error).replace(f"{folder}{os.sep}", "")).at(place))
        else:
            if reason := misplaced(runs[place], PurePosixPath(place)):
                findings.append(Finding(reason).at(place))
    findings += _check_repeats(runs)
    findings += _check_plans(runs, plan_of)
    if sealed:
        manifest = read_manifest(root)
        findings += [*_check_hashes(root, files, manifest), *_check_suite(runs, manifest)]
        if all(finding.note for finding in findings):  # else it differs for a reason already named
            findings += _check_leaderboard(root, manifest)
    number, finished = len(places), sum(run.status == "finished" for run in runs.values())
    for name in bundles:
        inner = _verify_inner_bundle(root, name, plan_of)
        number, finished = number + inner.runs, finished + inner.finished
        findings += [finding.at(name) for finding in inner.findings]
    return Report(shown, number, finished, sealed, findings)


def _verify_inner_bundle(root: Path, name: str, plan_of: Planner) -> Report:
    try:
        report = _verify_folder(root / name, Path(name), plan_of)
    except RecordError as error:
        raise Refused(f"bundle {name}: {error}") from None
    if report.ok:
        line = f"a bundle of {report.runs} runs, every file as in its manifest"
        report.findings.append(Finding(line, note=True))
    return report


# Checks. Each yields what it finds.


def _check_strays(files: Iterable[str], places: set[str]) -> Iterator[Finding]:
    for name in sorted(files):
        if name != MANIFEST_FILE and PurePosixPath(name).parent.as_posix() not in places:
            yield Finding(f"{name}: belongs to no run; its folder has no {RUN_FILE}")


def _read_bounded(folder: Path) -> Run:
    run = read_run(folder)
    if reason := check_bounds(run, []):
        raise RecordError(reason)
    return run


def _check_record(folder: Path, run: Run) -> Iterator[Finding]:
    if run.status != "finished":
        error = f" ({printable(run.error, 200)})" if run.error else ""
        yield Finding(f"{run.status}{error}", note=True)
    forms = [f for f in (UPDATES_FILE, COMPRESSED_UPDATES_FILE) if (folder / f).exists()]
    if len(forms) == 2:
        yield Finding(f"{UPDATES_FILE} and {COMPRESSED_UPDATES_FILE}: a record has one of them")
    elif not forms and (run.status == "finished" or run.updates):
        yield Finding("updates: there is no file of them")
    if len(forms) != 1:
        return
    updates = read_updates(folder)
    if reason := check_bounds(run, updates):
        yield Finding(reason)
        return
    yield from map(Finding, check_record(run, updates, limits_of(run.cell)))
    yield from _check_lines(folder / forms[0], run, updates)


def _check_lines(path: Path, run: Run, updates: list[Update]) -> Iterator[Finding]:
    """The stored lines are those that this package writes, and nothing follows them."""
    with open_updates(path) as file:
        for update in updates:
            if file.readline(MAX_LINE_BYTES) != canonical(update.model_dump(mode="json")) + b"\n":
                form = "repeated or reordered fields, spaces, number formats"
                yield Finding(f"update {update.update}: not as this package writes it ({form})")
                return
        if not file.read(1):
            return
    if run.status == "finished":
        yield Finding("updates: bytes after the last whole line")
    else:
        line = "the last line is incomplete: the run was killed while it was written"
        yield Finding(line, note=True)


def _check_repeats(runs: dict[str, Run]) -> Iterator[Finding]:
    """A copied run would count twice in every average."""
    seen: dict[tuple[str, str], str] = {}
    same_updates: dict[tuple[str, str], tuple[str, int]] = {}
    for place, run in runs.items():
        first = seen.setdefault((run.suite, run.key), place)
        if first != place:
            yield Finding(f"{place}: the same run as {first}")
        elif run.digest is not None:
            # Two seeds never give the same numbers; two configurations may.
            first, seed = same_updates.setdefault(
                (run.cell.task, run.digest), (place, run.cell.seed)
            )
            if seed != run.cell.seed:
                yield Finding(f"{place}: the same updates as {first}")


def _check_plans(runs: dict[str, Run], plan_of: Planner) -> Iterator[Finding]:
    """Which records the tables of their suites leave out."""
    plans: dict[str, Plan | None] = {}
    for place, run in runs.items():
        if run.suite not in plans:
            planned = plan_of(run.suite)
            plans[run.suite] = Plan.of(planned) if planned else None
        plan = plans[run.suite]
        if plan is not None and (reason := plan.difference(run.cell)) is not None:
            yield Finding(f"not comparable in suite {run.suite!r}: {reason}", note=True).at(place)


def _check_hashes(root: Path, files: dict[str, int], manifest: Manifest) -> Iterator[Finding]:
    for name in sorted(files.keys() - manifest.files.keys() - {MANIFEST_FILE}):
        yield Finding(f"{name}: not in the manifest")
    for name, entry in sorted(manifest.files.items()):
        if name not in files:
            yield Finding(f"{printable(name, 200)}: in the manifest, but missing")
        elif files[name] != entry.bytes:
            yield Finding(f"{name}: {files[name]} bytes, {entry.bytes} in the manifest")
        else:
            with open_to_read(root / name) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    yield Finding(f"{name}: its hash is not the one in the manifest")


def _check_suite(runs: dict[str, Run], manifest: Manifest) -> Iterator[Finding]:
    for place, run in runs.items():
        if run.suite != manifest.suite:
            yield Finding(f"of suite {run.suite!r}, the manifest of {manifest.suite!r}").at(place)


def _check_leaderboard(root: Path, manifest: Manifest) -> Iterator[Finding]:
    rows = plain_rows(leaderboard(load(root, manifest.suite, manifest.planned, claims=False)))
    if len(rows) != len(manifest.rows):
        line = f"the records give {len(rows)} rows, the manifest has {len(manifest.rows)}"
        yield Finding(f"leaderboard: {line}")
        return
    for number, (ours, theirs) in enumerate(zip(rows, manifest.rows)):
        place = f"leaderboard: row {number} ({ours['agent']} on {ours['task']})"
        for column in sorted(ours.keys() | theirs.keys()):
            mine, stated = ours.get(column), theirs.get(column)
            if not _agree(mine, stated):
                values = f"{mine!r} from the records, {printable(repr(stated), 80)} in the manifest"
                yield Finding(f"{place}: {printable(column, 60)}: {values}")


def _agree(mine: Any, stated: Any) -> bool:
    """Equal; fractions up to rounding, which differs between versions of numerical libraries."""
    if isinstance(mine, float) and type(stated) in (int, float):
        try:
            return math.isclose(mine, stated, rel_tol=_AGGREGATE_TOLERANCE, abs_tol=1e-12)
        except OverflowError:  # an integer with hundreds of digits
            return False
    return type(mine) is type(stated) and bool(mine == stated)
