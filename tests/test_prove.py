"""`scpo-bench prove`, its proof.json, and what the leaderboard believes of it."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from scpo_bench.cli import app, main
from scpo_bench.leaderboard.columns import COLUMNS, cell_text, shown
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.records.files import RecordError, read_run, write_run
from scpo_bench.records.proof import MAX_PROOF_BYTES, PROOF_FILE, read_proof
from scpo_bench.records.schema import Cell
from scpo_bench.runs.harness import run_cell
from scpo_bench.submissions.bundle import bundle
from scpo_bench.submissions.contents import Refused, list_contents
from scpo_bench.submissions.verify import verify

TASK = "scpo_bench/HarmfulRegression-v0"


def run_folder(root, agent, **config):
    cell = Cell(
        agent=agent,
        task=TASK,
        seed=0,
        steps=16 * 10 * 4,
        start="backup",
        num_envs=16,
        evaluation_episodes=50,
        cost_limit=0.0,
        config={"learning_rate": 0.3, "n_steps": 10, **config},
    )
    folder = root / "s" / REGRESSION_FOLDER / agent / "seed-0"
    assert run_cell(cell, folder, "s").status == "finished"
    return folder


REGRESSION_FOLDER = "scpo_bench.HarmfulRegression-v0"


@pytest.fixture(scope="module")
def proved_results(tmp_path_factory):
    """Results of suite "s": a proved run of scpo and one of sgd, whose policies violate."""
    root = tmp_path_factory.mktemp("results")
    outcomes = {}
    for agent, config in (("scpo", {"mode": "proven"}), ("sgd", {})):
        folder = run_folder(root, agent, **config)
        outcomes[agent] = CliRunner().invoke(app, ["prove", str(folder)])
    return root, outcomes


@pytest.fixture
def results(proved_results, tmp_path):
    """A copy to change."""
    return shutil.copytree(proved_results[0], tmp_path / "results")


def column(name):
    return next(column for column in COLUMNS if column.name == name)


def test_prove_proves_or_says_from_where_it_is_unsafe(proved_results):
    """Exit status, one line of result, and a counterexample that a user can check."""
    root, outcomes = proved_results
    assert outcomes["scpo"].exit_code == 0, outcomes["scpo"].output
    assert "4 of 4 distinct policies proved safe from every start state" in outcomes["scpo"].output
    assert outcomes["sgd"].exit_code == 1
    assert "update " in outcomes["sgd"].output
    assert "violates from start state (" in outcomes["sgd"].output
    for agent in outcomes:
        folder = root / "s" / REGRESSION_FOLDER / agent / "seed-0"
        run = read_run(folder)
        proof = read_proof(folder, run)
        assert (proof.key, proof.digest) == (run.key, run.digest)
        assert proof.proved + proof.violating + proof.undecided == proof.distinct == 4
        assert (proof.counterexample is None) == (agent == "scpo")


def test_a_run_that_is_not_repeated_proves_nothing(results):
    """If the repeated digest is another one, the proofs are of other policies."""
    folder = results / "s" / REGRESSION_FOLDER / "scpo" / "seed-0"
    (folder / PROOF_FILE).unlink()
    run = read_run(folder)
    write_run(folder, run.model_copy(update={"digest": "0" * 64}))
    outcome = CliRunner().invoke(app, ["prove", str(folder)])
    assert outcome.exception.exit_status == 1
    assert "another digest than the recorded one" in str(outcome.exception)
    assert not (folder / PROOF_FILE).exists()


def test_users_mistakes_are_one_line_with_status_2(results, tmp_path, monkeypatch, capsys):
    """No run, an unfinished run, a task that cannot be proved."""
    folder = results / "s" / REGRESSION_FOLDER / "scpo" / "seed-0"
    run = read_run(folder)
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    for place in (unfinished, other):
        place.mkdir()
    write_run(unfinished, run.model_copy(update={"status": "interrupted", "digest": None}))
    noisy = run.cell.model_copy(
        update={"task": "scpo_bench/DoubleIntegratorImitation-v0", "env": {"noise_std": 0.1}}
    )
    write_run(other, run.model_copy(update={"cell": noisy}))
    for place, message in (
        (tmp_path / "nowhere", "not found"),
        (unfinished, "has not finished (status 'interrupted')"),
        (other, "noise_std: expected 0, got 0.1"),
    ):
        monkeypatch.setattr("sys.argv", ["scpo-bench", "prove", str(place)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_leaderboard_shows_proofs_where_there_are_any(results):
    """proved / distinct, over the seeds that were proved; no column without a proof."""
    rows = leaderboard(load(results, "s")).to_dict("records")
    assert column("proved_policies") in [c for c in shown(rows) if c.name == "proved_policies"]
    by_agent = {row["agent"]: cell_text(column("proved_policies"), row) for row in rows}
    assert by_agent["scpo"] == "4/4"
    assert by_agent["sgd"] in ("0/4", "1/4")
    (results / "s" / REGRESSION_FOLDER / "sgd" / "seed-0" / PROOF_FILE).unlink()
    rows = leaderboard(load(results, "s")).to_dict("records")
    assert {row["agent"]: cell_text(column("proved_policies"), row) for row in rows}["sgd"] == "–"
    (results / "s" / REGRESSION_FOLDER / "scpo" / "seed-0" / PROOF_FILE).unlink()
    rows = leaderboard(load(results, "s")).to_dict("records")
    assert "proved_policies" not in [c.name for c in shown(rows)]


def changed(folder, **fields):
    path = folder / PROOF_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _link(folder):
    (folder / PROOF_FILE).rename(folder / "elsewhere.txt")
    (folder / PROOF_FILE).symlink_to("elsewhere.txt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / PROOF_FILE).write_text("{"), "Invalid JSON"),
        (lambda folder: (folder / PROOF_FILE).write_bytes(b"[" * MAX_PROOF_BYTES), "Invalid JSON"),
        (
            lambda folder: (folder / PROOF_FILE).write_text(" " * (MAX_PROOF_BYTES + 1)),
            "larger than 20000 bytes",
        ),
        (lambda folder: changed(folder, proved=400), "is not distinct"),
        (lambda folder: changed(folder, violating=1, proved=3), "a counterexample belongs to"),
        (lambda folder: changed(folder, digest="0" * 64), "belongs to another record"),
        (lambda folder: changed(folder, key="0" * 64), "belongs to another record"),
        (lambda folder: changed(folder, more=1), "Extra inputs"),
        (_link, "a symbolic link"),
    ],
)
def test_a_damaged_proof_is_ignored_and_named(results, damage, message):
    """Untrusted data: the record still counts, the claim about it does not."""
    folder = results / "s" / REGRESSION_FOLDER / "scpo" / "seed-0"
    damage(folder)
    with pytest.raises(RecordError, match=message):
        read_proof(folder, read_run(folder))
    table = leaderboard(load(results, "s"))
    problems = table.attrs["problems"]
    assert [p.startswith("ignored: ") and message in p for p in problems] == [True]
    row = next(row for row in table.to_dict("records") if row["agent"] == "scpo")
    assert cell_text(column("proved_policies"), row) == "–"
    assert row["seeds_finished"] == 1


def test_bundles_carry_no_proofs(results, tmp_path):
    """A proof in a submission is a claim that nobody has checked: it is not packed, and refused."""
    assert verify(results).ok  # one's own are tolerated
    packed = bundle(results, "s", tmp_path / "packed")
    assert not list(packed.rglob(PROOF_FILE))
    assert verify(packed).ok
    shutil.copy(
        results / "s" / REGRESSION_FOLDER / "scpo" / "seed-0" / PROOF_FILE,
        packed / REGRESSION_FOLDER / "scpo" / "seed-0",
    )
    with pytest.raises(Refused, match=r"proof\.json: not part of a record"):
        list_contents(packed)
    with pytest.raises(Refused):
        verify(packed)
