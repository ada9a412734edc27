"""What the documents say is so: the committed table, the example agent, the commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scpo_bench.cli import app
from scpo_bench.leaderboard.readme import current, generated
from scpo_bench.submissions.verify import verify

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("file", "suite"), [("README.md", "paper"), ("docs/scpo_rl.md", "scpo-rl")]
)
def test_committed_leaderboards_are_what_the_records_give(file, suite):
    """Nobody edits a table by hand:

    `make leaderboard` gives this text, and these records are consistent.
    """
    assert current((ROOT / file).read_text(encoding="utf-8"), suite) == generated(
        ROOT / "results", suite
    )
    report = verify(ROOT / "results" / suite)
    assert report.ok, str(report)


def test_example_agent_of_contributing_runs(tmp_path):
    """The agent that CONTRIBUTING.md shows is complete: saved to a file, it runs through the
    harness. Under 60 lines.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    program = next(
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if "PricedPPO" in block
    )
    assert len(program.splitlines()) < 60
    (tmp_path / "my_agent.py").write_text(program)
    command = [sys.executable, "-m", "scpo_bench.cli", "compare", "my_agent.py:PricedPPO"]
    command += [
        "--task",
        "scpo_bench/HarmfulRegression-v0",
        "--seeds",
        "1",
        "--steps",
        "4096",
        "--results",
        str(tmp_path / "r"),
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 run, 0 already there, 0 failed" in result.stdout
    command = [
        sys.executable,
        "-m",
        "scpo_bench.cli",
        "check",
        "my_agent.py:PricedPPO",
        "--config",
        '{"n_steps": 100}',
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_command_of_the_readme_exists():
    """A command or option that the README shows and the program does not know would be found out
    here.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^scpo-bench (\w+)(.*?)(?:#.*)?$", text, re.MULTILINE)
    assert len(shown) > 8
    for command, rest in shown:
        usage = CliRunner().invoke(
            app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        )
        assert usage.exit_code == 0, command
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in usage.output, f"{command} {option}"
