"""The files of a run folder: run.json (what was asked) and updates.jsonl (one line per update).

Lines are appended and flushed as updates happen, so a killed run loses at most the update in
flight. A finished run's lines are compressed (updates.jsonl.gz); everything else is written by
atomic replace. Reading never executes anything: plain files, JSON only, sizes bounded, every field
checked.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from scpo_bench.errors import UserError, describe, first_problem
from scpo_bench.records.plain_files import (
    RecordError,
    has_other_names,
    open_descriptor,
    open_to_read,
    read_file,
    write_all,
    write_atomically,
)
from scpo_bench.records.schema import Run, Update, canonical

M = TypeVar("M", bound=BaseModel)

# Bounds on untrusted input, far above what real runs write: about 1 kB per update, compressed to a
# fifth of it. What one record may hold also fits into 1 GB of memory when it is read.
MAX_LINE_BYTES = 1_000_000
MAX_UPDATES = 100_000
MAX_FILE_BYTES = 50_000_000  # of a run's updates, inflated
# What one command reads.
MAX_ENTRIES = 100_000  # files and folders
MAX_TOTAL_BYTES = 1_000_000_000  # of all updates, inflated

RUN_FILE, UPDATES_FILE, COMPRESSED_UPDATES_FILE = "run.json", "updates.jsonl", "updates.jsonl.gz"
# Beside a record and no part of it: of a run in progress, of one that failed.
CHECKPOINT_FILE, TRACEBACK_FILE = "checkpoint", "traceback.txt"
LOCKS_FOLDER = ".locks"  # of a results folder


# Names that read the same as one part of a path, but for one separator that becomes a dot: the
# namespace of a Gymnasium id, and the agent behind a safety filter.
_READABLE_NAME = re.compile(r"(filtered:|(?!filtered/)\w[\w-]*/)?\w[\w-]*", re.ASCII)
_SUITE_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
MAX_NAME_BYTES = 100  # leaves room for what is put before and after it, within 255


def file_name(name: str) -> str:
    """``name`` of a task or an agent as one part of a path; different names give different ones.

    ASCII letters, digits, "-" and "_" stay, and one "/" ("scpo_bench/X-v0") or the ":" of
    "filtered:X" becomes a dot. A name with anything else, or of more than ``MAX_NAME_BYTES``, also
    gets a "+", which the others never contain, and 128 bits of its SHA-256.
    """
    readable = re.sub(r"[^\w-]", ".", name, flags=re.ASCII)
    if _READABLE_NAME.fullmatch(name) and len(name) <= MAX_NAME_BYTES:
        return readable
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{readable[:60].strip('.-')}+{digest}"


def check_suite_name(place: str, name: str) -> None:
    """UserError unless ``name`` can be the name of a folder of results. place: for the message."""
    if not _SUITE_NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES + len("compare-"):
        raise UserError(
            f"{place}: a suite's name is that of a folder: letters, digits, '_', '-', '.' and '+', "
            f"first a letter, digit or '_', at most {MAX_NAME_BYTES}; got {name[:80]!r}"
        )


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
        if mark is not None and self.place() != mark:
            raise RecordError(f"{path}: is not what it was when the checkpoint was written")
        # Always a new file: one that has other names (hard links) keeps its content.
        write_atomically(path, kept)
        (folder / COMPRESSED_UPDATES_FILE).unlink(missing_ok=True)
        # Unbuffered: every line is in the file at once, and close() has nothing left to write that
        # could fail on a full disk.
        self._file = open(  # noqa: SIM115 (close())
            open_descriptor(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0
        )

    def append(self, update: Update) -> None:
        """Write one line; RecordError where it would be more than a record can hold."""
        line = canonical(update.model_dump(mode="json")) + b"\n"
        if update.update >= MAX_UPDATES or self._bytes + len(line) > MAX_FILE_BYTES:
            raise RecordError(
                f"{self._folder}: update {update.update}: a record holds at most {MAX_UPDATES} "
                f"updates in {MAX_FILE_BYTES} bytes; let the agent collect more steps per update"
            )
        write_all(self._file, line)
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
            gzip.compress(read_file(path, MAX_FILE_BYTES), compresslevel=9, mtime=0),
        )
        path.unlink()


def updates_file(folder: Path) -> Path:
    """The updates file of a run folder, compressed if it is there in that form."""
    compressed = folder / COMPRESSED_UPDATES_FILE
    return compressed if os.path.lexists(compressed) else folder / UPDATES_FILE


@contextmanager
def open_updates(path: Path) -> Iterator[io.BufferedIOBase]:
    """The lines of an updates file, inflated where it is compressed.

    RecordError for what cannot be read, inside the block too; FileNotFoundError for nothing.
    """
    try:
        with open_to_read(path) as file:
            if path.name != COMPRESSED_UPDATES_FILE:
                yield file
                return
            with gzip.open(file) as inflated:
                yield inflated
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None


def _stored_lines(folder: Path) -> bytes:
    """The content of the updates file; empty if there is none that can be read."""
    with (
        contextlib.suppress(RecordError, FileNotFoundError),
        open_updates(updates_file(folder)) as file,
    ):
        return file.read(MAX_FILE_BYTES)
    return b""


def _inflated_size(path: Path) -> int:
    """Bytes of an updates file's lines, counted up to just above ``MAX_FILE_BYTES``.

    Faster by far than to read the lines. What cannot be inflated counts until there.
    """
    size = 0
    with contextlib.suppress(RecordError, FileNotFoundError), open_updates(path) as file:
        while size <= MAX_FILE_BYTES and (piece := file.read(1 << 20)):
            size += len(piece)
    return size


def _invalid(path: Path, error: ValidationError, place: object = None) -> RecordError:
    # A hard link may be to a file that is none of this folder's business: no value of it is shown.
    problem = "a hard link, with other contents" if has_other_names(path) else first_problem(error)
    return RecordError(f"{place or path}: {problem}")


def read_model(path: Path, model: type[M], max_bytes: int) -> M:
    """What a JSON file holds, as ``model``.

    FileNotFoundError if there is none; RecordError naming what is wrong: no plain file, more than
    ``max_bytes``, other contents, a name given twice.
    """
    try:
        data = read_file(path, max_bytes)
        content = model.model_validate_json(data)
        json.loads(data, object_pairs_hook=_without_repeats)
        return content
    except (FileNotFoundError, RecordError):
        raise
    except ValidationError as error:
        raise _invalid(path, error) from None
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from None
    except (OSError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> None:
    """Of two values of one name a reader would see the last, and a person perhaps the first."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice in one object")


def read_run(folder: Path) -> Run:
    """run.json of a run folder. A RecordError names what is wrong."""
    path = folder / RUN_FILE
    try:
        return read_model(path, Run, MAX_LINE_BYTES)
    except FileNotFoundError:
        raise RecordError(f"{path}: not found") from None


def check_run_folder(folder: Path) -> None:
    """Raise RecordError where a run cannot read or must not write what is in its folder."""
    for name in (RUN_FILE, UPDATES_FILE, COMPRESSED_UPDATES_FILE, CHECKPOINT_FILE, TRACEBACK_FILE):
        try:
            open_to_read(folder / name).close()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RecordError(describe(error)) from None


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of an updates file."""
    try:
        if _inflated_size(path) > MAX_FILE_BYTES:
            raise RecordError(f"{path}: expands to more than {MAX_FILE_BYTES} bytes")
        number = 0
        with open_updates(path) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES or number > MAX_UPDATES:
                    raise RecordError(f"{path}: line {number}: more than a record can hold")
                yield f"{path}: line {number}", line
    except FileNotFoundError:
        raise RecordError(f"{path}: not found") from None


def read_updates(folder: Path) -> list[Update]:
    """All whole updates of a run folder, in order.

    A truncated last line (a killed run) is left out; any other fault is an error.
    """
    updates: list[Update] = []
    path = updates_file(folder)
    for place, line in _lines(path):
        if not line.endswith(b"\n"):
            break
        try:
            update = Update.model_validate_json(line)
        except ValidationError as error:
            raise _invalid(path, error, place) from None
        if update.update != len(updates):
            raise RecordError(f"{place}: update: expected {len(updates)}, got {update.update}")
        updates.append(update)
    return updates


def read_claim(path: Path, model: type[M], max_bytes: int) -> M | None:
    """What a file beside records claims about them, as ``model``; None if there is no file.

    Raises RecordError as :func:`read_model` does.
    """
    with contextlib.suppress(FileNotFoundError):
        return read_model(path, model, max_bytes)
    return None


def check_amount(root: Path) -> None:
    """Raise RecordError where there is more below ``root`` than one command reads.

    Links are not followed. What is too much is found out before anything is read as a record.
    """
    entries = total = 0
    for here, folders, files in os.walk(root, followlinks=False):
        entries += len(folders) + len(files)
        if entries > MAX_ENTRIES:
            raise RecordError(f"{root}: more than {MAX_ENTRIES} files and folders")
        for name in {UPDATES_FILE, COMPRESSED_UPDATES_FILE}.intersection(files):
            total += _inflated_size(Path(here, name))
            if total > MAX_TOTAL_BYTES:
                raise RecordError(
                    f"{root}: updates that expand to more than {MAX_TOTAL_BYTES} bytes"
                )


def run_folders(root: Path) -> list[Path]:
    """Every folder below ``root`` that holds a run.json, sorted.

    Links are not followed, and runs that were set aside ("seed-0~KEY") are left out. RecordError
    where there is more than one command reads.
    """
    if not root.is_dir():
        return []
    check_amount(root)
    found = [Path(here) for here, _, files in os.walk(root, followlinks=False) if RUN_FILE in files]
    return sorted(folder for folder in found if "~" not in folder.name)
