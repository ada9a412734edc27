"""The distribution: a wheel holds the scpo_bench package, all of it and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(folder),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return next(folder.glob("*.whl"))


def test_wheel_contains_exactly_the_package(wheel):
    """Every source file under its installed name; no top-level envs, baselines or tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"scpo_bench"}
    expected = {
        f"scpo_bench/{p.relative_to(ROOT / 'scpo_bench')}"
        for p in (ROOT / "scpo_bench").rglob("*.py")
    }
    for folder in ("envs", "baselines"):
        expected |= {f"scpo_bench/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"scpo_bench/suites/benchmarks.yaml", "scpo_bench/leaderboard/references.json"} <= names


def test_wheel_works_outside_the_source_tree(wheel, tmp_path):
    """Unpacked alone on the path, in an empty folder: tasks register, suites load, the command
    answers.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import scpo_bench, gymnasium; assert scpo_bench.__file__.startswith(sys.argv[1]), scpo_bench.__file__;"
        "gymnasium.make('scpo_bench/HarmfulRegression-v0').reset(seed=0);"
        "from scpo_bench.suites.schema import default_file, load_benchmarks; print(*load_benchmarks(default_file()).suites)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "quick" in result.stdout
