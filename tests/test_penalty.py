"""The soft-penalty baseline: its gradient, what it is charged for, and that it violates."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.checks.conformance import Trivial
from scpo_bench.contract import probe_meter_of
from scpo_bench.errors import UserError
from scpo_bench.policies import backup_of
from scpo_bench.runs.environments import NativeVecEnv
from scpo_bench.runs.evaluation import Evaluator
from scpo_bench.runs.recorder import RecordingVecEnv
from scpo_bench.scpo.gradient_descent import GradientDescent
from scpo_bench.scpo.penalty import Penalty

REGRESSION = "scpo_bench/HarmfulRegression-v1"
IMITATION = "scpo_bench/DoubleIntegratorImitation-v1"
# The suite's, with fewer updates.
CONFIG = {
    "n_steps": 1,
    "labels": "visited",
    "features": 128,
    "feature_scale": 4.0,
    "feature_bias": 8.0,
    "learning_rate": 0.02,
}


def make(agent_class=Penalty, task=REGRESSION, num_envs=64, **config):
    env = NativeVecEnv(
        gym.make_vec(task, num_envs=num_envs, vectorization_mode="vector_entry_point")
    )
    kwargs = {"backup": backup_of(env.task)}
    return agent_class("MlpPolicy", RecordingVecEnv(env), policy_kwargs=kwargs, seed=0, **config)


def test_penalty_by_hand():
    """At prediction 2.1 everywhere the upper bound is exceeded by 0.5: 64 times 0.25."""
    agent = make(features=16)
    design = torch.as_tensor(np.stack(agent.env.unwrapped.task.design_starts(64), axis=-1))
    with torch.no_grad():
        # Of the two hidden constants, the bias is the one that reaches every input alike.
        agent.space._whitening.zero_()
        agent.space._whitening[-1] = 1.0
    w = torch.full((agent.space.dimension,), 2.1 / agent.space.dimension, dtype=torch.float64)
    assert agent.space.policies(w[None])(design[None])[0].numpy() == pytest.approx(2.1)
    assert float(agent.penalty(w)) == pytest.approx(64 * 0.25)
    assert float(agent.penalty(0.5 * w)) == 0.0  # within the bounds nothing is penalised


def test_penalty_begins_at_the_margin():
    """Of values -0.1 and -0.3 a margin of 0.2 penalises the first, by 0.1 squared."""
    agent = make(features=16, margin=0.2)
    agent.rollouts.constraint_values = lambda w: torch.tensor([[[-0.1, -0.3]]])
    w = torch.zeros(agent.space.dimension, dtype=torch.float64)
    assert float(agent.penalty(w)) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("task", "space"), [(REGRESSION, "last_layer"), (IMITATION, "last_layer"), (IMITATION, "all")]
)
def test_gradient_is_that_of_the_rollouts(task, space):
    """Autograd through 30 steps of the dynamics agrees with difference quotients."""
    agent = make(task=task, num_envs=8, features=8, space=space, evaluation_starts=16)
    scale = {REGRESSION: 2.0, IMITATION: 0.3}[task] if space == "last_layer" else 1.5
    w = scale * np.random.default_rng(0).normal(size=agent.space.dimension)
    at = torch.nn.Parameter(torch.as_tensor(w))
    value = agent.penalty(at)
    assert value.item() > 0
    (gradient,) = torch.autograd.grad(value, at)
    direction = np.random.default_rng(1).normal(size=len(w))
    h = 1e-7
    ends = [agent.penalty(torch.as_tensor(w + s * h * direction)).item() for s in (1, -1)]
    assert gradient.numpy() @ direction == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)


def test_penalty_violates_a_little_where_gradient_descent_violates_much():
    """The paper's Figure 2: the penalty holds violations small, and does not prevent them."""
    evaluator = Evaluator(REGRESSION, {}, 10_001, native=True)
    found = {}
    for agent_class in (Penalty, GradientDescent):
        agent = make(agent_class, **CONFIG)
        agent.learn(64 * 400)

        def predict(observations, agent=agent):
            return agent.predict(observations, deterministic=True)[0]

        found[agent_class] = evaluator(predict)
    assert 0.0 < found[Penalty].worst < 0.1 < 0.3 < found[GradientDescent].worst
    # The best prediction within the bounds has 0.042.
    assert found[GradientDescent].objective < 0.01 < 0.042 < found[Penalty].objective < 0.07


def test_a_penalty_of_weight_0_is_gradient_descent():
    """Same seed, same updates, bit for bit: the two differ in the penalty alone."""
    agents = [make(**CONFIG, weight=0.0), make(GradientDescent, **CONFIG)]
    for agent in agents:
        agent.learn(64 * 5)
    np.testing.assert_array_equal(agents[0].w, agents[1].w)
    assert np.abs(agents[0].w).max() > 0


def test_rollouts_are_charged():
    """Every gradient costs a rollout from each design start, which counts as probe steps."""
    config = {"features": 8, "evaluation_starts": 16, "gradient_steps": 2, "learning_rate": 1e-3}
    agent = make(task=IMITATION, num_envs=8, **config)
    agent.learn(8 * 30 * 3)
    meter = probe_meter_of(agent.env)
    assert meter.steps == 3 * 2 * 16 * 30
    assert meter.violations == 0
    agent.penalty(torch.full((agent.space.dimension,), 5.0, dtype=torch.float64))
    assert meter.violations == 1


def test_other_environments_are_refused():
    """It needs gradients of the dynamics, and says so in one line."""
    agent = Penalty("MlpPolicy", DummyVecEnv([Trivial]), seed=0)
    with pytest.raises(UserError, match="Penalty: it differentiates through a task's pure"):
        agent.learn(100)


@pytest.mark.parametrize(("field", "value"), [("weight", -1.0), ("evaluation_starts", 0)])
def test_bad_configuration_is_named(field, value):
    """A mistake in the configuration says which field and what was expected."""
    with pytest.raises(UserError, match=rf"PenaltyConfig\.{field}: must be at least"):
        make(**{field: value})
