"""The files of a run folder: run.json (what was asked) and updates.jsonl (one line per update).

Lines are appended and flushed as updates happen, so a killed run loses at most the update in
flight. A finished run's lines are compressed (updates.jsonl.gz); everything else is written by
atomic replace. Reading never executes anything: JSON only, sizes bounded, every field checked.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from scpo_bench.errors import UserError
from scpo_bench.records.schema import Run, Update, canonical

# Bounds on untrusted input: far above what a real run writes.
MAX_LINE_BYTES = 1_000_000
MAX_UPDATES = 1_000_000
MAX_FILE_BYTES = 500_000_000

RUN_FILE, UPDATES_FILE, COMPRESSED_UPDATES_FILE = "run.json", "updates.jsonl", "updates.jsonl.gz"
CHECKPOINT_FILE = "checkpoint"  # of a run in progress; no part of its record


class RecordError(UserError):
    """A record's file is missing, damaged or not a record.

    The message names the file, the line and the field.
    """


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, or leave it as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_run(folder: Path, run: Run) -> None:
    write_atomically(
        folder / RUN_FILE,
        json.dumps(run.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n",
    )


@dataclass(frozen=True)
class LogMark:
    """A place in updates.jsonl: how many bytes stand before it, and their SHA-256."""

    bytes: int
    sha256: str


class UpdateLog:
    """Appends updates to updates.jsonl, each at once, and compresses the file at the end.

    mark: go on from there, dropping what stands behind it. RecordError if the file is not what it
    was at the mark.
    """

    def __init__(self, folder: Path, mark: LogMark | None = None) -> None:
        self._folder = folder
        kept = b"" if mark is None else _stored_lines(folder)[: mark.bytes]
        self._sha256 = hashlib.sha256(kept)
        self._bytes = len(kept)
        if mark is not None and self.place() != mark:
            raise RecordError(
                f"{folder / UPDATES_FILE}: is not what it was when the checkpoint was written"
            )
        if mark is not None:
            write_atomically(folder / UPDATES_FILE, kept)
        (folder / COMPRESSED_UPDATES_FILE).unlink(missing_ok=True)
        # Unbuffered: what is written is written, and on a full disk nothing is left for close() to
        # fail on.
        self._file = open(folder / UPDATES_FILE, "ab" if mark else "wb", buffering=0)

    def append(self, update: Update) -> None:
        line = canonical(update.model_dump(mode="json")) + b"\n"
        left = line
        while left:  # a disk that is nearly full takes a part, and says so at the next try
            left = left[self._file.write(left) :]
        self._sha256.update(line)
        self._bytes += len(line)

    def place(self) -> LogMark:
        return LogMark(self._bytes, self._sha256.hexdigest())

    def mark(self) -> LogMark:
        """The end of the log, as a place that is on the disk even if the power fails now."""
        os.fsync(self._file.fileno())
        return self.place()

    def close(self) -> None:
        self._file.close()

    def compress(self) -> None:
        """Close, and keep the lines as .gz (no time stamp inside: same lines, same bytes)."""
        self.close()
        path = self._folder / UPDATES_FILE
        write_atomically(
            self._folder / COMPRESSED_UPDATES_FILE,
            gzip.compress(path.read_bytes(), compresslevel=9, mtime=0),
        )
        path.unlink()


def _stored_lines(folder: Path) -> bytes:
    """The updates file as it is, whichever form it has; empty if there is none."""
    try:
        if (folder / COMPRESSED_UPDATES_FILE).exists():
            return gzip.decompress((folder / COMPRESSED_UPDATES_FILE).read_bytes())
        return (folder / UPDATES_FILE).read_bytes()
    except (OSError, EOFError, gzip.zlib.error):  # type: ignore[attr-defined]
        return b""


def read_run(folder: Path) -> Run:
    """run.json of a run folder. RecordError names what is wrong."""
    path = folder / RUN_FILE
    try:
        if path.stat().st_size > MAX_LINE_BYTES:
            raise RecordError(f"{path}: larger than {MAX_LINE_BYTES} bytes; not a run record")
        return Run.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"{path}: not found") from None
    except (OSError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None
    except ValidationError as error:
        raise RecordError(f"{path}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings, in one line: field, expectation, what came."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "file"
    came = repr(problem.get("input"))
    return f"{where}: {problem['msg']}, got {came[:80] + '...' if len(came) > 80 else came}"


def _lines(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of the updates file, whichever form it has."""
    compressed = folder / COMPRESSED_UPDATES_FILE
    path = compressed if compressed.exists() else folder / UPDATES_FILE
    total = 0
    try:
        with gzip.open(path, "rb") if path == compressed else open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number, total = number + 1, total + len(line)
                if len(line) > MAX_LINE_BYTES or number > MAX_UPDATES or total > MAX_FILE_BYTES:
                    raise RecordError(
                        f"{path}: line {number}: larger than any record; not read further"
                    )
                yield f"{path}: line {number}", line
    except FileNotFoundError:
        raise RecordError(f"{path}: not found") from None
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise RecordError(f"{path}: cannot be read ({error})") from None


def read_updates(folder: Path) -> list[Update]:
    """All whole updates of a run folder, in order.

    A truncated last line (a killed run) is left out; any other fault is an error.
    """
    updates: list[Update] = []
    for place, line in _lines(folder):
        if not line.endswith(b"\n"):
            break
        try:
            update = Update.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(f"{place}: {first_problem(error)}") from None
        if update.update != len(updates):
            raise RecordError(f"{place}: update: expected {len(updates)}, got {update.update}")
        updates.append(update)
    return updates


def run_folders(root: Path) -> list[Path]:
    """Every folder below ``root`` that holds a run.json, sorted; links are not followed."""
    if not root.is_dir():
        return []
    found = [Path(here) for here, _, files in os.walk(root, followlinks=False) if RUN_FILE in files]
    return sorted(folder for folder in found if "~" not in folder.name)
