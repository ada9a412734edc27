"""Runs one cell: its agent learns on its task, and the record of that goes into one folder."""

from __future__ import annotations

import contextlib
import errno
import math
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from threadpoolctl import threadpool_limits

from scpo_bench.contract import Agent
from scpo_bench.errors import UserError
from scpo_bench.records.files import (
    TRACEBACK_FILE,
    RecordError,
    UpdateLog,
    read_run,
    read_updates,
    write_run,
)
from scpo_bench.records.plain_files import remove_parts, write_atomically
from scpo_bench.records.schema import Cell, Run, Update, digest
from scpo_bench.runs.agents import make_agent, resolved_config, source_digest
from scpo_bench.runs.checkpoints import Checkpoint, Checkpointer
from scpo_bench.runs.environments import has_vector_env, make_training_env
from scpo_bench.runs.evaluation import Evaluator
from scpo_bench.runs.provenance import provenance
from scpo_bench.runs.recorder import Progress, RecordingVecEnv, UpdateRecorder
from scpo_bench.suites.registry import load_agent

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_cell(
    cell: Cell, folder: Path, suite: str, progress: Progress | None = None, workers: int = 1
) -> Run:
    """Run a cell into ``folder``, from its last checkpoint if it has one, and return its record.

    The record says how the run ended: an agent's or environment's failure is not raised.
    KeyboardInterrupt is recorded and raised again. workers: processes that step the environments;
    the record does not depend on it.
    """
    attempt = Attempt(cell, folder, suite)
    attempt.execute(progress, workers)
    return attempt.record


class Attempt:
    """One attempt at a cell, from its start, or its checkpoint, to whatever ends it.

    record: what run.json says, or will. users_mistake: it failed at what the user asked for: an
    agent or environment that cannot be set up this way, or an unsafe start policy.
    """

    def __init__(self, cell: Cell, folder: Path, suite: str) -> None:
        self.cell, self.folder = cell, folder
        self.record = Run(suite=suite, key=cell.key(), cell=cell, status="running", started=_now())
        self.users_mistake = False
        self.agent: Agent | None = None  # once it is made
        self._checkpointer: Checkpointer | None = None
        self._log: UpdateLog | None = None
        self._recorder: UpdateRecorder | None = None

    @threadpool_limits.wrap(limits=1)  # NumPy's BLAS; torch has a setting of its own
    def execute(self, progress: Progress | None, workers: int) -> None:
        """What ``run_cell`` does."""
        torch.set_num_threads(1)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_parts(self.folder)
        (self.folder / TRACEBACK_FILE).unlink(missing_ok=True)
        try:
            self._learn(progress, workers)
        except (Exception, SystemExit) as failure:  # not KeyboardInterrupt
            self._fail(failure)
        finally:
            self._close()

    def _learn(self, progress: Progress | None, workers: int) -> None:
        """Set up the run, or restore it from its checkpoint, and let the agent learn to the end."""
        cell, folder = self.cell, self.folder
        self._set(provenance=provenance())
        agent_class = load_agent(cell.agent)
        versions = {**self.record.provenance, "agent": source_digest(agent_class)}
        del versions["blas"]  # it lists what happens to be loaded; the other fields decide it
        checkpointer = self._checkpointer = Checkpointer(folder, self.record.key, versions)
        saved = checkpointer.load(agent_class)
        log, updates = _open_log(folder, saved)
        self._log = log
        if not updates:  # the log is not the one that the checkpoint belongs to
            saved = None
        with contextlib.ExitStack() as opened:
            env = saved.env if saved else _recorded(cell, workers)
            opened.callback(env.close)
            if saved:
                self._set(started=_started(folder))
            write_run(folder, self.record)
            native = has_vector_env(cell.task)
            evaluator = Evaluator(
                cell.task, cell.env, cell.evaluation_episodes, native, cell.evaluation_starts
            )
            opened.callback(evaluator.close)
            agent = saved.agent if saved else make_agent(cell, _normalised(cell, env))
            self.agent = agent
            self._set(resolved_config=resolved_config(agent))
            write_run(folder, self.record)

            def save(elapsed_s: float) -> None:
                checkpointer.save(agent, env, log, elapsed_s)

            recorder = self._recorder = UpdateRecorder(cell, env, evaluator, log, save, progress)
            if saved is None:
                agent.learn(total_timesteps=cell.steps, callback=recorder)
            else:
                recorder.resume(updates, saved.elapsed_s)
                left = cell.steps - agent.num_timesteps
                agent.learn(total_timesteps=left, callback=recorder, reset_num_timesteps=False)
        self._set(status="finished")

    def _fail(self, failure: BaseException) -> None:
        """Note why the attempt has failed; a full disk is an interruption, not a failure."""
        full = isinstance(failure, OSError) and failure.errno in NO_SPACE
        self._set(status="interrupted" if full else "failed", error=_one_line(failure))
        # Until the start policy is recorded, a ValueError is about the settings of the cell.
        setting_up = self._recorder is None or not self._recorder.updates
        self.users_mistake = isinstance(failure, ValueError if setting_up else UserError)
        with contextlib.suppress(OSError):
            text = traceback.format_exc().encode(errors="replace")
            write_atomically(self.folder / TRACEBACK_FILE, text)

    def _close(self) -> None:
        """Write the end of the record."""
        updates = self._recorder.updates if self._recorder else []
        if self._log is not None:
            self._log.close()
        if self.record.status == "running":
            self._set(status="interrupted")
        finished = self.record.status == "finished"
        result = digest(updates) if finished else None
        self._set(updates=len(updates), digest=result, ended=_end(self.record.started, updates))
        # What is not finished is taken up again; its last lines matter less than what ended it.
        with contextlib.nullcontext() if finished else contextlib.suppress(OSError):
            if self._log is not None and finished:
                self._log.compress()
            write_run(self.folder, self.record)
        if self._checkpointer is not None and self.record.status != "interrupted":
            self._checkpointer.discard()

    def _set(self, **fields: Any) -> None:
        self.record = self.record.model_copy(update=fields)


def _open_log(folder: Path, checkpoint: Checkpoint | None) -> tuple[UpdateLog, list[Update]]:
    """The run's log and the updates in it: those before the checkpoint, or none."""
    if checkpoint is not None:
        with contextlib.suppress(RecordError):
            return UpdateLog(folder, checkpoint.mark), read_updates(folder)
    return UpdateLog(folder), []


def _recorded(cell: Cell, workers: int) -> RecordingVecEnv:
    return RecordingVecEnv(make_training_env(cell, workers), cell.margin)


def _normalised(cell: Cell, env: RecordingVecEnv) -> VecEnv:
    """What the agent sees of ``env``: with ``normalize``, observations by running statistics."""
    return VecNormalize(env, norm_reward=False, clip_obs=10.0) if cell.normalize else env


def _started(folder: Path) -> str:
    """When the run that is resumed was started."""
    with contextlib.suppress(ValueError):
        started = read_run(folder).started
        if datetime.fromisoformat(started).tzinfo is not None:
            return started
    return _now()


def _end(started: str, updates: list[Update]) -> str:
    """Now, but not before the recorded seconds have passed: a clock may be set back meanwhile."""
    seconds = math.ceil(updates[-1].wall_time_s) if updates else 0
    earliest = datetime.fromisoformat(started) + timedelta(seconds=seconds)
    return max(datetime.now(UTC), earliest).isoformat(timespec="seconds")


def _one_line(failure: BaseException) -> str:
    if isinstance(failure, OSError) and failure.errno in NO_SPACE:
        return f"{failure.strerror}; free some and rerun the command: it resumes"
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
