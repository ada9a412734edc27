"""How the processes of this package start and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import NoReturn


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
