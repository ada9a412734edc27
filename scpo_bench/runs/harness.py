"""Runs one cell: task + agent + recorder -> one run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import inspect
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from threadpoolctl import threadpool_limits

from scpo_bench.contract import task_of
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy
from scpo_bench.records.files import RecordError, UpdateLog, read_run, read_updates, write_run
from scpo_bench.records.schema import Cell, Run, Update, digest
from scpo_bench.runs.checkpoints import Checkpoint, Checkpointer
from scpo_bench.runs.native_vec_env import NativeVecEnv
from scpo_bench.runs.recorder import Evaluator, RecordingVecEnv, UpdateRecorder
from scpo_bench.runs.worker_env import WorkerVecEnv
from scpo_bench.suites.registry import load_agent

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Progress = Callable[[int, int], None]
PACKAGES = (
    "scpo-bench",
    "torch",
    "numpy",
    "gymnasium",
    "stable-baselines3",
    "mujoco",
    "safety-gymnasium",
    "scipy",
)


def make_training_env(cell: Cell, workers: int = 1) -> VecEnv:
    """The cell's vector environment: native where the task has one, else instances stepped in
    ``workers`` processes.
    """
    spec = gym.spec(cell.task)
    if spec.vector_entry_point is not None:
        vector_env = gym.make_vec(
            cell.task, num_envs=cell.num_envs, vectorization_mode="vector_entry_point", **cell.env
        )
        return NativeVecEnv(vector_env)
    make_envs = [functools.partial(gym.make, cell.task, **cell.env) for _ in range(cell.num_envs)]
    with contextlib.closing(make_envs[0]()) as example:
        boxes = isinstance(example.observation_space, Box) and isinstance(example.action_space, Box)
    return WorkerVecEnv(make_envs, workers) if boxes else DummyVecEnv(make_envs)  # type: ignore[arg-type]


def make_agent(cell: Cell, env: VecEnv) -> Any:
    """The cell's agent on ``env``, starting from the backup policy if the cell says so.

    ValueError if the task has no backup, or the agent takes no such policy.
    """
    agent_class = load_agent(cell.agent)
    # One branch of the seed tree per use: the agent's generators and its environments' must not run
    # in step.
    seed = int(np.random.SeedSequence(cell.seed).generate_state(1)[0])
    config = dict(cell.config)
    if "cost_limit" in _config_fields(agent_class):
        config.setdefault(
            "cost_limit", cell.cost_limit
        )  # one limit per cell: what is judged is what the agent is told
    policy: Any = "MlpPolicy"
    if cell.start != "random":
        config["policy_kwargs"] = {
            **config.get("policy_kwargs", {}),
            "backup": _start_policy(cell, env),
        }
        if getattr(agent_class, "policy_aliases", {}).get("MlpPolicy") is ActorCriticPolicy:
            policy = BackupActorCriticPolicy
    try:
        return agent_class(policy, env, seed=seed, **config)
    except TypeError as error:
        if cell.start != "random" and "backup" in str(error):
            raise ValueError(
                f"start: '{cell.start}': agent '{cell.agent}' has no policy that starts at a backup"
            ) from None
        raise


def _start_policy(cell: Cell, env: VecEnv) -> AffineBackup:
    """``start: backup`` or ``zero``, as a module. ValueError if the task has no such thing."""
    if cell.start == "zero":
        if not isinstance(env.action_space, Box) or not isinstance(env.observation_space, Box):
            raise ValueError(
                f"start: 'zero' needs Box observations and actions, and {cell.task} has others; use 'random'"
            )
        return AffineBackup(
            np.zeros(
                (int(np.prod(env.action_space.shape)), int(np.prod(env.observation_space.shape)))
            )
        )
    task = task_of(env)
    if task is None:
        raise ValueError(
            f"start: 'backup' needs a task with a backup controller, and {cell.task} has none; use 'zero' or 'random'"
        )
    return AffineBackup(*task.backup_gain())


def _config_fields(agent_class: type[Any]) -> set[str]:
    """Names of the fields of the agent's Config dataclass, if it has one."""
    config_class = getattr(agent_class, "Config", None)
    return (
        {f.name for f in dataclasses.fields(config_class)}
        if dataclasses.is_dataclass(config_class)
        else set()
    )


def resolved_config(agent: Any) -> dict[str, Any]:
    """The agent's configuration with every default filled in, as far as it shows one (a ``config``
    dataclass).
    """
    config = getattr(agent, "config", None)
    return (
        dataclasses.asdict(config)
        if dataclasses.is_dataclass(config) and not isinstance(config, type)
        else {}
    )


def provenance() -> dict[str, Any]:
    """Package versions, git commit of the working directory's project if there is one, CPU and
    threads.
    """
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "commit": _git_commit(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()}-{platform.machine()}",
    }


@functools.cache
def _git_commit() -> str | None:
    """Commit of this package's source tree, "+" if it has local changes; None for an installed
    package.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        changes = subprocess.run(
            [
                "git",
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                "scpo_bench",
                "envs",
                "baselines",
                "benchmarks.yaml",
            ],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@threadpool_limits.wrap(limits=1)  # NumPy's BLAS; torch has a setting of its own
def run_cell(
    cell: Cell, folder: Path, suite: str, progress: Progress | None = None, workers: int = 1
) -> Run:
    """Run one cell into ``folder``, from its last checkpoint if it has one, and return its run
    record, which says how it ended.

    workers: processes that step the environments; the record does not depend on it. An agent's or
    environment's failure is recorded, not raised; KeyboardInterrupt is recorded and raised again.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "traceback.txt").unlink(missing_ok=True)
    run = Run(
        suite=suite,
        key=cell.key(),
        cell=cell,
        status="running",
        provenance=provenance(),
        started=_now(),
    )
    status, error = "interrupted", None
    recorder: UpdateRecorder | None = None
    log: UpdateLog | None = None
    checkpointer: Checkpointer | None = None
    try:
        agent_class = load_agent(cell.agent)
        checkpointer = Checkpointer(
            folder, run.key, {**run.provenance, "agent": _source_digest(agent_class)}
        )
        checkpoint = checkpointer.load(agent_class)
        log, done = _open_log(folder, checkpoint)
        agent = None
        if checkpoint is not None and done:
            agent, env, elapsed = checkpoint.agent, checkpoint.env, checkpoint.elapsed_s
            run = run.model_copy(update={"started": _started(folder) or run.started})
        else:
            env, elapsed = RecordingVecEnv(make_training_env(cell, workers)), 0.0
        write_run(folder, run)
        evaluator = Evaluator(
            cell.task,
            cell.env,
            cell.evaluation_episodes,
            native=hasattr(env.unwrapped, "vector_env"),
        )
        try:
            if agent is None:
                agent = make_agent(
                    cell,
                    VecNormalize(env, norm_reward=False, clip_obs=10.0) if cell.normalize else env,
                )
            run = run.model_copy(update={"resolved_config": resolved_config(agent)})
            write_run(folder, run)
            recorder = UpdateRecorder(
                cell, env, evaluator, log, checkpointer, progress, done, elapsed
            )
            if done:
                agent.learn(
                    total_timesteps=cell.steps - agent.num_timesteps,
                    callback=recorder,
                    reset_num_timesteps=False,
                )
            else:
                agent.learn(total_timesteps=cell.steps, callback=recorder)
            status = "finished"
        finally:
            evaluator.close()
            env.close()
    except (Exception, SystemExit) as failure:  # KeyboardInterrupt goes through
        full = isinstance(failure, OSError) and failure.errno in NO_SPACE
        status, error = "interrupted" if full else "failed", _one_line(failure)
        with contextlib.suppress(OSError):
            (folder / "traceback.txt").write_text(traceback.format_exc())
    finally:
        updates = recorder.updates if recorder else []
        if log is not None:
            log.close()
        run = run.model_copy(
            update={
                "status": status,
                "error": error,
                "updates": len(updates),
                "digest": digest(updates) if status == "finished" else None,
                "ended": _now(),
            }
        )
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            if log is not None and status == "finished":
                log.compress()
            write_run(folder, run)
        if checkpointer is not None and status in ("finished", "failed"):
            checkpointer.discard()
    return run


def _open_log(folder: Path, checkpoint: Checkpoint | None) -> tuple[UpdateLog, list[Update]]:
    """The run's log, and the updates that stand in it: up to the checkpoint, or none."""
    if checkpoint is not None:
        with contextlib.suppress(RecordError):
            log = UpdateLog(folder, checkpoint.mark)
            return log, read_updates(folder)
    return UpdateLog(folder), []


def _started(folder: Path) -> str | None:
    """When the run that goes on was begun."""
    try:
        return read_run(folder).started
    except RecordError:
        return None


def _source_digest(agent_class: type[Any]) -> str | None:
    """SHA-256 of the file that defines the agent: a run does not go on with code that it was not
    begun with.
    """
    with contextlib.suppress(OSError, TypeError):
        return hashlib.sha256(Path(inspect.getfile(agent_class)).read_bytes()).hexdigest()
    return None


def _one_line(failure: BaseException) -> str:
    text = str(failure).splitlines()[0] if str(failure) else ""
    if isinstance(failure, OSError) and failure.errno in NO_SPACE:
        return f"{failure.strerror}; free some and give the same command again: the run goes on from its last checkpoint"
    return f"{type(failure).__name__}: {text}"


def describe_environment() -> list[tuple[str, str, str]]:
    """(what, found, hint) for ``scpo-bench doctor``; an empty hint means it is in order."""
    rows = [
        (
            "python",
            platform.python_version(),
            "" if sys.version_info >= (3, 11) else "needs Python >= 3.11",
        )
    ]
    hints = {
        "safety-gymnasium": "pip install --no-deps safety-gymnasium",
        "torch": "pip install torch==2.13.0",
    }
    for name in PACKAGES:
        try:
            rows.append((name, version(name), ""))
        except PackageNotFoundError:
            rows.append((name, "missing", hints.get(name, f"pip install {name}")))
    rows.append(("cores", str(os.cpu_count()), ""))
    return rows
