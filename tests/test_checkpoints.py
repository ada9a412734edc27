"""A killed run goes on from its last checkpoint, and its record is that of a run that was never
killed.
"""

import itertools
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest

from scpo_bench.records.files import (
    CHECKPOINT_FILE,
    LogMark,
    RecordError,
    UpdateLog,
    read_run,
    read_updates,
)
from scpo_bench.records.schema import Cell, Update
from scpo_bench.runs import checkpoints
from scpo_bench.runs.harness import run_cell

EXHAUSTIVE = bool(os.environ.get("SCPO_BENCH_EXHAUSTIVE"))
KILLS = 50 if EXHAUSTIVE else 3

REGRESSION = {
    "task": "scpo_bench/HarmfulRegression-v0",
    "start": "backup",
    "cost_limit": 0.0,
    "num_envs": 4,
    "seed": 1,
}
SUPERVISED = {"n_steps": 10, "labels": "visited", "learning_rate": 0.3}
CELLS = {
    "scpo": {**REGRESSION, "steps": 800, "config": SUPERVISED},
    "sgd": {**REGRESSION, "steps": 2000, "config": SUPERVISED},
    "ppo": {**REGRESSION, "steps": 1200, "config": {"n_steps": 10, "batch_size": 20}},
    "ppo-lagrangian": {
        **REGRESSION,
        "steps": 2000,
        "config": {"steps_per_update": 40, "critic_passes": 5},
    },
    "cpo": {**REGRESSION, "steps": 2000, "config": {"steps_per_update": 40}},
    "cvpo": {
        **REGRESSION,
        "steps": 1600,
        "config": {
            "steps_per_update": 40,
            "learning_starts": 100,
            "batch_size": 32,
            "net_arch": [32, 32],
            "episode_steps": 10,
        },
    },
}
if EXHAUSTIVE:
    CELLS["ppo-lagrangian normalised"] = {
        "task": "SafetyPointGoal1-v0",
        "cost_limit": 25.0,
        "num_envs": 2,
        "seed": 1,
        "steps": 3000,
        "normalize": True,
        "evaluation_episodes": 1,
        "config": {"steps_per_update": 300, "critic_passes": 2},
    }


def cell_of(name: str) -> Cell:
    return Cell(agent=name.split()[0], **{"evaluation_episodes": 20, **CELLS[name]})


def in_own_process(cell, folder):
    """A process that runs the cell, forked from one that has the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scpo_bench.runs.harness"])
    process = context.Process(target=run_cell, args=(cell, folder, "s"))
    process.start()
    return process


@pytest.mark.parametrize("name", CELLS)
def test_killed_at_random_moments(tmp_path, name):
    """kill -9, again and again: the digest in the end is that of the undisturbed run."""
    cell = cell_of(name)
    whole = in_own_process(cell, tmp_path / "first")  # the first one waits for the imports
    whole.join()
    began = time.monotonic()
    whole = in_own_process(cell, tmp_path / "whole")
    whole.join()
    duration = time.monotonic() - began
    expected = read_run(tmp_path / "whole")
    assert expected.status == "finished"

    rng = np.random.default_rng(0)
    kills, attempt = 0, 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{attempt}"
        attempt += 1
        while True:
            process = in_own_process(cell, folder)
            process.join(rng.uniform(0, duration) if kills < KILLS else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        run = read_run(folder)
        assert (run.status, run.digest, run.updates) == (
            "finished",
            expected.digest,
            expected.updates,
        )
        assert not (folder / CHECKPOINT_FILE).exists()


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    """A run that was stopped in the middle, and its cell."""
    cell = cell_of("cpo")
    from scpo_bench.baselines.cpo import CPO

    def stopped(self):
        if self._n_updates == 20:
            raise KeyboardInterrupt
        original(self)

    original = CPO.train
    monkeypatch.setattr(CPO, "train", stopped)
    monkeypatch.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, tmp_path, "s")
    monkeypatch.undo()
    assert len(read_updates(tmp_path)) == 21
    return tmp_path, cell


def test_goes_on_instead_of_starting_again(half_done):
    """Only the missing steps are taken: progress begins where the run was stopped, and time goes on
    too.
    """
    folder, cell = half_done
    shown = []
    run = run_cell(cell, folder, "s", lambda steps, updates: shown.append((steps, updates)))
    assert run.status == "finished"
    updates = read_updates(folder)
    assert [u.update for u in updates] == list(range(51))
    assert all(
        later.wall_time_s >= earlier.wall_time_s for earlier, later in itertools.pairwise(updates)
    )
    assert min(updates for _, updates in shown) >= 20


@pytest.mark.parametrize(
    "fault", ["sealed by someone else", "cut short", "log shorter", "log changed"]
)
def test_checkpoint_that_does_not_fit_is_passed_over(half_done, fault, monkeypatch, tmp_path):
    """Then the run starts again, and ends with the same record.

    Nothing of a foreign checkpoint is unpickled.
    """
    folder, cell = half_done
    path = folder / CHECKPOINT_FILE
    if fault == "sealed by someone else":
        body = pickle.dumps(_Trap(folder / "trapped"))
        path.write_bytes(bytes(32) + body)
    elif fault == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        log = folder / "updates.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        if fault == "log shorter":
            log.write_bytes(b"".join(lines[:5]))
        else:
            log.write_bytes(
                b"".join([lines[0].replace(b'"episodes":0', b'"episodes":1'), *lines[1:]])
            )
    shown = []
    run = run_cell(cell, folder, "s", lambda steps, updates: shown.append(updates))
    assert run.digest == run_cell(cell, tmp_path / "whole", "s").digest
    assert not (folder / "trapped").exists()


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_no_place_for_a_key_means_no_checkpoints(tmp_path, monkeypatch):
    """A home that cannot be written costs the checkpoints, not the run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    checkpointer = checkpoints.Checkpointer(tmp_path, "key", {})
    assert checkpointer.obstacle
    assert (
        run_cell(cell_of("cpo").model_copy(update={"steps": 80}), tmp_path / "run", "s").status
        == "finished"
    )


def _update(number):
    return Update(update=number, interaction_steps=number, probe_steps=0, episodes=0)


def test_log_goes_on_from_a_mark(tmp_path):
    """Lines behind the mark are dropped, those before it must be as they were."""
    log = UpdateLog(tmp_path)
    log.append(_update(0))
    mark = log.mark()
    log.append(_update(1))
    log.close()
    again = UpdateLog(tmp_path, mark)
    assert len(read_updates(tmp_path)) == 1
    again.append(_update(1))
    again.compress()
    UpdateLog(tmp_path, mark).close()  # killed between compressing and saying so
    assert len(read_updates(tmp_path)) == 1
    with pytest.raises(RecordError, match=r"updates\.jsonl: is not what it was"):
        UpdateLog(tmp_path, LogMark(mark.bytes, "0" * 64))


def test_full_disk_is_named_and_the_run_goes_on_later(tmp_path):
    """Writing fails in the middle: one line says so, and with room again the record ends as if
    nothing had happened.
    """
    cell = cell_of("cpo")
    folder = tmp_path / "full"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run_with_little_room, args=(cell, folder))
    process.start()
    process.join()
    assert process.exitcode == 0
    run = read_run(folder)
    assert run.status == "interrupted"
    assert "free some and give the same command again" in run.error
    assert 0 < len(read_updates(folder)) < 51
    assert run_cell(cell, folder, "s").digest == run_cell(cell, tmp_path / "whole", "s").digest


def _run_with_little_room(cell, folder):
    """No file may grow beyond 20 kB: what a full disk looks like to a program (EFBIG instead of
    ENOSPC).
    """
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    run_cell(cell, folder, "s")
