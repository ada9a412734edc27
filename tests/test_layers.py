"""The architecture, as a test: rooms import downwards only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "scpo_bench"
# From the top down. A room may import itself and what stands below it, on a later line.
LEVELS = (
    ("cli",),
    ("checks", "submissions"),
    ("leaderboard",),
    ("runs",),
    ("suites",),
    ("records",),
    ("scpo", "baselines"),
    ("proofs",),
    ("envs",),
    ("policies", "advantages", "configuration", "processes"),
    ("contract",),
    ("errors",),
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> list[tuple[str, Path]]:
    """(room, file) of every module; the links to envs/ and baselines/ are followed."""
    found = []
    for entry in sorted(PACKAGE.iterdir()):
        if entry.is_dir():
            found += [(entry.name, path) for path in sorted(entry.rglob("*.py"))]
        elif entry.suffix == ".py" and entry.stem != "__init__":
            found.append((entry.stem, entry))
    return found


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a module imports from, wherever in the module the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "scpo_bench":
            names = [f"scpo_bench.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("scpo_bench.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize(
    ("room", "path"), modules(), ids=lambda value: getattr(value, "stem", value)
)
def test_rooms_import_downwards_only(room, path):
    """An arrow upwards or sideways is the first half of a circle."""
    for other in imported_rooms(path) - {room}:
        assert other in LEVEL, (
            f"{path.name} imports scpo_bench.{other}, which has no place in LEVELS"
        )
        assert LEVEL[other] > LEVEL[room], f"{path.name} ({room}) imports scpo_bench.{other}"


def test_every_room_has_a_level():
    """A new folder has to be given its place in the architecture."""
    assert {room for room, _ in modules()} == set(LEVEL)
