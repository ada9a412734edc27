"""Runs many cells, in this process or one process each, and skips those that are finished."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import itertools
import multiprocessing
import os
import re
import signal
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal, cast

from rich import progress
from rich.console import Console
from rich.markup import escape

from scpo_bench.errors import UserError, describe, printable
from scpo_bench.processes import end_with_parent, sigterm_interrupts
from scpo_bench.records.files import LOCKS_FOLDER, RecordError, check_run_folder, read_run
from scpo_bench.records.plain_files import (
    check_folder,
    check_writable,
    make_folder,
    open_descriptor,
)
from scpo_bench.records.schema import Cell
from scpo_bench.suites.cells import run_folder

BUSY_WAIT_S = 0.5  # between two tries at a cell that another command is running
EXIT_S = 10.0  # that an interrupted run is given to write its record


@dataclass(frozen=True)
class Failure:
    """A cell that has not finished. users_mistake: it asks for what cannot be run this way."""

    cell: Cell
    error: str
    users_mistake: bool = False


# How an attempt at a cell ended; "busy": another command is running it.
Result = Failure | Literal["finished", "busy"]


@dataclass(frozen=True)
class Outcome:
    """How the cells ended: two counts, and the failures."""

    finished: int
    skipped: int
    failed: list[Failure]


@dataclass(frozen=True)
class _Job:
    """What all cells of one command have in common. workers: processes per run's environments."""

    suite: str
    results: Path
    workers: int

    def folder(self, cell: Cell) -> Path:
        return run_folder(self.results, self.suite, cell)


def run_cells(
    cells: list[Cell], suite: str, results: Path, jobs: int, console: Console, env_workers: int = 1
) -> Outcome:
    """Run every cell that is not finished yet, ``jobs`` at a time.

    UserError if the results folder cannot be written or has no locks. env_workers: processes that
    step the environments of one run.
    """
    check_writable("--results", results)
    _check_locks(results)
    job = _Job(suite, results, env_workers)
    waiting = deque(cell for cell in cells if not is_finished(job.folder(cell), cell))
    number = len(waiting)
    failed: list[Failure] = []
    bars = _Bars(console, len(cells), len(cells) - number)
    runs = (
        _run_in_processes(job, waiting, bars, jobs) if jobs > 1 else _run_here(job, waiting, bars)
    )
    with bars.progress:
        for cell, result in runs:
            if result == "busy":
                waiting.append(cell)
                continue
            if isinstance(result, Failure):
                _show_failure(console, result, failed)
                failed.append(result)
            bars.cell_done(cell)
    return Outcome(number - len(failed), len(cells) - number, failed)


def _show_failure(console: Console, failure: Failure, earlier: list[Failure]) -> None:
    def kind(failure: Failure) -> tuple[str, str, str]:
        return failure.cell.agent, failure.cell.task, failure.error

    if kind(failure) not in map(kind, earlier):  # not once per seed
        line = escape(printable(f"{_label(failure.cell)}: {failure.error}"))
        console.print("[red]failed[/red]", line, highlight=False, soft_wrap=True)


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether the folder holds a finished run of exactly this cell."""
    try:
        run = read_run(folder)
    except RecordError:
        return False
    return run.status == "finished" and run.key == cell.key()


def _set_aside(folder: Path, cell: Cell) -> None:
    """Rename a finished run of another configuration, which would be overwritten otherwise."""
    with contextlib.suppress(RecordError):
        run = read_run(folder)
        if run.status == "finished" and run.key != cell.key():
            # Whatever the record says is its key: it must not name another folder.
            name = f"{folder.name}~{re.sub('[^0-9a-f]', '', run.key)[:12]}"
            names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
            folder.rename(
                next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
            )


def _locks_folder(results: Path) -> Path:
    """The folder of lock files, which is made if there is none. RecordError for a link."""
    locks = results / LOCKS_FOLDER
    if not os.path.lexists(locks):
        with contextlib.suppress(FileExistsError):
            locks.mkdir()
            # Whoever may add records may lock them, whatever the umask of the first user.
            locks.chmod(stat.S_IMODE(results.stat().st_mode))
    check_folder(locks)
    return locks


def _check_locks(results: Path) -> None:
    """UserError where runs cannot be locked."""
    locks = _locks_folder(results)
    check_writable("--results", locks)
    try:
        with _open_lock(locks / "test") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError as error:
        raise UserError(
            f"--results: '{results}' is on a file system without locks ({error.strerror}), which "
            "keep two commands from one run"
        ) from None


def _open_lock(path: Path) -> io.FileIO:
    try:
        return open(open_descriptor(path, os.O_RDWR | os.O_CREAT), "rb+", buffering=0)
    except PermissionError:  # another user's: reading is enough
        return open(open_descriptor(path, os.O_RDONLY), "rb", buffering=0)


def _label(cell: Cell) -> str:
    return f"{cell.agent} · {cell.task.rpartition('/')[2]} · seed {cell.seed}"


class _Bars:
    """One bar for the suite and one for each running cell."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[detail]}"),
            progress.TimeRemainingColumn(),
        )
        self.progress = progress.Progress(*columns, console=console, transient=True)
        self._all = self.progress.add_task("cells", total=total, completed=done, detail="")
        self._cells: dict[str, tuple[progress.TaskID, float, int]] = {}

    def show(self, cell: Cell, steps: int, updates: int) -> None:
        key = _label(cell)
        if key not in self._cells:
            bar = self.progress.add_task(escape(printable(key)), total=cell.steps, detail="")
            self._cells[key] = bar, 0.0, 0
        bar, began, first = self._cells[key]
        if first == 0:  # a resumed run does not begin at step 0
            began, first = time.perf_counter(), steps
            self._cells[key] = bar, began, first
        rate = (steps - first) / max(time.perf_counter() - began, 1e-9)
        self.progress.update(
            bar, completed=min(steps, cell.steps), detail=f"{updates} updates, {rate:,.0f} steps/s"
        )

    def cell_done(self, cell: Cell) -> None:
        bar = self._cells.pop(_label(cell), None)
        if bar is not None:
            self.progress.remove_task(bar[0])
        self.progress.advance(self._all)


@contextlib.contextmanager
def _locked(job: _Job, cell: Cell) -> Iterator[bool]:
    """Whether this process may run the cell now: no other process is running it.

    An advisory lock on a file of the cell's own, which the operating system releases when its
    holder dies, however it dies.
    """
    with _open_lock(_locks_folder(job.results) / f"{job.suite}-{cell.key()}") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _run_one(job: _Job, cell: Cell, report: Callable[[int, int], None]) -> Result:
    """Run the cell, unless another command is running it or has finished it."""
    try:
        return _attempt(job, cell, report)
    except RecordError as error:
        return Failure(cell, str(error), users_mistake=True)
    except OSError as error:
        return Failure(cell, describe(error), users_mistake=True)


def _attempt(job: _Job, cell: Cell, report: Callable[[int, int], None]) -> Result:
    # Imports torch and the agents, which the command line does not need.
    from scpo_bench.runs.harness import Attempt

    folder = job.folder(cell)
    with _locked(job, cell) as ours:
        if not ours:
            time.sleep(BUSY_WAIT_S)
            return "busy"
        make_folder(job.results, folder)
        check_run_folder(folder)
        if is_finished(folder, cell):
            return "finished"
        _set_aside(folder, cell)
        report(0, 0)
        attempt = Attempt(cell, folder, job.suite)
        attempt.execute(report, job.workers)
    if attempt.record.status == "finished":
        return "finished"
    return Failure(cell, attempt.record.error or "", attempt.users_mistake)


def _run_here(job: _Job, waiting: deque[Cell], bars: _Bars) -> Iterator[tuple[Cell, Result]]:
    while waiting:
        cell = waiting.popleft()
        yield cell, _run_one(job, cell, functools.partial(bars.show, cell))


def _run_in_processes(
    job: _Job, waiting: deque[Cell], bars: _Bars, jobs: int
) -> Iterator[tuple[Cell, Result]]:
    """One process per cell: one that dies (out of memory, killed) takes only its own cell."""
    running: dict[Connection, tuple[Cell, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                pipe, process = _start(job, cell)
                running[pipe] = cell, process
            for pipe in cast(list[Connection], wait(list(running))):
                cell, process = running[pipe]
                message = _receive(pipe, process, cell)
                if isinstance(message, tuple):
                    bars.show(cell, *message)
                else:
                    process.join()
                    del running[pipe]
                    yield cell, message
    finally:
        for _, process in running.values():  # interrupted
            process.terminate()
        for _, process in running.values():
            process.join(EXIT_S)


def _start(job: _Job, cell: Cell) -> tuple[Connection, BaseProcess]:
    # A fork of this process would share torch's thread pools. The server that forks has none: it
    # has only imported what takes seconds and every cell needs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scpo_bench.runs.harness", "torch._dynamo"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_process, args=(theirs, job, cell))
    process.start()
    theirs.close()
    return ours, process


def _receive(pipe: Connection, process: BaseProcess, cell: Cell) -> Result | tuple[int, int]:
    """A process's next message: its progress or its result."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        process.join()
        return Failure(cell, f"its process ended with exit code {process.exitcode}")


def _process(pipe: Connection, job: _Job, cell: Cell) -> None:
    """Run a cell in a process of its own and report to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent sends SIGTERM
    sigterm_interrupts()
    end_with_parent()

    def report(steps: int, updates: int) -> None:
        try:
            pipe.send((steps, updates))
        except BrokenPipeError:  # the parent was killed: an interruption, not the run's failure
            raise KeyboardInterrupt from None

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        pipe.send(_run_one(job, cell, report))
