"""The distribution: all of the scpo_bench package and nothing else, however it is installed.

``scpo_bench/envs``, ``scpo_bench/baselines`` and ``scpo_bench/suites/benchmarks.yaml`` are links to
the top level of the repository; an installed package must hold what they point to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import scpo_bench.baselines
import scpo_bench.envs

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("scpo_bench", "envs", "baselines", "benchmarks.yaml")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the source tree: building must not find the remains of earlier builds."""
    folder = tmp_path_factory.mktemp("source") / "tree"
    folder.mkdir()
    for name in (*PACKAGED, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(source: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [*command, str(source)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request, source, tmp_path_factory):
    """A wheel built from the tree, and one built from the source distribution."""
    out = tmp_path_factory.mktemp(request.param)
    # Without options, `build` makes the source distribution and builds the wheel from that.
    build(source, out, *(["--wheel"] if request.param == "tree" else []))
    return next(out.glob("*.whl"))


def test_wheel_contains_exactly_the_package(wheel, source):
    """Every source and data file under its installed name; no top-level envs, baselines or tests.

    Data files that are not named in pyproject.toml would be missing only from installed packages.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert len(names) == len(set(names))
        found = {name: archive.read(name) for name in names}
    files = [p for p in (source / "scpo_bench").rglob("*") if p.is_file()]
    for linked in ("envs", "baselines"):
        files += [p for p in (source / "scpo_bench" / linked).rglob("*") if p.is_file()]
    expected = {str(p.relative_to(source)): p.read_bytes() for p in files}
    assert sorted(found) == sorted(expected)
    assert found == expected
    assert "scpo_bench/suites/benchmarks.yaml" in found


def test_wheel_works_outside_the_source_tree(wheel, tmp_path):
    """Unpacked alone on the path, in an empty folder: tasks, suites and the command all work."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import gymnasium, scpo_bench, scpo_bench.baselines.cpo
assert scpo_bench.__file__.startswith(sys.argv[1]), scpo_bench.__file__
gymnasium.make("scpo_bench/HarmfulRegression-v0").reset(seed=0)
from scpo_bench.cli import main
sys.argv = ["scpo-bench", "list", "suites"]
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(site)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "quick" in result.stdout


def test_source_distribution_holds_files_instead_of_links(source, tmp_path):
    """A link out of the archive would be broken for whoever unpacks it."""
    build(source, tmp_path, "--sdist")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    for name in ("envs/__init__.py", "baselines/cpo.py", "suites/benchmarks.yaml"):
        assert members[f"scpo_bench/{name}"].isreg()


def test_editable_install_uses_the_source_tree():
    """`pip install -e .` resolves the links: edits in envs/ and baselines/ take effect at once."""
    assert Path(scpo_bench.envs.__file__).resolve() == ROOT / "envs" / "__init__.py"
    assert Path(scpo_bench.baselines.__file__).resolve() == ROOT / "baselines" / "__init__.py"
