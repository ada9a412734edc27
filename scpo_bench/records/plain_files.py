"""Opens, creates and replaces plain files in folders that others may have written to.

Results folders are shared, downloaded and unpacked, so whatever stands there in the place of a file
may be a link to somewhere else, a pipe that blocks its reader, or a device without an end. Nothing
here follows a link in the last part of a path, and a file is looked at before it is read. For the
folders above it there is :func:`make_folder`. Whoever exchanges a folder for a link while a command
is running is not kept out by this.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from pathlib import Path

from scpo_bench.errors import UserError

_NO_WAIT = os.O_NONBLOCK | os.O_CLOEXEC
_NO_LINK = os.O_NOFOLLOW | _NO_WAIT


class RecordError(UserError):
    """A record's file is missing, damaged or not a record.

    The message names the file, the line and the field.
    """


def open_descriptor(path: Path, flags: int, follow: bool = False) -> int:
    """A descriptor of the plain file ``path``; a file that is created gets mode 0666 & ~umask.

    flags: for reading or writing, as of :func:`os.open`. follow: the path is the user's own choice
    and may be a link. Raises RecordError for a link and for what is no plain file, OSError
    otherwise.
    """
    try:
        descriptor = os.open(path, flags | (_NO_WAIT if follow else _NO_LINK), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise RecordError(f"{path}: a symbolic link; expected a plain file") from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise RecordError(f"{path}: not a plain file")


def open_to_read(path: Path, follow: bool = False) -> io.BufferedReader:
    """Open a plain file; raises as :func:`open_descriptor` does."""
    return open(open_descriptor(path, os.O_RDONLY, follow), "rb")


def read_file(path: Path, max_bytes: int, follow: bool = False) -> bytes:
    """The content of a plain file.

    Raises RecordError also where it has more than ``max_bytes``, of which nothing is read.
    """
    with open_to_read(path, follow) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes:
            content = file.read(max_bytes + 1)
            if len(content) <= max_bytes:
                return content
    raise RecordError(f"{path}: larger than {max_bytes} bytes")


def has_other_names(path: Path) -> bool:
    """Whether the file is also reached by another name (a hard link), perhaps elsewhere."""
    return os.lstat(path).st_nlink > 1


def create(path: Path, mode: int = 0o666) -> io.FileIO:
    """A new file, to be written without buffering; FileExistsError if there is anything."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | _NO_LINK
    return open(os.open(path, flags, mode), "ab", buffering=0)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, or leave it as it was. A link itself is replaced."""
    # Process ids are the same in many containers, which may share the folder.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.part")
    try:
        with create(temporary) as file:
            write_all(file, data)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write to an unbuffered file; OSError where only a part can be written."""
    left = memoryview(data)
    while left:  # a disk that is nearly full takes a part, and fails on the next write
        left = left[file.write(left) :]


def remove_parts(folder: Path) -> None:
    """Remove what a killed :func:`write_atomically` has left in a folder."""
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            path.unlink()


def check_writable(option: str, folder: Path) -> None:
    """Create ``folder`` if need be. A UserError names the option where it cannot be written to."""
    probe = folder / f".write-test-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        create(probe).close()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option}: cannot write to '{folder}' ({error.strerror})") from None


def make_folder(root: Path, folder: Path) -> None:
    """Create ``folder``, which is below ``root``, and the folders between them.

    Raises RecordError where one of them is a link or no folder, OSError where one cannot be made.
    ``root`` is the user's own choice and may be a link.
    """
    place = root
    for part in folder.relative_to(root).parts:
        place = place / part
        with contextlib.suppress(FileExistsError):
            place.mkdir()
        check_folder(place)


def check_folder(folder: Path) -> None:
    """Raise RecordError where ``folder`` is a link or no folder; FileNotFoundError for nothing."""
    mode = os.lstat(folder).st_mode
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a folder"
        raise RecordError(f"{folder}: {kind}; expected a folder")
