"""Environments stepped in several processes at once, as a Stable-Baselines3 VecEnv.

Each process holds several environments: one message per step and process, through shared memory
(the longest through a pipe). This
process is one of them: it steps its own share while it would otherwise wait. A process that is done
steps environments that another
has not come to yet, where their state is easily moved: processes seldom run equally fast, and the
step takes as long as the slowest. What is returned does not depend on any of it, and has the values
of SB3's ``DummyVecEnv``, numpy scalars in infos as plain numbers.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from scpo_bench.runs.handover import Handover, handover_fields, layers, snapshot_size
from scpo_bench.runs.shared_line import Line, Post

STEP = b""  # the one message that carries nothing else


class WorkerError(RuntimeError):
    """An environment failed in its process: what and why in the first line, the traceback from
    there in those that follow.
    """


class WorkerVecEnv(VecEnv):
    """``WorkerVecEnv([make_env, ...], workers=2)``.

    make_envs: functions without arguments, one per environment; workers: processes, this one among
    them, at most one per environment. Raises ValueError unless observations and actions are Box
    spaces; WorkerError where an environment raises. Pickling it carries the environments along, in
    the state they are in.

    Moved between processes are environments that handover.py can move, if ``make_envs`` are
    ``functools.partial(gym.make, ...)``, all with equal arguments. One reached into by ``set_attr``
    or ``env_method`` is not moved any more.
    """

    def __init__(self, make_envs: Sequence[Callable[[], gym.Env[Any, Any]]], workers: int) -> None:
        with contextlib.closing(make_envs[0]()) as example:
            observation_space, action_space = example.observation_space, example.action_space
            size = snapshot_size(example) if workers > 1 and _alike(make_envs) else 0
        if not isinstance(observation_space, spaces.Box) or not isinstance(
            action_space, spaces.Box
        ):
            raise ValueError(
                f"WorkerVecEnv: needs Box observations and actions, got {observation_space}, {action_space}"
            )
        shares = np.array_split(np.arange(len(make_envs)), min(workers, len(make_envs)))
        self._shares = [range(int(share[0]), int(share[-1]) + 1) for share in shares]
        self._fields = {
            "actions": (action_space.shape, action_space.dtype),
            "observations": (observation_space.shape, observation_space.dtype),
            "rewards": ((), np.dtype(np.float32)),
            "dones": ((), np.dtype(np.bool_)),
            "owners": (
                (),
                np.dtype(np.int32),
            ),  # the process that has an environment's state, not a copy of it
            "movable": ((), np.dtype(np.bool_)),
            **handover_fields(size),
        }
        # Half of each share, the later one: enough where one process is three times as fast.
        movable = [
            size > 0 and i >= share.start + (len(share) + 1) // 2
            for share in self._shares
            for i in share
        ]
        self._start([cloudpickle.dumps(make) for make in make_envs], movable)
        super().__init__(len(make_envs), observation_space, action_space)

    @property
    def workers(self) -> int:
        """Processes that step environments, this one among them."""
        return len(self._shares)

    def _start(self, sources: list[bytes], movable: list[bool]) -> None:
        """One process for each share of ``sources``: pickled environments, or functions that make
        them.

        Those that are movable are in each process.
        """
        # Not fork: a forked child would share torch's thread pools. Not spawn: it imports the main
        # module, whatever that is.
        context = multiprocessing.get_context("forkserver")
        n = len(sources)
        memory = {
            name: (
                context.RawArray("b", max(1, n * int(np.prod(shape)) * dtype.itemsize)),
                (n, *shape),
                dtype,
            )
            for name, (shape, dtype) in self._fields.items()
        }
        self._arrays = {name: _view(*of) for name, of in memory.items()}
        self._arrays["movable"][:] = movable
        self._claims = {i: context.Semaphore(1) for i in range(n) if movable[i]}
        arguments = []
        for worker, share in enumerate(self._shares):
            self._arrays["owners"][share] = worker
            held = [*share, *(i for i in self._claims if i not in share)]
            arguments.append((worker, {i: sources[i] for i in held}, memory, self._claims))
        self._lines: list[Line] = []
        self._processes = []
        for own in arguments[1:]:
            ours, theirs = context.Pipe()
            to, back = Post.of(context), Post.of(context)
            process = context.Process(target=_serve, args=(theirs, to, back, *own), daemon=True)
            process.start()
            theirs.close()
            self._lines.append(Line(ours, outgoing=to, incoming=back))
            self._processes.append(process)
        try:
            self._group = _Group(*arguments[0])
            self._gather("ready", None)  # a step may begin with one that another process holds
        except BaseException:
            self._hang_up()
            raise

    def _send(self, worker: int, command: str, argument: Any) -> None:
        """worker: 1 is the first process that is not this one."""
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # the answer, which will not come, says it better
            self._lines[worker - 1].send(cloudpickle.dumps((command, argument)))

    def _receive(self, worker: int) -> Any:
        try:
            ok, value = pickle.loads(self._lines[worker - 1].receive())
        except (EOFError, ConnectionResetError):
            process = self._processes[worker - 1]
            process.join(timeout=1)
            raise WorkerError(
                f"environments' process {worker} died with exit code {process.exitcode}"
            ) from None
        if not ok:
            raise WorkerError(value)
        return value

    def _ask(self, i: int, command: str, *argument: Any) -> Any:
        """The process where environment ``i`` is."""
        worker = int(self._arrays["owners"][i])
        if worker == 0:
            return getattr(self._group, command)((i, *argument))
        self._send(worker, command, (i, *argument))
        return self._receive(worker)

    def _gather(self, command: str, argument: Any) -> list[dict[int, Any]]:
        """Ask all processes at once: from each, answers by environment."""
        for worker in range(1, self.workers):
            self._send(worker, command, argument)
        return self._collect(lambda: getattr(self._group, command)(argument))

    def _collect(self, own: Callable[[], Any]) -> list[Any]:
        """This process's answer and the others'.

        The first failure is raised when all have answered, so that none is left over.
        """
        answers, failures = [], []
        for worker in range(self.workers):
            try:
                answers.append(self._receive(worker) if worker else own())
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
        return answers

    def reset(self) -> Any:
        self.reset_infos = _by_index(self._gather("reset", (self._seeds, self._options)))
        self._reset_seeds()
        self._reset_options()
        return self._arrays["observations"].copy()

    def step_async(self, actions: Any) -> None:
        self._arrays["actions"][:] = actions
        for claim in (
            self._claims.values()
        ):  # nobody is stepping: all are claimed, or not, where a step failed
            claim.acquire(False)
            claim.release()
        for line in self._lines:
            line.send(STEP)

    def step_wait(self) -> Any:
        infos, resets = zip(*self._collect(self._group.step))
        for process_resets in resets:
            for i, info in process_resets.items():
                self.reset_infos[i] = info
        arrays = self._arrays
        return (
            arrays["observations"].copy(),
            arrays["rewards"].copy(),
            arrays["dones"].copy(),
            _by_index(infos),
        )

    def close(self) -> None:
        self._hang_up()
        self._group.close()

    def _hang_up(self) -> None:
        for line in self._lines:
            line.close()  # the process ends when nobody is left to talk to
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self._lines, self._processes = [], []

    def __getstate__(self) -> dict[str, Any]:
        state = {
            k: v
            for k, v in self.__dict__.items()
            if k not in ("_lines", "_processes", "_arrays", "_claims", "_group")
        }
        return state | {
            "sources": _by_index(self._gather("pickle", None)),
            "movable": self._arrays["movable"].tolist(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        sources, movable = state.pop("sources"), state.pop("movable")
        self.__dict__.update(state)
        self._start(sources, movable)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [self._ask(i, "get", attr_name) for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        for i in self._get_indices(indices):
            self._ask(i, "set", attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        return [self._ask(i, "call", method_name, args, kwargs) for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [self._ask(i, "wrapped", wrapper_class) for i in self._get_indices(indices)]


def _view(memory: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as an array."""
    return np.frombuffer(memory, dtype=dtype, count=int(np.prod(shape))).reshape(shape)


def _alike(make_envs: Sequence[Callable[[], Any]]) -> bool:
    """Whether all make the same: an environment by its id or spec, not edited afterwards by a
    function that could do anything.
    """
    plain = all(isinstance(make, functools.partial) and make.func is gym.make for make in make_envs)
    return plain and len({cloudpickle.dumps(make) for make in make_envs}) == 1


def _by_index(answers: Sequence[dict[int, Any]]) -> list[Any]:
    """Answers of several processes, each to some environments, in the environments' order."""
    merged = {i: value for part in answers for i, value in part.items()}
    return [merged[i] for i in range(len(merged))]


class _Group:
    """The environments of one process: its own first, then copies of others' that it may take over.
    """

    def __init__(
        self,
        process: int,
        sources: dict[int, bytes],
        memory: dict[str, Any],
        claims: dict[int, Any],
    ) -> None:
        self._process, self._claims = process, claims
        loaded = {i: pickle.loads(source) for i, source in sources.items()}
        self.envs = {i: env if isinstance(env, gym.Env) else env() for i, env in loaded.items()}
        arrays = {name: _view(*of) for name, of in memory.items()}
        (
            self._actions,
            self._observations,
            self._rewards,
            self._dones,
            self._owners,
            self._movable,
        ) = (
            arrays[name]
            for name in ("actions", "observations", "rewards", "dones", "owners", "movable")
        )
        self._handovers = {i: Handover(self.envs[i], i, arrays) for i in claims}

    def ready(self, _: None) -> dict[int, Any]:
        """Others can take over what this process has."""
        for i in self._own():
            self._leave(i, reset=True)
        return {}

    def _own(self) -> list[int]:
        return [i for i in self.envs if self._owners[i] == self._process]

    def _turns(self) -> Iterator[int]:
        """The environments to be stepped here: this process's own, then others', as long as there
        are any that nobody has claimed.
        """
        if not self._claims:
            yield from self.envs
            return
        # A process that is ahead may have changed owners already in this step; what it has taken
        # over cannot be claimed again.
        owners, movable = self._owners.tolist(), self._movable.tolist()
        for i in self.envs:
            if owners[i] == self._process and (not movable[i] or self._claims[i].acquire(False)):
                yield i
        for i in reversed(self.envs):  # their owner comes from the other end
            if owners[i] != self._process and movable[i] and self._claims[i].acquire(False):
                self._handovers[i].take()
                self._owners[i] = self._process
                yield i

    def _leave(self, i: int, reset: bool) -> None:
        if i in self._handovers:
            self._handovers[i].leave()
            if reset:
                self._handovers[i].leave_generator()

    def reset(self, argument: Any) -> dict[int, Any]:
        seeds, options = argument
        infos = {}
        for (
            i,
            env,
        ) in self.envs.items():  # copies as well: a wrapper refuses to step what was never reset
            observation, info = env.reset(
                seed=seeds[i], **({"options": options[i]} if options[i] else {})
            )
            if self._owners[i] == self._process:
                self._observations[i], infos[i] = observation, info
                self._leave(i, reset=True)
        return infos

    def step(self) -> tuple[dict[int, Any], dict[int, Any]]:
        """Infos, and infos of the resets, by environment: an episode's end resets its environment,
        as in SB3's VecEnvs.
        """
        infos, resets = {}, {}
        for i in self._turns():
            env = self.envs[i]
            observation, self._rewards[i], terminated, truncated, info = env.step(self._actions[i])
            self._dones[i] = done = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = observation
                observation, resets[i] = env.reset()
            self._observations[i] = observation
            # Plain numbers: numpy's own are slow to pickle.
            infos[i] = {
                key: value.item() if isinstance(value, np.generic) else value
                for key, value in info.items()
            }
            self._leave(i, reset=done)
        return infos, resets

    def close(self) -> None:
        for env in self.envs.values():
            env.close()
        self.envs = {}

    def pickle(self, _: None) -> dict[int, bytes]:
        return {i: cloudpickle.dumps(self.envs[i]) for i in self._own()}

    def get(self, argument: Any) -> Any:
        i, name = argument
        return self.envs[i].get_wrapper_attr(name)

    def set(self, argument: Any) -> None:
        i, name, value = argument
        self._movable[i] = False  # who knows what a snapshot does not hold
        self.envs[i].set_wrapper_attr(name, value)

    def call(self, argument: Any) -> Any:
        i, name, args, kwargs = argument
        self._movable[i] = False
        return self.envs[i].get_wrapper_attr(name)(*args, **kwargs)

    def wrapped(self, argument: Any) -> bool:
        i, wrapper_class = argument
        return any(isinstance(layer, wrapper_class) for layer in layers(self.envs[i]))


def _serve(
    pipe: Connection,
    incoming: Post,
    outgoing: Post,
    process: int,
    sources: dict[int, bytes],
    memory: dict[str, Any],
    claims: dict[int, Any],
) -> None:
    """A worker process: answers (True, result) or (False, traceback) until the other end is closed.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, whose end closes the pipe
    group: _Group | None = None
    line = Line(pipe, outgoing, incoming)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = line.receive()
            answer: tuple[bool, Any]
            try:
                group = group or _Group(process, sources, memory, claims)
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
