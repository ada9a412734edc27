"""Records: the rule for violations, what contradicts it, and `scpo-bench show`."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_records import GOAL, IMITATION, synthetic_cell, synthetic_updates, write_record

from scpo_bench.errors import UserError
from scpo_bench.records.consistency import check_bounds, check_record
from scpo_bench.records.files import (
    COMPRESSED_UPDATES_FILE,
    file_name,
    read_run,
    read_updates,
    write_atomically,
)
from scpo_bench.records.schema import canonical, violates
from scpo_bench.records.show import show

ROOT = Path(__file__).parent.parent
TASK = "scpo_bench.DoubleIntegratorImitation-v0"
SCPO = Path("results/paper") / TASK / "scpo/seed-0"
CPO = Path("results/paper") / TASK / "cpo/seed-3"
LIMIT_25 = Path("results/scpo-rl/SafetyHopperVelocity-v1/ppo-lagrangian/seed-0")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def altered(folder: Path, target: Path, number: int, **fields: object) -> Path:
    """A copy of a run with some fields of one update changed; nothing else is adapted."""
    shutil.copytree(folder, target)
    path = target / COMPRESSED_UPDATES_FILE
    lines = gzip.decompress(path.read_bytes()).splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **fields}).encode()
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return target


def rows(text: str) -> dict[str, str]:
    """label -> text of what `show` prints, without the wrapping."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines()[2:]:
        label = line[:14].strip() or label
        found[label] = " ".join([*found.get(label, "").split(), *line[14:].split()])
    return found


@pytest.mark.parametrize(
    ("cost", "worst", "limit", "expected"),
    [
        (0.0, 0.18, 0.0, True),  # one constraint is violated, though no cost was counted
        (0.0, 0.0, 0.0, False),
        (3.0, -0.1, 0.0, False),  # with limit 0 the signed values decide, not the cost
        (0.0, None, 0.0, False),
        (0.1, None, 0.0, True),  # no signed values: any cost counts
        (25.0, None, 25.0, False),  # the limit itself is allowed
        (25.1, None, 25.0, True),
        (0.05, 0.18, 0.1, False),  # above limit 0 the mean cost decides, not the signed values
        (0.2, -0.1, 0.1, True),
    ],
)
def test_the_rule_for_violations(cost, worst, limit, expected):
    """The verdict that every table, figure and count of the benchmark rests on."""
    assert violates(cost, worst, limit) is expected


@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_a_verdict_that_does_not_follow_is_inconsistent(tmp_path, limit):
    """`verify` decides by the same rule; a verdict edited into a record contradicts it."""
    cell = synthetic_cell("sgd", IMITATION, 0, 10, cost_limit=limit)
    updates = synthetic_updates(cell, 10)
    if limit == 0:  # constraint values alone decide, so the cost must not
        updates = [update.model_copy(update={"iterate_cost": 0.0}) for update in updates]
    run = read_run(write_record(tmp_path, "s", cell, updates))
    assert check_record(run, updates) == []
    for update in updates:
        other = update.model_copy(update={"iterate_violates": not update.iterate_violates})
        problems = check_record(
            run, [*updates[: update.update], other, *updates[update.update + 1 :]]
        )
        expected = f"update {update.update}: iterate_violates: {update.iterate_violates} follows"
        assert any(problem.startswith(expected) for problem in problems)


def first_above_its_bound():
    """The first update of SCPO's record after which a constraint ended above its bound."""
    return next(
        u.update
        for u in read_updates(SCPO)[1:]
        if any(
            u.diagnostics[f"realised/{name}"] > u.diagnostics[f"bound/{name}"] + 1e-6
            for name in ("position", "terminal", "velocity")
        )
    )


def test_show_answers_whether_an_update_violates():
    """Collection, evaluation, verdict with its rule, certificate and diagnostics of one update."""
    found = rows(show(SCPO, 18))
    assert found["update"].startswith("18 of 300, 17280 steps, 844800 probe steps, 5 violating")
    assert found["collected"].startswith("960 steps by the policy of update 17 0 steps with cost")
    assert "32 episodes ended, 0 with cost > 0; mean return -24.3883" in found["collected"]
    assert found["evaluated"].startswith("return -25.1526, cost 0, worst constraint value -0.03821")
    assert "on 1000 held-out episodes" in found["evaluated"]
    assert found["verdict"] == (
        "does not violate: worst constraint value -0.0382134 <= 0 "
        "(limit 0: any violated constraint value counts)"
    )
    assert re.search(
        r"position bound -0.166788 realised -0.166788 L 0.01( terminal|$)", found["certificate"]
    )
    assert "velocity bound -0.11646 realised -0.116461 L 0.0169157" in found["certificate"]
    assert "above its bound" in show(SCPO, first_above_its_bound())
    assert "loss=0.0930818" in found["diagnostics"]


def test_show_names_the_rule_that_was_violated(tmp_path):
    """Another worst value, another verdict; one that contradicts the record is pointed out."""
    fields = {"iterate_worst_constraint_value": 0.18, "iterate_violates": True}
    verdict = "violates: worst constraint value 0.18 > 0 (limit 0: any violated constraint value"
    found = rows(show(altered(SCPO, tmp_path / "a", 17, **fields), 17))
    assert found["verdict"] == f"{verdict} counts)"
    fields["iterate_violates"] = False
    found = rows(show(altered(SCPO, tmp_path / "b", 17, **fields), 17))
    assert found["verdict"].startswith(f"{verdict} counts), BUT THE RECORD SAYS OTHERWISE")
    found = rows(show(LIMIT_25, 17))
    assert (
        found["verdict"]
        == "violates: mean cost 51.9 > 25 (limit 25: the mean cost per episode counts)"
    )
    assert found["multipliers"] == "multiplier=0.355879"
    assert "16 episodes ended, 4 with cost > 25" in found["collected"]


def test_show_summarises_a_run():
    """What was asked, how it ended, the first and the last policy, and the first violations."""
    found = rows(show(CPO))
    run, updates = read_run(CPO), read_updates(CPO)
    assert found["asked"].startswith("suite paper: 288000 steps in 32 environments start: backup")
    assert "cost_gamma=0.97" in found["config"]
    assert found["ended"].startswith("finished, from 2026-11-25T")
    assert (found["key"], found["digest"]) == (run.key, run.digest)
    assert "does not violate: worst constraint value -0.206043 <= 0" in found["start policy"]
    assert "violates: worst constraint value 0.0270328 > 0" in found["final policy"]
    unsafe = [u.update for u in updates if u.iterate_violates]
    assert found["violations"] == (
        f"{len(unsafe)} of 300 evaluated updates updates 111, 112, 113, 114, 119, 163, 164, 165, "
        "... `--update 111` shows the first of them"
    )
    assert unsafe[:8] == [111, 112, 113, 114, 119, 163, 164, 165]
    assert rows(show(SCPO))["violations"] == "0 of 300 evaluated updates"


def test_show_of_runs_without_measurements(tmp_path):
    """A failed run, the start policy and an update without evaluation are shown as such."""
    failed = synthetic_cell("ppo", GOAL, 0, 4)
    folder = write_record(tmp_path, "s", failed, [], status="failed", error="ValueError: no")
    found = rows(show(folder))
    assert found["ended"].startswith("failed: ValueError: no, from")
    assert found["updates"] == "none"
    with pytest.raises(UserError, match=r"no update 0 in '.*'; recorded: none"):
        show(folder, 0)
    names = ("iterate_return", "iterate_cost", "iterate_violates")
    folder = altered(LIMIT_25, tmp_path / "gap", 5, **dict.fromkeys(names))
    assert rows(show(folder, 5))["verdict"] == "unknown: this update was not evaluated"
    assert rows(show(folder, 0))["collected"] == "nothing yet: this is the start policy"


@pytest.mark.parametrize(
    ("folder", "update", "message"),
    [
        (CPO, 301, r"--update: no update 301 in '.*seed-3'; recorded: 0 to 300"),
        (CPO, -1, r"--update: no update -1 in"),
        (CPO.parent, None, r"no run in '.*cpo'; 20 below it, such as results/paper/.*/cpo/seed-0"),
        (CPO.parent / "seed-30", None, r"no run in '.*seed-30'; did you mean 'seed-3'\?"),
        (CPO.parent.parent / "cpoo/seed-0", None, r"no run in '.*'; did you mean 'cpo'\?"),
        (Path("/no/such/folder"), None, r"no run in '/no/such/folder'"),
    ],
)
def test_show_of_nothing_is_one_line(folder, update, message):
    """A folder without a run, or an update that was not recorded: what there is instead."""
    with pytest.raises(UserError, match=message):
        show(folder, update)


def test_show_prints_no_control_characters(tmp_path):
    """A record may be someone else's: its text must not control the terminal."""
    cell = synthetic_cell("\x1b[2J", IMITATION, 0, 2, config={"\x07": "\x1b]0;x\x07"})
    folder = write_record(tmp_path, "s\x1b", cell, synthetic_updates(cell, 2))
    for text in (show(folder), show(folder, 1)):
        assert all(line.isprintable() for line in text.splitlines())


def test_show_is_light():
    """Reading a record imports no agent, environment or table."""
    program = (
        "import sys, scpo_bench.records.show; "
        "print([m for m in ('torch', 'pandas', 'mujoco', 'scipy', 'rich') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scpo_bench/DoubleIntegrator-v0", "scpo_bench.DoubleIntegrator-v0"),
        ("SafetyPointGoal1-v0", "SafetyPointGoal1-v0"),
        ("ALE/Pong-v5", "ALE.Pong-v5"),
        ("filtered:scpo", "filtered.scpo"),
        ("filtered/scpo", "filtered.scpo+"),
        ("../../mine.py:Agent", "mine.py.Agent+"),
        ("..", "+"),
        ("a b\0c", "a.b.c+"),
        ("-rf", "rf+"),
        ("é", "+"),
        ("a" * 101, f"{'a' * 60}+"),
    ],
)
def test_file_names(name, expected):
    """A name is one part of a path and leads nowhere else; committed folders depend on the form."""
    found = file_name(name)
    if expected.endswith("+"):
        expected += hashlib.sha256(name.encode()).hexdigest()[:32]
    assert found == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_has_no_canonical_text(value):
    """NaN would make a key or digest that no other JSON reader could compute."""
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"a": value})


def test_one_value_has_one_canonical_text():
    """Keys and digests must not depend on the order in which fields were written."""
    assert canonical({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    """The old file stands, and no part of the new one lies beside it."""
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(("steps", "accepted"), [(2**53, True), (2**53 + 1, False)])
def test_counts_are_bounded_where_floats_stop_being_exact(steps, accepted):
    """Larger counts are no measurements, and sums of them would be wrong without a warning."""
    run, (update, *_) = read_run(CPO), read_updates(CPO)
    update = update.model_copy(update={"interaction_steps": steps})
    problem = check_bounds(run, [update])
    assert (problem is None) == accepted
    assert accepted or f"interaction_steps: expected at most {2**53}" in str(problem)


def test_rounding_of_a_mean_is_no_contradiction():
    """The mean of equal costs may exceed the largest by rounding, in proportion to its size."""
    run, updates = read_run(LIMIT_25), read_updates(LIMIT_25)
    number = next(u.update for u in updates if u.episodes)
    for excess, accepted in ((1e-7, True), (1e-5, False)):
        fields = {"cost_max": 1e6, "cost_mean": 1e6 * (1 + excess), "violating_episodes": 1}
        updates[number] = updates[number].model_copy(update=fields)
        problems = check_record(run, updates)
        assert any("cost_mean" in problem for problem in problems) != accepted


@pytest.mark.parametrize(("interval", "text"), [(1, "every update"), (5, "1 in 5")])
def test_show_says_how_often_policies_are_evaluated(tmp_path, interval, text):
    """An update without an evaluation is no gap in the record if it was never planned."""
    cell = synthetic_cell("ppo", IMITATION, 0, 5, evaluation_interval=interval)
    folder = write_record(tmp_path, "quick", cell, synthetic_updates(cell, 5))
    assert text in show(folder)
