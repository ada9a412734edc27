"""Re-runs: what a record says is reproduced exactly, or the first difference is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import (
    IMITATION,
    REGRESSION,
    folder_of,
    synthetic_cell,
    synthetic_updates,
    write_record,
)
from typer.testing import CliRunner, Result

from scpo_bench.cli import app
from scpo_bench.records.files import RecordError, read_run, read_updates, write_run
from scpo_bench.records.schema import TIMING_FIELDS, Cell, Update
from scpo_bench.runs.harness import run_cell
from scpo_bench.submissions import reproduce as module
from scpo_bench.submissions.reproduce import compare, reproduce
from scpo_bench.submissions.verify import verify


def small_cell(agent: str, seed: int = 0) -> Cell:
    """Two updates, about a tenth of a second."""
    return Cell(
        agent=agent,
        task=REGRESSION,
        seed=seed,
        steps=200,
        start="backup",
        num_envs=4,
        evaluation_episodes=4,
        cost_limit=0.0,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Real runs of two agents: a results folder."""
    results = tmp_path_factory.mktemp("results")
    for cell in (small_cell("sgd"), small_cell("scpo")):
        assert run_cell(cell, folder_of(results, "s", cell), "s").status == "finished"
    return results


def verify_rerun(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", "--rerun", *map(str, arguments)])


def changed(update: Update, **fields: Any) -> Update:
    return Update(**{**update.model_dump(), **fields})


def test_an_honest_record_is_reproduced_exactly(recorded):
    """The promise of the README: same cell, same versions, same machine, same record; status 0."""
    result = verify_rerun(recorded)
    assert result.exit_code == 0, result.output
    *_, first, second, tier = result.stdout.splitlines()
    for cell, line in ((small_cell("scpo"), first), (small_cell("sgd"), second)):
        assert line == f"{folder_of(recorded, 's', cell)}: reproduced exactly"
    assert tier == "tier: reproduced-exact"


def test_a_consistent_forgery_is_not_reproduced(recorded, tmp_path):
    """One number changed and the digest recomputed: only the re-run can tell; status 1."""
    cell = small_cell("sgd")
    updates = read_updates(folder_of(recorded, "s", cell))
    honest = updates[1].iterate_return
    updates[1] = changed(updates[1], iterate_return=honest + 0.25)
    forged = write_record(tmp_path, "s", cell, updates)
    assert verify(forged).ok
    result = verify_rerun(forged)
    assert result.exit_code == 1
    *_, line, tier = result.stdout.splitlines()
    difference = f"update 1: iterate_return: {honest + 0.25} against {honest}"
    assert line.startswith(f"{forged}: {difference}; update 1 is the first of those that differ")
    assert tier == "tier: consistent (1 runs differ)"


def test_an_inconsistent_record_is_not_rerun(recorded, tmp_path):
    """Its problem is named, and no agent's code is run for it; status 1."""
    folder = tmp_path / "run"
    shutil.copytree(folder_of(recorded, "s", small_cell("sgd")), folder)
    write_run(folder, read_run(folder).model_copy(update={"digest": "0" * 64}))
    result = verify_rerun(folder)
    assert result.exit_code == 1
    assert "problem: digest" in result.stdout
    assert "tier" not in result.stdout


def test_a_run_that_no_longer_works_is_a_difference(tmp_path):
    """An agent that fails now has not reproduced its record."""
    cell = synthetic_cell("sgd", REGRESSION, 0, 3, config={"no_such_field": 1})
    folder = write_record(tmp_path, "s", cell, synthetic_updates(cell, 3))
    [(path, differences)] = reproduce(tmp_path)
    assert path == folder
    assert differences[0] == "status: finished against failed"


@pytest.fixture
def rerun(monkeypatch):
    """Replaces the run itself by the synthetic record of its cell; the cells that were run."""
    ran = []

    def fake(cell: Cell, folder: Path, suite: str) -> None:
        ran.append(cell)
        write_record(folder.parent, suite, cell, synthetic_updates(cell, 2))
        folder_of(folder.parent, suite, cell).rename(folder)

    monkeypatch.setattr(module, "run_cell", fake)
    return ran


@pytest.fixture
def four_runs(tmp_path):
    cells = [synthetic_cell("sgd", IMITATION, seed, 2) for seed in range(4)]
    for cell in cells[:3]:
        write_record(tmp_path / "r", "s", cell, synthetic_updates(cell, 2))
    write_record(
        tmp_path / "r", "s", cells[3], synthetic_updates(cells[3], 2)[:2], status="running"
    )
    return tmp_path / "r"


def test_sample_draws_that_many_runs(four_runs, rerun):
    """--sample 2 re-runs two different finished runs, not always the same; none is left out."""
    drawn = set()
    for _ in range(50):
        rerun.clear()
        result = verify_rerun(four_runs, "--sample", 2)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("reproduced exactly") == 2
        assert len({cell.key() for cell in rerun}) == 2
        drawn |= {cell.seed for cell in rerun}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("sample", [None, 3, 100])
def test_without_a_smaller_sample_all_finished_runs_are_rerun(four_runs, rerun, sample):
    """Runs that have not finished have no digest to reproduce."""
    assert [differences for _, differences in reproduce(four_runs, sample)] == [[], [], []]
    assert [cell.seed for cell in rerun] == [0, 1, 2]


def test_nothing_to_rerun(tmp_path):
    """Unfinished runs and packed bundles: one line says so, instead of "reproduced exactly"."""
    cell = synthetic_cell("sgd", IMITATION, 0, 2)
    write_record(tmp_path, "s", cell, synthetic_updates(cell, 2), status="interrupted")
    for path in (tmp_path, tmp_path / "b.tar.gz"):
        with pytest.raises(RecordError, match="no finished runs to re-run"):
            list(reproduce(path))


# Comparing two records.

CELL = synthetic_cell("scpo", IMITATION, 0, 5)
UPDATES = synthetic_updates(CELL, 5)


def compared(
    place: Path, other: list[Update], one: list[Update] = UPDATES, cell: Cell = CELL, **fields: Any
) -> list[str]:
    """Write both records and compare them. cell, fields: of the other record."""
    a = write_record(place / "a", "s", CELL, one)
    return compare(a, write_record(place / "b", "s", cell, other, **fields))


def test_timing_and_versions_do_not_make_a_difference(tmp_path):
    """A slower machine with other packages that gives the same numbers has reproduced the run."""
    slower = [
        changed(u, wall_time_s=2 * u.wall_time_s, steps_per_s=u.steps_per_s / 2) for u in UPDATES
    ]
    assert compared(tmp_path, slower, provenance={"versions": {"torch": "9"}}) == []


@pytest.mark.parametrize("field", sorted(Update.model_fields.keys() - TIMING_FIELDS - {"update"}))
def test_every_field_is_compared(tmp_path, field):
    """No number of an update can differ unnoticed; the first update that differs is named."""
    value, place = getattr(UPDATES[3], field), field
    if field == "diagnostics":
        place, other = "diagnostics.loss", {**value, "loss": 0.0}
    else:
        other = not value if isinstance(value, bool) else value + 1
    changed_late = [*UPDATES[:3], *(changed(u, **{field: other}) for u in UPDATES[3:])]
    differences = compared(tmp_path, changed_late)
    assert differences[0].startswith(f"update 3: {place}: ")
    assert differences[1:] == ["update 3 is the first of those that differ"]


@pytest.mark.parametrize("other", [{}, {"loss": None, "more": None}])
def test_a_missing_diagnostic_is_not_one_that_is_null(tmp_path, other):
    """An agent that no longer reports a number differs from one that reports it as unknown."""
    one = [changed(u, diagnostics={"loss": None}) for u in UPDATES]
    differences = compared(tmp_path, [changed(u, diagnostics=other) for u in UPDATES], one)
    assert differences[0].startswith("update 0: diagnostics.")


def test_differing_versions_are_named_beside_a_difference(tmp_path):
    """They are the usual reason for it."""
    late = [*UPDATES[:5], changed(UPDATES[5], iterate_return=7.0)]
    differences = compared(
        tmp_path, late, provenance={"versions": {"torch": "9"}, "cpu": "synthetic"}
    )
    assert "provenance.versions.torch: 2.13.0 against 9" in differences
    assert not any("cpu" in line for line in differences)


def test_cell_status_and_length_are_compared(tmp_path):
    """Records of other cells, unfinished ones and shorter ones are not the same record."""
    other = synthetic_cell("scpo", IMITATION, 1, 5)
    differences = compared(tmp_path, UPDATES[:3], cell=other, status="failed")
    assert differences[:3] == [
        "cell.seed: 0 against 1",
        "status: finished against failed",
        "updates: 6 against 3",
    ]


def test_the_digest_is_compared(tmp_path):
    """Equal lines under another digest: one of the two records is not what it claims to be."""
    assert compared(tmp_path, UPDATES, digest="0" * 64)[0].startswith("digest: ")


def test_damaged_records_are_not_compared(tmp_path):
    """One line names the file or the field."""
    with pytest.raises(RecordError, match="expected at most"):
        compared(tmp_path, [*UPDATES[:5], changed(UPDATES[5], probe_steps=10**400)])
    with pytest.raises(RecordError, match="not found"):
        compare(tmp_path / "a", tmp_path / "c")
