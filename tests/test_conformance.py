"""`scpo-bench check`: agents that keep to the contract pass.

Each way of breaking it is found by the check named for it.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from typer.testing import CliRunner

from scpo_bench.checks.conformance import TRIVIAL, check
from scpo_bench.cli import app
from scpo_bench.errors import UserError
from scpo_bench.records.schema import Cell
from scpo_bench.runs.harness import run_cell

AGENTS = """
import sys
import threading

import numpy as np
from stable_baselines3 import A2C


class Good(A2C):
    pass


class NotANumber(A2C):
    def predict(self, *args, **kwargs):
        return np.full((len(args[0]), 1), np.nan), None


class Outside(A2C):
    def predict(self, *args, **kwargs):
        return np.full((len(args[0]), 1), 2.1), None


class Unseeded(A2C):
    def train(self):
        super().train()
        self.policy.action_net.bias.data += 0.001 * float(np.random.default_rng().uniform())


class Constant(A2C):
    def train(self):
        pass


class Endless(A2C):
    def learn(self, total_timesteps, **kwargs):
        return super().learn(10**9, **kwargs)


class Short(A2C):
    def learn(self, total_timesteps, **kwargs):
        return super().learn(total_timesteps // 2, **kwargs)


class Long(A2C):
    def learn(self, total_timesteps, **kwargs):
        return super().learn(total_timesteps * 3 // 2, **kwargs)


class Unloadable(A2C):
    @classmethod
    def load(cls, *args, **kwargs):
        raise RuntimeError("no such thing")


class Forgetful(A2C):
    def save(self, path, **kwargs):
        for parameter in self.policy.parameters():
            parameter.data.zero_()
        super().save(path)


class Unpicklable(A2C):
    def learn(self, *args, **kwargs):
        self.lock = threading.Lock()
        return super().learn(*args, **kwargs)


class Raising(A2C):
    def __init__(self, *args, **kwargs):
        raise RuntimeError("not today")


class Failing(A2C):
    def train(self):
        raise RuntimeError("not today")


class Exiting(A2C):
    def train(self):
        sys.exit(3)


class Silent(A2C):
    def learn(self, total_timesteps, callback=None, **kwargs):
        return super().learn(total_timesteps)
"""

BROKEN = {
    "NotANumber": "actions are finite and inside their space: ActionError: array([nan]",
    "Outside": "actions are finite and inside their space: ActionError: array([2.1]",
    "Unseeded": "same seed, same record",
    "Constant": "learns",
    "Endless": "keeps to the step budget: asked for 1000, took 2080, at most 80",
    "Short": "keeps to the step budget: asked for 1000, took 560, at most 80",
    "Long": "keeps to the step budget: asked for 1000, took 1520, at most 80",
    "Unloadable": "save and load keep the policy: RuntimeError: no such thing",
    "Forgetful": "save and load keep the policy: 64 observations",
    "Unpicklable": "resumes after being stopped: its state cannot be pickled, so a killed run"
    " starts again; lock: TypeError",
    "Raising": "constructed as Agent(policy, env, seed=..., **config): RuntimeError: not today",
    "Failing": "runs without an error: RuntimeError: not today",
    "Exiting": "runs without an error: SystemExit: 3",
    "Silent": "updates its policy more than once: none seen",
}
FEW_UPDATES = '{"n_steps": 20}'


@pytest.fixture
def agents_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "agents.py").write_text(AGENTS)
    return tmp_path


def scpo_bench_check(*arguments):
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # it is neither, on purpose
def test_trivial_task_is_a_sound_environment():
    """Gymnasium's own checks pass, and other actions are refused.

    The expert's action costs nothing and earns the best return.
    """
    env = gym.make(TRIVIAL)
    check_env(env.unwrapped, skip_render_check=True)
    _, info = env.reset(seed=0)
    for step in range(10):
        _, reward, terminated, truncated, info = env.step(info["expert_action"])
        assert (reward, info["cost"], terminated, truncated) == (0.0, 0.0, False, step == 9)
    env.reset(seed=0)
    assert env.step(np.array([1.75], np.float32))[4]["cost"] == 1.0
    for action in ([2.1], [np.nan], [0.5, 0.5], 0.5):
        with pytest.raises(ValueError, match="is outside Box"):
            env.unwrapped.step(np.array(action, np.float32))


@pytest.mark.parametrize(
    ("agent", "config"),
    [("agents.py:Good", FEW_UPDATES), ("scpo", "{}")],
)
def test_agents_that_keep_to_the_contract_conform(agents_file, agent, config):
    """Every check passes with status 0, and no files are left behind."""
    result = scpo_bench_check(agent, "--config", config)
    assert result.exit_code == 0, result.output
    *findings, last = result.stdout.splitlines()
    assert len(findings) == 8
    assert all(line.startswith("ok ") for line in findings), result.output
    assert last == f"{agent}: conforms"
    assert [p.name for p in agents_file.iterdir() if p.is_dir() and "check" in p.name] == []


# A save() that fails leaves its file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_agents_are_found_by_the_check_named_for_it(agents_file, name):
    """One line says what and where, status 1; the records and tracebacks are kept."""
    result = scpo_bench_check(f"agents.py:{name}", "--steps", "2000", "--config", FEW_UPDATES)
    assert result.exit_code == 1, result.output
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert failed[0].startswith(f"FAILED {BROKEN[name]}"), result.output
    assert "Traceback" not in result.output
    assert list(agents_file.glob("scpo-bench-check-*/*")) or name == "Raising"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpoo"], "unknown agent 'cpoo'; did you mean 'cpo'?"),
        (["agents.py"], "which class in it? expected agents.py:Class"),
        (["agents.py:Goood"], "no class 'Goood' in agents.py; did you mean 'Good'?"),
        (["bad.py:Agent"], "cannot import 'bad.py' (ZeroDivisionError: division by zero)"),
        (["leaving.py:Agent"], "cannot import 'leaving.py' (SystemExit: 3)"),
        (["ppo", "--config", "[1"], "--config: expected a JSON object"),
        (["ppo", "--config", "3"], "--config: expected a JSON object"),
        (
            ["ppo", "--config", '{"n_stepz": 1}'],
            "--config: PPO.__init__() got an unexpected keyword argument 'n_stepz'",
        ),
        (
            ["cpo", "--config", '{"target_klo": 1}'],
            "--config: CPOConfig.target_klo: unknown field; did you mean 'target_kl'?",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(agents_file, arguments, message):
    """A UserError, which `main` prints as one line with status 2."""
    (agents_file / "bad.py").write_text("1 / 0")
    (agents_file / "leaving.py").write_text("import sys; sys.exit(3)")
    error = scpo_bench_check(*arguments).exception
    assert isinstance(error, UserError), error
    assert message in str(error)


def test_ctrl_c_ends_the_check(tmp_path, monkeypatch):
    """The user's interrupt is not mistaken for the one that ends a run early."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("scpo_bench.checks.conformance.run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(check("ppo", {}, 1000, tmp_path))


def test_an_agent_that_exits_has_not_finished(agents_file):
    """sys.exit() in an agent is a failure; it neither ends the harness nor finishes the run."""
    cell = Cell(agent="agents.py:Exiting", task=TRIVIAL, seed=0, steps=100, cost_limit=10.0)
    run = run_cell(cell, agents_file / "run", "s")
    assert (run.status, run.error, run.digest) == ("failed", "SystemExit: 3", None)


def test_every_update_is_reported(tmp_path):
    """What stops a run by its progress stops it at the same update on any machine."""
    cell = Cell(
        agent="sgd",
        task="scpo_bench/HarmfulRegression-v0",
        seed=0,
        steps=400,
        num_envs=4,
        start="backup",
        evaluation_episodes=4,
        cost_limit=0.0,
    )
    reported = []
    run = run_cell(cell, tmp_path, "s", lambda steps, updates: reported.append((steps, updates)))
    assert run.updates == 5
    assert {(120 * number, number + 1) for number in range(5)} <= set(reported)


def test_findings_do_not_depend_on_the_reports(agents_file, monkeypatch):
    """On a machine so fast that it reports progress rarely, a run is judged by the same updates."""

    def findings(every):
        def rarely(cell, folder, suite, progress):
            return run_cell(
                cell, folder, suite, lambda s, u: progress(s, u) if u % every == 0 else None
            )

        monkeypatch.setattr("scpo_bench.checks.conformance.run_cell", rarely)
        folder = agents_file / f"every-{every}"
        return list(check("agents.py:Endless", {"n_steps": 20}, 2000, folder))

    assert findings(1) == findings(7)
