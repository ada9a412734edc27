"""The documents agree with the program: committed tables, the example agent, commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scpo_bench.cli import app
from scpo_bench.leaderboard.readme import agent_table, current, generated
from scpo_bench.submissions.verify import verify

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("README.md", "paper scpo_bench/DoubleIntegratorImitation-v0"),
        ("docs/paper.md", "paper"),
        ("docs/scpo_rl.md", "scpo-rl"),
    ],
)
def test_committed_leaderboards_are_what_the_records_give(file, name):
    """No table is edited by hand: `make leaderboard` gives this text from consistent records."""
    suite, *task = name.split()
    shown = current((ROOT / file).read_text(encoding="utf-8"), name)
    assert shown == generated(ROOT / "results", suite, *task)
    report = verify(ROOT / "results" / suite)
    assert report.ok, str(report)


def test_documented_agents_are_the_agents():
    """What an agent sees of the constraints is part of the protocol: `make leaderboard`."""
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert current(text, "agents") == agent_table()


def test_example_agent_of_contributing_runs(tmp_path):
    """The agent in CONTRIBUTING.md is complete and short: saved to a file, it runs and conforms."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = next(block for block in blocks if "PricedPPO" in block)
    assert len(program.splitlines()) < 60
    (tmp_path / "my_agent.py").write_text(program)
    task = ["--task", "scpo_bench/HarmfulRegression-v0", "--seeds", "1", "--steps", "4096"]
    for arguments, expected in (
        (["compare", "my_agent.py:PricedPPO", *task], "1 run, 0 already there, 0 failed"),
        (["check", "my_agent.py:PricedPPO", "--config", '{"n_steps": 100}'], "conforms"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "scpo_bench.cli", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert expected in result.stdout


def test_every_command_of_the_readme_exists():
    """Commands and options that README.md shows are known to the program."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^scpo-bench (\w+)(.*?)(?:#.*)?$", text, re.MULTILINE)
    assert len(shown) > 8
    for command, rest in shown:
        usage = CliRunner().invoke(app, [command, "--help"])
        assert usage.exit_code == 0, command
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in usage.output, f"{command} {option}"
