"""What a results folder and a bundle may contain, and how a bundle is unpacked.

All of it is untrusted input, and none of it is executed. Refused before any content is read: links,
devices, files that are not part of a record, files larger or more numerous than any record needs,
and, in archives, names that leave the archive. Reading stops at the first such entry.
"""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
import stat
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from scpo_bench.leaderboard.render import printable
from scpo_bench.records.files import (
    CHECKPOINT_FILE,
    COMPRESSED_UPDATES_FILE,
    LOCKS_FOLDER,
    MAX_LINE_BYTES,
    RUN_FILE,
    TRACEBACK_FILE,
    UPDATES_FILE,
    RecordError,
    check_amount,
    read_model,
)
from scpo_bench.records.plain_files import open_to_read
from scpo_bench.records.proof import PROOF_FILE
from scpo_bench.records.schema import Cell
from scpo_bench.records.study import STUDY_FILE

MANIFEST_FILE = "manifest.json"
RECORD_FILES = (RUN_FILE, UPDATES_FILE, COMPRESSED_UPDATES_FILE)
PACKED = (".tar.gz", ".tgz")
# Beside one's own records, never read and never packed: what this package generates from them, what
# an unfinished run leaves, and the lock and temporary files of running processes.
_GENERATED = (".md", ".html", ".csv", ".tex", ".png", ".svg", ".pdf", ".part")
# proof.json and tuning.json are claims about records, which a bundle's reader cannot check.
_LEFT_BY_RUNS = (TRACEBACK_FILE, CHECKPOINT_FILE, PROOF_FILE, STUDY_FILE)

# What tarfile, gzip and zlib raise for damaged and hostile archives.
_DAMAGE = (tarfile.TarError, zlib.error, struct.error, OSError, ValueError, EOFError)

# Limits of what is read at all. The updates of a run of 300 updates take about 300 kB, a large
# suite about 20 MB compressed.
MAX_FILES = 100_000
MAX_MEMBERS = 10_000  # of an archive
MAX_DEPTH = 12
MAX_BYTES = {
    RUN_FILE: MAX_LINE_BYTES,
    UPDATES_FILE: 100_000_000,
    COMPRESSED_UPDATES_FILE: 100_000_000,
    MANIFEST_FILE: 20_000_000,
}
MAX_ARCHIVE_BYTES = 500_000_000
MAX_ARCHIVE_EXPANDED_BYTES = 1_000_000_000
MAX_HEADER_BYTES = 1_000_000  # between two files of an archive


class Refused(RecordError):
    """Something that must not be in a record; nothing further was read. One line names it."""


class FileEntry(BaseModel):
    """A file of a bundle, as the manifest states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(BaseModel):
    """manifest.json of a bundle: the hash of every file, the planned cells and the leaderboard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest_version: Literal[1] = 1
    suite: str
    scpo_bench: str
    """Version of this package that packed the bundle."""
    files: dict[str, FileEntry]
    planned: list[Cell]
    """The suite's cells; those without a record count as missing."""
    rows: list[dict[str, Any]]
    """The leaderboard, every column."""


def read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle. A RecordError names what is wrong with it."""
    try:
        return read_model(root / MANIFEST_FILE, Manifest, MAX_BYTES[MANIFEST_FILE])
    except FileNotFoundError:
        raise RecordError(f"{root / MANIFEST_FILE}: not found") from None


class Contents(NamedTuple):
    """What is below a folder. Paths are relative to it."""

    files: dict[str, int]
    """Sizes of the files of its records and of its manifest."""
    bundles: list[str]
    """Folders that are bundles; what is in them is not listed."""
    ignored: list[str]
    """Files that are not part of the records, and why they are tolerated."""


def list_contents(root: Path) -> Contents:
    """List what is below ``root`` and raise Refused for what must not be there.

    Links are not followed. In a bundle nothing but its records and its manifest is tolerated.
    """
    check_amount(root)
    sealed = os.path.lexists(root / MANIFEST_FILE)
    found = Contents({}, [], [])
    entries_seen = itertools.count(1)
    folders = [root]
    for folder in folders:  # grows while it is iterated over
        place = folder.relative_to(root)
        if folder != root and not sealed and os.path.lexists(folder / MANIFEST_FILE):
            found.bundles.append(place.as_posix())
            continue
        if len(place.parts) > MAX_DEPTH:
            raise Refused(f"{root}: folders more than {MAX_DEPTH} deep")
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if next(entries_seen) > MAX_FILES:
                        raise Refused(f"{root}: more than {MAX_FILES} files")
                    path, status = place / entry.name, entry.stat(follow_symlinks=False)
                    if not entry.name.isprintable():
                        raise Refused(f"{path.as_posix()!r}: a name with control characters")
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(root / path)
                    else:
                        _list_file(path, status, sealed, found)
        except OSError as error:
            raise Refused(f"{folder}: cannot be read ({error.strerror})") from None
    return Contents(found.files, sorted(found.bundles), sorted(found.ignored))


def _list_file(path: Path, status: os.stat_result, sealed: bool, found: Contents) -> None:
    name = path.as_posix()
    if not stat.S_ISREG(status.st_mode):
        link = stat.S_ISLNK(status.st_mode)
        kind = "a symbolic link" if link else "neither a file nor a folder"
        raise Refused(f"{name}: {kind}; records consist of plain files")
    # The launcher sets run folders aside under names with a "~"; nothing reads these.
    if name == MANIFEST_FILE or (path.name in RECORD_FILES and "~" not in path.parent.name):
        _check_size(name, status.st_size)
        found.files[name] = status.st_size
    elif sealed or (reason := _why_ignored(path)) is None:
        raise Refused(f"{name}: not part of a record (expected {', '.join(MAX_BYTES)})")
    elif reason:
        found.ignored.append(f"{name}: ignored; {reason}")


def _check_size(name: str, size: int) -> None:
    limit = MAX_BYTES[PurePosixPath(name).name]
    if size > limit:
        raise Refused(f"{printable(name, 120)}: {size} bytes; records have at most {limit} here")


def _why_ignored(path: Path) -> str | None:
    """Why a file beside one's own records is ignored ("": not worth a note); None if it is not."""
    if path.parent.name == LOCKS_FOLDER:
        return ""
    if path.name in RECORD_FILES:
        return "set aside"
    if path.name.endswith(PACKED):
        return "a packed bundle is verified by itself"
    if path.name in _LEFT_BY_RUNS or path.suffix in _GENERATED:
        return "not part of the records"
    return None


class _BoundedGzip(gzip.GzipFile):
    """Raises Refused once too much was read, in all or since :meth:`expect`.

    Neither a compression bomb nor a huge header can fill the memory: tarfile reads small pieces.
    """

    expected = MAX_HEADER_BYTES

    def expect(self, size: int) -> None:
        """A file of ``size`` bytes comes next, and then the header of another."""
        self.expected = self.tell() + size + MAX_HEADER_BYTES

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if self.tell() > min(self.expected, MAX_ARCHIVE_EXPANDED_BYTES):
            raise Refused("expands to more than any bundle contains")
        return data


def unpack(archive: Path, target: Path) -> None:
    """Write the files of a .tar.gz below ``target``. Raises Refused before anything is written."""
    if archive.stat().st_size > MAX_ARCHIVE_BYTES:
        raise Refused(f"{archive}: larger than {MAX_ARCHIVE_BYTES} bytes")
    try:
        names = Counter(PurePosixPath(member.name) for member, _ in _members(archive))
        for name in (name for name, times in names.items() if times > 1):
            raise Refused(f"{printable(name, 120)!r} appears twice")
        for member, source in _members(archive):
            path = target / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                shutil.copyfileobj(source, file)
    except Refused as refused:
        raise Refused(f"{archive}: {refused}") from None
    except (*_DAMAGE, RecursionError, OverflowError) as error:
        raise Refused(f"{archive}: not a readable .tar.gz ({printable(error, 120)})") from None


def _members(archive: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The files of a .tar.gz, each checked. Raises Refused, and what is in ``_DAMAGE``."""
    with (
        open_to_read(archive, follow=True) as packed,
        _BoundedGzip(fileobj=packed, mode="rb") as expanded,
        tarfile.open(fileobj=expanded, mode="r|", errorlevel=0) as tar,
    ):
        for number, member in enumerate(tar):
            if number >= MAX_MEMBERS:
                raise Refused(f"more than {MAX_MEMBERS} files")
            expanded.expect(member.size)
            yield member, _checked(tar, member)


def safe_parts(name: str) -> tuple[str, ...] | None:
    """The components of a relative path that stays below its root, or None."""
    parts = PurePosixPath(name).parts
    plain = all(
        p not in ("..", ".") and len(p) <= 255 and p.isprintable() and not set(p) & set("\\:~/")
        for p in parts
    )
    return parts if plain and 0 < len(parts) <= MAX_DEPTH else None


def _checked(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """The content of a file of an archive. Raises Refused for what must not be in a bundle."""
    shown = repr(printable(member.name, 120))
    parts = safe_parts(member.name)
    if parts is None:
        raise Refused(f"{shown} is not a path inside the archive")
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not plain or (source := tar.extractfile(member)) is None:
        raise Refused(f"{shown} is not a plain file; bundles have no links, folders or devices")
    if parts[-1] not in MAX_BYTES:
        raise Refused(f"{shown} is not part of a record")
    _check_size(member.name, member.size)
    return source
