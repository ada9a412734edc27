"""A killed run resumes from its last checkpoint; its record is that of an undisturbed run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import random
import time

import numpy as np
import pytest
import torch

from scpo_bench.records.files import (
    CHECKPOINT_FILE,
    LogMark,
    RecordError,
    UpdateLog,
    read_run,
    read_updates,
)
from scpo_bench.records.schema import Cell, Update
from scpo_bench.runs import checkpoints, provenance, recorder
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
    # Checkpoints fall within episodes, of which the filter keeps count.
    "filtered:sgd": {
        **REGRESSION,
        "task": "scpo_bench/DoubleIntegratorImitation-v1",
        "steps": 2000,
        "config": {"n_steps": 20, "learning_rate": 0.3},
    },
    "ppo": {**REGRESSION, "steps": 1200, "config": {"n_steps": 10, "batch_size": 20}},
    "ppo-lagrangian": {
        **REGRESSION,
        "steps": 2000,
        "config": {"steps_per_update": 40, "critic_passes": 5},
    },
    "ppo-pid": {
        **REGRESSION,
        "steps": 2000,
        "config": {"steps_per_update": 40, "critic_passes": 5},
    },
    "focops": {**REGRESSION, "steps": 2000, "config": {"steps_per_update": 40, "critic_passes": 5}},
    "p3o": {**REGRESSION, "steps": 2000, "config": {"steps_per_update": 40, "critic_passes": 5}},
    "cpo": {**REGRESSION, "steps": 2000, "config": {"steps_per_update": 40}},
    "trpo-lagrangian": {**REGRESSION, "steps": 2000, "config": {"steps_per_update": 40}},
    "crpo": {**REGRESSION, "steps": 2000, "config": {"steps_per_update": 40}},
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
    "sac-lagrangian": {
        **REGRESSION,
        "steps": 1600,
        "config": {
            "steps_per_update": 40,
            "learning_starts": 100,
            "batch_size": 32,
            "net_arch": [32, 32],
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
    """A process that runs the cell, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scpo_bench.runs.harness", "torch._dynamo"])
    process = context.Process(target=run_cell, args=(cell, folder, "s"))
    process.start()
    return process


@pytest.mark.parametrize("name", CELLS)
def test_killed_at_random_moments(tmp_path, name):
    """However often a run is killed (kill -9), its digest must be that of the undisturbed run."""
    cell = cell_of(name)
    whole = in_own_process(cell, tmp_path / "first")  # waits for the imports
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


def stop_after(cell, folder, updates, monkeypatch, workers=1):
    """Run the cell until it has recorded so many updates, with a checkpoint at each of them."""

    def stop(steps, recorded):
        if recorded == updates:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "SHARE_OF_TIME", float("inf"))
        patched.setattr(recorder, "PROGRESS_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, folder, "s", stop, workers)
    assert read_run(folder).status == "interrupted"
    assert len(read_updates(folder)) == updates


HOPPER = Cell(
    agent="ppo-lagrangian",
    task="SafetyHopperVelocity-v1",
    seed=1,
    steps=1200,
    num_envs=2,
    cost_limit=25.0,
    normalize=True,
    evaluation_episodes=1,
    config={"steps_per_update": 300, "critic_passes": 2},
)
OFF_POLICY = {"steps_per_update": 300, "learning_starts": 300, "batch_size": 32}
HOPPER_CVPO = HOPPER.model_copy(update={"agent": "cvpo", "config": OFF_POLICY})


@pytest.mark.parametrize(
    ("cell", "workers"),
    [(cell_of("cpo"), 1), (cell_of("ppo"), 1), (HOPPER, 1), (HOPPER, 2), (HOPPER_CVPO, 1)],
    ids=["native", "global generators", "normalised", "two workers", "off-policy"],
)
def test_an_interrupted_run_resumes_with_equal_digest(tmp_path, cell, workers, monkeypatch):
    """A checkpoint must hold everything: policy, statistics, environments, generators, counters."""
    stop_after(cell, tmp_path / "stopped", 3, monkeypatch, workers)
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # as in another process
        seed(99)
    resumed_at = []

    def note(steps, updates):
        resumed_at.append(updates)

    run = run_cell(cell, tmp_path / "stopped", "s", note, workers)
    assert min(resumed_at) >= 3
    whole = run_cell(cell, tmp_path / "whole", "s")
    assert (run.status, run.digest) == ("finished", whole.digest)


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    """A run that was stopped in the middle, and its cell."""
    cell = cell_of("cpo")
    stop_after(cell, tmp_path, 21, monkeypatch)
    return tmp_path, cell


def test_resumes_instead_of_starting_again(half_done, monkeypatch):
    """Only the missing steps may be taken; time and the start of the run must be kept.

    Another process may have loaded another BLAS beside the one that runs use.
    """
    folder, cell = half_done
    monkeypatch.setattr(provenance, "_blas_kernels", lambda: ["mkl 2030 Skylake"])
    started = read_run(folder).started
    shown = []
    run = run_cell(cell, folder, "s", lambda steps, updates: shown.append((steps, updates)))
    assert run.status == "finished"
    assert run.started == started
    updates = read_updates(folder)
    assert [u.update for u in updates] == list(range(51))
    assert all(
        later.wall_time_s >= earlier.wall_time_s for earlier, later in itertools.pairwise(updates)
    )
    assert min(updates for _, updates in shown) >= 20


@pytest.mark.parametrize(
    "fault", ["sealed by someone else", "cut short", "log shorter", "log changed"]
)
def test_checkpoint_that_does_not_fit_is_ignored(half_done, fault, tmp_path):
    """The run must start again and end with the same record.

    Nothing of a checkpoint that somebody else wrote may be unpickled: that would run their code.
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
    """A home that cannot be written must cost the checkpoints, not the run."""
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


def test_log_continues_from_a_mark(tmp_path):
    """Lines after the mark must be dropped, and a change before it must be noticed."""
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


def test_full_disk_is_named_and_the_run_resumes_later(tmp_path):
    """A full disk must be an interruption with a reason, after which the run resumes."""
    cell = cell_of("cpo")
    folder = tmp_path / "full"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run_with_little_room, args=(cell, folder))
    process.start()
    process.join()
    assert process.exitcode == 0
    run = read_run(folder)
    assert run.status == "interrupted"
    assert "free some and rerun the command" in run.error
    assert 0 < len(read_updates(folder)) < 51
    assert run_cell(cell, folder, "s").digest == run_cell(cell, tmp_path / "whole", "s").digest


def _run_with_little_room(cell, folder):
    """Run it where no file may grow beyond 20 kB: like a full disk, with EFBIG for ENOSPC."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    run_cell(cell, folder, "s")
