"""Folders, archives and suites files that bite, and machines that refuse: one line each, or works.

Every case runs through the command line. A canary outside of the results folder must neither be
shown nor changed.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from synthetic_records import REGRESSION, synthetic_updates, write_record

from scpo_bench import cli
from scpo_bench.records import files, plain_files
from scpo_bench.records.files import (
    COMPRESSED_UPDATES_FILE,
    RUN_FILE,
    UPDATES_FILE,
    RecordError,
    UpdateLog,
    file_name,
    read_run,
    read_updates,
)
from scpo_bench.records.schema import Cell, Update, canonical
from scpo_bench.runs import harness, launch
from scpo_bench.runs.checkpoints import Checkpointer
from scpo_bench.submissions.verify import verify
from scpo_bench.suites.cells import cells, run_folder
from scpo_bench.suites.schema import load_benchmarks

pytestmark = pytest.mark.timeout(60)

COMMAND = [sys.executable, "-m", "scpo_bench.cli"]
CANARY = "CANARY-7f3a"
# Of processor time, which other processes do not lengthen; whatever waits runs into the timeout.
LIMIT_S, LIMIT_BYTES = 10, 1_000_000_000
SUITES = f"""
version: 1
suites:
  s:
    description: one run
    tasks: [{REGRESSION}]
    agents: [ppo]
    steps: 640
    seeds: 1
    num_envs: 4
    evaluation_episodes: 2
    config: {{ppo: {{n_steps: 20, batch_size: 20}}}}
"""
QUIET = Console(quiet=True)


class Place(NamedTuple):
    """A results folder with the finished record of the only cell of suite "s"."""

    results: Path
    run: Path
    cell: Cell
    outside: Path
    """A folder with the canary, a file of text, and nothing else."""
    canary: Path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    Path("benchmarks.yaml").write_text(SUITES)
    (cell,) = cells(load_benchmarks(Path("benchmarks.yaml")).suites["s"])
    run = write_record(Path("results"), "s", cell, synthetic_updates(cell, 7))
    outside = Path("outside")
    outside.mkdir()
    canary = outside / "canary"
    canary.write_text(f'{{"token": "{CANARY}"}}\n')
    return Place(Path("results"), run, cell, outside.absolute(), canary.absolute())


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def scpo_bench(monkeypatch, capsys):
    """Runs a command in this process, within the time that it is given."""

    def command(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["scpo-bench", *map(str, arguments)])
        monkeypatch.setattr("scpo_bench.processes.sigterm_interrupts", lambda: None)
        capsys.readouterr()
        began = time.process_time()
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        assert time.process_time() - began < LIMIT_S
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        assert CANARY not in shown.out + shown.err
        assert len(shown.err.splitlines()) <= 1
        return Ended(status, shown.out, shown.err)

    return command


def unchanged(place: Place) -> None:
    """Nothing outside of the results was written, removed or added."""
    assert [path.name for path in place.outside.iterdir()] == ["canary"]
    assert place.canary.read_text() == f'{{"token": "{CANARY}"}}\n'


# What may stand in the place of a file.


def symbolic_link(path: Path, place: Place) -> None:
    path.symlink_to(place.canary)


def dangling_link(path: Path, place: Place) -> None:
    path.symlink_to(place.outside / "new")


def endless_link(path: Path, place: Place) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path, place: Place) -> None:
    path.symlink_to(path.name)


def link_to_folder(path: Path, place: Place) -> None:
    path.symlink_to(place.outside, target_is_directory=True)


def hard_link(path: Path, place: Place) -> None:
    path.hardlink_to(place.canary)


def pipe(path: Path, place: Place) -> None:
    os.mkfifo(path)


def unix_socket(path: Path, place: Place) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has 108 bytes at most
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def folder(path: Path, place: Place) -> None:
    path.mkdir()


KINDS = (
    *(symbolic_link, dangling_link, endless_link, link_to_itself, link_to_folder),
    *(pipe, unix_socket, folder),
)


def plant(path: Path, kind: Callable[[Path, Place], None], place: Place) -> None:
    path.unlink(missing_ok=True)
    kind(path, place)


@pytest.mark.parametrize("name", [RUN_FILE, COMPRESSED_UPDATES_FILE])
@pytest.mark.parametrize("kind", [*KINDS, hard_link])
def test_what_is_no_plain_file_is_not_read(place, scpo_bench, kind, name):
    """Not opened, not waited for, not shown; no bundle is packed from it."""
    plant(place.run / name, kind, place)
    checked = scpo_bench("verify", place.results)
    assert checked.status in (1, 2)
    table = scpo_bench("leaderboard", "s", "--format", "json")
    assert table.status == 0
    rows = json.loads(table.out)["rows"]
    assert sum(row["seeds_finished"] for row in rows) == 0
    packed = scpo_bench("bundle", "s")
    assert packed.status == 2
    assert not Path("s.tar.gz").exists()
    assert scpo_bench("show", place.run).status in (0, 2)
    unchanged(place)


@pytest.mark.parametrize(
    "name", [RUN_FILE, UPDATES_FILE, COMPRESSED_UPDATES_FILE, "checkpoint", "traceback.txt"]
)
@pytest.mark.parametrize("kind", [symbolic_link, dangling_link, endless_link, pipe, folder])
def test_a_run_does_not_write_through_links(place, scpo_bench, kind, name):
    """The run is refused in one line that names the file."""
    (place.run / RUN_FILE).unlink()
    plant(place.run / name, kind, place)
    ended = scpo_bench("run", "s")
    assert ended.status == 2
    assert f"{place.run / name}: " in " ".join(ended.out.split())
    unchanged(place)


@pytest.mark.parametrize("name", [RUN_FILE, UPDATES_FILE, "checkpoint", "traceback.txt"])
def test_a_run_does_not_write_through_hard_links(place, scpo_bench, name):
    """A backup of hard links (cp -al) keeps what it held; the run has files of its own."""
    (place.run / RUN_FILE).unlink()
    plant(place.run / name, hard_link, place)
    assert scpo_bench("run", "s").status == 0
    assert verify(place.run).ok
    unchanged(place)


@pytest.mark.parametrize("depth", range(1, 5))
def test_no_folder_below_the_results_is_a_link(place, scpo_bench, depth):
    """results/SUITE/TASK/AGENT/seed-0: whichever it is, nothing is read or written there."""
    linked = place.results.joinpath(*place.run.relative_to(place.results).parts[:depth])
    shutil.rmtree(linked)
    linked.symlink_to(place.outside, target_is_directory=True)
    for command, status in (("run", 2), ("bundle", 2)):
        assert scpo_bench(command, "s").status == status
    assert scpo_bench("plot", "s").status in (0, 2)
    assert scpo_bench("verify", place.results).status == 2
    table = scpo_bench("leaderboard", "s")
    assert table.status == (2 if depth == 1 else 0)
    unchanged(place)


@pytest.mark.parametrize("kind", [*KINDS, hard_link])
def test_locks_are_plain_files(place, scpo_bench, kind):
    """Opening a lock must neither empty what a link points to nor wait for a pipe."""
    shutil.rmtree(place.run)
    locks = place.results / ".locks"
    locks.mkdir()
    plant(locks / f"s-{place.cell.key()}", kind, place)
    assert scpo_bench("run", "s").status == (0 if kind is hard_link else 2)
    unchanged(place)


@pytest.mark.parametrize("kind", [symbolic_link, dangling_link, link_to_folder, pipe])
def test_the_folder_of_locks_is_a_folder(place, scpo_bench, kind):
    """As above, for all locks at once."""
    shutil.rmtree(place.run)
    plant(place.results / ".locks", kind, place)
    ended = scpo_bench("run", "s")
    assert ended.status == 2
    assert ".locks" in ended.err
    unchanged(place)


def test_figures_are_not_drawn_through_links(place, scpo_bench):
    """The figures' folder lies among the results, and so may have come with them."""
    plots = place.results / "s" / "plots"
    assert scpo_bench("plot", "s").status == 0
    drawn = next(plots.iterdir())
    plant(drawn, symbolic_link, place)
    assert scpo_bench("plot", "s").status == 0
    assert drawn.is_file()
    assert not drawn.is_symlink()
    shutil.rmtree(plots)
    plots.symlink_to(place.outside, target_is_directory=True)
    assert scpo_bench("plot", "s").status == 2
    unchanged(place)


def test_the_key_in_a_record_names_no_folder(place, scpo_bench):
    """A finished run is set aside under its key, which may be anything that someone wrote."""
    run = json.loads((place.run / RUN_FILE).read_text())
    (place.run / RUN_FILE).write_text(json.dumps({**run, "key": "/../../../outside/new"}))
    assert scpo_bench("run", "s").status == 0
    assert [path.name for path in place.run.parent.iterdir() if "~" in path.name] == ["seed-0~dee"]
    unchanged(place)


def test_messages_show_nothing_of_a_hard_link(place):
    """Not its values, nor the names of its fields."""
    for name in (RUN_FILE, COMPRESSED_UPDATES_FILE):
        plant(place.run / name, hard_link, place)
    plant(place.run / UPDATES_FILE, hard_link, place)
    (place.run / COMPRESSED_UPDATES_FILE).unlink()
    for read in (read_run, read_updates):
        with pytest.raises(RecordError, match="a hard link, with other contents") as caught:
            read(place.run)
        assert "token" not in str(caught.value)


def test_messages_do_not_repeat_a_file_that_is_no_json(place, scpo_bench):
    """Whatever was taken for a record may be a letter or a key."""
    (place.run / RUN_FILE).write_text(CANARY)
    assert scpo_bench("verify", place.results).status == 1
    assert "Invalid JSON" in scpo_bench("leaderboard", "s").out


# Names.

BAD_NAMES = (
    *("../../x", "/tmp/x", "a/b", ".", "..", "", ".hidden", "-rf", "~", "a\0b", "a\nb", "\x1b[2J"),
    *("a b", "a\\b", "a:b", "é", "\N{FULLWIDTH EQUALS SIGN}1+1", "a\u202eb", "x" * 109, "x" * 1000),
)


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:20])
def test_names_of_suites_that_lead_elsewhere(place, scpo_bench, name):
    """In a suites file and on the command line: one line, and nothing is made under that name."""
    before = sorted(path.as_posix() for path in Path().rglob("*"))
    Path("named.yaml").write_text(json.dumps({"version": 1, "suites": {name: {}}}))
    ended = scpo_bench("list", "suites", "--file", "named.yaml")
    assert ended.status == 2
    assert "named.yaml: suites: " in ended.err
    Path("named.yaml").unlink()
    for command in ("run", "leaderboard", "plot", "bundle"):
        if name or command != "leaderboard":
            assert scpo_bench(command, "--", name).status == 2, command
    assert sorted(path.as_posix() for path in Path().rglob("*")) == before
    unchanged(place)


@pytest.mark.parametrize("name", ["", "a:\0", "a:\nb", "a:\x1b[2J", "a:" + "b" * 200])
@pytest.mark.parametrize("field", ["tasks", "agents"])
def test_names_of_tasks_and_agents_are_printable(scpo_bench, tmp_path, field, name):
    """Records with other names are refused when they are read."""
    suite = {"description": "d", "tasks": [REGRESSION], "agents": ["ppo"], "seeds": 1, "steps": 1}
    path = tmp_path / "named.yaml"
    path.write_text(json.dumps({"version": 1, "suites": {"s": {**suite, field: [name]}}}))
    ended = scpo_bench("list", "suites", "--file", path)
    assert ended.status == 2
    assert f"named.yaml: suites.s.{field}[0]" in ended.err
    assert "printable characters" in ended.err


odd_names = st.text("ab.:/+-~\\\0\n é", max_size=6) | st.text(max_size=300)


@given(odd_names, odd_names)
def test_different_names_have_different_folders(one, other):
    """Two tasks or agents with one folder would set each other's runs aside."""
    assert (file_name(one) == file_name(other)) == (one == other)
    assert re.fullmatch(r"[\w+][\w.+-]{0,119}", file_name(one), re.ASCII)


# Too much of anything.


def lines_of(updates: int) -> bytes:
    counted = ({"interaction_steps": n, "probe_steps": 0, "episodes": 0} for n in range(updates))
    return b"".join(
        canonical(Update(update=n, **counts).model_dump(mode="json")) + b"\n"
        for n, counts in enumerate(counted)
    )


def one_bomb(run: Path) -> None:
    path = run / COMPRESSED_UPDATES_FILE
    path.write_bytes(4000 * gzip.compress(bytes(1 << 20), mtime=0))


def one_bomb_of_lines(run: Path) -> None:
    lines = 2000 * lines_of(100)
    (run / COMPRESSED_UPDATES_FILE).write_bytes(gzip.compress(lines, compresslevel=1, mtime=0))


def many_updates(run: Path) -> None:
    line = b'{"update":%d,"interaction_steps":0,"probe_steps":0,"episodes":0}\n'
    lines = b"".join(line % number for number in range(100_100))
    (run / COMPRESSED_UPDATES_FILE).write_bytes(gzip.compress(lines, compresslevel=1, mtime=0))


def many_diagnostics(run: Path) -> None:
    values = {f"{n:x}": 1 for n in range(90_000)}
    line = json.dumps({"update": 0, "interaction_steps": 0, "probe_steps": 0, "episodes": 0})
    line = f'{line[:-1]},"diagnostics":{json.dumps(values)}}}'
    lines = [line.replace('"update": 0', f'"update": {n}', 1) for n in range(55)]
    text = "\n".join(lines) + "\n"
    assert len(text) > 50_000_000
    (run / UPDATES_FILE).write_text(text)
    (run / COMPRESSED_UPDATES_FILE).unlink()


def many_bombs(run: Path) -> None:
    bomb = 49 * gzip.compress(bytes(1 << 20), mtime=0)
    for number in range(60):
        copy = run.with_name(f"bomb-{number}")
        copy.mkdir()
        (copy / COMPRESSED_UPDATES_FILE).write_bytes(bomb)
        (copy / RUN_FILE).write_bytes((run / RUN_FILE).read_bytes())


def many_inner_bundles(run: Path) -> None:
    many_bombs(run)
    for copy in run.parent.glob("bomb-*"):
        (copy / "manifest.json").write_text("{}")


def a_sparse_file(run: Path) -> None:
    (run / COMPRESSED_UPDATES_FILE).unlink()
    with open(run / UPDATES_FILE, "wb") as file:
        file.truncate(10**12)


def a_sparse_run(run: Path) -> None:
    with open(run / RUN_FILE, "wb") as file:
        file.truncate(10**12)


def deep_json(run: Path) -> None:
    (run / RUN_FILE).write_text('{"cell":' + "[" * 500_000)


def many_values(run: Path) -> None:
    (run / RUN_FILE).write_text('{"provenance":{"a":[' + "{}," * 300_000 + "{}]}}")


AMOUNTS = (
    *(one_bomb, one_bomb_of_lines, many_updates, many_diagnostics, many_bombs, many_inner_bundles),
    *(a_sparse_file, a_sparse_run, deep_json, many_values),
)


def within_limits(*arguments: object) -> Ended:
    """Run a command in a process of its own; it has to keep to the limits of time and memory."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.stdout.read(), process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    process.stderr.close()
    assert used.ru_utime + used.ru_stime < LIMIT_S
    assert used.ru_maxrss * 1024 < LIMIT_BYTES
    assert "Traceback" not in out + err
    return Ended(process.returncode, out, err)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_too_much_is_refused_in_time(place, amount):
    """Small files that expand to gigabytes cost neither the time nor the memory for them."""
    amount(place.run)
    assert within_limits("verify", place.results).status in (1, 2)


@pytest.mark.parametrize("amount", [many_bombs, many_diagnostics])
def test_a_table_is_bounded_as_well(place, amount):
    """The sum over a folder counts: each of many bombs may be within the bounds of a record."""
    amount(place.run)
    ended = within_limits("leaderboard", "s", "--format", "json")
    if amount is many_bombs:
        assert ended.status == 2
        assert "expand to more than" in ended.err
    else:
        assert json.loads(ended.out)["rows"][0]["seeds_finished"] == 0


def test_a_folder_of_very_many_entries(place, scpo_bench, monkeypatch):
    """Nothing is read where there is more than any results folder has."""
    for number in range(20):
        (place.results / "s" / str(number)).mkdir()
    monkeypatch.setattr(files, "MAX_ENTRIES", 20)
    for command in (("verify", place.results), ("leaderboard", "s"), ("bundle", "s")):
        ended = scpo_bench(*command)
        assert ended.status == 2
        assert "more than 20 files and folders" in ended.err


def test_a_log_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    """A run that grows beyond the bounds says so, instead of ending as a damaged record."""
    monkeypatch.setattr(files, "MAX_UPDATES", 2)
    log = UpdateLog(tmp_path)
    updates = [Update.model_validate_json(line) for line in lines_of(3).splitlines()]
    log.append(updates[0])
    log.append(updates[1])
    with pytest.raises(RecordError, match="a record holds at most 2 updates"):
        log.append(updates[2])
    log.close()
    assert len(read_updates(tmp_path)) == 2


# Archives.


def member(name: str, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def extended(size: int, type: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = type, size
    return info.tobuf(tarfile.USTAR_FORMAT)


ZEROS = gzip.compress(bytes(1 << 20), mtime=0)
ARCHIVES = {
    "many files": gzip.compress(
        b"".join(member(f"s/{n:06}/run.json") for n in range(10_001)), compresslevel=1
    ),
    "the same file": gzip.compress(2 * member("s/run.json")),
    "a long header": gzip.compress(extended(900 << 20, tarfile.XHDTYPE)) + 900 * ZEROS,
    "a long header after a file": gzip.compress(
        member("s/run.json") + extended(900 << 20, tarfile.XHDTYPE)
    )
    + 900 * ZEROS,
    "a long name": gzip.compress(extended(900 << 20, tarfile.GNUTYPE_LONGNAME)) + 900 * ZEROS,
    "many large files": b"".join(
        gzip.compress(member(f"s/{n}/updates.jsonl", 90 << 20)) + 90 * ZEROS for n in range(12)
    ),
    "only zeros": 2000 * ZEROS,
    "negative size": gzip.compress(
        member("s/run.json").replace(b"00000000000\0", b"\xff" * 12, 1) + bytes(1024)
    ),
    "a huge manifest": gzip.compress(member("s/manifest.json", 30 << 20)) + 30 * ZEROS,
    "a manifest of empty rows": gzip.compress(
        member("s/manifest.json", 9_000_064 + 448)
        + b'{"suite":"s","scpo_bench":"0","files":{},"planned":[],"rows":['
        + b"{},"[:3] * 3_000_000
        + b"{}]}".ljust(450 - 2, b" ")
        + bytes(10240),
        compresslevel=1,
    ),
}


@pytest.mark.parametrize("content", ARCHIVES.values(), ids=ARCHIVES.keys())
def test_archives_that_grow(tmp_path, monkeypatch, content):
    """Refused while they are read, with nothing left behind."""
    path = tmp_path / "b.tar.gz"
    path.write_bytes(content)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    ended = within_limits("verify", path)
    assert ended.status == 2, ended.out
    assert len(ended.err.splitlines()) == 1
    assert list(temporary.iterdir()) == []


# Suites files.


def laughs() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(lines)


YAML_FILES = {
    "billion laughs": laughs(),
    "an alias of itself": "&a [*a]",
    "deep": "[" * 100_000,
    "deep mappings": "{a: " * 50_000,
    "indented": "\n".join(" " * n + "a:" for n in range(900)),
    "many values": "- a\n" * 120_000,
    "too large": "#" * 600_000,
    "many keys": "".join(f"k{n}:\n" for n in range(50_000)),
    "many anchors": "".join(f"- &a{n} x\n" for n in range(30_000)),
    "a python object": "!!python/object/apply:os.system [touch outside/new]",
    "a binary": "version: !!binary |\n  R0lGODlhDAAMAIQAAP",
    "a null character": "version: 1\0",
    "no text": "\x80\x81",
    "a merge of itself": "a: &a\n  <<: *a",
    "many digits": "version: " + "9" * 10_000,
    "a repeated key": "version: 1\nversion: 1",
    "a list as key": "? [a]\n: b",
    "a date as suite": "version: 1\nsuites: {2025-01-01: {}}",
    "many cells": SUITES.replace("seeds: 1", "seeds: 1000000"),
    "no mapping": CANARY,
    "no yaml": f"key: {CANARY}: x\n",
}


@pytest.mark.parametrize("text", YAML_FILES.values(), ids=YAML_FILES.keys())
def test_suites_files_that_bite(place, scpo_bench, text):
    """One line, in time, without what else is in the file."""
    Path("bad.yaml").write_bytes(text.encode("latin-1"))
    ended = scpo_bench("run", "s", "--file", "bad.yaml")
    assert ended.status == 2
    assert len(ended.err) < 700
    unchanged(place)


@pytest.mark.parametrize("kind", [*KINDS])
def test_suites_files_that_are_no_files(place, scpo_bench, kind):
    """The user may link to a suites file; a pipe or a device is none."""
    kind(Path("odd.yaml"), place)
    ended = scpo_bench("list", "suites", "--file", "odd.yaml")
    assert ended.status == 2
    unchanged(place)


def test_a_suites_file_may_be_a_link(place, scpo_bench):
    """The user names it, so it is the user's own choice what it links to."""
    Path("linked.yaml").symlink_to("benchmarks.yaml")
    assert scpo_bench("list", "suites", "--file", "linked.yaml").status == 0


@pytest.mark.parametrize("kind", [*KINDS])
def test_counterexamples_that_are_no_files(place, scpo_bench, kind):
    """Somebody else's counterexample is untrusted as well."""
    kind(Path("odd.json"), place)
    assert scpo_bench("falsify", "--replay", "odd.json").status == 2


# Machines and users.


@pytest.mark.parametrize(
    "command",
    [
        ("plot", "s", "-o"),
        ("bundle", "s", "-o"),
        ("falsify", "--output"),
        ("tune", "s", "-o"),
        ("run", "s", "--results"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("target", ["/dev/null/x", "benchmarks.yaml/x", "/proc/x", "x" * 300])
def test_output_to_an_impossible_place(place, scpo_bench, command, target):
    """Said in one line before anything is computed for it."""
    ended = scpo_bench(*command, target)
    assert ended.status == 2
    assert ended.err.startswith(("scpo-bench: --output", "scpo-bench: --results"))


def shell(command: str, **environment: str) -> Ended:
    """A command line of bash, where $S is scpo-bench."""
    found = {**os.environ, "S": " ".join(COMMAND), **environment}
    ended = subprocess.run(
        ["bash", "-c", command], env=found, capture_output=True, text=True, timeout=30, check=False
    )
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "Exception ignored" not in ended.stderr
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize(
    ("command", "status", "lines"),
    [
        ("$S list agents >&-", 0, 0),
        ("$S list agents >&- 2>&-", 0, 0),
        ("$S list agents > /dev/full", 2, 1),
        ("$S verify nowhere 2> /dev/full", 2, 0),
        ("$S leaderboard s --format md > /dev/full", 2, 1),
        ("$S leaderboard s | head -1; exit ${PIPESTATUS[1]}", 0, 0),
        ("$S list agents | true; exit ${PIPESTATUS[0]}", 1, 0),
        ("$S leaderboard s --format csv | true; exit ${PIPESTATUS[0]}", 1, 0),
    ],
)
def test_output_that_cannot_be_written(place, command, status, lines):
    """A closed standard output is fine; a full one is one line on standard error."""
    ended = shell(command)
    assert ended.status == status
    assert len(ended.err.splitlines()) == lines


def test_ascii_output(place):
    """What a locale has no character for is replaced in the table."""
    ended = shell("$S leaderboard s", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert ended.status == 0
    assert ended.out.isascii()
    assert "ppo" in ended.out
    failed = shell("$S show é", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert failed.status == 2


@pytest.mark.parametrize("home", [None, "/dev/null", "/proc"])
def test_no_home_means_no_checkpoints(tmp_path, monkeypatch, home):
    """A user id without an account, as containers have it, or a home that cannot be written."""
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert Checkpointer(tmp_path, "key", {}).obstacle == "no place to keep a key"


def as_user(user: int) -> list[str]:
    """The beginning of a command that runs as a user without an account, a home or rights."""
    ids = [f"--reuid={user}", "--regid=23456", "--clear-groups"]
    return ["env", "-u", "HOME", "-u", "XDG_CONFIG_HOME", "setpriv", *ids]


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of a group, below which its users can write."""
    probe = [*as_user(23451), sys.executable, "-c", ""]
    if os.geteuid() != 0 or subprocess.run(probe, check=False).returncode:
        pytest.skip("needs to act as other users")
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(path, -1, 23456)
    path.chmod(0o2775)
    yield path
    shutil.rmtree(path)


def test_two_unknown_users_share_a_folder(shared):
    """Neither has an account or a home; what one has made, the other uses or is told about."""
    (shared / "benchmarks.yaml").write_text(SUITES)

    (shared / "results").mkdir()
    os.chown(shared / "results", -1, 23456)
    (shared / "results").chmod(0o2775)

    def run(user: int) -> Ended:
        return shell(f"cd {shared}; umask 022; {' '.join(as_user(user))} $S run s")

    first = run(23451)
    assert first.status == 0
    assert "1 run" in first.out
    second = run(23452)
    assert second.status == 0
    assert "1 already there" in second.out
    # The suite's folder is the first user's own.
    (shared / "benchmarks.yaml").write_text(SUITES.replace("640", "1280"))
    third = run(23452)
    assert third.status == 2
    assert "Permission denied" in third.out


def test_another_users_lock_is_opened_for_reading(place, monkeypatch):
    """Reading suffices for a lock, and is all that another user's umask may leave."""
    opened = []
    real = os.open

    def not_to_write(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        opened.append(path)
        return real(path, flags, *more)

    lock = place.results / "lock"
    lock.touch(mode=0o444)
    monkeypatch.setattr(plain_files.os, "open", not_to_write)
    with launch._open_lock(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert opened == [lock]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(place, scpo_bench, monkeypatch, number):
    """Two commands could otherwise write one record."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    shutil.rmtree(place.run)
    monkeypatch.setattr(launch.fcntl, "flock", refuse)
    ended = scpo_bench("run", "s")
    assert ended.status == 2
    assert "a file system without locks" in ended.err
    assert not place.run.exists()


def test_a_full_folder_of_locks(place, scpo_bench, monkeypatch):
    """The next command goes on when there is room again."""
    shutil.rmtree(place.run)

    def full(path: Path, *more: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(launch, "open_descriptor", full)
        assert scpo_bench("run", "s").status == 2
    assert scpo_bench("run", "s").status == 0


def test_a_disk_that_is_full_at_the_end(place, scpo_bench, monkeypatch):
    """The record is not finished, its checkpoint stays, and the same command goes on from there."""
    shutil.rmtree(place.run)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(UpdateLog, "compress", full)
        ended = scpo_bench("run", "s")
    assert ended.status == 2
    assert "No space left" in ended.out
    assert read_run(place.run).status == "running"
    assert (place.run / "checkpoint").exists()
    assert scpo_bench("run", "s").status == 0
    assert verify(place.run).ok


def test_an_interrupt_counts_on_a_full_disk_too(place, monkeypatch):
    """Ctrl-C must end the command where the record of the interrupted run cannot be written."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupt(steps: int, updates: int) -> None:
        monkeypatch.setattr(harness, "write_run", full)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.run_cell(place.cell, Path("interrupted"), "s", interrupt)
    assert read_run(Path("interrupted")).status == "running"


def test_configurations_in_turn(place):
    """A, B, A, B: each finished run that is replaced is kept under a name of its own."""
    other = place.cell.model_copy(update={"steps": 320})
    for cell in (place.cell, other) * 2:
        outcome = launch.run_cells([cell], "s", place.results, 1, QUIET)
        assert outcome.failed == []
    folder = run_folder(place.results, "s", other)
    kept = sorted(path.name for path in folder.parent.iterdir())
    first, second = (f"seed-0~{cell.key()[:12]}" for cell in (place.cell, other))
    assert kept == sorted(["seed-0", first, f"{first}-2", second])
    assert read_run(folder).key == other.key()


def test_a_clock_that_is_set_back(place, monkeypatch):
    """An honest record must not end before it started, nor too early for the seconds it took."""

    class Back(datetime):
        reads = 0

        @classmethod
        def now(cls, zone=None):
            cls.reads += 1
            return datetime(2026, 1, 1, tzinfo=UTC) - timedelta(hours=cls.reads)

    monkeypatch.setattr(harness, "datetime", Back)
    run = harness.run_cell(place.cell, Path("back"), "s")
    assert Back.reads > 1
    assert run.status == "finished"
    assert verify(Path("back")).ok


def test_what_a_killed_write_leaves_is_removed(place, scpo_bench):
    """Parts of checkpoints are large, and each has a name of its own."""
    (place.run / RUN_FILE).unlink()
    part = place.run / ".checkpoint.0123456789abcdef.part"
    part.write_bytes(b"part")
    assert scpo_bench("run", "s").status == 0
    assert not part.exists()


def test_temporary_names_differ_between_containers(tmp_path, monkeypatch):
    """Two containers on one folder may have the same process id."""
    names = []
    real = plain_files.create

    def noted(path: Path, mode: int = 0o666) -> io.FileIO:
        names.append(path.name)
        return real(path, mode)

    monkeypatch.setattr(plain_files, "create", noted)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    for _ in range(2):
        plain_files.write_atomically(tmp_path / "file", b"data")
    assert len(set(names)) == 2
    (tmp_path / names[0]).touch()
    with pytest.raises(FileExistsError):
        real(tmp_path / names[0])


def test_new_files_are_as_the_umask_says(tmp_path):
    """Records on a shared folder are for the group to read; the key of checkpoints is not."""
    old = os.umask(0o007)
    try:
        plain_files.write_atomically(tmp_path / "file", b"data")
        plain_files.create(tmp_path / "key", mode=0o600).close()
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "key")]
    assert modes == [0o660, 0o600]
