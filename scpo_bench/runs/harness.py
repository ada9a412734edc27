"""Runs one cell: its agent learns on its task, and the record of that goes into one folder."""

from __future__ import annotations

import contextlib
import errno
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from threadpoolctl import threadpool_limits

from scpo_bench.errors import UserError
from scpo_bench.records.files import RecordError, UpdateLog, read_run, read_updates, write_run
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
    return attempt_cell(cell, folder, suite, progress, workers).run


@threadpool_limits.wrap(limits=1)  # NumPy's BLAS; torch has a setting of its own
def attempt_cell(
    cell: Cell, folder: Path, suite: str, progress: Progress | None = None, workers: int = 1
) -> Attempt:
    """``run_cell`` for a caller who needs to know whose mistake a failure is."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "traceback.txt").unlink(missing_ok=True)
    attempt = Attempt(cell, folder, suite)
    try:
        attempt.learn(progress, workers)
    except (Exception, SystemExit) as failure:  # not KeyboardInterrupt
        attempt.fail(failure)
    finally:
        attempt.close()
    return attempt


class Attempt:
    """One attempt at a cell, from its start, or its checkpoint, to whatever ends it.

    run: its record, as last written. users_mistake: it failed at what the user asked for: an agent
    or environment that cannot be set up this way, or a start policy that is not safe.
    """

    def __init__(self, cell: Cell, folder: Path, suite: str) -> None:
        self.cell, self.folder = cell, folder
        key, now = cell.key(), _now()
        self.run = Run(
            suite=suite, key=key, cell=cell, status="running", provenance=provenance(), started=now
        )
        self.users_mistake = False
        self._status = "interrupted"
        self._error: str | None = None
        self._checkpointer: Checkpointer | None = None
        self._log: UpdateLog | None = None
        self._recorder: UpdateRecorder | None = None

    def learn(self, progress: Progress | None, workers: int) -> None:
        """Set up the run, or restore it from its checkpoint, and let the agent learn to the end."""
        cell, folder = self.cell, self.folder
        agent_class = load_agent(cell.agent)
        versions = {**self.run.provenance, "agent": source_digest(agent_class)}
        checkpointer = self._checkpointer = Checkpointer(folder, self.run.key, versions)
        checkpoint = checkpointer.load(agent_class)
        log, updates = _open_log(folder, checkpoint)
        self._log = log
        if not updates:  # the log is not the one that the checkpoint belongs to
            checkpoint = None
        with contextlib.ExitStack() as opened:
            env = (
                checkpoint.env if checkpoint else RecordingVecEnv(make_training_env(cell, workers))
            )
            opened.callback(env.close)
            self._write(started=_started(folder) if checkpoint else self.run.started)
            native = has_vector_env(cell.task)
            evaluator = Evaluator(cell.task, cell.env, cell.evaluation_episodes, native)
            opened.callback(evaluator.close)
            agent = checkpoint.agent if checkpoint else make_agent(cell, _normalised(cell, env))
            self._write(resolved_config=resolved_config(agent))

            def save(elapsed_s: float) -> None:
                checkpointer.save(agent, env, log, elapsed_s)

            recorder = self._recorder = UpdateRecorder(cell, env, evaluator, log, save, progress)
            if checkpoint is None:
                agent.learn(total_timesteps=cell.steps, callback=recorder)
            else:
                recorder.resume(updates, checkpoint.elapsed_s)
                left = cell.steps - agent.num_timesteps
                agent.learn(total_timesteps=left, callback=recorder, reset_num_timesteps=False)
            self._status = "finished"

    def fail(self, failure: BaseException) -> None:
        """Note why the attempt has failed; a full disk is an interruption, not a failure."""
        full = isinstance(failure, OSError) and failure.errno in NO_SPACE
        self._status = "interrupted" if full else "failed"
        self._error = _one_line(failure)
        # Before anything was learned, a ValueError is about the configuration it was given.
        setting_up = self._recorder is None
        self.users_mistake = isinstance(failure, ValueError if setting_up else UserError)
        with contextlib.suppress(OSError):
            (self.folder / "traceback.txt").write_text(traceback.format_exc())

    def close(self) -> None:
        """Write the end of the record."""
        updates = self._recorder.updates if self._recorder else []
        finished = self._status == "finished"
        if self._log is not None:
            self._log.close()
        self.run = self.run.model_copy(
            update={
                "status": self._status,
                "error": self._error,
                "updates": len(updates),
                "digest": digest(updates) if finished else None,
                "ended": _now(),
            }
        )
        with contextlib.suppress(OSError) if self._error else contextlib.nullcontext():
            if self._log is not None and finished:
                self._log.compress()
            write_run(self.folder, self.run)
        if self._checkpointer is not None and self._status in ("finished", "failed"):
            self._checkpointer.discard()

    def _write(self, **fields: Any) -> None:
        self.run = self.run.model_copy(update=fields)
        write_run(self.folder, self.run)


def _open_log(folder: Path, checkpoint: Checkpoint | None) -> tuple[UpdateLog, list[Update]]:
    """The run's log and the updates in it: those before the checkpoint, or none."""
    if checkpoint is not None:
        with contextlib.suppress(RecordError):
            return UpdateLog(folder, checkpoint.mark), read_updates(folder)
    return UpdateLog(folder), []


def _normalised(cell: Cell, env: RecordingVecEnv) -> VecEnv:
    """What the agent sees of ``env``: with ``normalize``, observations by running statistics."""
    return VecNormalize(env, norm_reward=False, clip_obs=10.0) if cell.normalize else env


def _started(folder: Path) -> str:
    """When the run that is resumed was started."""
    with contextlib.suppress(RecordError):
        return read_run(folder).started
    return _now()


def _one_line(failure: BaseException) -> str:
    if isinstance(failure, OSError) and failure.errno in NO_SPACE:
        return f"{failure.strerror}; free some and rerun the command: it resumes"
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
