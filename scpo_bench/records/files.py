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
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from scpo_bench.errors import UserError, first_problem
from scpo_bench.records.schema import Run, Update, canonical

M = TypeVar("M", bound=BaseModel)

# Bounds on untrusted input: far above what a real run writes.
MAX_LINE_BYTES = 1_000_000
MAX_UPDATES = 1_000_000
MAX_FILE_BYTES = 200_000_000

RUN_FILE, UPDATES_FILE, COMPRESSED_UPDATES_FILE = "run.json", "updates.jsonl", "updates.jsonl.gz"
CHECKPOINT_FILE = "checkpoint"  # of a run in progress; no part of its record


class RecordError(UserError):
    """A record's file is missing, damaged or not a record.

    The message names the file, the line and the field.
    """


def file_name(name: str) -> str:
    """``name`` as one part of a path: separators and other special characters become dots."""
    return "".join(c if c.isalnum() or c in "-_." else "." for c in name).strip(".")


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
    """A place in updates.jsonl: the number of bytes before it, and their SHA-256."""

    bytes: int
    sha256: str


class UpdateLog:
    """Appends updates to updates.jsonl, each at once, and compresses the file at the end.

    mark: resume from there and drop the lines after it. RecordError if the lines before it have
    changed.
    """

    def __init__(self, folder: Path, mark: LogMark | None = None) -> None:
        self._folder = folder
        kept = b"" if mark is None else _stored_lines(folder)[: mark.bytes]
        self._sha256 = hashlib.sha256(kept)
        self._bytes = len(kept)
        path = folder / UPDATES_FILE
        if mark is not None:
            if self.place() != mark:
                raise RecordError(f"{path}: is not what it was when the checkpoint was written")
            write_atomically(path, kept)
        (folder / COMPRESSED_UPDATES_FILE).unlink(missing_ok=True)
        # Unbuffered: every line is in the file at once, and close() has nothing left to write that
        # could fail on a full disk.
        self._file = open(path, "ab" if mark else "wb", buffering=0)  # noqa: SIM115 (close())

    def append(self, update: Update) -> None:
        line = canonical(update.model_dump(mode="json")) + b"\n"
        left = line
        while left:  # a disk that is nearly full takes a part, and fails on the next write
            left = left[self._file.write(left) :]
        self._sha256.update(line)
        self._bytes += len(line)

    def place(self) -> LogMark:
        return LogMark(self._bytes, self._sha256.hexdigest())

    def mark(self) -> LogMark:
        """The end of the log, once everything before it is on the disk."""
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


def updates_file(folder: Path) -> Path:
    """The updates file of a run folder, compressed if it is there in that form."""
    compressed = folder / COMPRESSED_UPDATES_FILE
    return compressed if compressed.exists() else folder / UPDATES_FILE


def _stored_lines(folder: Path) -> bytes:
    """The content of the updates file; empty if there is none."""
    path = updates_file(folder)
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.name == COMPRESSED_UPDATES_FILE else content
    except (OSError, EOFError, zlib.error):
        return b""


def read_run(folder: Path) -> Run:
    """run.json of a run folder. A RecordError names what is wrong."""
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


def _lines(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of the updates file."""
    path = updates_file(folder)
    total = 0
    try:
        with gzip.open(path) if path.name == COMPRESSED_UPDATES_FILE else open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number, total = number + 1, total + len(line)
                if len(line) > MAX_LINE_BYTES or number > MAX_UPDATES or total > MAX_FILE_BYTES:
                    raise RecordError(f"{path}: line {number}: more than a record can hold")
                yield f"{path}: line {number}", line
    except FileNotFoundError:
        raise RecordError(f"{path}: not found") from None
    except (OSError, EOFError, zlib.error) as error:
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


def read_claim(path: Path, model: type[M], max_bytes: int) -> M | None:
    """What a file beside records claims about them, as ``model``; None if there is no file.

    Raises RecordError naming what is wrong: a link, more than ``max_bytes``, other contents.
    """
    try:
        if path.is_symlink():
            raise RecordError(f"{path}: a symbolic link")
        if path.stat().st_size > max_bytes:
            kind = model.__name__.lower()
            raise RecordError(f"{path}: larger than {max_bytes} bytes; not a {kind}")
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None
    except ValidationError as error:
        raise RecordError(f"{path}: {first_problem(error)}") from None


def run_folders(root: Path) -> list[Path]:
    """Every folder below ``root`` that holds a run.json, sorted.

    Links are not followed, and runs that were set aside ("seed-0~KEY") are left out.
    """
    if not root.is_dir():
        return []
    found = [Path(here) for here, _, files in os.walk(root, followlinks=False) if RUN_FILE in files]
    return sorted(folder for folder in found if "~" not in folder.name)
