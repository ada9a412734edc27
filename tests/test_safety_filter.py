"""The predictive safety filter: the closest safe input, in training and in evaluation."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.baselines import safety_filter
from scpo_bench.baselines.safety_filter import (
    FilteredVecEnv,
    SafetyFilter,
    admissible_inputs,
    filtered,
)
from scpo_bench.checks.conformance import Trivial
from scpo_bench.envs import double_integrator_control as control
from scpo_bench.envs.double_integrator_v1 import ImitationV1Task
from scpo_bench.errors import UserError
from scpo_bench.policies import backup_of
from scpo_bench.records.files import read_updates
from scpo_bench.records.schema import Cell
from scpo_bench.runs.agents import make_agent
from scpo_bench.runs.environments import NativeVecEnv, make_training_env
from scpo_bench.runs.harness import run_cell
from scpo_bench.scpo.gradient_descent import GradientDescent
from scpo_bench.suites.cells import cells, get_suite
from scpo_bench.suites.registry import agent_spec, load_agent
from scpo_bench.suites.schema import PACKAGED_FILE, load_benchmarks

IMITATION = "scpo_bench/DoubleIntegratorImitation-v1"

# ---- the problem that is solved


def by_cvxpy(state, action, steps):
    """The problem as a reader of the paper would state it: the first input, or None.

    With ``SPARE``. The distance is not squared: that has the same minimum, found to more digits.
    """
    import cvxpy as cp

    share = (1.0 - safety_filter.SPARE) ** np.arange(steps + 1)
    u, x = cp.Variable(steps), cp.Variable((steps + 1, 2))
    corners = safety_filter.invariant_polygon()
    constraints = [x[0] == state]
    for t in range(steps):
        constraints += [
            x[t + 1] == control.A @ x[t] + control.B[:, 0] * u[t],
            cp.abs(u[t]) <= share[t],
            # The last state is in the polygon, which is itself within the bounds.
            *([cp.abs(x[t + 1]) <= share[t + 1]] if t + 1 < steps else []),
        ]
    weights = cp.Variable(len(corners), nonneg=True)
    constraints += [x[steps] == share[steps] * corners.T @ weights, cp.sum(weights) == 1]
    problem = cp.Problem(cp.Minimize(cp.abs(u[0] - action)), constraints)
    problem.solve(solver=cp.CLARABEL)
    return float(u.value[0]) if problem.status == "optimal" else None


@pytest.mark.parametrize(("steps", "states"), [(1, 15), (2, 15), (7, 15), (30, 15)])
def test_the_input_is_the_qps(steps, states):
    """On random states, within the set and outside: the same closest input, or no plan in both."""
    rng = np.random.default_rng(steps)
    found = 0
    for state in rng.uniform(-1, 1, (states, 2)):
        action = rng.choice([-1.0, 1.0])
        (lowest,), (highest,) = admissible_inputs(state[None], steps)
        expected = by_cvxpy(state, action, steps)
        assert (lowest <= highest) == (expected is not None)
        if expected is not None:
            assert np.clip(action, lowest, highest) == pytest.approx(expected, abs=1e-5)
            found += 1
    assert found > 0
    assert found < states or steps == 30


def test_the_polygon_is_within_the_invariant_set():
    """An inner approximation: one that reached outside would end episodes in violation."""
    corners = safety_filter.invariant_polygon()
    level = control.backup().level
    edges = 0.5 * (corners + np.roll(corners, 1, axis=0))
    for points, low, high in ((corners, 1 - 1e-12, 1 + 1e-12), (edges, 0.9998, 1.0)):
        value = np.einsum("ni,ij,nj->n", points, control.backup().P, points) / level
        assert low <= value.min()
        assert value.max() <= high


def test_the_backup_is_a_plan_from_the_invariant_set():
    """Where the backup can take over, the filter must have room for it, whatever is left."""
    states = 0.999 * safety_filter.invariant_polygon()
    u = states @ control.backup().gain[0]
    for steps in (1, 2, 10, 30):
        lowest, highest = admissible_inputs(states, steps)
        assert (lowest <= u).all()
        assert (u <= highest).all()


# ---- episodes


def play(task, policy, n=500, starts=None):
    """(worst constraint value, filter, share of actions passed bit for bit) of n episodes."""
    state = task.sample_starts(n, np.random.default_rng(0)) if starts is None else starts
    safe = SafetyFilter(task.horizon)
    safe.restart(n)
    worst, passed = -np.inf, 0
    for step in range(task.horizon):
        observations = np.stack(state, axis=-1).astype(np.float32)
        actions = policy(state)
        applied = safe(observations, actions)
        assert applied.dtype == np.float32
        passed += (applied == actions).sum()
        action = (applied[:, 0].astype(np.float64),)
        following = task.next_state(state, action)
        values = task.constraint_values(state, action, following, step + 1 == task.horizon)
        worst = max(worst, np.max(values))
        state = following
    return worst, safe, passed / (n * task.horizon)


@pytest.mark.parametrize("expert", ["malicious", "diverging"])
def test_whatever_is_asked_for_the_bounds_hold(expert):
    """30 steps of an unsafe controller: no violation, and always a plan, in float32."""
    task = ImitationV1Task(expert=expert)
    worst, safe, _ = play(task, lambda s: np.stack(task.label(s), axis=-1).astype(np.float32))
    assert -1e-3 < worst < 0  # safe, and no more careful than it has to be
    assert safe.interventions.without_plan == 0
    assert safe.interventions.changed > 1000


def test_random_actions_are_made_safe_too():
    """Every bound on the way is met by some of them."""
    rng = np.random.default_rng(1)
    task = ImitationV1Task()
    worst, safe, _ = play(task, lambda s: rng.choice([-3.0, 3.0], (500, 1)).astype(np.float32))
    assert worst < 0
    assert safe.interventions.without_plan == 0


def test_safe_actions_pass_bit_for_bit():
    """The backup needs no filter: not one of its actions is touched."""
    task, gain = ImitationV1Task(), control.backup().gain[0]
    _, safe, passed = play(
        task, lambda s: (gain[0] * s[0] + gain[1] * s[1]).astype(np.float32)[:, None]
    )
    assert passed == 1.0
    assert safe.interventions.summary("") == {
        "interventions": 0.0,
        "intervention_share": 0.0,
        "mean_change": 0.0,
        "without_plan": 0.0,
    }


def test_the_backup_acts_where_there_is_no_plan():
    """From outside of the bounds nothing is safe: the backup acts, and each step is counted."""
    safe = SafetyFilter(30)
    safe.restart(2)
    applied = safe(np.float32([[3.0, 3.0], [0.0, 0.0]]), np.float32([[1.0], [0.5]]))
    np.testing.assert_array_equal(applied, np.float32([[-1.0], [0.5]]))
    assert safe.interventions.summary("x_") == {
        "x_interventions": 1.0,
        "x_intervention_share": 0.5,
        "x_mean_change": 2.0,
        "x_without_plan": 1.0,
    }


def test_the_plan_is_as_long_as_the_rest_of_the_episode():
    """Far out, with 30 steps left, there is time to return; at the last step there is not."""
    state = np.array([[0.8, 0.5]])
    assert np.subtract(*admissible_inputs(state, 30)) < 0
    assert np.subtract(*admissible_inputs(state, 1)) > 0
    safe = SafetyFilter(3)
    safe.restart(1)
    zero = np.float32([[0.0]])
    x = np.float32([[0.1, 0.2]])
    for _ in range(3):
        safe(x, zero)
        assert safe.continues(safe._predicted.astype(np.float32)) == (safe._step[0] < 3)
        assert not safe.continues(x + 0.01)
        assert not safe.continues(np.repeat(safe._predicted, 2, axis=0))
        x = safe._predicted.astype(np.float32)
    safe.ended(np.array([True]))
    assert safe._step[0] == 0


# ---- agents behind it

CONFIG = {
    "sgd": {"learning_rate": 0.3},
    "ppo": {"n_steps": 30, "batch_size": 120, "policy_kwargs": {"log_std_init": 1.0}},
    "cpo": {"steps_per_update": 240, "critic_passes": 1, "target_kl": 0.1},
    "cvpo": {"steps_per_update": 240, "learning_starts": 0, "initial_std": 3.0},
    "sac-lagrangian": {"steps_per_update": 240, "learning_starts": 0, "initial_std": 3.0},
}


def record(agent, folder, updates, num_envs=8):
    cell = Cell(
        agent=agent,
        task=IMITATION,
        seed=0,
        steps=30 * num_envs * updates,
        num_envs=num_envs,
        start="backup",
        cost_limit=0.0,
        evaluation_episodes=200,
        config=CONFIG[agent.removeprefix("filtered:")],
    )
    run = run_cell(cell, folder, "s")
    assert run.status == "finished", run.error
    return read_updates(folder)


def test_gradient_descent_violates_and_behind_the_filter_it_does_not(tmp_path):
    """In the harness's record: neither while it collects nor when it is evaluated."""
    plain = record("sgd", tmp_path / "plain", 12, num_envs=32)
    safe = record("filtered:sgd", tmp_path / "safe", 12, num_envs=32)
    assert any(update.iterate_violates for update in plain)
    assert sum(update.violating_steps for update in plain) > 0
    assert not any(update.iterate_violates for update in safe)
    assert sum(update.violating_steps for update in safe) == 0
    assert safe[-1].iterate_objective < 0.5 * safe[0].iterate_objective
    for name in ("interventions", "evaluation_interventions"):
        assert safe[0].diagnostics[name] == 0.0  # the backup needs none
        assert safe[-1].diagnostics[name] > 0.0
    assert safe[-1].diagnostics["without_plan"] == 0.0
    assert 0 < safe[-1].diagnostics["intervention_share"] < 1
    assert 0 < safe[-1].diagnostics["mean_change"] < 2
    assert "loss" in safe[-1].diagnostics  # the agent's own stay


@pytest.mark.parametrize("agent", ["ppo", "cpo", "cvpo", "sac-lagrangian"])
def test_other_agents_are_safe_behind_it(agent, tmp_path):
    """On-policy and off-policy agents alike, exploration noise included."""
    updates = record(f"filtered:{agent}", tmp_path, 5)
    assert not any(update.iterate_violates for update in updates)
    assert sum(update.violating_steps for update in updates) == 0
    assert updates[-1].diagnostics["interventions"] > 0


def filtered_sgd(env, **config):
    kwargs = {"backup": backup_of(ImitationV1Task())}
    return filtered(GradientDescent)("MlpPolicy", env, seed=0, policy_kwargs=kwargs, **config)


def native(num_envs=8):
    return NativeVecEnv(
        gym.make_vec(IMITATION, num_envs=num_envs, vectorization_mode="vector_entry_point")
    )


def test_training_counts_every_step_once():
    """``predict`` leaves the training observations to the environment, which filters them."""
    agent = filtered_sgd(native(), learning_rate=0.3, n_steps=20)
    agent.learn(8 * 20 * 6)
    assert agent.env.filter.interventions.steps == 8 * 20 * 6
    assert agent._evaluation.interventions.steps == 0
    for _ in range(2):  # the second is no continuation of the first: only the last ones count
        agent.predict(np.full((8, 2), 0.3, np.float32), deterministic=True)
        assert agent._evaluation.interventions.steps == 8
    assert agent.env.filter.interventions.steps == 8 * 20 * 6


def test_a_reset_starts_the_plans_anew():
    """In the middle of an episode too: what is left of it is then the whole horizon."""
    env = FilteredVecEnv(native(2))
    env.reset()
    for _ in range(5):
        env.step(np.zeros((2, 1), np.float32))
    assert env.filter._step.tolist() == [5, 5]
    env.reset()
    assert env.filter._step.tolist() == [0, 0]


def test_environments_that_are_stepped_one_by_one():
    """SB3's own vector environment, whose episodes may end at different times."""
    agent = filtered_sgd(DummyVecEnv([lambda: gym.make(IMITATION)] * 3), learning_rate=0.3)
    agent.learn(3 * 30 * 8)
    assert agent.env.filter.interventions.changed > 0
    single = filtered_sgd(gym.make(IMITATION), learning_rate=0.3).learn(60)
    assert single.env.filter.interventions.steps == 60


def test_save_and_load(tmp_path):
    """A loaded agent filters too, with and without an environment."""
    agent = filtered_sgd(native(), learning_rate=0.3)
    agent.learn(8 * 30 * 12)
    observations = np.random.default_rng(0).uniform(-0.9, 0.9, (400, 2)).astype(np.float32)
    expected = agent.predict(observations, deterministic=True)[0]
    unfiltered = GradientDescent.predict(agent, observations, deterministic=True)[0]
    agent.save(tmp_path / "agent")
    for env in (None, native()):
        loaded = filtered(GradientDescent).load(tmp_path / "agent", env=env)
        np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], expected)
        one = loaded.predict(observations[0], deterministic=True)[0]
        assert one == pytest.approx(expected[0], abs=1e-4)  # rounding
    assert (expected != unfiltered).any()
    loaded.learn(8 * 30)
    assert loaded.env.filter.interventions.steps == 8 * 30


# ---- names


def test_names():
    """``filtered:NAME`` is the agent NAME, wrapped; it keeps its configuration class."""
    assert load_agent("filtered:sgd") is load_agent("filtered:sgd")
    assert issubclass(load_agent("filtered:ppo"), PPO)
    assert load_agent("filtered:sgd").Config is GradientDescent.Config
    assert agent_spec("filtered:sgd").summary == "sgd behind a safety filter"


def test_unknown_names_and_other_agents_are_refused(tmp_path):
    """One line that says what is wrong with the name."""
    with pytest.raises(UserError, match=r"unknown agent 'sgdd'; did you mean 'sgd'"):
        agent_spec("filtered:sgdd")
    with pytest.raises(UserError, match=r"unknown agent ''"):
        agent_spec("filtered:")
    (tmp_path / "mine.py").write_text("class Mine: ...\n")
    with pytest.raises(UserError, match="the filter needs an agent that is an SB3 BaseAlgorithm"):
        load_agent(f"filtered:{tmp_path / 'mine.py'}:Mine")


def test_other_tasks_are_refused():
    """Before anything runs, and again where an environment is given by hand."""
    suite = get_suite(load_benchmarks(PACKAGED_FILE), "paper")
    with pytest.raises(UserError, match=r"'filtered:sgd': .* and scpo_bench/HarmfulRegression-v0"):
        cells(suite, agents=["filtered:sgd"])
    with pytest.raises(UserError, match="filtered: the filter's model is that of the double"):
        filtered(PPO)("MlpPolicy", DummyVecEnv([Trivial]))


def test_settings_of_a_suite_are_those_of_the_agent_behind_the_filter():
    """`run paper --agents sgd,filtered:sgd` compares the two at equal settings."""
    suite = get_suite(load_benchmarks(PACKAGED_FILE), "paper")
    pair = cells(suite, agents=["sgd", "filtered:sgd"], tasks=[IMITATION], seeds=1)
    assert [cell.agent for cell in pair] == ["sgd", "filtered:sgd"]
    assert pair[0].config == pair[1].config == {"learning_rate": 0.3}


def test_what_the_filter_cannot_act_on_is_refused():
    """Normalised observations are not the model's state; SCPO certifies the unfiltered policy."""
    with pytest.raises(UserError, match="filtered: needs observations that are not normalised"):
        filtered(PPO)("MlpPolicy", VecNormalize(native()))
    cell = Cell(
        agent="filtered:scpo", task=IMITATION, seed=0, steps=240, start="backup", cost_limit=0.0
    )
    agent = make_agent(cell, make_training_env(cell))
    with pytest.raises(UserError, match="its rollouts do not see wrapper FilteredVecEnv"):
        agent.learn(240)
