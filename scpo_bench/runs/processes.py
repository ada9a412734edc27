"""What every process that this package starts has in common."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import NoReturn


def end_with_parent() -> None:
    """A parent that is killed must not leave processes behind that go on writing records: they get
    SIGTERM.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def sigterm_interrupts() -> None:
    """SIGTERM, which schedulers send before they kill, raises KeyboardInterrupt, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
