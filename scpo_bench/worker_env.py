"""Environments stepped in several processes at once, as a Stable-Baselines3 VecEnv.

Each process holds several environments: one message per step and process, through shared memory (the longest through a pipe). This
process is one of them: it steps its own share while it would otherwise wait. What is returned does not depend on the number of
processes, and has the values of SB3's ``DummyVecEnv``, numpy scalars in infos as plain numbers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

STEP = b""  # the one message that carries nothing else
SPIN_S = 1e-3  # how long a process looks out for a message before it sleeps: waking up costs more than a short wait
NAP_S = 0.2  # how long it sleeps before it looks whether the other end is still there
ROOM = 1 << 16  # bytes of a message that fit into shared memory
THROUGH_PIPE = -1  # the length of a longer one


class _Post(NamedTuple):
    """One direction of a line, in shared memory. Ringing the bell takes no system call; what was written before it is seen after it."""

    bell: Any
    length: Any
    memory: Any

    @classmethod
    def of(cls, context: Any) -> _Post:
        return cls(context.Semaphore(0), context.RawValue("q", 0), context.RawArray("B", ROOM))


class _Line:
    """One end of the line between two processes: each message is awaited by the other end before it sends one."""

    def __init__(self, pipe: Connection, outgoing: _Post, incoming: _Post) -> None:
        self._pipe, self._out, self._in = pipe, outgoing, incoming
        self._written, self._read = (np.frombuffer(post.memory, np.uint8).data for post in (outgoing, incoming))

    def send(self, message: bytes) -> None:
        fits = len(message) <= ROOM
        if fits:
            self._written[: len(message)] = message
        self._ring(len(message) if fits else THROUGH_PIPE)
        if not fits:
            self._pipe.send_bytes(message)

    def _ring(self, length: int) -> None:
        self._out.length.value = length
        self._out.bell.release()

    def receive(self) -> bytes | memoryview:
        """The next message, to be read before the next is sent. EOFError when the other end is closed."""
        until = time.perf_counter() + SPIN_S
        while not self._in.bell.acquire(False):
            os.sched_yield()  # with more processes than cores, looking out must not hold up what is looked out for
            if time.perf_counter() > until:
                self._sleep()
                break
        length = self._in.length.value
        return self._pipe.recv_bytes() if length == THROUGH_PIPE else self._read[:length]

    def _sleep(self) -> None:
        """Until the bell rings."""
        while not self._in.bell.acquire(True, NAP_S):
            if self._pipe.poll():  # the bell rings before a message is in the pipe: without it, this is the end
                if not self._in.bell.acquire(False):
                    raise EOFError
                return

    def close(self) -> None:
        self._ring(THROUGH_PIPE)  # the other end need not sleep on: it finds the pipe closed
        self._pipe.close()


class WorkerError(RuntimeError):
    """An environment failed in its process: what and why in the first line, the traceback from there in those that follow."""


class WorkerVecEnv(VecEnv):
    """``WorkerVecEnv([make_env, ...], workers=2)``.

    make_envs: functions without arguments, one per environment; workers: processes, this one among them, at most one per environment.
    Raises ValueError unless observations and actions are Box spaces; WorkerError where an environment raises. Pickling it carries
    the environments along, in the state they are in.
    """

    def __init__(self, make_envs: Sequence[Callable[[], gym.Env[Any, Any]]], workers: int) -> None:
        example = make_envs[0]()
        observation_space, action_space = example.observation_space, example.action_space
        example.close()
        if not isinstance(observation_space, spaces.Box) or not isinstance(action_space, spaces.Box):
            raise ValueError(f"WorkerVecEnv: needs Box observations and actions, got {observation_space}, {action_space}")
        shares = np.array_split(np.arange(len(make_envs)), min(workers, len(make_envs)))
        self._shares = [slice(int(share[0]), int(share[-1]) + 1) for share in shares]
        self._fields = {
            "actions": (action_space.shape, action_space.dtype),
            "observations": (observation_space.shape, observation_space.dtype),
            "rewards": ((), np.dtype(np.float32)),
            "dones": ((), np.dtype(np.bool_)),
        }
        self._start([cloudpickle.dumps(make) for make in make_envs])
        super().__init__(len(make_envs), observation_space, action_space)

    @property
    def workers(self) -> int:
        """Processes that step environments, this one among them."""
        return len(self._shares)

    def _start(self, sources: list[bytes]) -> None:
        """One process for each share of ``sources``: pickled environments, or functions that make them."""
        # Not fork: a forked child would share torch's thread pools. Not spawn: it imports the main module, whatever that is.
        context = multiprocessing.get_context("forkserver")
        n = len(sources)
        memory = {
            name: (context.RawArray("b", max(1, n * int(np.prod(shape)) * dtype.itemsize)), (n, *shape), dtype)
            for name, (shape, dtype) in self._fields.items()
        }
        self._arrays = {name: _view(*of) for name, of in memory.items()}
        here, *elsewhere = self._shares
        self._group = _Group(sources[here], memory, here)
        self._lines: list[_Line] = []
        self._processes = []
        for share in elsewhere:
            ours, theirs = context.Pipe()
            to, back = _Post.of(context), _Post.of(context)
            process = context.Process(target=_serve, args=(theirs, to, back, sources[share], memory, share), daemon=True)
            process.start()
            theirs.close()
            self._lines.append(_Line(ours, outgoing=to, incoming=back))
            self._processes.append(process)

    def _send(self, worker: int, command: str, argument: Any) -> None:
        """worker: 1 is the first process that is not this one."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer, which will not come, says it better
            self._lines[worker - 1].send(cloudpickle.dumps((command, argument)))

    def _receive(self, worker: int) -> Any:
        try:
            ok, value = pickle.loads(self._lines[worker - 1].receive())
        except (EOFError, ConnectionResetError):
            process = self._processes[worker - 1]
            process.join(timeout=1)
            raise WorkerError(f"environments' process {worker} died with exit code {process.exitcode}") from None
        if not ok:
            raise WorkerError(value)
        return value

    def _ask(self, worker: int, command: str, argument: Any) -> Any:
        if worker == 0:
            return getattr(self._group, command)(argument)
        self._send(worker, command, argument)
        return self._receive(worker)

    def _gather(self, command: str, arguments: Sequence[Any]) -> list[Any]:
        """Ask all processes at once: a list with one answer per environment."""
        for worker, argument in enumerate(arguments[1:], start=1):
            self._send(worker, command, argument)
        answers = getattr(self._group, command)(arguments[0])
        return [*answers, *(answer for worker in range(1, len(arguments)) for answer in self._receive(worker))]

    def reset(self) -> Any:
        arguments = [(self._seeds[share], self._options[share]) for share in self._shares]
        self.reset_infos = self._gather("reset", arguments)
        self._reset_seeds()
        self._reset_options()
        return self._arrays["observations"].copy()

    def step_async(self, actions: Any) -> None:
        self._arrays["actions"][:] = actions
        for line in self._lines:
            line.send(STEP)

    def step_wait(self) -> Any:
        infos: list[dict[str, Any]] = []
        for worker, share in enumerate(self._shares):
            share_infos, resets = self._receive(worker) if worker else self._group.step()
            infos.extend(share_infos)
            for i, info in resets.items():
                self.reset_infos[share.start + i] = info
        arrays = self._arrays
        return arrays["observations"].copy(), arrays["rewards"].copy(), arrays["dones"].copy(), infos

    def close(self) -> None:
        for line in self._lines:
            line.close()  # the process ends when nobody is left to talk to
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self._group.close()
        self._lines, self._processes = [], []

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_lines", "_processes", "_arrays", "_group")}
        return state | {"sources": self._gather("pickle", [None] * len(self._shares))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sources = state.pop("sources")
        self.__dict__.update(state)
        self._start(sources)

    def _of(self, indices: Any) -> list[tuple[int, int]]:
        """(process, its environment) of each index."""
        of = [(worker, i - share.start) for worker, share in enumerate(self._shares) for i in range(share.start, share.stop)]
        return [of[i] for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [self._ask(worker, "get", (i, attr_name)) for worker, i in self._of(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        for worker, i in self._of(indices):
            self._ask(worker, "set", (i, attr_name, value))

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [self._ask(worker, "call", (i, method_name, args, kwargs)) for worker, i in self._of(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [self._ask(worker, "wrapped", (i, wrapper_class)) for worker, i in self._of(indices)]


def _view(memory: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as an array."""
    return np.frombuffer(memory, dtype=dtype, count=int(np.prod(shape))).reshape(shape)


class _Group:
    """The environments of one process, and their rows of the shared arrays."""

    def __init__(self, sources: list[bytes], memory: dict[str, Any], rows: slice) -> None:
        loaded = [pickle.loads(source) for source in sources]
        self.envs = [env if isinstance(env, gym.Env) else env() for env in loaded]
        self.actions, self.observations, self.rewards, self.dones = (
            _view(*memory[name])[rows] for name in ("actions", "observations", "rewards", "dones")
        )

    def reset(self, argument: Any) -> list[Any]:
        infos = []
        for i, (env, seed, options) in enumerate(zip(self.envs, *argument)):
            self.observations[i], info = env.reset(seed=seed, **({"options": options} if options else {}))
            infos.append(info)
        return infos

    def step(self) -> tuple[list[Any], dict[int, Any]]:
        """(infos, infos of the resets by environment): an episode's end resets its environment, as in SB3's VecEnvs."""
        infos, resets = [], {}
        for i, env in enumerate(self.envs):
            observation, self.rewards[i], terminated, truncated, info = env.step(self.actions[i])
            self.dones[i] = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if self.dones[i]:
                info["terminal_observation"] = observation
                observation, resets[i] = env.reset()
            self.observations[i] = observation
            # Plain numbers: numpy's own are slow to pickle.
            infos.append({key: value.item() if isinstance(value, np.generic) else value for key, value in info.items()})
        return infos, resets

    def close(self) -> None:
        for env in self.envs:
            env.close()
        self.envs = []

    def pickle(self, _: None) -> list[bytes]:
        return [cloudpickle.dumps(env) for env in self.envs]

    def get(self, argument: Any) -> Any:
        i, name = argument
        return self.envs[i].get_wrapper_attr(name)

    def set(self, argument: Any) -> None:
        i, name, value = argument
        self.envs[i].set_wrapper_attr(name, value)

    def call(self, argument: Any) -> Any:
        i, name, args, kwargs = argument
        return self.envs[i].get_wrapper_attr(name)(*args, **kwargs)

    def wrapped(self, argument: Any) -> bool:
        i, wrapper_class = argument
        env: Any = self.envs[i]
        while isinstance(env, gym.Wrapper):
            if isinstance(env, wrapper_class):
                return True
            env = env.env
        return False


def _serve(pipe: Connection, incoming: _Post, outgoing: _Post, sources: list[bytes], memory: dict[str, Any], rows: slice) -> None:
    """A worker process: answers (True, result) or (False, traceback) until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the pipe
    group: _Group | None = None
    line = _Line(pipe, outgoing, incoming)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = line.receive()
            answer: tuple[bool, Any]
            try:
                group = group or _Group(sources, memory, rows)
                if message == STEP:
                    answer = True, group.step()
                else:
                    command, argument = pickle.loads(message)
                    answer = True, getattr(group, command)(argument)
            except Exception as failure:
                answer = False, f"{type(failure).__name__}: {failure}\n{traceback.format_exc()}"
            line.send(cloudpickle.dumps(answer) if message != STEP else pickle.dumps(answer))
    if group is not None:
        group.close()
