"""The harness: what it measures is what happened; same cell, same record; failures and
interruptions leave good records.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from scpo_bench.errors import UserError
from scpo_bench.records.files import RecordError, read_run, read_updates
from scpo_bench.records.schema import Cell, digest
from scpo_bench.runs.harness import make_agent, make_training_env, run_cell
from scpo_bench.runs.launch import run_cells
from scpo_bench.runs.recorder import Evaluator, RecordingVecEnv
from scpo_bench.suites.cells import run_folder

PPO_CONFIG = {"n_steps": 10, "batch_size": 20, "n_epochs": 1}
CELL = Cell(
    agent="ppo",
    task="scpo_bench/HarmfulRegression-v0",
    seed=1,
    steps=60,
    start="backup",
    num_envs=2,
    cost_limit=0.0,
    evaluation_episodes=5,
    config=PPO_CONFIG,
)
SCPO_CELL = CELL.model_copy(
    update={
        "agent": "scpo",
        "config": {"n_steps": 10, "labels": "visited", "features": 8, "evaluation_starts": 16},
    }
)


class Scripted(gym.Env):
    """Five steps; the cost is 1 at steps 2 and 4, the constraint value at step t is t / 10 - 0.25,
    the reward t.
    """

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        info = {
            "cost": float(self.t in (2, 4)),
            "constraint_values": np.array([self.t / 10 - 0.25]),
        }
        return np.zeros(1, np.float32), float(self.t), self.t == 5, False, info


def test_recorder_counts_what_happens():
    """Seven steps of two environments: one finished episode each, with return 15 and cost 2; worst
    value 0.25.
    """
    env = RecordingVecEnv(DummyVecEnv([Scripted, Scripted]))
    env.reset()
    for _ in range(7):
        env.step(np.zeros((2, 1)))
    seen = env.take()
    assert env.steps == 14
    assert seen.returns == [15.0, 15.0]
    assert seen.costs == [2.0, 2.0]
    assert seen.cost_sum == 6.0  # two per finished episode, one at step 2 of each running one
    assert seen.violating_steps == 6
    assert seen.worst == pytest.approx(0.25)
    assert env.take().returns == []


def test_missing_cost_and_non_finite_rewards_are_named():
    """An environment that reports no cost, or NaN, stops the run with what and where."""

    class NoCost(Scripted):
        def step(self, action):
            *rest, _ = super().step(action)
            return (*rest, {})

    class NotANumber(Scripted):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return (observation, float("nan"), *rest)

    for env_class, error, message in (
        (NoCost, KeyError, r"info\['cost'\] is missing"),
        (NotANumber, FloatingPointError, "step 2, environment 0: reward is not finite"),
    ):
        env = RecordingVecEnv(DummyVecEnv([env_class, env_class]))
        env.reset()
        with pytest.raises(error, match=message):
            env.step(np.zeros((2, 1)))


def test_native_and_scalar_evaluation_agree():
    """The two ways to evaluate measure the same thing: a constant prediction on the regression
    task.
    """

    def predict(observations):
        return np.full((len(observations), 1), 0.6, np.float32)

    native = Evaluator("scpo_bench/HarmfulRegression-v0", {}, 300, native=True)(predict)
    scalar = Evaluator("scpo_bench/HarmfulRegression-v0", {}, 300, native=False)(predict)
    assert native.worst == pytest.approx(0.2, abs=1e-6)
    assert scalar.worst == pytest.approx(0.2, abs=1e-6)
    assert native.mean_cost == scalar.mean_cost == 10.0
    assert native.mean_return == pytest.approx(scalar.mean_return, rel=0.1)
    assert native.objective == pytest.approx(scalar.objective, rel=0.1)


def test_evaluation_repeats_exactly():
    """Common starts at every update: the same policy gets the same numbers."""
    evaluator = Evaluator(
        "scpo_bench/DoubleIntegratorImitation-v0", {"noise_std": 0.1}, 20, native=True
    )
    one, two = (evaluator(lambda o: np.zeros((len(o), 1), np.float32)) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("cell", [CELL, SCPO_CELL], ids=lambda c: c.agent)
def test_same_cell_same_record(tmp_path, cell):
    """Determinism: two runs of a cell have equal digests; another seed has another."""
    digests = [run_cell(cell, tmp_path / str(i), "s").digest for i in range(2)]
    assert digests[0] == digests[1]
    assert digests[0] is not None
    other = run_cell(cell.model_copy(update={"seed": 2}), tmp_path / "other", "s")
    assert other.digest != digests[0]


def test_record_has_one_line_per_update(tmp_path):
    """60 steps at 20 per update: the start policy and three updates, with counters that add up."""
    run = run_cell(CELL, tmp_path, "s")
    updates = read_updates(tmp_path)
    assert run.status == "finished"
    assert read_run(tmp_path) == run
    assert [u.update for u in updates] == [0, 1, 2, 3]
    assert [u.interaction_steps for u in updates] == [0, 20, 40, 60]
    assert [u.episodes for u in updates] == [0, 2, 2, 2]
    assert all(u.iterate_violates is not None for u in updates)
    assert not updates[0].iterate_violates  # start: backup
    assert digest(updates) == run.digest
    assert run.provenance["versions"]["torch"]


def test_evaluation_interval_skips_but_never_the_last(tmp_path):
    """With interval 2, updates 0, 2 and the final 3 are evaluated."""
    run_cell(CELL.model_copy(update={"evaluation_interval": 2}), tmp_path, "s")
    assert [u.iterate_return is not None for u in read_updates(tmp_path)] == [
        True,
        False,
        True,
        True,
    ]


def test_scpo_probe_steps_are_counted_apart(tmp_path):
    """Probing costs environment steps; they are in the record, beside the interaction steps."""
    run_cell(SCPO_CELL, tmp_path, "s")
    probes = [u.probe_steps for u in read_updates(tmp_path)]
    assert probes[0] == 16  # g at the start policy: 16 inputs, one step each
    assert probes == sorted(probes)
    assert probes[-1] > probes[0]


def test_jobs_do_not_change_records(tmp_path):
    """One process or two: byte-identical records, timing aside; and a finished cell is not run
    again.
    """
    todo = [CELL.model_copy(update={"seed": seed}) for seed in range(2)] + [SCPO_CELL]
    console = Console(quiet=True)
    for jobs in (1, 2):
        outcome = run_cells(todo, "s", tmp_path / str(jobs), jobs, console)
        assert (outcome.finished, outcome.skipped, outcome.failed) == (3, 0, [])
    for cell in todo:
        one, two = (read_run(run_folder(tmp_path / str(jobs), "s", cell)) for jobs in (1, 2))
        assert one.digest == two.digest
    again = run_cells(todo, "s", tmp_path / "1", 1, console)
    assert (again.finished, again.skipped) == (0, 3)


@pytest.mark.parametrize("number", [2, 4])
def test_commands_on_one_folder_share_the_work(tmp_path, number):
    """Processes started together on the same cells: every cell is run once, and all of them see it
    finished.
    """
    program = (
        "import sys; from pathlib import Path; from rich.console import Console; from scpo_bench import harness;"
        "from scpo_bench.runs.launch import run_cells; from scpo_bench.records.schema import Cell; original = harness.run_cell\n"
        "def counted(cell, *rest):\n    print('ran', cell.seed, flush=True)\n    return original(cell, *rest)\n"
        "harness.run_cell = counted\n"
        "cells = [Cell.model_validate_json(line) for line in sys.stdin]\n"
        "outcome = run_cells(cells, 's', Path(sys.argv[1]), 1, Console(quiet=True)); print('failed', len(outcome.failed))"
    )
    todo = [CELL.model_copy(update={"seed": seed, "steps": 400}) for seed in range(6)]
    lines = "\n".join(cell.model_dump_json() for cell in todo)
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(number)
    ]
    for command in commands:
        command.stdin.write(lines)
        command.stdin.close()
    assert [command.wait(timeout=300) for command in commands] == [0] * number
    said = [line for command in commands for line in command.stdout.read().splitlines()]
    assert sorted(said) == ["failed 0"] * number + [f"ran {seed}" for seed in range(6)]
    serial = run_cells(todo, "s", tmp_path / "serial", 1, Console(quiet=True))
    assert serial.finished == 6
    for cell in todo:
        together, alone = (
            read_run(run_folder(results, "s", cell)) for results in (tmp_path, tmp_path / "serial")
        )
        assert together.digest == alone.digest
    for command in commands:
        command.stdout.close()


def test_killed_run_starts_again_and_ends_equal(tmp_path):
    """kill -9 in the middle: what was written is readable, and the same command gives the record of
    an undisturbed run.
    """
    program = "import sys; from pathlib import Path; from scpo_bench.runs.harness import run_cell; from scpo_bench.records.schema import Cell;"
    program += "run_cell(Cell.model_validate_json(sys.argv[1]), Path(sys.argv[2]), 's')"
    cell = CELL.model_copy(update={"steps": 4000})
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", program, cell.model_dump_json(), folder])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "updates.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert read_run(folder).status == "running"
    read_updates(folder)
    assert run_cell(cell, folder, "s").digest == run_cell(cell, tmp_path / "whole", "s").digest


def test_failed_cell_is_shown_and_the_rest_goes_on(tmp_path):
    """A bad configuration fails its own cell, keeps its traceback in a file, and costs nobody else
    anything.
    """
    bad = CELL.model_copy(update={"config": {**PPO_CONFIG, "batch_size": -1}})
    outcome = run_cells(
        [bad, CELL.model_copy(update={"seed": 5})], "s", tmp_path, 1, Console(quiet=True)
    )
    assert outcome.finished == 1
    assert outcome.failed[0][0] == bad
    folder = run_folder(tmp_path, "s", bad)
    assert read_run(folder).status == "failed"
    assert "Traceback" in (folder / "traceback.txt").read_text()


def test_unsafe_start_fails_with_constraint_and_value(tmp_path):
    """SCPO from a start that is not safe: refused before training, in words a user can act on."""
    cell = SCPO_CELL.model_copy(
        update={"task": "scpo_bench/DoubleIntegratorImitation-v0", "start": "random"}
    )
    run = run_cell(cell, tmp_path, "s")
    assert run.status == "failed"
    assert "UnsafeStartError: SCPO: the start policy is unsafe: constraint '" in run.error
    assert len(read_updates(tmp_path)) == 0


def test_interrupt_keeps_the_updates_so_far(tmp_path, monkeypatch):
    """Ctrl-C in the middle: what was recorded stays readable, and the status says so."""

    def interrupted(self, *args, **kwargs):
        if self.num_timesteps >= 40:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    original = PPO.train
    monkeypatch.setattr(PPO, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cell(CELL, tmp_path, "s")
    assert read_run(tmp_path).status == "interrupted"
    assert [u.update for u in read_updates(tmp_path)] == [0, 1]
    monkeypatch.undo()
    assert run_cell(CELL, tmp_path, "s").status == "finished"


def test_changed_cell_keeps_the_old_record(tmp_path):
    """A finished run of another configuration is set aside, not written over."""
    console = Console(quiet=True)
    run_cells([CELL], "s", tmp_path, 1, console)
    changed = CELL.model_copy(update={"steps": 40})
    run_cells([changed], "s", tmp_path, 1, console)
    folder = run_folder(tmp_path, "s", CELL)
    assert read_run(folder).key == changed.key()
    assert read_run(folder.with_name(f"{folder.name}~{CELL.key()[:12]}")).key == CELL.key()


def test_unwritable_results_folder_is_one_line(tmp_path):
    """A file where the folder should be: named before anything runs."""
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="--results: cannot write to"):
        run_cells([CELL], "s", tmp_path / "results", 1, Console(quiet=True))


def test_damaged_records_are_named(tmp_path):
    """A cut last line is a killed run and left out; anything else names file, line and field."""
    run_cell(CELL.model_copy(update={"config": {**PPO_CONFIG, "batch_size": -1}}), tmp_path, "s")
    path = tmp_path / "updates.jsonl"
    line = json.dumps({"update": 0, "interaction_steps": 0, "probe_steps": 0, "episodes": 0})
    path.write_text(f"{line}\n{line[:20]}")
    assert len(read_updates(tmp_path)) == 1
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(RecordError, match=r"line 2: update: expected 1, got 0"):
        read_updates(tmp_path)
    path.write_text(line.replace('"episodes": 0', '"episodes": -3') + "\n")
    with pytest.raises(RecordError, match=r"line 1: episodes: Input should be greater"):
        read_updates(tmp_path)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(RecordError, match=r"run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("agent", ["ppo", "scpo-ppo", "ppo-lagrangian", "cpo", "cvpo"])
def test_start_zero_is_action_zero_everywhere(agent):
    """``start: zero``: every agent's untrained policy stands still, whatever it sees."""
    cell = Cell(
        agent=agent,
        task="SafetySwimmerVelocity-v1",
        seed=0,
        steps=1,
        start="zero",
        num_envs=1,
        cost_limit=25.0,
    )
    env = make_training_env(cell)
    try:
        observations = (
            np.random.default_rng(0)
            .normal(size=(5, *env.observation_space.shape))
            .astype(np.float32)
        )
        assert not make_agent(cell, env).predict(observations, deterministic=True)[0].any()
    finally:
        env.close()
