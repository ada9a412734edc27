"""A run's whole state between two updates, so that a killed run goes on as if nothing had happened.

A checkpoint is a pickle: the agent with its optimisers, buffers and generators, the environments in
the state they are in, and what the recorder has counted. Reading a pickle runs code, so only the
user's own are read: each is sealed with a key that stays in the user's configuration folder, and a
checkpoint that came with somebody else's records is passed over.
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

from scpo_bench.records.files import CHECKPOINT_FILE, LogMark, UpdateLog, write_atomically

SHARE_OF_TIME = (
    0.02  # spent on writing checkpoints, at most: cheap ones are written at every update
)
SEAL_BYTES = 32
# What an SB3 agent makes anew in its next learn().
TRANSIENT = ("_logger",)


@dataclass
class Checkpoint:
    """What a run needs to go on. env: the recording environment; mark: how far the log had been
    written; elapsed_s: until then.
    """

    agent: Any
    env: Any
    mark: LogMark
    elapsed_s: float


class _Pickler(cloudpickle.Pickler):
    """Passes over what SB3's VecEnvWrapper keeps of its class, which no pickle can hold and which
    follows from the class.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, VecEnvWrapper) and type(obj).__getstate__ is object.__getstate__:
            state = {
                name: value for name, value in obj.__dict__.items() if name != "class_attributes"
            }
            return object.__new__, (type(obj),), state, None, None, _set_wrapper_state
        return super().reducer_override(obj)


def _set_wrapper_state(wrapper: VecEnvWrapper, state: dict[str, Any]) -> None:
    wrapper.__dict__.update(state, class_attributes=dict(inspect.getmembers(type(wrapper))))


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def obstacle(agent: Any) -> str | None:
    """The first attribute of the agent that no checkpoint can hold, and why; None if there is none.
    """
    for name, value in _state(agent).items():
        try:
            _dumps(value)
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
    return None


def _state(agent: Any) -> dict[str, Any]:
    return {name: value for name, value in agent.__dict__.items() if name not in TRANSIENT}


def _key() -> bytes | None:
    """This user's sealing key, made on first use; None where there is no place to keep one."""
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "scpo-bench"
    path = base / "checkpoint.key"
    with contextlib.suppress(OSError):
        if not path.exists():
            base.mkdir(parents=True, exist_ok=True)
            fresh = base / f".checkpoint.key.{os.getpid()}"
            fresh.touch(mode=0o600)
            fresh.write_bytes(secrets.token_bytes(SEAL_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)  # the first of several processes wins, with a whole key
            fresh.unlink()
        key = path.read_bytes()
        return key if len(key) == SEAL_BYTES else None
    return None


def _seal(key: bytes, cell_key: str, body: bytes) -> bytes:
    return hmac.digest(key, cell_key.encode() + b"\n" + body, "sha256")


class Checkpointer:
    """Writes the checkpoints of one run into its folder, as often as ``SHARE_OF_TIME`` allows.

    cell_key, versions: what a checkpoint must agree with to be read again; other code would not go
    on in the same way. ``obstacle`` says why there are none, where there are none.
    Without a key to seal with, or with an agent that cannot be pickled, there are no checkpoints:
    the run starts again when killed.
    """

    def __init__(self, folder: Path, cell_key: str, versions: dict[str, Any]) -> None:
        self.path = folder / CHECKPOINT_FILE
        self._cell_key, self._versions, self._secret = cell_key, versions, _key()
        self._next = 0.0
        self.obstacle: str | None = None if self._secret else "no place to keep a key"

    def save(self, agent: Any, env: Any, log: UpdateLog, elapsed_s: float) -> None:
        """Write a checkpoint if one is due. env: the harness's recording environment, below any
        VecNormalize.
        """
        if self._secret is None or self.obstacle or time.monotonic() < self._next:
            return
        began = time.monotonic()
        normaliser = agent.get_vec_normalize_env()
        state = {
            "versions": self._versions,
            "agent": _state(agent),
            "env": env,
            # the same object as the agent's env, without the environments below it
            "normaliser": normaliser,
            "returns": None if normaliser is None else normaliser.returns,
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
            "elapsed_s": elapsed_s,
        }
        try:
            state["mark"] = log.mark()
            body = _dumps(state)
            write_atomically(self.path, _seal(self._secret, self._cell_key, body) + body)
        except OSError:
            self._next = (
                time.monotonic() + 60.0
            )  # the disk may be full now and free later; the last checkpoint stands
            return
        except Exception as error:
            self.obstacle = f"{type(error).__name__}: {error}"
            return
        ended = time.monotonic()
        self._next = ended + (ended - began) / SHARE_OF_TIME

    def load(self, agent_class: type[Any]) -> Checkpoint | None:
        """The run's last checkpoint, with the random generators set to it; None if there is none
        that is ours and fits.
        """
        try:
            content = self.path.read_bytes()
        except OSError:
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
        agent: Any = object.__new__(agent_class)
        agent.__dict__.update(state["agent"])
        if state["normaliser"] is not None:
            state["normaliser"].set_venv(state["env"])
            state["normaliser"].returns = state["returns"]
        random.setstate(state["random"][0])
        np.random.set_state(state["random"][1])
        torch.set_rng_state(state["random"][2])
        return Checkpoint(agent, state["env"], state["mark"], state["elapsed_s"])

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
