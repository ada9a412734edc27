"""Records of others get into the results whole, under the suite's conditions, or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_records import IMITATION, REGRESSION, synthetic_updates, write_record
from typer.testing import CliRunner, Result

from scpo_bench.cli import app
from scpo_bench.records.files import RUN_FILE
from scpo_bench.records.schema import Cell, Update
from scpo_bench.submissions import publish as publication
from scpo_bench.submissions.bundle import bundle
from scpo_bench.submissions.verify import verify
from scpo_bench.suites.cells import cells, run_folder
from scpo_bench.suites.schema import load_benchmarks

SUITES = f"""
version: 1
suites:
  small:
    description: two seeds
    tasks: [{REGRESSION}]
    agents: [ppo]
    steps: 600
    seeds: 2
    num_envs: 4
    start: backup
"""
AGENT = "my_agent.py:Mine"
RESULTS, SENT = Path("results"), Path("sent")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A folder with a suites file and the records of ppo, which the suite plans."""
    monkeypatch.chdir(tmp_path)
    Path("benchmarks.yaml").write_text(SUITES)
    for cell in planned():
        write(RESULTS, cell)


def planned(**fields: object) -> list[Cell]:
    suite = load_benchmarks(Path("benchmarks.yaml")).suites["small"]
    return [cell.model_copy(update=fields) for cell in cells(suite)]


def submitted(**fields: object) -> list[Cell]:
    return planned(**{"agent": AGENT, "agent_source": "a" * 64, **fields})


def write(
    results: Path, cell: Cell, suite: str = "small", updates: list[Update] | None = None
) -> Path:
    """A finished record, where the harness would put it."""
    updates = updates or synthetic_updates(cell, 6)
    scratch = write_record(results.with_name("scratch"), suite, cell, updates)
    place = run_folder(results, suite, cell)
    place.parent.mkdir(parents=True, exist_ok=True)
    return scratch.rename(place)


def pack(records: list[Cell], output: str = "sent.tar.gz", suite: str = "small") -> Path:
    for cell in records:
        write(SENT, cell, suite)
    return bundle(SENT, suite, Path(output), records)


def publish(path: Path) -> Result:
    result = CliRunner().invoke(app, ["publish", str(path)])
    assert result.exception is None or isinstance(result.exception, (SystemExit, ValueError))
    return result


def tree(root: Path) -> dict[str, str]:
    """Digest of every file, and every folder and link, below ``root``."""
    return {
        path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


@pytest.mark.parametrize("output", ["sent.tar.gz", "packed"])
def test_a_row_is_gained(output):
    """The whole walk: packed, published, in the table, consistent; other records as they were."""
    before = tree(RESULTS)
    result = publish(pack(submitted(), output))
    assert result.exit_code == 0, result.output
    assert "2 records added, 0 already there; tier: consistent" in result.output
    assert "make leaderboard" in result.output
    table = CliRunner().invoke(app, ["leaderboard", "small", "--format", "csv"]).output
    assert AGENT in table
    assert verify(RESULTS).ok
    after = tree(RESULTS)
    assert before.items() <= after.items()
    for cell in submitted():
        own, theirs = (run_folder(root, "small", cell) for root in (RESULTS, SENT))
        assert list(tree(own).values()) == list(tree(theirs).values())
        assert str(own) in result.output


def test_what_is_there_is_not_added_again():
    """The same bundle twice, or one that repeats our own records, changes nothing."""
    packed = pack([*submitted(), *planned()[:1]])
    assert publish(packed).exit_code == 0
    before = tree(RESULTS)
    result = publish(packed)
    assert result.exit_code == 0
    assert "0 records added, 3 already there" in result.output
    assert "make leaderboard" not in result.output
    assert tree(RESULTS) == before


def one_unplanned_limit() -> Path:
    first, second = submitted()
    return pack([first, second.model_copy(update={"cost_limit": 1.0})])


def another_task() -> Path:
    return pack(submitted(task=IMITATION))


def a_missing_seed() -> Path:
    return pack(submitted()[:1])


def an_unfinished_seed() -> Path:
    first, second = submitted()
    write(SENT, first)
    failed = write_record(
        Path("scratch"), "small", second, synthetic_updates(second, 3), "failed", "ValueError: no"
    )
    failed.rename(run_folder(SENT, "small", second))
    return bundle(SENT, "small", Path("sent.tar.gz"))


def good_and_bad() -> Path:
    return pack([*submitted(), *submitted(agent="other.py:Other")[:1]])


def an_agent_of_ours() -> Path:
    return pack(planned(agent="cpo"))


def an_agent_of_ours_by_its_module() -> Path:
    return pack(planned(agent="scpo_bench.baselines.cpo:CPO"))


def another_record_there() -> Path:
    cell = submitted()[1]
    write(RESULTS, cell, updates=synthetic_updates(cell.model_copy(update={"seed": 9}), 6))
    return pack(submitted())


def another_set_up_there() -> Path:
    cell = submitted(config={"gamma": 0.5})[1]
    write(RESULTS, cell, updates=synthetic_updates(submitted()[1], 6))
    return pack(submitted())


def a_damaged_record_there() -> Path:
    place = run_folder(RESULTS, "small", submitted()[1])
    place.mkdir(parents=True)
    (place / RUN_FILE).write_text("{}")
    return pack(submitted())


def changed_after_packing() -> Path:
    packed = pack(submitted(), "packed")
    path = next(packed.rglob(RUN_FILE))
    path.write_text(path.read_text().replace("synthetic", "imaginary"))
    return packed


REFUSED: list[tuple[Callable[[], Path], str]] = [
    (one_unplanned_limit, "seed 1: cost_limit: 1.0, planned is 0.0"),
    (one_unplanned_limit, "missing or not finished: seeds 1"),
    (another_task, "task: the suite does not have it"),
    (a_missing_seed, "missing or not finished: seeds 1"),
    (an_unfinished_seed, "missing or not finished: seeds 1"),
    (good_and_bad, "other.py:Other on scpo_bench/HarmfulRegression-v0: missing"),
    (an_agent_of_ours, f"scpo-bench run small --agents cpo --tasks {REGRESSION}"),
    (an_agent_of_ours_by_its_module, "an agent of this package"),
    (another_record_there, "another record is there; nothing is replaced"),
    (another_set_up_there, "another record is there; nothing is replaced"),
    (a_damaged_record_there, "cannot be read"),
    (changed_after_packing, "NOT consistent"),
]


@pytest.mark.parametrize(("sent", "reason"), REFUSED)
def test_a_refused_bundle_changes_nothing(sent, reason):
    """The reason is printed, and none of the records is added, good ones neither."""
    packed = sent()
    before = tree(RESULTS)
    result = publish(packed)
    assert result.exit_code == 1
    assert reason in result.output
    assert "nothing was added" in result.output
    assert tree(RESULTS) == before


def a_results_folder() -> Path:
    pack(submitted())
    return SENT / "small"


def an_unknown_suite() -> Path:
    return pack(submitted(), suite="smal")


def a_linked_record() -> Path:
    packed = pack(submitted())
    own, theirs = (run_folder(root, "small", submitted()[1]) for root in (RESULTS, SENT))
    own.parent.mkdir(parents=True)
    own.symlink_to(theirs.absolute())
    return packed


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (lambda: Path("absent.tar.gz"), "not found"),
        (a_results_folder, "not a bundle"),
        (an_unknown_suite, "did you mean 'small'?"),
        (a_linked_record, "a symbolic link"),
    ],
)
def test_a_mistake_is_one_line(sent, reason):
    """What cannot be a submission is the caller's mistake; nothing is written."""
    packed = sent()
    before = tree(Path())
    result = publish(packed)
    assert result.exit_code != 0
    assert reason in str(result.exception)
    assert not result.output
    assert tree(Path()) == before


def test_two_records_of_one_place_are_refused():
    """Two set-ups of one agent have the same places; the second would find the first there."""
    for cell in submitted(config={"gamma": 0.5}):
        place = write(SENT, cell)
        deeper = SENT / "small" / "more" / place.relative_to(SENT)
        deeper.parent.mkdir(parents=True, exist_ok=True)
        place.rename(deeper)
    packed = pack(submitted())
    before = tree(RESULTS)
    result = publish(packed)
    assert result.exit_code == 1
    assert "seed 1: twice in the bundle" in result.output
    assert tree(RESULTS) == before


def test_a_killed_publish_can_be_repeated():
    """A kill in the middle of a record leaves whole records only, and the same command goes on."""
    packed = pack(submitted())
    program = """
import os
from scpo_bench import cli
from scpo_bench.submissions import publish
write, written = publish._write, []
def killed(path, data):
    written.append(path)
    if len(written) == 4:
        os._exit(9)
    write(path, data)
publish._write = killed
cli.main()
"""
    command = [sys.executable, "-c", program, "publish", str(packed)]
    assert subprocess.run(command, timeout=120, capture_output=True).returncode == 9
    first, second = (run_folder(RESULTS, "small", cell) for cell in submitted())
    assert first.exists()
    assert not second.exists()
    assert verify(RESULTS).ok
    assert verify(RESULTS).runs == 3
    result = publish(packed)
    assert "1 records added, 1 already there" in result.output
    assert verify(RESULTS).ok
    assert verify(RESULTS).runs == 4


def test_what_is_added_is_what_was_checked(monkeypatch):
    """A bundle that is changed after the checks, by its author say, gains nothing by it."""
    packed = pack(submitted(), "packed")
    before = tree(packed)

    def verify_and_change(root: Path) -> object:
        report = verify(root)
        for path in packed.rglob(RUN_FILE):
            path.write_text("{}")
        return report

    monkeypatch.setattr(publication, "verify", verify_and_change)
    assert publish(packed).exit_code == 0
    added = tree(run_folder(RESULTS, "small", submitted()[0]).parent)
    assert set(added.values()) <= set(before.values())


def test_a_record_that_appears_meanwhile_is_not_replaced():
    """Between check and writing another command may finish the same place."""
    record = write(SENT, submitted()[0])
    place = run_folder(RESULTS, "small", submitted()[0])
    place.mkdir(parents=True)
    (place / RUN_FILE).write_text("of another command")
    before = tree(RESULTS)
    with pytest.raises(OSError, match="not empty"):
        publication._add(record, RESULTS, place)
    assert tree(RESULTS) == before
