"""Agents of others: one name, the digest of their source, and that only trusted code is run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from scpo_bench.cli import app, main
from scpo_bench.errors import UserError
from scpo_bench.records.files import read_run, run_folders, write_run
from scpo_bench.records.schema import Cell
from scpo_bench.runs.harness import run_cell
from scpo_bench.runs.launch import run_cells
from scpo_bench.runs.trust import check_trust
from scpo_bench.suites import registry
from scpo_bench.suites.cells import cells, comparison, run_folder
from scpo_bench.suites.registry import AGENT_PATH, AgentSpec, agent_name, agent_source, load_agent
from scpo_bench.suites.schema import Benchmarks, load_benchmarks

TASK = "scpo_bench/HarmfulRegression-v0"
SOURCE = """
from pathlib import Path

from stable_baselines3 import PPO

Path(__file__).with_name("canary").touch()


class Mine(PPO):
    pass
"""
SUITE = f"""
version: 1
suites:
  s:
    description: small
    agents: [ppo]
    seeds: 2
    steps: 40
    start: backup
    num_envs: 2
    evaluation_episodes: 2
    config:
      ppo: {{n_steps: 10, batch_size: 20, n_epochs: 1}}
    tasks: [{TASK}]
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with my.py, and benchmarks.yaml with suite "s"."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "my.py").write_text(SOURCE)
    (folder / "benchmarks.yaml").write_text(SUITE)
    monkeypatch.chdir(folder)
    monkeypatch.setenv(AGENT_PATH, "")  # restored, whatever a test adds
    return folder


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


# Names.


def planned(agent: str) -> Cell:
    [cell] = cells(comparison(Benchmarks({}), [agent], TASK, 1, 40, None)[1])
    return cell


def test_a_file_has_one_name_however_it_is_written(here, tmp_path):
    """Else two spellings of one agent evict each other's records, or stand twice in a table."""
    (tmp_path / "link").symlink_to(here)
    spellings = ("my.py", "./my.py", "../here/my.py", f"{here}/my.py", f"{tmp_path}/link/my.py")
    planned_cells = [planned(f"{path}:Mine") for path in spellings]
    assert {cell.agent for cell in planned_cells} == {"my.py:Mine"}
    assert len({cell.key() for cell in planned_cells}) == 1
    assert len({run_folder(here, "s", cell) for cell in planned_cells}) == 1
    assert agent_name(f"filtered:{here}/my.py:Mine") == "filtered:my.py:Mine"
    (here / "sub").mkdir()
    assert agent_name(f"{here}/sub/../sub/a.py:A") == "sub/a.py:A"
    suite = load_benchmarks(here / "benchmarks.yaml").suites["s"]
    assert len(cells(suite, [f"{path}:Mine" for path in spellings])) == 2  # two seeds


def test_a_file_elsewhere_is_named_without_its_folder(here, tmp_path):
    """The path of somebody's home folder must not be published; the file is found all the same."""
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "other.py"
    other.write_text(SOURCE)
    cell = planned(f"{other}:Mine")
    assert cell.agent == "other.py:Mine"
    assert cell.agent_source == digest_of(other)
    assert load_agent(cell.agent).__name__ == "Mine"
    assert agent_name("other.py:Mine") == "other.py:Mine"  # now on AGENT_PATH
    assert os.environ[AGENT_PATH] == str(other.parent)
    assert agent_name(f"{tmp_path}/none.py:Mine") == "none.py:Mine"
    with pytest.raises(UserError, match=r"no file none\.py"):
        load_agent("none.py:Mine")


def test_two_files_cannot_have_one_name(here, tmp_path):
    """A file elsewhere that is called like one here would be recorded, and run, as that one."""
    (tmp_path / "my.py").write_text(SOURCE)
    with pytest.raises(UserError, match=r"records would name it 'my\.py', as they name .*here"):
        planned(f"{tmp_path}/my.py:Mine")


def test_our_own_agents_have_their_own_names(here):
    """cpo and scpo_bench.baselines.cpo:CPO are one agent, one key, in a suites file too."""
    assert planned("scpo_bench.baselines.cpo:CPO") == planned("cpo")
    assert planned("stable_baselines3:PPO").agent == "ppo"
    assert agent_name("filtered:scpo_bench.scpo.gradient_descent:GradientDescent") == "filtered:sgd"
    (here / "benchmarks.yaml").write_text(SUITE.replace("ppo", "'stable_baselines3:PPO'"))
    suite = load_benchmarks(here / "benchmarks.yaml").suites["s"]
    assert [cell.agent for cell in cells(suite)] == ["ppo", "ppo"]
    assert cells(suite)[0].config["n_steps"] == 10


# Digests.


def test_the_digest_is_that_of_the_source_and_runs_nothing(here, tmp_path, monkeypatch):
    """Files, modules, inner modules and packages; what was only planned has not been imported."""
    package = tmp_path / "site" / "apackage"
    (package / "inner").mkdir(parents=True)
    for path in (package / "__init__.py", package / "inner" / "__init__.py", package / "x.py"):
        path.write_text(SOURCE)
    (package / "inner" / "deep.py").write_text(f"{SOURCE}# deep")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert agent_source("my.py:Mine") == digest_of(here / "my.py")
    assert agent_source("filtered:my.py:Mine") == digest_of(here / "my.py")
    assert agent_source("apackage:Mine") == digest_of(package / "__init__.py")
    assert agent_source("apackage.inner.deep:Mine") == digest_of(package / "inner" / "deep.py")
    point = AgentSpec("theirs", "apackage.x:Mine", "")
    monkeypatch.setattr(registry, "agents", lambda: {"theirs": point})
    assert agent_source("theirs") == digest_of(package / "x.py")
    assert not list(tmp_path.rglob("canary"))
    for name in ("nowhere:A", "apackage.none:A", "apackage.x.y:A", "sys:A", ":A", "a..b:A", "\0:A"):
        assert agent_source(name) is None


def test_our_own_agents_have_no_digest(here):
    """Their keys are those of the committed records; the commit says which source it was."""
    for name in ("cpo", "ppo", "filtered:sgd", "scpo_bench.baselines.cpo:CPO"):
        assert agent_source(name) is None
    cell = planned("cpo")
    assert cell.model_copy(update={"agent_source": "0" * 64}).key() != cell.key()


def test_an_edited_file_runs_again_and_says_so(here):
    """It used to say "already there" and show the results of the file before the edit."""
    command = ("run", "s", "--agents", "./my.py:Mine", "--results", "r")
    assert "2 run, 0 already there" in invoke(*command).output
    assert "0 run, 2 already there" in invoke(*command).output
    (here / "my.py").write_text(f"{SOURCE}# edited")
    result = invoke(*command)
    line = "agent 'my.py:Mine' has changed: 2 finished runs of its earlier source set aside"
    assert line in result.output.splitlines()
    assert "2 run, 0 already there" in result.output
    folders = run_folders(here / "r")
    assert [read_run(folder).cell.agent_source for folder in folders] == [
        digest_of(here / "my.py")
    ] * 2
    assert len(list(here.glob("r/s/*/*/seed-*~*"))) == 2
    # Back, and forth again: no record is lost, and none is in the way.
    for text in (SOURCE, f"{SOURCE}# edited"):
        (here / "my.py").write_text(text)
        assert "2 run, 0 already there" in invoke(*command).output
    assert len(list(here.glob("r/s/*/*/seed-*~*"))) == 6
    assert "has changed" not in invoke(*command).output


def test_a_file_edited_after_planning_is_not_run(here):
    """Its results would stand under the digest of the file before the edit."""
    cell = planned("my.py:Mine").model_copy(update={"start": "backup"})
    (here / "my.py").write_text(f"{SOURCE}# edited")
    outcome = run_cells([cell], "s", here / "r", 1, Console(quiet=True))
    [failure] = outcome.failed
    assert "its source is not the one that this run is planned with" in failure.error
    assert failure.users_mistake


# Trust.


@pytest.fixture
def record(here) -> Path:
    """A finished run of my.py:Mine and one of ppo; my.py's canary is gone."""
    assert "2 run" in invoke("run", "s", "--agents", "ppo,my.py:Mine", "--seeds", 1).output
    (here / "canary").unlink()
    [folder] = (folder for folder in run_folders(here) if "my.py" in str(folder))
    return folder


def refused(*arguments: object, monkeypatch, capsys) -> str:
    """What the command says on stderr, one line with exit status 2."""
    monkeypatch.setattr("sys.argv", ["scpo-bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_rerun_asks_before_it_runs_an_agents_file(here, record, monkeypatch, capsys):
    """The user asked for a re-run, not for a stranger's code; nothing at all is run."""
    for folder in (record, here / "results"):
        error = refused("verify", folder, "--rerun", monkeypatch=monkeypatch, capsys=capsys)
        assert "--trust-code" in error
        assert f"agent 'my.py:Mine': {here}/my.py, SHA-256 {digest_of(here / 'my.py')}" in error
    assert not (here / "canary").exists()
    error = refused("prove", record, monkeypatch=monkeypatch, capsys=capsys)
    assert "--trust-code" in error
    assert not (here / "canary").exists()


def test_trusted_code_is_named_before_it_is_run(here, record):
    """Path, digest, and whether it is the source that the record was made with."""
    result = invoke("verify", here / "results", "--rerun", "--trust-code")
    assert result.exit_code == 0, result.output
    announced = f"agent 'my.py:Mine': {here}/my.py, SHA-256 {digest_of(here / 'my.py')}"
    assert f"{announced} (as recorded)" in result.output
    assert result.output.index(announced) < result.output.index("reproduced exactly")
    assert result.output.splitlines()[-1] == "tier: reproduced exactly"
    assert (here / "canary").exists()
    recorded = digest_of(here / "my.py")
    (here / "my.py").write_text(f"{SOURCE}# edited")
    result = invoke("verify", record, "--rerun", "--trust-code")
    assert f"(NOT as recorded, which is {recorded})" in result.output
    assert result.exit_code == 0  # the numbers are the same


@pytest.mark.parametrize(
    "changes",
    [
        {"agent": "amodule:Mine"},
        {"agent": "filtered:amodule:Mine"},
        {"agent": "theirs"},
        {"agent": "unknown-here"},
        {"task": "amodule:Task-v0"},
        {"config": {"tensorboard_log": "/somewhere"}},
    ],
)
def test_everything_that_is_not_ours_needs_trust(here, monkeypatch, changes):
    """Modules, other distributions' agents, tasks that import a module, and a folder to write."""
    (here / "amodule.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(here))
    theirs = AgentSpec("theirs", "amodule:Mine", "")
    monkeypatch.setattr(registry, "agents", lambda: {"ppo": registry._AGENTS[7], "theirs": theirs})
    cell = planned("ppo").model_copy(update=changes)
    said: list[str] = []
    with pytest.raises(UserError, match=r"nothing was run: .* --trust-code"):
        check_trust([cell], False, said.append)
    assert not said
    check_trust([cell], True, said.append)
    [line] = said
    [named] = changes.values()
    assert (named if isinstance(named, str) else "tensorboard_log writes to '/somewhere'") in line
    assert not (here / "canary").exists()


def test_our_own_agents_need_no_trust(here):
    """A bundle of baselines is re-run without questions, whatever their spelling."""
    names = ("ppo", "filtered:sgd", "scpo_bench.baselines.cpo:CPO")
    own = [planned("ppo").model_copy(update={"agent": name}) for name in names]
    said: list[str] = []
    check_trust(own, False, said.append)
    assert not said


def test_prove_needs_trust_too(here, monkeypatch, capsys):
    """With it, the code is named first."""
    cell = planned("sgd").model_copy(update={"start": "backup", "steps": 40})
    run_cell(cell, here / "run", "s")
    run = read_run(here / "run")
    write_run(
        here / "run",
        run.model_copy(update={"cell": cell.model_copy(update={"task": f"my:{TASK}"})}),
    )
    assert "--trust-code" in refused("prove", "run", monkeypatch=monkeypatch, capsys=capsys)
    result = invoke("prove", "run", "--trust-code")
    assert f"task 'my:{TASK}': " in result.output
