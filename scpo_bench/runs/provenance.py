"""Where a record comes from: package versions, git commit, machine.

Floating-point results depend on the processor through the kernels that NumPy's BLAS and torch
choose for it, so a record names them.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_info

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
    """Package versions, the source tree's git commit, processor, kernels and threads."""
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _git_commit(),
        "cpu": _cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "blas": _blas_kernels(),
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


@functools.cache
def _cpu_model() -> str:
    """The processor's name with family, model and stepping: some names cover several of these."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", first, re.MULTILINE))
    name = fields.get("model name") or platform.processor() or "unknown"
    numbers = [
        f"{label} {fields[key]}"
        for label, key in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))
        if key in fields
    ]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _blas_kernels() -> list[str]:
    """Every BLAS that is loaded, with its version and the kernels that it has chosen."""
    loaded = [info for info in threadpool_info() if info["user_api"] == "blas"]
    return sorted(
        f"{info['internal_api']} {info['version']} {info.get('architecture', '')}".strip()
        for info in loaded
    )


def describe_environment() -> list[tuple[str, str, str]]:
    """(what, found, hint) for ``scpo-bench doctor``; the hint is empty where all is in order."""
    python_hint = "" if sys.version_info >= (3, 11) else "needs Python >= 3.11"
    rows = [("python", platform.python_version(), python_hint)]
    for name in PACKAGES:
        found = _version(name)
        hint = "" if found else INSTALL.get(name, f"pip install {name}")
        rows.append((name, found or "missing", hint))
    return [*rows, ("cores", str(os.cpu_count()), "")]
