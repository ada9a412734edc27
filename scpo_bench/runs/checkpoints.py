"""A run's whole state between two updates, so that a killed run resumes where it was.

A checkpoint is a pickle: the agent with its optimisers, buffers and generators, the environments in
their present state, and what the recorder has counted. Unpickling runs code, so only the user's own
checkpoints are read: each is sealed with a key in the user's configuration folder, and one that
came with somebody else's records is ignored.
"""

from __future__ import annotations

import contextlib
import hmac
import inspect
import io
import os
import pickle
import random
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnvWrapper

from scpo_bench.contract import Agent
from scpo_bench.records.files import CHECKPOINT_FILE, LogMark, RecordError, UpdateLog
from scpo_bench.records.plain_files import create, open_to_read, write_atomically
from scpo_bench.runs.recorder import RecordingVecEnv

# Of a run's time, spent on checkpoints at most; cheap ones are written at every update.
SHARE_OF_TIME = 0.02
RETRY_S = 60.0  # after a write that failed, on a full disk say
SEAL_BYTES = 32
TRANSIENT = ("_logger",)  # attributes that an SB3 agent sets anew in learn()


@dataclass
class Checkpoint:
    """What a run resumes from. mark: the end of the log; elapsed_s: the seconds until then."""

    agent: Agent
    env: RecordingVecEnv
    mark: LogMark
    elapsed_s: float


class _Pickler(cloudpickle.Pickler):
    """Leaves out the class members that SB3's VecEnvWrapper keeps: they cannot be pickled."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, VecEnvWrapper) and type(obj).__getstate__ is object.__getstate__:
            state = {k: v for k, v in obj.__dict__.items() if k != "class_attributes"}
            return object.__new__, (type(obj),), state, None, None, _set_wrapper_state
        return super().reducer_override(obj)


def _set_wrapper_state(wrapper: VecEnvWrapper, state: dict[str, Any]) -> None:
    wrapper.__dict__.update(state, class_attributes=dict(inspect.getmembers(type(wrapper))))


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def obstacle(agent: Agent) -> str | None:
    """The first attribute of the agent that cannot be pickled, and why; None if all can."""
    for name, value in _state(agent).items():
        try:
            _dumps(value)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
    return None


def _state(agent: Agent) -> dict[str, Any]:
    return {name: value for name, value in agent.__dict__.items() if name not in TRANSIENT}


def _key() -> bytes | None:
    """This user's sealing key, written on first use; None where it cannot be stored."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "scpo-bench"
        path = base / "checkpoint.key"
        if not path.exists():
            base.mkdir(parents=True, exist_ok=True)
            fresh = base / f".checkpoint.key.{secrets.token_hex(8)}"
            with create(fresh, mode=0o600) as file:
                file.write(secrets.token_bytes(SEAL_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)  # the first of several processes wins, with a whole key
            fresh.unlink()
        key = path.read_bytes()
        return key if len(key) == SEAL_BYTES else None
    return None


def _seal(key: bytes, cell_key: str, body: bytes) -> bytes:
    return hmac.digest(key, cell_key.encode() + b"\n" + body, "sha256")


class Checkpointer:
    """Writes one run's checkpoints into its folder, as often as ``SHARE_OF_TIME`` allows.

    cell_key, versions: what a checkpoint must agree with to be read; other code would continue
    differently. Without a key, or with an agent that cannot be pickled, there are no checkpoints:
    ``obstacle`` says why, and a killed run starts again.
    """

    def __init__(self, folder: Path, cell_key: str, versions: dict[str, Any]) -> None:
        self.path = folder / CHECKPOINT_FILE
        self._cell_key, self._versions, self._secret = cell_key, versions, _key()
        self._next = 0.0
        self.obstacle: str | None = None if self._secret else "no place to keep a key"

    def save(self, agent: Agent, env: RecordingVecEnv, log: UpdateLog, elapsed_s: float) -> None:
        """Write a checkpoint if one is due. env: the recording wrapper, below any VecNormalize."""
        if self._secret is None or self.obstacle or time.monotonic() < self._next:
            return
        began = time.monotonic()
        normaliser = agent.get_vec_normalize_env()
        state: dict[str, Any] = {
            "versions": self._versions,
            "agent": _state(agent),
            "env": env,
            # VecNormalize pickles without the environments below it.
            "normaliser": normaliser,
            "returns": None if normaliser is None else normaliser.returns,
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002 - SB3 uses it
            "elapsed_s": elapsed_s,
        }
        try:
            state["mark"] = log.mark()
            body = _dumps(state)
            write_atomically(self.path, _seal(self._secret, self._cell_key, body) + body)
        except OSError:
            self._next = time.monotonic() + RETRY_S  # the last checkpoint stays
            return
        except Exception as error:
            self.obstacle = f"{type(error).__name__}: {error}"
            return
        ended = time.monotonic()
        self._next = ended + (ended - began) / SHARE_OF_TIME

    def load(self, agent_class: type[Agent]) -> Checkpoint | None:
        """The run's last checkpoint, if it is ours and fits; sets the global random generators."""
        try:
            with open_to_read(self.path) as file:
                content = file.read()
        except (OSError, RecordError):
            return None
        seal, body = content[:SEAL_BYTES], content[SEAL_BYTES:]
        if self._secret is None or not hmac.compare_digest(
            seal, _seal(self._secret, self._cell_key, body)
        ):
            return None
        try:
            state = pickle.loads(body)
        except Exception:  # written by versions whose classes no longer exist
            return None
        if state["versions"] != self._versions:
            return None
        agent = object.__new__(agent_class)
        agent.__dict__.update(state["agent"])
        if state["normaliser"] is not None:
            state["normaliser"].set_venv(state["env"])
            state["normaliser"].returns = state["returns"]
        random.setstate(state["random"][0])
        np.random.set_state(state["random"][1])  # noqa: NPY002 - as above
        torch.set_rng_state(state["random"][2])
        return Checkpoint(agent, state["env"], state["mark"], state["elapsed_s"])

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
