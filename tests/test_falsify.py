"""`scpo-bench falsify`: finds understated constants, and no breach of valid ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scpo_bench.checks import counterexample, falsify
from scpo_bench.errors import UserError

REGRESSION = "scpo_bench/HarmfulRegression-v0"


def scpo_bench_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scpo_bench.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_understated_constants_breach_and_valid_ones_do_not(tmp_path):
    """Known L: breaches at a 128th of it, none from 1 on; the saved counterexample repeats."""
    done = scpo_bench_command("falsify", "--updates", "10", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " of " in line and "%" in line]
    rates = {float(row[0]): (int(row[1]), int(row[3])) for row in rows}
    assert rates[2.0**-7][0] > 0.3 * rates[2.0**-7][1]
    assert all(breaches == 0 < steps for factor, (breaches, steps) in rates.items() if factor >= 1)
    assert (tmp_path / "known-smoothness.png").stat().st_size > 10_000
    again = scpo_bench_command("falsify", "--replay", str(tmp_path / "known-smoothness.json"))
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "it breaches")


def test_a_breach_of_a_valid_constant_falsifies():
    """The search must be able to fail: one breach at a factor of 1 is enough, where L is known."""
    setting = falsify.Setting(factor=1.0, radius=1e-3, directions="random")
    rates = {setting: (1, 100)}
    assert falsify.Report(falsify.KNOWN, rates, {}, None).falsified
    assert not falsify.Report(REGRESSION, rates, {}, None).falsified
    understated = {setting.model_copy(update={"factor": 0.5}): (1, 100)}
    assert not falsify.Report(falsify.KNOWN, understated, {}, None).falsified


def test_a_task_of_the_paper(tmp_path):
    """Both smoothness rules are trained; understated constants breach; a counterexample repeats."""
    report = falsify.falsify(REGRESSION, seeds=1, updates=6, progress=lambda *_: None)
    assert set(report.rules) == {"sampled", "adaptive"}
    assert all(updates >= 5 for _, updates in report.rules.values())
    by_factor = report.by_factor()
    assert by_factor[2.0**-7][0] > by_factor[4.0][0]
    assert not report.falsified  # L was not known
    counterexample.save(report.counterexample, tmp_path / "found.json")
    found = counterexample.load(tmp_path / "found.json")
    assert found == report.counterexample
    bound, realised = falsify.replay(found)
    assert (realised > bound).any()
    assert realised == pytest.approx(found.realised, abs=1e-12)


def test_mistakes_are_one_line(tmp_path):
    """A damaged, foreign or missing file and an unknown task are the user's, not a traceback."""
    for content in ("not json", "[1, 2]", '{"format": 1}', "[" * 100_000):
        (tmp_path / "file").write_text(content)
        with pytest.raises(UserError, match="not a counterexample"):
            counterexample.load(tmp_path / "file")
    done = scpo_bench_command("falsify", "--replay", str(tmp_path / "missing.json"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = scpo_bench_command("falsify", "--task", "scpo_bench/HarmfulRegresion-v0")
    assert done.returncode == 2
    assert "did you mean 'scpo_bench/HarmfulRegression-v0'" in done.stderr


def test_an_inconsistent_counterexample_is_refused(tmp_path):
    """Lengths that do not fit together would fail somewhere inside the projection."""
    path = tmp_path / "file"
    found = counterexample.Counterexample(
        task=falsify.KNOWN,
        seed=0,
        update=1,
        setting=counterexample.Setting(factor=1.0, radius=1e-3, directions="all"),
        w=[0.0, 0.0],
        basis=[[1.0], [0.0]],
        proposal=[1.0, 0.0],
        L=[1.0, 1.0, 1.0],
        trust_radius=1.0,
        step_norm=1.0,
        bound=[0.0, 0.0, 0.0],
        realised=[1.0, 0.0, 0.0],
    )
    counterexample.save(found, path)
    assert counterexample.load(path) == found
    text = path.read_text()
    for old, new in (('"w":[0.0,0.0]', '"w":[0.0]'), ("[0.0]]", "[]]"), ("[0.0,0.0,0.0]", "[0.0]")):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match="not a counterexample"):
            counterexample.load(path)
    longer = found.model_copy(update={"w": [0.0] * 3, "basis": [[1.0]] * 3, "proposal": [1.0] * 3})
    with pytest.raises(UserError, match="expected 2 numbers for known-smoothness, got 3"):
        falsify.replay(longer)
