"""Runs cells in this process (one job) or in worker processes, with progress bars; what is finished
is not run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import multiprocessing
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from scpo_bench.errors import UserError
from scpo_bench.records.files import RecordError, read_run
from scpo_bench.records.schema import Cell
from scpo_bench.runs.processes import end_with_parent, sigterm_interrupts
from scpo_bench.suites.cells import run_folder

BUSY_WAIT_S = 0.5  # between two looks at a cell that another process is running


@dataclass(frozen=True)
class Outcome:
    """How each cell ended: counts, and (cell, error) of the failed ones."""

    finished: int
    skipped: int
    failed: list[tuple[Cell, str]]


def is_finished(folder: Path, cell: Cell) -> bool:
    """The folder holds a finished run of exactly this cell."""
    try:
        run = read_run(folder)
    except RecordError:
        return False
    return run.status == "finished" and run.key == cell.key()


def _set_aside(folder: Path, cell: Cell) -> None:
    """Keep a finished run of another configuration under its own name instead of writing over it.
    """
    try:
        run = read_run(folder)
    except RecordError:
        return
    if run.status == "finished" and run.key != cell.key():
        folder.rename(folder.with_name(f"{folder.name}~{run.key[:12]}"))


def _check_writable(results: Path) -> None:
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe = results / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--results: cannot write to '{results}' ({error.strerror})") from None


def run_cells(
    cells: list[Cell], suite: str, results: Path, jobs: int, console: Console, env_workers: int = 1
) -> Outcome:
    """Run every cell that is not finished yet, ``jobs`` at a time.

    UserError if the results folder cannot be written.

    env_workers: processes that step the environments of one run.
    """
    _check_writable(results)
    todo = [cell for cell in cells if not is_finished(run_folder(results, suite, cell), cell)]
    failed: list[tuple[Cell, str]] = []
    with _bars(console, len(cells), len(cells) - len(todo)) as bars:
        common = (todo, suite, results, bars, env_workers)
        runs = _run_here(*common) if jobs == 1 else _run_in_processes(*common, jobs)
        for cell, error in runs:
            if error is not None:
                if all(
                    (cell.agent, cell.task, error) != (c.agent, c.task, e) for c, e in failed
                ):  # not once per seed
                    console.print(
                        "[red]failed[/red]",
                        escape(f"{_label(cell)}: {error}"),
                        highlight=False,
                        soft_wrap=True,
                    )
                failed.append((cell, error))
            bars.cell_done(cell)
    return Outcome(len(todo) - len(failed), len(cells) - len(todo), failed)


def _label(cell: Cell) -> str:
    return f"{cell.agent} · {cell.task.rpartition('/')[2]} · seed {cell.seed}"


class _Bars:
    """One bar for the suite and one for each running cell."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self._progress = progress
        self._all = progress.add_task("cells", total=total, completed=done, detail="")
        self._cells: dict[str, tuple[TaskID, float, int]] = {}

    def show(self, cell: Cell, steps: int, updates: int) -> None:
        key = _label(cell)
        bar, began, first = self._cells.get(key) or (
            self._progress.add_task(key, total=cell.steps, detail=""),
            0.0,
            0,
        )
        if first == 0:  # a run that goes on from a checkpoint does not begin at step 0
            began, first = time.perf_counter(), steps
        self._cells[key] = (bar, began, first)
        rate = (steps - first) / max(time.perf_counter() - began, 1e-9)
        self._progress.update(
            bar, completed=min(steps, cell.steps), detail=f"{updates} updates, {rate:,.0f} steps/s"
        )

    def cell_done(self, cell: Cell) -> None:
        bar = self._cells.pop(_label(cell), None)
        if bar is not None:
            self._progress.remove_task(bar[0])
        self._progress.advance(self._all)


@contextlib.contextmanager
def _bars(console: Console, total: int, done: int) -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress, total, done)


@contextlib.contextmanager
def _claimed(cell: Cell, suite: str, results: Path) -> Iterator[bool]:
    """Whether this process may run the cell now: not while another one, of this or another command,
    is running it.

    An advisory lock on a file of the cell's own, which the operating system gives back when its
    holder dies, however it dies.
    """
    locks = results / ".locks"
    locks.mkdir(exist_ok=True)
    with open(locks / f"{suite}-{cell.key()}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _run_one(
    cell: Cell, suite: str, results: Path, report: Callable[[int, int], None], env_workers: int
) -> str | None:
    """The cell's error, or None.

    Imports torch and the agents, which the command line has no need of.
    """
    from scpo_bench.runs.harness import run_cell

    folder = run_folder(results, suite, cell)
    if is_finished(folder, cell):  # by another command, since this one looked
        return None
    _set_aside(folder, cell)
    report(0, 0)
    run = run_cell(cell, folder, suite, report, env_workers)
    return None if run.status == "finished" else run.error


def _run_here(
    cells: list[Cell], suite: str, results: Path, bars: _Bars, env_workers: int
) -> Iterator[tuple[Cell, str | None]]:
    waiting = deque(cells)
    while waiting:
        cell = waiting.popleft()
        with _claimed(cell, suite, results) as mine:
            if mine:
                error = _run_one(
                    cell, suite, results, functools.partial(bars.show, cell), env_workers
                )
        if mine:
            yield cell, error
        else:
            waiting.append(cell)
            time.sleep(BUSY_WAIT_S)


def _worker(todo: Any, messages: Any, suite: str, results: Path, env_workers: int) -> None:
    """Takes cells until there are none.

    Ctrl-C reaches the parent, which stops the workers by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sigterm_interrupts()
    end_with_parent()
    with contextlib.suppress(KeyboardInterrupt):
        _take_cells(todo, messages, suite, results, env_workers)


def _take_cells(todo: Any, messages: Any, suite: str, results: Path, env_workers: int) -> None:
    while True:
        try:
            index, cell = todo.get_nowait()
        except queue.Empty:
            return
        with _claimed(cell, suite, results) as mine:
            if mine:
                messages.put(("started", index, os.getpid(), 0))
                error = _run_one(
                    cell, suite, results, functools.partial(_report, messages, index), env_workers
                )
                messages.put(("done", index, error, 0))
        if not mine:
            todo.put((index, cell))
            time.sleep(BUSY_WAIT_S)


def _report(messages: Any, index: int, steps: int, updates: int) -> None:
    messages.put(("progress", index, steps, updates))


def _run_in_processes(
    cells: list[Cell], suite: str, results: Path, bars: _Bars, env_workers: int, jobs: int
) -> Iterator[tuple[Cell, str | None]]:
    # A forked child would share torch's thread pools and the parent's generators: start fresh ones.
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(initializer=end_with_parent)
    with manager:
        todo, messages = manager.Queue(), manager.Queue()
        for item in enumerate(cells):
            todo.put(item)
        arguments = (todo, messages, suite, results, env_workers)
        workers = [
            context.Process(target=_worker, args=arguments) for _ in range(min(jobs, len(cells)))
        ]
        for worker in workers:
            worker.start()
        running: dict[int, int] = {}  # process id -> index of its cell
        left = len(cells)
        try:
            while left:
                try:
                    kind, index, first, second = messages.get(timeout=0.5)
                except queue.Empty:
                    # A worker that died (out of memory, killed) takes only its own cell with it.
                    for worker in [
                        w for w in workers if w.exitcode not in (None, 0) and w.pid in running
                    ]:
                        index = running.pop(worker.pid)  # type: ignore[arg-type]
                        left -= 1
                        yield cells[index], f"its process ended with exit code {worker.exitcode}"
                        workers.remove(worker)
                        workers.append(context.Process(target=_worker, args=arguments))
                        workers[-1].start()
                    if all(worker.exitcode is not None for worker in workers) and messages.empty():
                        # Workers that cannot even start will not start on the next try either.
                        for index in range(len(cells) - left, len(cells)):
                            yield cells[index], "no worker process could be started"
                        return
                    continue
                if kind == "started":
                    running[first] = index
                    bars.show(cells[index], 0, 0)
                elif kind == "progress":
                    bars.show(cells[index], first, second)
                else:
                    running = {pid: i for pid, i in running.items() if i != index}
                    left -= 1
                    yield cells[index], first
        finally:
            for worker in workers:
                if left and worker.is_alive():  # interrupted; otherwise they end by themselves
                    worker.terminate()
            for worker in workers:
                worker.join(timeout=10)
