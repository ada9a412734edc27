"""Moving an environment from process to process while it runs: its state goes through shared
memory, a copy goes on from it.

It takes microseconds, where pickling takes milliseconds, and so is only for environments that say
what their state is:

    snapshot_size: int
    snapshot_functions(memory) -> (write, read)

``memory`` is float64 [snapshot_size]; ``write()`` puts all that the next step depends on there, and
``read()`` has the environment go on from it. Steps draw nothing from ``np_random``, resets may. A
class is moved only if it defines ``snapshot_functions`` itself: an heir may have more state than
those it inherits know of. So may wrappers; only gymnasium's own, which ``make`` adds, are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

WORD = 2**64
Fields = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


def layers(env: Any) -> Iterator[Any]:
    """An environment's wrappers from the outermost, and itself."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def snapshot_size(env: Any) -> int:
    """Of an environment that can be moved, else 0: with other wrappers, a renderer, or another
    generator than gymnasium's.
    """
    *wrappers, inner = layers(env)
    known = all(
        type(wrapper) in (TimeLimit, OrderEnforcing, PassiveEnvChecker) for wrapper in wrappers
    )
    if not known or env.render_mode is not None or "snapshot_functions" not in vars(type(inner)):
        return 0
    return int(inner.snapshot_size) if type(inner.np_random.bit_generator) is np.random.PCG64 else 0


def handover_fields(size: int) -> Fields:
    """Shape and type of what ``Handover`` needs in shared memory, per environment."""
    return {
        "snapshots": ((size,), np.dtype(np.float64)),
        "elapsed": ((), np.dtype(np.int64)),
        "draws": ((), np.dtype(np.int64)),
        "generators": ((6,), np.dtype(np.uint64)),
    }


class Handover:
    """Environment ``i`` or a copy of it, and where its state lies:

    ``arrays`` are the fields [n, ...] in shared memory.
    """

    def __init__(self, env: Any, i: int, arrays: dict[str, Any]) -> None:
        self._inner = env.unwrapped
        self._limits: list[Any] = [
            wrapper for wrapper in layers(env) if isinstance(wrapper, TimeLimit)
        ]
        self._write, self._read = self._inner.snapshot_functions(arrays["snapshots"][i])
        self._elapsed, self._draws = arrays["elapsed"][i : i + 1], arrays["draws"][i : i + 1]
        self._generator = arrays["generators"][i]
        self._drawn = -1  # of the draws, how many this generator has followed

    def leave(self) -> None:
        """After a step."""
        self._write()
        for limit in self._limits:
            self._elapsed[0] = limit._elapsed_steps or 0

    def leave_generator(self) -> None:
        """After a reset, the one time when numbers are drawn."""
        self._generator[:] = _words(self._inner.np_random.bit_generator.state)
        self._draws[0] += 1
        self._drawn = int(self._draws[0])

    def take(self) -> None:
        """Go on where another process has left the environment."""
        self._read()
        for limit in self._limits:
            limit._elapsed_steps = int(self._elapsed[0])
        if self._drawn != self._draws[0]:
            self._inner.np_random.bit_generator.state = _state(self._generator)
            self._drawn = int(self._draws[0])


def _words(state: dict[str, Any]) -> list[int]:
    """The state of numpy's PCG64 as six numbers of 64 bits."""
    numbers = state["state"]
    return [
        *divmod(numbers["state"], WORD),
        *divmod(numbers["inc"], WORD),
        state["has_uint32"],
        state["uinteger"],
    ]


def _state(words: Any) -> dict[str, Any]:
    """The other way round."""
    high, low, inc_high, inc_low, has_uint32, uinteger = words.tolist()
    numbers = {"state": high * WORD + low, "inc": inc_high * WORD + inc_low}
    return {
        "bit_generator": "PCG64",
        "state": numbers,
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
