"""How the processes of this package start and end."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from typing import NoReturn


def open_streams() -> None:
    """Open the output streams that the process was started without, and let them take any text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the process (>&-)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # tables are not ASCII, a locale may be


def end_with_parent() -> None:
    """Send this process SIGTERM when its parent dies, so that none is left writing records."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def sigterm_interrupts() -> None:
    """Make SIGTERM, which schedulers send before they kill, raise KeyboardInterrupt like Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    # A scheduler's SIGTERM may reach a process and, through its parent, reach it again: the second
    # must not interrupt the writing of the record.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
