"""Loading safety-gymnasium 1.0.0 where its own ``__init__`` cannot run.

The released package pins gymnasium 0.28 and registers its ids through that version's internals, so
``import safety_gymnasium`` fails on gymnasium 1.x; two of its dataclasses use arrays as defaults,
which Python 3.11 refuses. Its modules below the top level need neither, so they are imported here
under an un-executed package module.

The copy is private: outside ``private_modules()`` nothing of it is left in ``sys.modules``, so an
installed safety_gymnasium that can be imported (a later release, say) works beside it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium.error import DependencyNotInstalled

INSTALL = "pip install --no-deps safety-gymnasium==1.0.0"
VERSION = "1.0.0"
_NAME = "safety_gymnasium"

_lock = threading.RLock()
_private: dict[str, ModuleType] = {}


class _HashableArray(np.ndarray):
    """An array that hashes by identity: what Python 3.11 asks of a dataclass default."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@dataclass(frozen=True)
class Original:
    """The parts of safety-gymnasium that the adapter and the fast path build on."""

    builder: type
    world: ModuleType
    tasks: ModuleType
    agents: ModuleType
    random_generator: type
    resampling_error: type[Exception]
    offscreen_viewer: type
    keyboard_viewer: type
    root: str
    """Folder of the installed package; its ``assets`` lie below."""

    def velocity_class(self, robot: str, version: int) -> type:
        """The environment class of ``Safety<robot>Velocity-v<version>``."""
        words = "".join("_" + c.lower() if c.isupper() else c for c in robot)
        name = f"{_NAME}.tasks.safe_velocity.safety{words}_velocity_v{version}"
        with private_modules():
            return getattr(importlib.import_module(name), f"Safety{robot}VelocityEnv")


@contextmanager
def private_modules() -> Iterator[None]:
    """Within the block, ``safety_gymnasium`` in ``sys.modules`` is the private copy.

    Needed to import more of it and to pickle or unpickle its objects, which are found by module
    name. Afterwards ``sys.modules`` is as it was before.

    Raises:
        DependencyNotInstalled: safety-gymnasium is not installed, or not in the adapted version.
    """
    with _lock:
        if not _private:
            _private[_NAME] = _package_shell()
        outside = _pop_modules()
        sys.modules.update(_private)
        try:
            yield
        finally:
            _private.update(_pop_modules())
            sys.modules.update(outside)


def _pop_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == _NAME or name.startswith(_NAME + ".")]
    return {name: sys.modules.pop(name) for name in names}


def _package_shell() -> ModuleType:
    """The top-level package, not executed, with ``__path__`` and ``__file__`` for its modules."""
    with _lock:
        outside = _pop_modules()  # find_spec would return the spec of a module already imported
        try:
            spec = importlib.util.find_spec(_NAME)
        finally:
            sys.modules.update(outside)
    if spec is None or spec.origin is None:
        raise DependencyNotInstalled(f"the Safety-Gymnasium tasks need safety-gymnasium: {INSTALL}")
    try:
        version = importlib.metadata.version("safety-gymnasium")
    except importlib.metadata.PackageNotFoundError:
        version = VERSION  # an unpacked source tree on the path carries no metadata
    if version != VERSION:
        raise DependencyNotInstalled(
            f"found safety-gymnasium {version}, the tasks adapt {VERSION}: {INSTALL}"
        )
    return importlib.util.module_from_spec(spec)


@functools.cache
def original() -> Original:
    """Load safety-gymnasium once per process (about a second).

    Raises:
        DependencyNotInstalled: safety-gymnasium is not installed; the message holds the command
        that installs it.
    """
    with private_modules():

        def module(name: str) -> Any:
            return importlib.import_module(f"{_NAME}.{name}")

        color: dict[str, Any] = module("assets.color").COLOR
        for name, rgba in color.items():
            color[name] = rgba.view(_HashableArray)
        underlying = module("bases.underlying")
        return Original(
            builder=module("builder").Builder,
            world=module("world"),
            tasks=module("tasks"),
            agents=module("agents"),
            random_generator=module("utils.random_generator").RandomGenerator,
            resampling_error=module("utils.common_utils").ResamplingError,
            offscreen_viewer=underlying.OffScreenViewer,
            keyboard_viewer=underlying.KeyboardViewer,
            root=sys.modules[_NAME].__path__[0],
        )
