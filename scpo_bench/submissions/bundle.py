"""Packs the records of a suite for others."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from scpo_bench import __version__
from scpo_bench.errors import UserError
from scpo_bench.leaderboard.render import plain_rows
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.records.files import RecordError, read_run, run_folders
from scpo_bench.records.plain_files import create, read_file, write_all, write_atomically
from scpo_bench.records.schema import Cell, canonical
from scpo_bench.submissions.contents import (
    MANIFEST_FILE,
    MAX_BYTES,
    PACKED,
    RECORD_FILES,
    FileEntry,
    Manifest,
    safe_parts,
)
from scpo_bench.submissions.verify import verify


def bundle(results: Path, suite: str, output: Path, planned: Sequence[Cell] = ()) -> Path:
    """Pack a suite's records into a .tar.gz (if ``output`` is named so) or a new folder.

    A bundle consists of the records and a manifest with their hashes, the planned cells and the
    leaderboard; no code, no pickles, no tracebacks. The same records give the same bytes. Raises
    RecordError where there are no records, where one is not consistent, or where ``output`` exists;
    UserError where it cannot be written.
    """
    root = results / suite
    if not root.is_dir():
        raise RecordError(f"{root}: not found; run the suite first")
    if os.path.lexists(output):
        raise RecordError(f"{output}: exists already; name a new file or folder")
    if problems := verify(root).problems:
        raise RecordError(f"{root}: not consistent: {problems[0]}")
    contents = _record_files(root, suite)
    manifest = Manifest(
        suite=suite,
        scpo_bench=__version__,
        files={
            name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
            for name, data in contents.items()
        },
        planned=list(planned),
        rows=plain_rows(leaderboard(load(results, suite, planned, claims=False))),
    )
    # The manifest comes first: a reader of the archive knows what follows.
    contents = {MANIFEST_FILE: canonical(manifest.model_dump(mode="json")) + b"\n", **contents}
    try:
        _write(output, contents, suite)
    except OSError as error:
        raise UserError(f"--output: cannot write '{output}' ({error.strerror})") from None
    return output


def _write(output: Path, contents: dict[str, bytes], suite: str) -> None:
    if output.name.endswith(PACKED):
        write_atomically(output, _archive(contents, suite))
        return
    output.mkdir(parents=True)
    for name, data in contents.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with create(path) as file:
            write_all(file, data)


def _record_files(root: Path, suite: str) -> dict[str, bytes]:
    """Path below ``root`` -> content, in a fixed order."""
    contents: dict[str, bytes] = {}
    for folder in run_folders(root):
        if (found := read_run(folder).suite) != suite:
            raise RecordError(f"{folder}: a record of suite {found!r}, not {suite!r}")
        for path in (folder / name for name in RECORD_FILES):
            name = path.relative_to(root).as_posix()
            if safe_parts(f"{suite}/{name}") is None:
                raise RecordError(f"{path}: bundles cannot contain a file of this name")
            if path.is_file():
                contents[name] = read_file(path, MAX_BYTES[path.name])
    return contents


def _archive(contents: dict[str, bytes], top: str) -> bytes:
    """A .tar.gz of these files in one folder, without times or owners: same files, same bytes."""
    expanded = io.BytesIO()
    with tarfile.open(fileobj=expanded, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(expanded.getvalue(), compresslevel=9, mtime=0)
