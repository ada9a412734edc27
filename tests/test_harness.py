"""One cell: what is measured, what the record says, and how failures are recorded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from scpo_bench.baselines.cpo import CPO
from scpo_bench.errors import UserError
from scpo_bench.records.files import RecordError, read_run, read_updates
from scpo_bench.records.schema import Cell, digest
from scpo_bench.runs import provenance
from scpo_bench.runs.agents import make_agent, resolved_config
from scpo_bench.runs.environments import make_training_env
from scpo_bench.runs.evaluation import Evaluator
from scpo_bench.runs.harness import run_cell
from scpo_bench.runs.recorder import RecordingVecEnv

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
ROOT = Path(__file__).parent.parent


class Scripted(gym.Env):
    """Five steps t: cost 1 where t is 2 or 4, constraint value t / 10 - 0.25, reward t."""

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


class Drawn(Scripted):
    """One step; its reward, cost, constraint value and loss are a number drawn at the reset."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.number = self.np_random.uniform()
        return result

    def step(self, action):
        info = {"cost": self.number, "constraint_values": [self.number]}
        info["objective_loss"] = self.number
        return np.zeros(1, np.float32), self.number, False, True, info


class Fives(gym.Env):
    """Every observation is 5; the reward of an episode's one step is the action."""

    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gym.spaces.Box(-10, 10, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(1, 5, np.float32), {}

    def step(self, action):
        return np.full(1, 5, np.float32), float(action[0]), True, False, {"cost": 0.0}


class Echo(PPO):
    """Its action is the observation that it is given."""

    def predict(self, observation, *args, **kwargs):
        return observation, None


gym.register("test/Scripted-v0", Scripted)
gym.register("test/Drawn-v0", Drawn)
gym.register("test/Fives-v0", Fives)


# Recording and evaluation


def test_recorder_counts_what_happens():
    """The totals of seven steps of two environments, computed by hand."""
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
    """An environment that reports no cost, or NaN, must stop the run with what and where."""

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


def test_evaluation_measures_what_happens():
    """Return, cost and worst constraint value of the scripted episode, computed by hand."""
    evaluator = Evaluator("test/Scripted-v0", {}, 20, native=False)  # more than run at once
    found = evaluator(lambda observations: np.zeros((len(observations), 1), np.float32))
    assert (found.mean_return, found.mean_cost) == (15.0, 2.0)
    assert found.worst == pytest.approx(0.25)
    assert found.objective is None


def test_evaluation_starts_are_held_out_and_all_count():
    """Records are comparable because all policies of a task are judged on the same starts."""
    evaluator = Evaluator("test/Drawn-v0", {}, 20, native=False)
    found = evaluator(lambda observations: np.zeros((len(observations), 1), np.float32))
    seeds = np.random.SeedSequence(20_251_213).generate_state(20)
    drawn = [np.random.default_rng(int(seed)).uniform() for seed in seeds]
    assert found.worst == max(drawn) != drawn[0]
    means = (found.mean_return, found.mean_cost, found.objective)
    assert means == pytest.approx([np.mean(drawn)] * 3)


def test_native_and_scalar_evaluation_agree():
    """The two ways to evaluate must measure the same: a constant prediction in the regression."""

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
    """Common starts at every update: the same policy must get the same numbers."""
    evaluator = Evaluator(
        "scpo_bench/DoubleIntegratorImitation-v0", {"noise_std": 0.1}, 20, native=True
    )
    one, two = (evaluator(lambda o: np.zeros((len(o), 1), np.float32)) for _ in range(2))
    assert one == two


@pytest.mark.parametrize(("normalize", "seen"), [(False, 5.0), (True, 0.0)])
def test_normalize_holds_in_training_and_evaluation(tmp_path, normalize, seen):
    """A policy must be evaluated with the observations that it is trained with.

    Where all observations are 5, running statistics turn them into 0; the echoing agent earns what
    it is given.
    """
    changes = {"agent": f"{__name__}:Echo", "task": "test/Fives-v0", "start": "random"}
    run_cell(CELL.model_copy(update={**changes, "normalize": normalize}), tmp_path, "s")
    returns = [update.iterate_return for update in read_updates(tmp_path)]
    assert len(returns) == 4
    assert returns == pytest.approx([seen] * 4, abs=1e-2)


def test_a_policy_is_judged_by_the_limit_of_the_cell(tmp_path):
    """The scripted episode costs 2, with a constraint value of 0.25: only limit 5 allows that."""
    for limit, violating in ((0.0, True), (1.5, True), (5.0, False)):
        changes = {"task": "test/Scripted-v0", "start": "zero", "cost_limit": limit}
        run_cell(CELL.model_copy(update=changes), tmp_path / str(limit), "s")
        updates = read_updates(tmp_path / str(limit))
        assert [update.iterate_violates for update in updates] == [violating] * 4
        assert sum(update.violating_episodes for update in updates) == (12 if violating else 0)


# The record


@pytest.mark.parametrize("cell", [CELL, SCPO_CELL], ids=lambda c: c.agent)
def test_same_cell_same_record(tmp_path, cell):
    """Two runs of a cell must have equal digests, and another seed another one."""
    digests = [run_cell(cell, tmp_path / str(i), "s").digest for i in range(2)]
    assert digests[0] == digests[1]
    assert digests[0] is not None
    other = run_cell(cell.model_copy(update={"seed": 2}), tmp_path / "other", "s")
    assert other.digest != digests[0]


def test_record_has_one_line_per_update(tmp_path):
    """60 steps at 20 per update must give the start policy and three updates, and add up."""
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
    """With interval 2, updates 0, 2 and the final 3 must be evaluated, and no other."""
    run_cell(CELL.model_copy(update={"evaluation_interval": 2}), tmp_path, "s")
    evaluated = [u.update for u in read_updates(tmp_path) if u.iterate_return is not None]
    assert evaluated == [0, 2, 3]


def test_scpo_probe_steps_are_counted_apart(tmp_path):
    """Steps of constraint evaluation must be in the record, beside the interaction steps."""
    run_cell(SCPO_CELL, tmp_path, "s")
    probes = [u.probe_steps for u in read_updates(tmp_path)]
    assert probes[0] == 16  # g at the start policy: 16 inputs, one step each
    assert probes == sorted(probes)
    assert probes[-1] > probes[0]


def test_unsafe_start_fails_with_constraint_and_value(tmp_path):
    """SCPO from an unsafe start must be refused before training, with constraint and value."""
    cell = SCPO_CELL.model_copy(
        update={"task": "scpo_bench/DoubleIntegratorImitation-v0", "start": "random"}
    )
    run = run_cell(cell, tmp_path, "s")
    assert run.status == "failed"
    assert "UnsafeStartError: SCPO: the start policy is unsafe: constraint '" in run.error
    assert len(read_updates(tmp_path)) == 0


def test_interrupt_keeps_the_updates_so_far(tmp_path, monkeypatch):
    """After Ctrl-C the record must be readable, say so, and be completed by the next run."""

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


def test_damaged_records_are_named(tmp_path):
    """A cut last line (a killed run) is left out; any other damage must be named by its place."""
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


# Agents, environments, provenance


@pytest.mark.parametrize(("config", "told"), [({}, 7.0), ({"cost_limit": 3.0}, 3.0)])
def test_the_agent_is_told_the_cost_limit(config, told):
    """An agent must train for the limit that it is judged by, unless the suite says otherwise."""
    cell = CELL.model_copy(update={"agent": "cpo", "cost_limit": 7.0, "config": config})
    agent = make_agent(cell, make_training_env(cell))
    assert agent.config.cost_limit == told


@pytest.mark.parametrize(
    "agent",
    [
        *("scpo", "sgd", "ppo-lagrangian", "ppo-pid", "focops", "p3o", "cpo", "trpo-lagrangian"),
        *("crpo", "cvpo", "sac-lagrangian"),
    ],
)
def test_resolved_config_names_every_default(agent):
    """A default that changes later must not change what a record says it was run with."""
    cell = CELL.model_copy(update={"agent": agent, "config": {}})
    made = make_agent(cell, make_training_env(cell))
    defaults = dataclasses.asdict(type(made).Config())
    expected = {**defaults, "cost_limit": 0.0} if "cost_limit" in defaults else defaults
    assert len(defaults) >= 10
    assert resolved_config(made) == expected


def test_resolved_config_is_in_the_record(tmp_path):
    """run.json must hold what was set, what the cell implies, and the defaults."""
    set_here = {"steps_per_update": 40, "target_kl": 0.03}
    changes = {"agent": "cpo", "cost_limit": 7.0, "config": set_here}
    run_cell(CELL.model_copy(update=changes), tmp_path, "s")
    defaults = json.loads(json.dumps(dataclasses.asdict(CPO.Config())))  # lists for tuples
    assert read_run(tmp_path).resolved_config == {**defaults, **set_here, "cost_limit": 7.0}


def test_a_start_that_the_agent_cannot_take_is_refused():
    """``start: backup`` must not run from another policy where an agent has no backup."""
    cell = CELL.model_copy(update={"agent": "stable_baselines3:SAC", "config": {}})
    with pytest.raises(UserError, match="has no policy that starts at a backup"):
        make_agent(cell, make_training_env(cell))


@pytest.mark.parametrize(
    "agent", ["ppo", "scpo-ppo", "ppo-lagrangian", "cpo", "cvpo", "sac-lagrangian"]
)
def test_start_zero_is_action_zero_everywhere(agent):
    """With ``start: zero`` every agent's untrained policy must act 0, whatever it observes."""
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


def test_a_task_of_a_module_runs(tmp_path, monkeypatch):
    """A task named "module:Id" must be registered by importing the module, as gymnasium does."""
    (tmp_path / "my_tasks.py").write_text(
        f"import gymnasium\nimport {__name__}\n"
        f"gymnasium.register('test/Mine-v0', {__name__}.Scripted)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"task": "my_tasks:test/Mine-v0", "start": "zero"}
    run = run_cell(CELL.model_copy(update=changes), tmp_path / "run", "s")
    assert (run.status, run.error) == ("finished", None)


def test_provenance_names_the_commit_and_the_versions():
    """A record must lead back to the code that wrote it."""
    found = provenance.provenance()
    assert all(found["versions"][name] for name in ("torch", "numpy", "gymnasium"))
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found["commit"].removesuffix("+") == head.strip()


def test_provenance_tells_processors_apart():
    """One name covers several processors, on which results differ in the last bits."""
    found = provenance.provenance()
    listed = Path("/proc/cpuinfo").read_text()
    assert all(f"{name} " in found["cpu"] for name in ("family", "stepping") if name in listed)
    assert found["instruction_set"]
    assert any(kernel.split()[0] in ("openblas", "mkl", "blis") for kernel in found["blas"])


def test_a_missing_package_comes_with_its_command(monkeypatch):
    """``doctor`` must say how to install what is missing, and safety-gymnasium without its pins."""
    monkeypatch.setattr(provenance, "_version", {"torch": "2"}.get)
    hints = {name: hint for name, _, hint in provenance.describe_environment()}
    assert hints["torch"] == ""
    assert hints["scipy"] == "pip install scipy"
    assert hints["safety-gymnasium"] == "pip install --no-deps safety-gymnasium"
