"""`scpo-bench tune`: what is tried, on which seeds and starts, how it is judged and resumed."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from test_harness import CELL
from typer.testing import CliRunner

from scpo_bench.cli import app
from scpo_bench.configuration import Range, resolve_config
from scpo_bench.errors import UserError
from scpo_bench.records.files import RUN_FILE, RecordError, read_run, run_folders
from scpo_bench.records.study import STUDY_FILE, Study, Trial, read_study
from scpo_bench.runs import tune as tuning
from scpo_bench.suites import registry

# The agents' own search spaces may change; what is tested here must not depend on them.
SPACE = {"learning_rate": Range(0.01, 1.0, log=True), "gradient_steps": Range(1, 3)}
SGD = {"n_steps": 10, "labels": "visited", "features": 8}
SGD_CELL = CELL.model_copy(update={"agent": "sgd", "config": SGD, "margin": 0.02})


@pytest.fixture
def space(monkeypatch):
    monkeypatch.setattr(tuning, "search_space", lambda agent: SPACE)


def study_of(folder, trials=7, **kwargs):
    return tuning.tune(SGD_CELL, trials, 2, folder, 1, Console(quiet=True), **kwargs)


def test_trials_run_on_tuning_seeds_and_starts_alone(space, tmp_path):
    """Seeds or starts of the table in a trial would tune the agent on what it is judged by."""
    study = study_of(tmp_path, trials=3)
    runs = [read_run(folder) for folder in run_folders(tmp_path)]
    assert len(runs) == 6
    assert {run.cell.seed for run in runs} == {100, 101}
    assert {run.cell.evaluation_starts for run in runs} == {"tuning"}
    assert {run.cell.margin for run in runs} == {0.02}
    assert study.trials[0].config == {}
    for trial in study.trials[1:]:
        assert 0.01 <= trial.config["learning_rate"] <= 1.0
        assert trial.config["gradient_steps"] in (1, 2, 3)
    assert read_study(tmp_path) == study


def test_a_study_resumes_and_repeats(space, tmp_path):
    """Interrupted after any trial, the same command must go on to the same study.

    Eight trials: the last ones depend on the outcomes of the first, not on the seed alone.
    """
    whole = study_of(tmp_path / "whole", trials=8)

    def stop(line):
        if line.startswith("trial 5: "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_of(tmp_path / "stopped", trials=8, report=stop)
    times = {run: (run / RUN_FILE).stat().st_mtime_ns for run in run_folders(tmp_path / "stopped")}
    assert len(times) == 12
    resumed = study_of(tmp_path / "stopped", trials=8)
    assert [t.config for t in resumed.trials] == [t.config for t in whole.trials]
    assert [t.merit() for t in resumed.trials] == [t.merit() for t in whole.trials]
    assert all((run / RUN_FILE).stat().st_mtime_ns == time for run, time in times.items())


def test_violations_count_before_the_loss():
    """A lower loss must not buy violations, and a failed trial must not win."""
    trials = [
        Trial(config={}, violating_share=0.1, loss=0.0),
        Trial(config={"a": 1}, violating_share=0.0, loss=5.0),
        Trial(config={"a": 2}, violating_share=0.0, loss=4.0),
        Trial(config={"a": 3}),
    ]
    study = Study(cell=SGD_CELL, seeds=1, trials=trials, sampler="")
    assert study.best().config == {"a": 2}
    configured = SGD_CELL.model_copy(update={"config": {**SGD, "a": 2}})
    assert study.found(configured)
    assert not study.found(SGD_CELL)
    fine = study.model_copy(
        update={"trials": [trials[0], Trial(config={"a": 0.123456}, violating_share=0, loss=1.0)]}
    )
    for value, same in ((0.123, True), (0.125, False), ("0.123", False)):
        rounded = SGD_CELL.model_copy(update={"config": {**SGD, "a": value}})
        assert fine.found(rounded) is same
    assert not study.found(configured.model_copy(update={"margin": 0.1}))


def test_failed_trials_are_noted_and_tuning_goes_on(space, monkeypatch, tmp_path):
    """A configuration that crashes is a bad one, not the end of the study."""
    monkeypatch.setitem(SPACE, "optimizer", ("NoSuchOptimizer",))
    study = study_of(tmp_path, trials=3)
    assert [trial.loss is None for trial in study.trials] == [False, True, True]
    assert study.best().config == {}


def test_an_agent_without_a_space_is_named(tmp_path):
    """Tuning nothing in silence would look like equal effort."""
    cell = CELL.model_copy(update={"agent": "ppo"})
    with pytest.raises(UserError, match="agent 'ppo': its Config has no search_space"):
        tuning.tune(cell, 2, 1, tmp_path, 1, Console(quiet=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"study_version": 1}', "cell"),
        (" " * 1_000_001, "larger than"),
    ],
)
def test_a_hostile_study_is_one_line(tmp_path, text, message):
    """tuning.json may come with somebody else's records."""
    (tmp_path / STUDY_FILE).write_text(text)
    with pytest.raises(RecordError, match=message):
        read_study(tmp_path)


def test_command(space, tmp_path):
    """What a user sees: one line per trial, and the configuration to put into the suites file."""
    suites = {
        "version": 1,
        "defaults": {"agents": ["sgd", "ppo"], "seeds": 1, "steps": 40, "start": "backup"},
        "suites": {
            "mine": {
                "description": "d",
                "tasks": [{"id": CELL.task, "num_envs": 2, "config": {"sgd": SGD}}],
            }
        },
    }
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(suites))
    options = ["--trials", "2", "--seeds", "1", "--agents", "sgd"]
    command = ["tune", "mine", *options, "--file", str(file), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "sgd on scpo_bench/HarmfulRegression-v0: trial 1: " in result.output
    assert "config sgd: {n_steps: 10, labels: visited, features: 8" in result.output


@pytest.mark.parametrize("agent", sorted(registry.agents()))
def test_search_spaces_hold_valid_values_of_real_fields(agent):
    """A field that was renamed, or a value that its Config refuses, would fail every trial."""
    space = tuning.search_space(agent)
    if agent == "ppo":  # Stable-Baselines3's, an unconstrained reference
        assert not space
        return
    config_class = registry.load_agent(agent).Config
    for end in (0, -1):
        chosen = {
            name: (values.low, values.high)[end] if isinstance(values, Range) else values[end]
            for name, values in space.items()
        }
        resolve_config(config_class, chosen)
    if agent != "scpo-ppo":
        assert space
