"""Re-runs: what a record says is reproduced exactly, or the first difference is named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from synthetic_records import (
    GOAL,
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
from scpo_bench.submissions.reproduce import compare_folders, lines, reproduce
from scpo_bench.submissions.tiers import Ends, Tier, prediction_interval
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
    assert tier == "tier: reproduced exactly"


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
    *_, difference, first, reason, seeds, tier = result.stdout.splitlines()
    assert f"{forged}: different\n  provenance." in result.stdout  # before any number
    assert difference == f"  update 1: iterate_return: {honest + 0.25} against {honest}"
    assert first == "  update 1 is the first of those that differ"
    assert reason.startswith("  update 1: iterate_return is beyond the tolerance")
    assert seeds == "  interval: needs 5 recorded seeds of this set-up, found 1"
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
    [(path, comparison)] = reproduce(tmp_path)
    assert path == folder
    assert comparison.tier is Tier.DIFFERENT
    assert comparison.differences[0] == "status: finished against failed"
    assert "no_such_field" in comparison.differences[-1]
    gone = synthetic_cell("nowhere:Agent", REGRESSION, 0, 3)
    write_record(tmp_path / "gone", "s", gone, synthetic_updates(gone, 3))
    [(_, comparison)] = reproduce(tmp_path / "gone", trust_code=True)
    assert comparison.tier is Tier.DIFFERENT
    assert "cannot import 'nowhere'" in comparison.differences[-1]


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
        assert result.stdout.count(": reproduced exactly") == 2 + 1  # the tier, too
        assert len({cell.key() for cell in rerun}) == 2
        drawn |= {cell.seed for cell in rerun}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("sample", [None, 3, 100])
def test_without_a_smaller_sample_all_finished_runs_are_rerun(four_runs, rerun, sample):
    """Runs that have not finished have no digest to reproduce."""
    assert [found.tier for _, found in reproduce(four_runs, sample)] == [Tier.EXACT] * 3
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
    found = compare_folders(a, write_record(place / "b", "s", cell, other, **fields))
    assert (found.tier is Tier.EXACT) == (not found.differences)
    return found.differences


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
    versions = {name: str(number) for number, name in enumerate("abcdefghij")}
    place = tmp_path / "a", tmp_path / "b"
    a = write_record(place[0], "s", CELL, UPDATES)
    provenance = {"versions": {"torch": "9", **versions}, "cpu": "synthetic"}
    b = write_record(place[1], "s", CELL, late, provenance=provenance)
    found = compare_folders(a, b)
    assert "provenance.versions.torch: 2.13.0 against 9" in found.provenance
    assert not any("cpu" in line for line in found.provenance)
    shown = lines(a, found)
    # All of them, and before the first number.
    assert shown[1 : 1 + len(found.provenance)] == [f"  {line}" for line in found.provenance]
    assert len(found.provenance) > 10
    assert shown[-1].strip() == found.differences[-1]


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
    assert tier_of(tmp_path / "cpu", UPDATES, digest="0" * 64) is Tier.DIFFERENT


def test_damaged_records_are_not_compared(tmp_path):
    """One line names the file or the field."""
    with pytest.raises(RecordError, match="expected at most"):
        compared(tmp_path, [*UPDATES[:5], changed(UPDATES[5], probe_steps=10**400)])
    with pytest.raises(RecordError, match="not found"):
        compare_folders(tmp_path / "a", tmp_path / "c")


# Tiers.

OTHER_CPU = {"cpu": "another", "versions": {"torch": "2.13.0"}}


def near(update: Update, factor: float = 1 + 1e-5, **fields: Any) -> Update:
    """The update as another CPU might give it."""
    measured = {
        name: value * factor
        for name, value in update.model_dump().items()
        if isinstance(value, float) and name not in TIMING_FIELDS
    }
    return changed(update, **{**measured, **fields})


def tier_of(
    place: Path, other: list[Update], seeds: list[list[Update]] | None = None, **fields: Any
) -> Tier:
    """Of a re-run on another CPU; seeds: what was recorded for the other seeds."""
    a = write_record(place / "a", "s", CELL, UPDATES)
    b = write_record(place / "b", "s", CELL, other, **{"provenance": OTHER_CPU, **fields})
    setup = [a] if seeds is not None else []
    for number, updates in enumerate(seeds or [], 1):
        cell = synthetic_cell("scpo", IMITATION, number, 5)
        setup.append(write_record(place / "a", "s", cell, updates))
    return compare_folders(a, b, setup).tier


def test_small_differences_need_another_machine(tmp_path):
    """On the same CPU and versions a run is the same to the last bit, or something is wrong."""
    slightly = list(map(near, UPDATES))
    assert tier_of(tmp_path / "1", slightly) is Tier.TOLERANCE
    recorded = read_run(write_record(tmp_path / "2", "s", CELL, UPDATES)).provenance
    same = {**recorded, "commit": "another"}
    assert tier_of(tmp_path / "3", slightly, provenance=same) is Tier.DIFFERENT
    for name, value in (
        ("cpu", "x"),
        ("instruction_set", "AVX2"),
        ("blas", ["x"]),
        ("versions", {}),
    ):
        other = {**recorded, name: value}
        assert tier_of(tmp_path / name, slightly, provenance=other) is Tier.TOLERANCE


def test_a_library_that_is_not_loaded_is_no_other_machine(tmp_path):
    """A process that also loads SciPy names a second BLAS; its numbers are the same."""
    a = write_record(tmp_path / "a", "s", CELL, UPDATES, provenance={"blas": ["x 1"]})
    slightly = list(map(near, UPDATES))
    b = write_record(tmp_path / "b", "s", CELL, slightly, provenance={"blas": ["x 1", "y 2"]})
    assert compare_folders(a, b).tier is Tier.DIFFERENT


def test_the_start_must_agree_on_every_number(tmp_path):
    """Before the policy changes, no agent can have amplified a difference; the rest is its own."""
    for i, update in enumerate(UPDATES):
        far = list(map(near, UPDATES))
        far[i] = near(update, return_mean=(update.return_mean or 1.0) * 1.01)
        expected = Tier.DIFFERENT if i <= 1 else Tier.TOLERANCE
        assert tier_of(tmp_path / str(i), far) is expected
    cell = synthetic_cell("cpo", GOAL, 0, 5)
    updates = synthetic_updates(cell, 5)
    a = write_record(tmp_path / "goal", "s", cell, updates)
    for i, expected in ((0, Tier.DIFFERENT), (1, Tier.TOLERANCE)):  # episodes are chaotic, too
        far = list(map(near, updates))
        far[i] = near(updates[i], cost_sum=updates[i].cost_sum + 7)
        place = tmp_path / f"goal-{i}"
        b = write_record(place, "s", cell, far, provenance=OTHER_CPU)
        assert compare_folders(a, b).tier is expected
    own = [near(update, diagnostics={"loss": 9.0}) for update in UPDATES]
    assert tier_of(tmp_path / "own", own) is Tier.TOLERANCE


def test_a_flipped_violation_is_beyond_the_tolerance(tmp_path):
    """Whether a policy violates is what the table counts, however little decides it."""
    flipped = list(map(near, UPDATES))
    flipped[2] = near(UPDATES[2], iterate_violates=not UPDATES[2].iterate_violates)
    assert tier_of(tmp_path, flipped) is Tier.DIFFERENT


def shifted(by: float) -> list[Update]:
    """Like the record in its first updates, and further off from then on."""
    return [
        *map(near, UPDATES[:3]),
        *(near(u, iterate_objective=u.iterate_objective + by) for u in UPDATES[3:]),
    ]


def test_an_end_among_those_of_the_seeds_is_within_the_interval(tmp_path):
    """Trajectories that separate are judged as one more seed; few seeds say too little."""
    seeds = [shifted(0.02 * number) for number in range(1, 6)]
    assert tier_of(tmp_path / "1", shifted(0.03), seeds) is Tier.INTERVAL
    assert tier_of(tmp_path / "2", shifted(3.0), seeds) is Tier.DIFFERENT
    assert tier_of(tmp_path / "3", shifted(0.03), seeds[:3]) is Tier.DIFFERENT
    assert tier_of(tmp_path / "4", shifted(0.03)) is Tier.DIFFERENT
    wild = shifted(0.03)
    wild[0] = near(wild[0], iterate_objective=9.0)  # but not before anything is learned
    assert tier_of(tmp_path / "5", wild, seeds) is Tier.DIFFERENT
    wild[:2] = near(UPDATES[0]), near(wild[1], iterate_objective=9.0, probe_steps=99)
    assert tier_of(tmp_path / "6", wild, seeds) is Tier.INTERVAL


def test_one_violation_where_no_seed_has_any_is_outside(tmp_path):
    """ "Safe throughout" on one machine must not be confirmed by a run that was not safe."""
    seeds = [shifted(0.02 * number) for number in range(1, 6)]
    unsafe = shifted(0.03)
    unsafe[4] = near(unsafe[4], iterate_violates=not unsafe[4].iterate_violates)
    assert tier_of(tmp_path, unsafe, seeds) is Tier.DIFFERENT


def test_the_interval_by_hand():
    """Student's t with n - 1 = 1 degree of freedom: 636.6 s sqrt(1 + 1/2), and the tolerance."""
    low, high = prediction_interval([0.0, 2.0])
    assert (low + high) / 2 == pytest.approx(1.0)
    assert (high - low) / 2 == pytest.approx(636.619 * 2**0.5 * 1.5**0.5 + 1e-3, rel=1e-5)
    assert prediction_interval([0.0] * 5) == (-1e-6, 1e-6)
    assert Ends.of([UPDATES] * 4).obstacles(UPDATES)[0].startswith("interval: needs 5 recorded")


def test_a_tier_that_is_not_exact_is_no_failure(four_runs, monkeypatch):
    """Exit status 0, with the name of the tier; the worst of several is that of the folder."""

    def fake(cell: Cell, folder: Path, suite: str) -> None:
        updates = synthetic_updates(cell, 2)
        if cell.seed == 1:
            updates = list(map(near, updates))
        write_record(folder.parent, suite, cell, updates, provenance=OTHER_CPU)
        folder_of(folder.parent, suite, cell).rename(folder)

    monkeypatch.setattr(module, "run_cell", fake)
    result = verify_rerun(four_runs)
    assert result.exit_code == 0, result.output
    assert result.stdout.count(": reproduced exactly") == 3 - 1
    assert result.stdout.splitlines()[-1] == "tier: reproduced within tolerance"
