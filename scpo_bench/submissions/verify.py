"""Checks records that others made, and packs one's own for others.

Records are untrusted input, and here nothing of them is executed.

Tiers. *consistent*: the schema holds, and every key, digest, counter and aggregate was recomputed
and agrees. *reproduced-exact*: a re-run gave the same digests (see :func:`compare`). Consistency
shows that a record was not damaged or edited afterwards; whether its runs happened, only a re-run
shows.

What is refused, before any content is looked at: links, devices, files that are no part of a
record, sizes and numbers of files that no record has, and, in archives, names that leave the
archive. Reading stops at the first such thing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import stat
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scpo_bench.leaderboard.render import plain_rows, printable
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.records.consistency import check_bounds, check_record
from scpo_bench.records.files import (
    CHECKPOINT_FILE,
    COMPRESSED_UPDATES_FILE,
    MAX_LINE_BYTES,
    RUN_FILE,
    UPDATES_FILE,
    RecordError,
    first_problem,
    read_run,
    read_updates,
    run_folders,
    write_atomically,
)
from scpo_bench.records.schema import TIMING_FIELDS, Cell, Run, Update, canonical

MANIFEST_FILE = "manifest.json"
RECORD_FILES = frozenset({RUN_FILE, UPDATES_FILE, COMPRESSED_UPDATES_FILE})
# Made from records by this package, or left by a failed run; tolerated beside one's own records,
# never read, never packed.
_OWN_OUTPUT = frozenset({".md", ".html", ".csv", ".tex", ".png", ".svg", ".pdf"})
_TRACEBACK_FILE = "traceback.txt"
# What running processes keep beside the records: locks of cells, and files about to be renamed into
# place.
_LOCKS_FOLDER, _PART_SUFFIX = ".locks", ".part"
_PACKED = (".tar.gz", ".tgz")

# Bounds on what is read at all. A run of 300 updates has some 300 kB of lines; a large suite some
# 20 MB compressed.
MAX_FILES = 100_000
MAX_DEPTH = 12
MAX_STORED_BYTES = 100_000_000
MAX_EXPANDED_BYTES = 200_000_000
MAX_MANIFEST_BYTES = 50_000_000
MAX_ARCHIVE_BYTES = 500_000_000
MAX_ARCHIVE_EXPANDED_BYTES = 2_000_000_000
_CHUNK = MAX_LINE_BYTES  # so that a line within one piece cannot be too long
_AGGREGATE_TOLERANCE = 1e-6


class Refused(RecordError):
    """Something that has no place in a record; nothing further was read.

    The message is one line naming it.
    """


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(BaseModel):
    """manifest.json of a bundle: every file with its hash, what was planned, and the table that the
    records give.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest_version: Literal[1] = 1
    suite: str
    scpo_bench: str
    """Version of this package that made the bundle."""
    files: dict[str, _File]
    planned: list[Cell]
    """The suite's cells: what has no record is missing, and shown so."""
    rows: list[dict[str, Any]]
    """The leaderboard, every column."""


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. ``problems`` empty means consistent."""

    path: Path
    runs: int
    finished: int
    sealed: bool
    """A manifest with hashes of all files was there, and checked."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def tier(self) -> str | None:
        return "consistent" if self.ok else None

    def __str__(self) -> str:
        sealed = ", every file as in the manifest" if self.sealed and self.ok else ""
        verdict = (
            f"consistent{sealed}" if self.ok else f"NOT consistent, {len(self.problems)} problems"
        )
        lines = [f"{self.path}: {self.runs} runs, {self.finished} finished: {verdict}"]
        lines += [f"  problem: {printable(line)}" for line in self.problems]
        return "\n".join([*lines, *(f"  note: {printable(line)}" for line in self.notes)])


def verify(folder: Path) -> Report:
    """Check a run folder, a results folder, or a bundle (folder or .tar.gz).

    Nothing is executed, nothing outside is touched.

    Raises :class:`Refused` (a RecordError) with one line for what must not be read, RecordError
    where there are no records.
    """
    if folder.is_file():
        with tempfile.TemporaryDirectory(prefix="scpo-bench-verify-") as temporary:
            _unpack(folder, Path(temporary))
            root = Path(temporary)
            inside = sorted(root.iterdir())
            if MANIFEST_FILE not in {p.name for p in inside} and len(inside) == 1:
                root = inside[0]
            if not (root / MANIFEST_FILE).is_file():
                raise Refused(f"{folder}: holds no {MANIFEST_FILE}, so it is no bundle")
            found = _verify_folder(root)
            problems, notes = (
                [line.replace(str(root), "") for line in lines]
                for lines in (found.problems, found.notes)
            )
            return Report(folder, found.runs, found.finished, found.sealed, problems, notes)
    if not folder.is_dir():
        raise RecordError(f"{folder}: not found")
    return _verify_folder(folder)


# The tree: what is there, before anything is opened.


def _tree(root: Path, sealed: bool) -> tuple[dict[str, int], list[str]]:
    """(relative path -> size of every file of the record, notes on what was passed over).

    Raises Refused.

    Below a folder that is no bundle itself there may be bundles: their manifests are among the
    files.
    """
    files: dict[str, int] = {}
    passed: list[str] = []
    for path, status in _entries(root):
        name = path.relative_to(root).as_posix()
        if not stat.S_ISREG(status.st_mode):
            kind = (
                "a symbolic link" if stat.S_ISLNK(status.st_mode) else "neither a file nor a folder"
            )
            raise Refused(f"{name}: {kind}; records hold plain files only")
        if path.name in RECORD_FILES or (
            path.name == MANIFEST_FILE and (path.parent == root or not sealed)
        ):
            limit = MAX_STORED_BYTES
            if path.name == RUN_FILE:
                limit = MAX_LINE_BYTES
            elif path.name == MANIFEST_FILE:
                limit = MAX_MANIFEST_BYTES
            if status.st_size > limit:
                raise Refused(
                    f"{name}: {status.st_size} bytes; no record's file is larger than {limit}"
                )
            files[name] = status.st_size
        elif not sealed and path.parent.name == _LOCKS_FOLDER:
            continue
        elif not sealed and (
            path.name in (_TRACEBACK_FILE, CHECKPOINT_FILE)
            or path.suffix in (*_OWN_OUTPUT, _PART_SUFFIX)
        ):
            passed.append(f"{name}: not part of the records, not looked at")
        elif not sealed and path.name.endswith(_PACKED):
            passed.append(f"{name}: not looked at; a packed bundle is verified by itself")
        else:
            raise Refused(
                f"{name}: no part of a record (those are {', '.join(sorted(RECORD_FILES))}, {MANIFEST_FILE})"
            )
    return files, passed


def _entries(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every entry below root that is not a folder, without following links.

    Raises Refused for too many or too deep.
    """
    number = 0
    folders = [(root, 0)]
    while folders:
        here, depth = folders.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    number += 1
                    if number > MAX_FILES:
                        raise Refused(f"{root}: more than {MAX_FILES} files")
                    if not entry.name.isprintable():
                        raise Refused(
                            f"{Path(entry.path).relative_to(root).as_posix()!r}: a name with control characters"
                        )
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(status.st_mode):
                        yield Path(entry.path), status
                    elif depth >= MAX_DEPTH:
                        raise Refused(f"{root}: folders more than {MAX_DEPTH} deep")
                    else:
                        folders.append((Path(entry.path), depth + 1))
        except OSError as error:
            raise Refused(f"{here}: cannot be read ({error.strerror})") from None


# Archives.


class _Bounded(io.RawIOBase):
    """Passes reads through and refuses to go on after ``limit`` bytes: neither a bomb nor a header
    can fill the memory.
    """

    def __init__(self, stream: Any, limit: int, name: str) -> None:
        self._stream, self._left, self._name = stream, limit, name

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(min(size, _CHUNK) if size >= 0 else _CHUNK)
        self._left -= len(data)
        if self._left < 0:
            raise Refused(f"{self._name}: expands to more than any bundle holds")
        return data

    def readable(self) -> bool:
        return True


def _unpack(archive: Path, target: Path) -> None:
    """Write the plain files of a .tar.gz below ``target``, under names checked one by one.

    Raises Refused.
    """
    if archive.stat().st_size > MAX_ARCHIVE_BYTES:
        raise Refused(f"{archive}: larger than {MAX_ARCHIVE_BYTES} bytes")
    try:
        with gzip.open(archive, "rb") as expanded:
            stream = _Bounded(expanded, MAX_ARCHIVE_EXPANDED_BYTES, archive.name)
            with tarfile.open(fileobj=stream, mode="r|", errorlevel=0) as tar:
                for number, member in enumerate(tar):
                    if number >= MAX_FILES:
                        raise Refused(f"{archive.name}: more than {MAX_FILES} files")
                    _unpack_member(archive.name, tar, member, target)
    except Refused:
        raise
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        RecursionError,
        OverflowError,
        struct.error,
    ) as error:
        raise Refused(f"{archive}: not a readable .tar.gz ({printable(error, 120)})") from None


def safe_parts(name: str) -> tuple[str, ...] | None:
    """The components of a relative path that stays below its root, or None."""
    parts = PurePosixPath(name).parts
    plain = all(
        p not in ("..", ".") and len(p) <= 255 and p.isprintable() and not set(p) & set("\\:~")
        for p in parts
    )
    return (
        parts if parts and len(parts) <= MAX_DEPTH and plain and not name.startswith("/") else None
    )


def _unpack_member(
    archive: str, tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path
) -> None:
    shown = printable(member.name, 120)
    parts = safe_parts(member.name)
    if parts is None:
        raise Refused(f"{archive}: {shown!r} is no path inside the archive")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise Refused(
            f"{archive}: {shown!r} is no plain file; a bundle holds no links, folders or devices"
        )
    if parts[-1] not in RECORD_FILES and parts[-1] != MANIFEST_FILE:
        raise Refused(f"{archive}: {shown!r} is no part of a record")
    if member.size > MAX_STORED_BYTES:
        raise Refused(
            f"{archive}: {shown!r} has {member.size} bytes; no record's file is larger than {MAX_STORED_BYTES}"
        )
    path = target.joinpath(*parts)
    source = tar.extractfile(member)
    if source is None:
        raise Refused(f"{archive}: {shown!r} cannot be read")
    path.parent.mkdir(parents=True, exist_ok=True)
    # "x": a second member of the same name must not replace the first.
    with open(path, "xb") as file:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
    if path.stat().st_size != member.size:
        raise Refused(f"{archive}: {shown!r} is cut short")


# Content.


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RecordError(f"{MANIFEST_FILE}: {first_problem(error)}") from None


def _verify_folder(root: Path) -> Report:
    sealed = (root / MANIFEST_FILE).exists() or (root / MANIFEST_FILE).is_symlink()
    files, passed = _tree(root, sealed)
    problems: list[str] = []
    notes = sorted(passed)
    inner = (
        []
        if sealed
        else _outermost(name for name in files if PurePosixPath(name).name == MANIFEST_FILE)
    )
    manifest = _read_manifest(root) if sealed else None
    if manifest is not None:
        problems += _check_files(root, manifest, files)

    within = tuple(f"{name}/" for name in inner)
    files = {name: size for name, size in files.items() if not name.startswith(within)}
    folders = [
        path
        for path in run_folders(root)
        if not f"{path.relative_to(root).as_posix()}/".startswith(within)
    ]
    held = {folder.relative_to(root).as_posix() for folder in folders}
    aside = set()
    for name in sorted(files):
        parent = PurePosixPath(name).parent
        if name == MANIFEST_FILE or parent.as_posix() in held:
            continue
        if not sealed and "~" in parent.name:
            aside.add(parent.as_posix())
        else:
            problems.append(f"{name}: belongs to no run; its folder has no {RUN_FILE}")
    notes += [f"{name}: set aside, no part of the results, not looked at" for name in sorted(aside)]
    if not folders and not inner:
        raise RecordError(f"{root}: holds no records (no {RUN_FILE})")

    seen: dict[tuple[str, str], str] = {}
    finished = 0
    for folder in folders:
        name = folder.relative_to(root).as_posix()
        run, found, remarks = _verify_run(folder)
        place = "" if name == "." else f"{name}: "
        problems += [f"{place}{line}" for line in found]
        notes += [f"{place}{line}" for line in remarks]
        if run is None:
            continue
        finished += run.status == "finished"
        first = seen.setdefault((run.suite, run.key), name)
        if first != name:
            problems.append(f"{name}: the same run as {first}")
        if manifest is not None and run.suite != manifest.suite:
            problems.append(f"{name}: of suite {run.suite!r}; the manifest says {manifest.suite!r}")
    if manifest is not None and not problems:
        problems += _check_aggregates(root, manifest)
    runs = len(folders)
    for name in inner:
        found_inside = _verify_bundle_inside(root, name)
        runs, finished = runs + found_inside.runs, finished + found_inside.finished
        problems += [f"{name}: {line}" for line in found_inside.problems]
        if found_inside.ok:
            notes.append(
                f"{name}: a bundle of {found_inside.runs} runs, every file as in its manifest"
            )
        notes += [f"{name}: {line}" for line in found_inside.notes]
    return Report(root, runs, finished, sealed, problems, notes)


def _outermost(manifests: Iterable[str]) -> list[str]:
    """Folders of these manifests, without those inside of others: within a bundle, a second
    manifest is refused.
    """
    found: list[str] = []
    for folder in sorted(PurePosixPath(name).parent.as_posix() for name in manifests):
        if not any(f"{folder}/".startswith(f"{outer}/") for outer in found):
            found.append(folder)
    return found


def _verify_bundle_inside(root: Path, name: str) -> Report:
    try:
        return _verify_folder(root / name)
    except RecordError as error:
        raise Refused(f"bundle {name}: {error}") from None


def _check_files(root: Path, manifest: Manifest, files: dict[str, int]) -> Iterator[str]:
    present = set(files) - {MANIFEST_FILE}
    for name in sorted(present - set(manifest.files)):
        yield f"{name}: not in the manifest"
    for name, entry in sorted(manifest.files.items()):
        if name not in present:
            yield f"{printable(name, 200)}: in the manifest, but not there"
        elif files[name] != entry.bytes:
            yield f"{name}: {files[name]} bytes, {entry.bytes} in the manifest"
        elif _sha256(root / name) != entry.sha256:
            yield f"{name}: other content than the manifest's hash"


def _scan_updates(path: Path) -> tuple[str, bool]:
    """(sha256 of the expanded lines, whether they end in a newline), reading in pieces.

    Raises Refused beyond the bounds.
    """
    digest, total, line, last = hashlib.sha256(), 0, 0, b"\n"
    try:
        opened = gzip.open(path, "rb") if path.name == COMPRESSED_UPDATES_FILE else open(path, "rb")
        with opened as file:
            while chunk := file.read(_CHUNK):
                total += len(chunk)
                if total > MAX_EXPANDED_BYTES:
                    raise Refused(
                        f"{path}: more than {MAX_EXPANDED_BYTES} bytes of updates; no record holds so much"
                    )
                first = chunk.find(b"\n")
                line += len(chunk) if first < 0 else first
                if line > MAX_LINE_BYTES:
                    raise Refused(
                        f"{path}: a line of more than {MAX_LINE_BYTES} bytes; no record holds such"
                    )
                if first >= 0:
                    line = len(chunk) - chunk.rfind(b"\n") - 1
                digest.update(chunk)
                last = chunk[-1:]
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{path.name}: cannot be read ({printable(error, 120)})") from None
    return digest.hexdigest(), last == b"\n"


def _verify_run(folder: Path) -> tuple[Run | None, list[str], list[str]]:
    """(run, problems, notes) of one run folder, whose files :func:`_tree` has found acceptable."""
    notes: list[str] = []
    try:
        run = read_run(folder)
        if reason := check_bounds(run, []):
            return None, [reason], notes
        if run.status != "finished":
            notes.append(f"{run.status}{f' ({printable(run.error, 200)})' if run.error else ''}")
        forms = [
            name for name in (UPDATES_FILE, COMPRESSED_UPDATES_FILE) if (folder / name).exists()
        ]
        if not forms:
            unstarted = run.status != "finished" and not run.updates
            return run, [] if unstarted else ["updates: no file of them"], notes
        if len(forms) == 2:
            return (
                run,
                [f"{UPDATES_FILE} and {COMPRESSED_UPDATES_FILE}: one record has one of them"],
                notes,
            )
        stored, whole = _scan_updates(folder / forms[0])
        updates = read_updates(folder)
    except Refused:
        raise
    except RecordError as error:
        return None, [str(error).replace(f"{folder}{os.sep}", "")], notes
    if reason := check_bounds(run, updates):
        return run, [reason], notes
    problems = check_record(run, updates)
    if not whole:
        if run.status == "finished":
            problems.append("updates: bytes after the last whole line")
        else:
            notes.append("the last line is cut short: the update in flight when the run was killed")
    elif stored != _hash_of_lines(updates):
        problems.append(
            "updates: lines other than this package writes (repeated or reordered fields, spaces, number formats)"
        )
    return run, problems, notes


def _hash_of_lines(updates: Sequence[Update]) -> str:
    digest = hashlib.sha256()
    for update in updates:
        digest.update(canonical(update.model_dump(mode="json")) + b"\n")
    return digest.hexdigest()


def _check_aggregates(root: Path, manifest: Manifest) -> Iterator[str]:
    rows = plain_rows(leaderboard(load(root, manifest.suite, manifest.planned)))
    if len(rows) != len(manifest.rows):
        yield f"leaderboard: the records give {len(rows)} rows, the manifest has {len(manifest.rows)}"
        return
    for number, (ours, theirs) in enumerate(zip(rows, manifest.rows)):
        for name in sorted(set(ours) | set(theirs)):
            mine, stated = ours.get(name), theirs.get(name)
            if not _agree(mine, stated):
                place = f"leaderboard: row {number} ({ours['agent']} on {ours['task']})"
                yield (
                    f"{place}: {printable(name, 60)}: {mine!r} from the records, {printable(repr(stated), 80)} in the manifest"
                )


def _agree(mine: Any, stated: Any) -> bool:
    """Equal; for fractions up to rounding, which differs between versions of numerical libraries.
    """
    numbers = (
        isinstance(mine, float) and isinstance(stated, int | float) and not isinstance(stated, bool)
    )
    if numbers:
        try:
            return math.isclose(mine, stated, rel_tol=_AGGREGATE_TOLERANCE, abs_tol=1e-12)
        except OverflowError:
            return False
    return bool(type(mine) is type(stated) and mine == stated)


# Packing one's own.


def bundle(results: Path, suite: str, output: Path, planned: Sequence[Cell] = ()) -> Path:
    """Pack a suite's records for others: a .tar.gz (if ``output`` is named so) or a new folder.

    The same records give the same bytes.

    It holds the records, and a manifest with their hashes, the planned cells and the leaderboard;
    no code, no pickles, no tracebacks. Raises RecordError where there are no records, where one is
    not consistent, or where ``output`` exists.
    """
    root = results / suite
    if not root.is_dir():
        raise RecordError(f"{root}: not found; run the suite first")
    if output.exists():
        raise RecordError(f"{output}: exists already; name a new file or folder")
    report = _verify_folder(root)
    if not report.ok:
        raise RecordError(f"{root}: not consistent: {report.problems[0]}")
    contents: dict[str, bytes] = {}
    for folder in run_folders(root):
        run = read_run(folder)
        if run.suite != suite:
            raise RecordError(f"{folder}: a record of suite {run.suite!r}, not {suite!r}")
        for name in sorted(RECORD_FILES):
            path = folder / name
            if path.is_file():
                contents[path.relative_to(root).as_posix()] = path.read_bytes()
    for name in contents:
        if safe_parts(f"{suite}/{name}") is None:
            raise RecordError(f"{root / name}: a name that bundles cannot hold")
    manifest = Manifest(
        suite=suite,
        scpo_bench=_own_version(),
        files={
            name: _File(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
            for name, data in contents.items()
        },
        planned=list(planned),
        rows=plain_rows(leaderboard(load(results, suite, planned))),
    )
    contents[MANIFEST_FILE] = canonical(manifest.model_dump(mode="json")) + b"\n"
    if output.name.endswith(_PACKED):
        write_atomically(output, _archive(contents, suite))
    else:
        for name, data in contents.items():
            path = output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return output


def _own_version() -> str:
    try:
        return version("scpo-bench")
    except PackageNotFoundError:
        return "unknown"


def _archive(contents: dict[str, bytes], top: str) -> bytes:
    """A .tar.gz of these files in one folder, without times, owners or anything else that differs
    from one packing to the next.
    """
    expanded: BinaryIO = io.BytesIO()
    with tarfile.open(fileobj=expanded, mode="w", format=tarfile.PAX_FORMAT) as tar:
        # The manifest first: whoever reads on learns what is to come.
        for name in sorted(contents, key=lambda n: (n != MANIFEST_FILE, n)):
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size, member.mode, member.mtime = len(contents[name]), 0o644, 0
            tar.addfile(member, io.BytesIO(contents[name]))
    return gzip.compress(expanded.getvalue(), compresslevel=9, mtime=0)  # type: ignore[attr-defined]


# Re-runs.


def compare(run_a_folder: Path, run_b_folder: Path) -> list[str]:
    """How two records of one cell differ, timing aside; empty means reproduced exactly.

    RecordError if one cannot be read.

    Where they differ, differing package versions and machines are named too: they are the usual
    reason.
    """
    a, b = read_run(run_a_folder), read_run(run_b_folder)
    for folder, run in ((run_a_folder, a), (run_b_folder, b)):
        if reason := check_bounds(run, []):
            raise RecordError(f"{folder}: {reason}")
    differences = [
        (
            f"cell.{name}: {printable(repr(getattr(a.cell, name)), 80)} against {printable(repr(getattr(b.cell, name)), 80)}"
        )
        for name in Cell.model_fields
        if getattr(a.cell, name) != getattr(b.cell, name)
    ]
    if a.status != b.status:
        differences.append(f"status: {a.status} against {b.status}")
    updates_a, updates_b = read_updates(run_a_folder), read_updates(run_b_folder)
    if len(updates_a) != len(updates_b):
        differences.append(f"updates: {len(updates_a)} against {len(updates_b)}")
    for one, other in zip(updates_a, updates_b):
        fields = _differing_fields(one, other)
        if fields:
            differences += [f"update {one.update}: {line}" for line in fields]
            differences.append(f"update {one.update} is the first of those that differ")
            break
    if differences:
        differences += [
            f"provenance.{line}" for line in _provenance_differences(a.provenance, b.provenance)
        ]
    return differences


def _differing_fields(one: Update, other: Update) -> list[str]:
    found = []
    for name in Update.model_fields:
        left, right = getattr(one, name), getattr(other, name)
        if name in TIMING_FIELDS or left == right:
            continue
        if name == "diagnostics":
            keys = sorted(
                k
                for k in left.keys() | right.keys()
                if k not in left or k not in right or left[k] != right[k]
            )
            found += [
                f"diagnostics.{printable(k, 60)}: {left.get(k)!r} against {right.get(k)!r}"
                for k in keys[:5]
            ]
        else:
            found.append(f"{name}: {left!r} against {right!r}")
    return found


def _provenance_differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(a.keys() | b.keys()):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict) and not prefix:
            found += _provenance_differences(left, right, f"{name}.")
        elif left != right:
            found.append(
                f"{prefix}{printable(name, 60)}: {printable(left, 80)} against {printable(right, 80)}"
            )
    return found
