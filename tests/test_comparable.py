"""What a table compares, and what every honest record satisfies."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from synthetic_records import (
    GOAL,
    IMITATION,
    REFERENCES,
    synthetic_cell,
    synthetic_updates,
    write_record,
    write_suite,
)

from scpo_bench.leaderboard.render import notes
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.records.comparable import Plan
from scpo_bench.records.files import RecordError
from scpo_bench.records.schema import TIMING_FIELDS, Cell, Update
from scpo_bench.submissions.verify import verify

UPDATES = 5


@pytest.fixture
def planned(tmp_path) -> list[Cell]:
    return write_suite(tmp_path, "s", (IMITATION, GOAL), ("scpo", "sgd"), 3, UPDATES)


def submit(results: Path, updates: list[Update] | None = None, **fields: object) -> Path:
    """A record of third party's "mine", honest but for ``fields`` of its cell."""
    cell = synthetic_cell("mine", str(fields.pop("task", IMITATION)), 0, UPDATES)
    cell = cell.model_copy(update=fields)
    own = synthetic_updates(cell, UPDATES) if updates is None else updates
    return write_record(results, "s", cell, own)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cost_limit", 0.5),
        ("env", {"horizon": 5}),
        ("steps", 100),
        ("evaluation_interval", 5),
        ("evaluation_episodes", 1),
        ("evaluation_starts", "tuning"),
        ("start", "zero"),
        ("normalize", True),
        ("margin", 0.5),
        ("budget", "total"),
        ("num_envs", 1),
        ("seed", 7),
        ("task", "SafetyCarGoal1-v0"),
    ],
)
def test_other_conditions_are_not_comparable(tmp_path, planned, field, value):
    """The record gains no row in a planned suite; the note and ``verify`` name the field."""
    submit(tmp_path, **{field: value})
    table = leaderboard(load(tmp_path, "s", planned, REFERENCES))
    assert "mine" not in set(table["agent"])
    (line,) = (note for note in notes(table) if note.startswith("not comparable"))
    assert f": {field}: " in line
    report = verify(tmp_path, lambda suite: planned)
    (line,) = (note for note in report.notes if "not comparable" in note)
    assert f": {field}: " in line


def test_an_agent_of_the_same_conditions_gets_a_row(tmp_path, planned):
    """Its configuration is free, and planned seeds that it did not run are missing."""
    submit(tmp_path, config={"learning_rate": 3.0})
    table = leaderboard(load(tmp_path, "s", planned, REFERENCES))
    (row,) = (row for _, row in table.iterrows() if row["agent"] == "mine")
    assert (row["seeds_finished"], row["seeds_missing"], row["seeds_planned"]) == (1, 2, 3)
    assert not [note for note in notes(table) if note.startswith("not comparable")]


def test_without_a_plan_the_common_conditions_hold(tmp_path, planned):
    submit(tmp_path, cost_limit=0.5)
    table = leaderboard(load(tmp_path, "s", None, REFERENCES))
    assert "mine" not in set(table["agent"])
    assert Plan.most_common(planned).difference(planned[0]) is None
    assert Plan.most_common(planned).seeds is None


def test_other_versions_are_marked(tmp_path, planned):
    """A row whose runs used other packages than most, or a changed source tree."""
    cell = synthetic_cell("mine", IMITATION, 0, UPDATES)
    own = {"versions": {"scpo-bench": "0.1.0", "torch": "1.0"}}
    write_record(tmp_path, "s", cell, synthetic_updates(cell, UPDATES), provenance=own)
    table = leaderboard(load(tmp_path, "s", planned, REFERENCES))
    assert set(table.loc[table["other_versions"], "agent"]) == {"mine"}
    assert any(note.startswith("‡") for note in notes(table))


def changed(cell: Cell, number: int, **fields: object) -> list[Update]:
    updates = synthetic_updates(cell, UPDATES)
    updates[number] = updates[number].model_copy(update=fields)
    return updates


@pytest.mark.parametrize(
    ("task", "number", "fields", "problem"),
    [
        (IMITATION, 2, {"iterate_objective": -0.1}, "iterate_objective: on this task"),
        (IMITATION, 2, {"iterate_return": 0.1}, "iterate_return: on this task"),
        (IMITATION, 2, {"return_mean": 0.1}, "return_mean: on this task"),
        (IMITATION, 2, {"cost_max": 31.0, "violating_episodes": 1}, "cost_max: on this task"),
        (IMITATION, 2, {"iterate_cost": -0.5}, "iterate_cost: costs are not negative"),
        (IMITATION, 2, {"cost_sum": 50.0, "violating_steps": 3}, "cost_sum: at most 1 per"),
        (GOAL, 2, {"cost_mean": -1.0}, "cost_mean: costs are not negative"),
        (GOAL, 2, {"episodes": 500}, "episodes: at most the 100 steps"),
        (GOAL, 0, {"interaction_steps": 10}, "update 0: the start policy has collected nothing"),
        (GOAL, 4, {"interaction_steps": 500}, "a run ends with the collection that reaches 500"),
    ],
)
def test_impossible_numbers_are_damage(tmp_path, planned, task, number, fields, problem):
    """Ranges and relations that every honest record satisfies."""
    cell = synthetic_cell("mine", task, 0, UPDATES)
    write_record(tmp_path, "s", cell, changed(cell, number, **fields))
    assert any(problem in line for line in verify(tmp_path).problems)
    runs = load(tmp_path, "s", planned, REFERENCES)
    assert (runs.loc[runs["agent"] == "mine", "status"].iloc[0]) == "damaged"


@pytest.mark.parametrize(
    ("run_fields", "problem"),
    [
        ({"provenance": {}}, "provenance: expected the versions"),
        ({"error": "ValueError"}, "error: a finished run has none"),
        ({"started": "2999-01-01T00:00:00+00:00", "ended": "2999-01-01T00:01:00+00:00"}, "future"),
        ({"started": "2025-12-13T10:00:00", "ended": "2025-12-13T10:01:00"}, "with zones"),
        ({"resolved_config": {"cost_limit": 25.0}}, "resolved_config: cost_limit: expected 0.0"),
    ],
)
def test_implausible_runs_are_damage(tmp_path, run_fields, problem):
    cell = synthetic_cell("mine", IMITATION, 0, UPDATES)
    write_record(tmp_path, "s", cell, synthetic_updates(cell, UPDATES), **run_fields)
    assert any(problem in line for line in verify(tmp_path).problems)


def test_a_cloned_seed_is_damage(tmp_path, planned):
    """The same updates under another seed: seven lucky seeds made of one."""
    source = synthetic_updates(synthetic_cell("mine", IMITATION, 0, UPDATES), UPDATES)
    submit(tmp_path)
    submit(tmp_path, updates=source, seed=1)
    assert any("the same updates as" in line for line in verify(tmp_path).problems)
    runs = load(tmp_path, "s", planned, REFERENCES)
    mine = runs[runs["agent"] == "mine"].set_index("seed")["status"]
    assert mine.to_dict() == {0: "finished", 1: "damaged", 2: "missing"}


def test_a_record_in_the_folder_of_another_cell_is_left_out(tmp_path, planned):
    folder = submit(tmp_path)
    folder.rename(folder.with_name("seed-2"))
    assert any("folder: expected" in line for line in verify(tmp_path).problems)
    runs = load(tmp_path, "s", planned, REFERENCES)
    assert "mine" not in set(runs["agent"])
    assert any("seed-0 from the cell" in line for line in runs.attrs["problems"])


def test_names_that_look_alike_are_refused(tmp_path, planned):
    """A Cyrillic o: "scp\u043e" would stand beside "scpo"."""
    cell = synthetic_cell("scp\u043e", IMITATION, 0, UPDATES)
    write_record(tmp_path, "s", cell, synthetic_updates(cell, UPDATES))
    assert any("printable ASCII" in line for line in verify(tmp_path).problems)
    assert len(set(load(tmp_path, "s", planned, REFERENCES)["agent"])) == 2


INFORMATIVE = ("provenance", "started", "ended", "resolved_config")
"""Fields of run.json that describe the run, as their docstrings say; no number is made from them.

The limit and the margin of ``resolved_config`` are, and are compared with the cell.
"""


def leaves(value: object, place: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Paths to the numbers and texts of a JSON value."""
    if isinstance(value, dict):
        return [path for key, inner in value.items() for path in leaves(inner, (*place, key))]
    if isinstance(value, list):
        return [path for i, inner in enumerate(value) for path in leaves(inner, (*place, i))]
    return [place]


def mutated(content: object, path: tuple[object, ...]) -> object:
    """A copy with the number, text or truth value at ``path`` changed."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    value = inner[path[-1]]
    if isinstance(value, bool):
        inner[path[-1]] = not value
    elif isinstance(value, int | float):
        inner[path[-1]] = value + 1
    else:
        inner[path[-1]] = f"{value}x" if isinstance(value, str) else "x"
    return copy


def test_no_mutation_of_a_record_goes_unnoticed(tmp_path):
    """Every number, text and length of run.json and of the updates, one at a time."""
    cell = synthetic_cell("mine", IMITATION, 0, 3, config={"learning_rate": 0.5, "names": ["a"]})
    folder = write_record(tmp_path, "s", cell, synthetic_updates(cell, 3))
    run, lines = folder / "run.json", folder / "updates.jsonl.gz"

    def unnoticed(path: Path, data: bytes) -> bool:
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            return verify(tmp_path).ok
        except RecordError:
            return False
        finally:
            path.write_bytes(before)

    content = json.loads(run.read_bytes())
    missed = {
        path
        for path in leaves(content)
        if unnoticed(run, json.dumps(mutated(content, path)).encode())
    }
    assert {path[0] for path in missed} <= set(INFORMATIVE)
    updates = gzip.decompress(lines.read_bytes()).splitlines()
    for number, line in enumerate(updates):
        shorter = updates[:number] + updates[number + 1 :]
        assert not unnoticed(lines, gzip.compress(b"\n".join([*shorter, b""])))
        for path in leaves(json.loads(line)):
            changed_line = json.dumps(
                mutated(json.loads(line), path), sort_keys=True, separators=(",", ":")
            ).encode()
            all_lines = [*updates[:number], changed_line, *updates[number + 1 :], b""]
            noticed = not unnoticed(lines, gzip.compress(b"\n".join(all_lines)))
            assert noticed or path[0] in TIMING_FIELDS, path


def test_a_name_given_twice_is_refused(tmp_path):
    """Which of two cost limits holds?"""
    run = submit(tmp_path) / "run.json"
    run.write_text(
        run.read_text().replace('"cost_limit": 0.0,', '"cost_limit": 9.0, "cost_limit": 0.0,')
    )
    assert any("given twice" in line for line in verify(tmp_path).problems)
    assert load(tmp_path, "s", None, REFERENCES).empty
