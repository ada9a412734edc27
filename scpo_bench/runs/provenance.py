"""Where a record comes from: package versions, git commit, machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("scpo-bench", "torch", "numpy", "gymnasium", "stable-baselines3"),
    *("mujoco", "safety-gymnasium", "scipy"),
)
SOURCE_TREE = Path(__file__).resolve().parents[2]
SOURCES = ("scpo_bench", "envs", "baselines", "benchmarks.yaml")  # what a run depends on
INSTALL = {
    "safety-gymnasium": "pip install --no-deps safety-gymnasium",
    "torch": "pip install torch==2.13.0",
}


def provenance() -> dict[str, Any]:
    """Package versions, the source tree's git commit, CPU and threads."""
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _git_commit(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()}-{platform.machine()}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _git_commit() -> str | None:
    """Commit of the source tree, with "+" if it has changes; None for an installed package."""
    if not (SOURCE_TREE / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=SOURCE_TREE, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def describe_environment() -> list[tuple[str, str, str]]:
    """(what, found, hint) for ``scpo-bench doctor``; the hint is empty where all is in order."""
    python_hint = "" if sys.version_info >= (3, 11) else "needs Python >= 3.11"
    rows = [("python", platform.python_version(), python_hint)]
    for name in PACKAGES:
        found = _version(name)
        hint = "" if found else INSTALL.get(name, f"pip install {name}")
        rows.append((name, found or "missing", hint))
    return [*rows, ("cores", str(os.cpu_count()), "")]
