"""The launcher: cells in one process or several, locks, interruptions, and whose mistake it was."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from scpo_bench.errors import UserError
from scpo_bench.records.files import read_run
from scpo_bench.records.schema import Cell
from scpo_bench.runs import launch
from scpo_bench.runs.launch import run_cells
from scpo_bench.suites.cells import run_folder

CELL = Cell(
    agent="ppo",
    task="scpo_bench/HarmfulRegression-v0",
    seed=1,
    steps=60,
    start="backup",
    num_envs=2,
    cost_limit=0.0,
    evaluation_episodes=5,
    config={"n_steps": 10, "batch_size": 20, "n_epochs": 1},
)
SCPO_CELL = CELL.model_copy(
    update={
        "agent": "scpo",
        "config": {"n_steps": 10, "labels": "visited", "features": 8, "evaluation_starts": 16},
    }
)
QUIET = Console(quiet=True)

AGENTS = """
import os
import signal
import time
from pathlib import Path

from stable_baselines3 import PPO


class Killed(PPO):
    def train(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Sleeping(PPO):
    def train(self):
        Path(__file__).with_name("asleep").touch()
        time.sleep(600)


class Refusing(PPO):
    def __init__(self, *args, **kwargs):
        raise ValueError("this does not suit me")


class Broken(PPO):
    def train(self):
        raise ValueError("shapes do not match")
"""


@pytest.fixture
def agents_file(tmp_path):
    path = tmp_path / "agents.py"
    path.write_text(AGENTS)
    return path


def other(**changes):
    return CELL.model_copy(update=changes)


def test_jobs_do_not_change_records(tmp_path):
    """The number of processes must not show in a record; a finished cell must not run again."""
    todo = [other(seed=0), other(seed=1), SCPO_CELL]
    for jobs in (1, 2):
        outcome = run_cells(todo, "s", tmp_path / str(jobs), jobs, QUIET)
        assert (outcome.finished, outcome.skipped, outcome.failed) == (3, 0, [])
    for cell in todo:
        one, two = (read_run(run_folder(tmp_path / str(jobs), "s", cell)) for jobs in (1, 2))
        assert one.digest == two.digest
    again = run_cells(todo, "s", tmp_path / "1", 1, QUIET)
    assert (again.finished, again.skipped) == (0, 3)


def test_a_killed_process_takes_only_its_own_cell(tmp_path, agents_file):
    """One run that is killed (for lack of memory, say) must not cost or stop the others."""
    killed = other(agent=f"{agents_file}:Killed")
    outcome = run_cells([other(seed=0), killed, other(seed=2)], "s", tmp_path, 2, QUIET)
    assert outcome.finished == 2
    (failure,) = outcome.failed
    assert failure.cell == killed
    assert failure.error == "its process ended with exit code -9"
    assert not failure.users_mistake
    assert read_run(run_folder(tmp_path, "s", killed)).status == "running"  # it could not say


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_says_whose_mistake_it_was(tmp_path, agents_file, jobs):
    """Exit status 2 is for settings that cannot be run; a failure of the code must not get it."""
    unsafe = {"task": "scpo_bench/DoubleIntegratorImitation-v0", "start": "random"}
    users = [
        other(agent="cpo", config={"target_kll": 0.1}),
        other(task="SafetyPointGoal1-v0"),  # has no backup to start from
        other(agent=f"{agents_file}:Refusing", start="random"),
        other(agent="no_such_module:Agent"),
        SCPO_CELL.model_copy(update=unsafe),
    ]
    codes = [other(agent=f"{agents_file}:Broken")]
    outcome = run_cells([*users, *codes], "s", tmp_path, jobs, QUIET)
    mistakes = {failure.cell.key(): failure.users_mistake for failure in outcome.failed}
    expected = {cell.key(): cell in users for cell in [*users, *codes]}
    assert mistakes == expected
    errors = " ".join(failure.error for failure in outcome.failed)
    for said in (
        "CPOConfig.target_kll: unknown field; did you mean 'target_kl'?",
        "start: 'backup' needs a task with a backup controller",
        "ValueError: this does not suit me",
        "cannot import 'no_such_module'",
        "UnsafeStartError: SCPO: the start policy is unsafe: constraint '",
        "ValueError: shapes do not match",
    ):
        assert said in errors


def test_a_failed_cell_does_not_stop_the_others(tmp_path):
    """A bad configuration must fail its own cell only, and leave its traceback in a file."""
    bad = other(config={**CELL.config, "batch_size": -1})
    outcome = run_cells([bad, other(seed=5)], "s", tmp_path, 1, QUIET)
    assert outcome.finished == 1
    assert [failure.cell for failure in outcome.failed] == [bad]
    folder = run_folder(tmp_path, "s", bad)
    assert read_run(folder).status == "failed"
    assert "Traceback" in (folder / "traceback.txt").read_text()


def test_a_failure_is_printed_once_for_all_seeds(tmp_path, agents_file):
    """Ten seeds with the same mistake must not print ten lines."""
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    cells = [other(agent=f"{agents_file}:Refusing", start="random", seed=seed) for seed in (0, 1)]
    outcome = run_cells(cells, "s", tmp_path, 1, console)
    console.file.close()
    assert len(outcome.failed) == 2
    assert console.export_text().count("this does not suit me") == 1


PROGRAM = """
import sys
from pathlib import Path

from rich.console import Console

from scpo_bench.records.schema import Cell
from scpo_bench.runs.harness import Attempt
from scpo_bench.runs.launch import is_finished, run_cells
from scpo_bench.processes import sigterm_interrupts
from scpo_bench.suites.cells import run_folder

original = Attempt.execute


def counted(self, *rest):
    print("ran", self.cell.seed, flush=True)
    original(self, *rest)


if __name__ == "__main__":
    Attempt.execute = counted
    sigterm_interrupts()
    cells = [Cell.model_validate_json(line) for line in sys.stdin]
    results = Path(sys.argv[1])
    try:
        run_cells(cells, "s", results, int(sys.argv[2]), Console(quiet=True))
        print("finished", sum(is_finished(run_folder(results, "s", c), c) for c in cells))
    except KeyboardInterrupt:
        print("interrupted")
"""


def start_command(tmp_path, cells, jobs):
    """A command on the same results folder, in a process group of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "results", str(jobs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    command.stdin.write("\n".join(cell.model_dump_json() for cell in cells))
    command.stdin.close()
    return command


def test_commands_on_one_folder_share_the_work(tmp_path):
    """Three commands started together on the same cells: each cell must run once.

    Each command must end when all its cells are finished, whoever ran them.
    """
    todo = [other(seed=seed, steps=400) for seed in range(6)]
    commands = [start_command(tmp_path, todo, 1) for _ in range(3)]
    assert [command.wait(timeout=300) for command in commands] == [0] * 3
    said = [line for command in commands for line in command.stdout.read().splitlines()]
    assert sorted(said) == ["finished 6"] * 3 + [f"ran {seed}" for seed in range(6)]
    for command in commands:
        command.stdout.close()


def test_a_cell_that_another_command_gives_up_is_run(tmp_path, monkeypatch):
    """A locked cell must be tried again, also as the last one: its run may be killed."""
    (tmp_path / ".locks").mkdir()
    with open(tmp_path / ".locks" / f"s-{CELL.key()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(launch.time, "sleep", lambda seconds: lock.close())
        run_cells([CELL], "s", tmp_path, 1, QUIET)
        assert lock.closed
    assert read_run(run_folder(tmp_path, "s", CELL)).status == "finished"


def wait_until(condition):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not condition():
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("sent", ["SIGTERM to all processes", "SIGKILL to the parent"])
def test_processes_of_an_interrupted_command_record_it(tmp_path, agents_file, sent):
    """Stopped by a scheduler, or with its parent killed, a run must end soon, and as interrupted.

    Even if it is busy with a long update, which reports nothing to the parent.
    """
    cell = other(agent=f"{agents_file}:Sleeping")
    command = start_command(tmp_path, [cell, cell.model_copy(update={"seed": 2})], 2)
    folder = run_folder(tmp_path / "results", "s", cell)
    # Either of the two may be asleep first; the one that is looked at has to have begun.
    wait_until(lambda: (tmp_path / "asleep").exists() and (folder / "run.json").exists())
    if sent == "SIGKILL to the parent":
        command.kill()
    else:
        os.killpg(command.pid, signal.SIGTERM)
    wait_until(lambda: read_run(folder).status != "running")
    assert read_run(folder).status == "interrupted"
    assert command.wait(timeout=60) == (-signal.SIGKILL if "KILL" in sent else 0)
    command.stdout.close()


class _ParentDies:
    """A pipe whose other end takes the first message only."""

    def send(self, message):
        if message != (0, 0):
            raise BrokenPipeError


def _report_to_nobody(results):
    """What a cell's process does between its parent's death and the SIGTERM that follows."""
    launch._process(_ParentDies(), launch._Job("s", results, 1), CELL)


def test_a_parent_that_is_gone_is_no_failure_of_the_run(tmp_path):
    """A run that called this its failure would lose its checkpoint and start again."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_report_to_nobody, args=(tmp_path,)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert read_run(run_folder(tmp_path, "s", CELL)).status == "interrupted"


def test_a_second_sigterm_does_not_disturb_the_record(tmp_path):
    """A scheduler signals all processes, and a parent its children: a run may get it twice."""
    program = (
        "import os, signal\n"
        "from scpo_bench.processes import sigterm_interrupts\n"
        "sigterm_interrupts()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "except KeyboardInterrupt:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('written')\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "written\n"


def test_a_changed_cell_keeps_the_old_record(tmp_path):
    """A finished run of another configuration must be renamed, not overwritten."""
    run_cells([CELL], "s", tmp_path, 1, QUIET)
    changed = other(steps=40)
    run_cells([changed], "s", tmp_path, 1, QUIET)
    folder = run_folder(tmp_path, "s", CELL)
    assert read_run(folder).key == changed.key()
    assert read_run(folder.with_name(f"{folder.name}~{CELL.key()[:12]}")).key == CELL.key()


def test_unwritable_results_folder_is_one_line(tmp_path):
    """A file where the folder should be must be named before anything runs."""
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="--results: cannot write to"):
        run_cells([CELL], "s", tmp_path / "results", 1, QUIET)
