"""Environments stepped by several processes, as a Stable-Baselines3 VecEnv.

Each process holds an SB3 ``DummyVecEnv`` of its share of the environments. This process is one of
them: it steps its share while the others step theirs. All values are those of one ``DummyVecEnv``.

SB3's ``SubprocVecEnv`` and gymnasium's ``AsyncVectorEnv`` have one process per environment. On two
cores both stepped SafetyHopperVelocity-v1 more slowly than a single process does (with 4
environments at 0.6 and 0.7 times its rate, with 16 at 0.8 times; this class with two workers at 0.9
and 1.4 times), and SB3's 16 processes took 2.6 GB. Neither can be pickled for a checkpoint; SB3's
returns float64 rewards, and EOFError where an environment raises. Waiting for a message in a loop
rather than asleep gained a fifth on idle cores and cost a factor of four on shared ones.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

MakeEnv = Callable[[], gym.Env[Any, Any]]
EXIT_S = 5.0  # that a worker is given to end by itself


class WorkerError(RuntimeError):
    """An environment failed in its process (its traceback follows the first line), or died."""


class _Share(DummyVecEnv):
    """The environments of one process."""

    def reset_with(self, seeds: list[int | None], options: list[dict[str, Any]]) -> tuple[Any, Any]:
        self._seeds, self._options = seeds, options
        return self.reset(), self.reset_infos

    def step_with(self, actions: Any) -> tuple[Any, ...]:
        return (*self.step(actions), self.reset_infos)

    def pickled(self) -> bytes:
        return cloudpickle.dumps(self)


def _load(source: bytes) -> _Share:
    """The share, pickled itself or as the functions that make its environments."""
    loaded = pickle.loads(source)
    return loaded if isinstance(loaded, _Share) else _Share(loaded)


class _Here:
    """This process's share, with the methods of ``_Worker``."""

    def __init__(self, source: bytes) -> None:
        self._share = _load(source)

    def send(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._call = method, args, kwargs

    def receive(self) -> Any:
        method, args, kwargs = self._call
        return getattr(self._share, method)(*args, **kwargs)

    def close(self) -> None:
        self._share.close()


class _Worker:
    """Another process and its share."""

    def __init__(self, source: bytes) -> None:
        context = multiprocessing.get_context("forkserver")  # fork would share torch's threads
        context.set_forkserver_preload([__name__])  # imported once for all workers
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, source), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call ``method`` of the share there."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receive() explains it
            self._pipe.send((method, args, kwargs))

    def receive(self) -> Any:
        """What the method returned. WorkerError if it raised, or the process has died."""
        try:
            ok, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(EXIT_S)
            code = self._process.exitcode
            raise WorkerError(f"a worker process died with exit code {code}") from None
        if not ok:
            raise WorkerError(value)
        return value

    def close(self) -> None:
        self._pipe.close()  # the worker ends when its pipe does
        self._process.join(EXIT_S)
        if self._process.is_alive():
            self._process.terminate()


def _serve(pipe: Connection, source: bytes) -> None:
    """Answer (True, result) or (False, error and traceback) until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent closes the pipe
    share: _Share | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            method, args, kwargs = pipe.recv()
            try:
                share = share or _load(source)
                pipe.send((True, getattr(share, method)(*args, **kwargs)))
            except Exception as error:
                pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    if share is not None:
        share.close()


class WorkerVecEnv(VecEnv):
    """``WorkerVecEnv([make_env, ...], workers=2)``, for observations that are arrays.

    workers: processes, this one included; at most one per environment. Raises WorkerError where an
    environment of another process raises. Pickling keeps the environments' present state.
    """

    def __init__(self, make_envs: Sequence[MakeEnv], workers: int) -> None:
        parts = np.array_split(np.arange(len(make_envs)), min(workers, len(make_envs)))
        self._shares = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
        self._start([cloudpickle.dumps(list(make_envs[share])) for share in self._shares])
        spaces = [self._ask(0, "get_attr", f"{of}_space") for of in ("observation", "action")]
        super().__init__(len(make_envs), *spaces)

    @property
    def workers(self) -> int:
        """Processes that step environments, this one included."""
        return len(self._shares)

    def _start(self, sources: list[bytes]) -> None:
        # This process's share first: where an environment cannot be made, no worker is started.
        self._processes: list[_Here | _Worker] = [_Here(sources[0])]
        self._processes += [_Worker(source) for source in sources[1:]]

    def _send(self, method: str, *arguments: Any) -> None:
        """Call a method of every share with its part of each argument [N, ...]."""
        for process, share in zip(self._processes, self._shares):
            process.send(method, *(argument[share] for argument in arguments))

    def _receive(self) -> list[Any]:
        """The answers; the first failure is raised when no answer is left in a pipe."""
        answers, failures = [], []
        for process in self._processes:
            try:
                answers.append(process.receive())
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
        return answers

    def _ask(self, i: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of ``DummyVecEnv`` returns for environment ``i``."""
        share = next(share for share in self._shares if i < share.stop)
        process = self._processes[self._shares.index(share)]
        process.send(method, *args, indices=[i - share.start], **kwargs)
        answer = process.receive()
        return answer and answer[0]

    def reset(self) -> Any:
        self._send("reset_with", self._seeds, self._options)
        observations, reset_infos = zip(*self._receive())
        self.reset_infos = list(itertools.chain(*reset_infos))
        self._reset_seeds()
        self._reset_options()
        return np.concatenate(observations)

    def step_async(self, actions: Any) -> None:
        self._send("step_with", actions)

    def step_wait(self) -> Any:
        observations, rewards, dones, infos, reset_infos = zip(*self._receive())
        self.reset_infos = list(itertools.chain(*reset_infos))
        arrays = (np.concatenate(parts) for parts in (observations, rewards, dones))
        return (*arrays, list(itertools.chain(*infos)))

    def close(self) -> None:
        for process in self._processes:
            process.close()

    def __getstate__(self) -> dict[str, Any]:
        self._send("pickled")
        state = {name: value for name, value in self.__dict__.items() if name != "_processes"}
        return {**state, "sources": self._receive()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(state.pop("sources"))
        self.__dict__.update(state)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [self._ask(i, "get_attr", attr_name) for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        for i in self._get_indices(indices):
            self._ask(i, "set_attr", attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        call = ("env_method", method_name, *method_args)
        return [self._ask(i, *call, **method_kwargs) for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [self._ask(i, "env_is_wrapped", wrapper_class) for i in self._get_indices(indices)]
