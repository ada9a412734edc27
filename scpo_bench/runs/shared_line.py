"""Messages between two processes through shared memory: quicker than a pipe by the time that waking
a sleeper takes.
"""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

# how long a process looks out for a message before it sleeps: waking up costs more than a short
# wait
SPIN_S = 1e-3
NAP_S = 0.2  # how long it sleeps before it looks whether the other end is still there
ROOM = 1 << 16  # bytes of a message that fit into shared memory
THROUGH_PIPE = -1  # the length of a longer one


class Post(NamedTuple):
    """One direction of a line, in shared memory.

    Ringing the bell takes no system call; what was written before it is seen after it.
    """

    bell: Any
    length: Any
    memory: Any

    @classmethod
    def of(cls, context: Any) -> Post:
        return cls(context.Semaphore(0), context.RawValue("q", 0), context.RawArray("B", ROOM))


class Line:
    """One end of the line between two processes: each message is awaited by the other end before it
    sends one.
    """

    def __init__(self, pipe: Connection, outgoing: Post, incoming: Post) -> None:
        self._pipe, self._out, self._in = pipe, outgoing, incoming
        self._written, self._read = (
            np.frombuffer(post.memory, np.uint8).data for post in (outgoing, incoming)
        )

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
        """The next message, to be read before the next is sent.

        EOFError when the other end is closed.
        """
        until = time.perf_counter() + SPIN_S
        while not self._in.bell.acquire(False):
            # with more processes than cores, looking out must not hold up what is looked out for
            os.sched_yield()
            if time.perf_counter() > until:
                self._sleep()
                break
        length = self._in.length.value
        return self._pipe.recv_bytes() if length == THROUGH_PIPE else self._read[:length]

    def _sleep(self) -> None:
        """Until the bell rings."""
        while not self._in.bell.acquire(True, NAP_S):
            if (
                self._pipe.poll()
            ):  # the bell rings before a message is in the pipe: without it, this is the end
                if not self._in.bell.acquire(False):
                    raise EOFError
                return

    def close(self) -> None:
        self._ring(THROUGH_PIPE)  # the other end need not sleep on: it finds the pipe closed
        self._pipe.close()
