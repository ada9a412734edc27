"""Parameter spaces, and rollouts of policies in them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from push import Push, pushing
from stable_baselines3 import PPO, SAC

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.contract import ProbeMeter
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy
from scpo_bench.scpo.rollouts import BatchedRollouts, EpisodeRollouts
from scpo_bench.scpo.spaces import PolicyWeights, make_space
from scpo_bench.scpo.wrap import ProjectedConfig

torch.set_num_threads(1)
IMITATION = "scpo_bench/DoubleIntegratorImitation-v0"
SPACES = ("last_layer", "low_rank", "all", "deployed")


@pytest.fixture(scope="module")
def task():
    return gym.make(IMITATION).unwrapped.task


def space_of(name, task):
    """(space, policy that starts at the task's backup, w = 0)."""
    torch.manual_seed(0)
    backup = AffineBackup(*task.backup_gain())
    policy = BackupActorCriticPolicy(
        task.observation_space,
        task.action_space,
        lambda _: 0.0,
        backup=backup,
        net_arch={"pi": [16], "vf": []},
    )
    if name == "deployed":
        return PolicyWeights(policy), policy
    reference = torch.as_tensor(np.stack(task.design_starts(256), axis=-1))
    return make_space(name, policy, reference, rank=2), policy


# ---- parameter spaces


@pytest.mark.parametrize("name", SPACES)
def test_every_space_starts_at_the_policy_and_writes_what_it_evaluates(name, task):
    """w = 0 acts as the backup; after write(w) the deployed network acts as the evaluated one."""
    space, policy = space_of(name, task)
    w = 0.01 * np.random.default_rng(0).normal(size=(1, space.dimension))
    observations = np.random.default_rng(1).uniform(-0.3, 0.3, (20, 2)).astype(np.float32)
    x = torch.as_tensor(observations, dtype=torch.float64)[None]
    with torch.no_grad():
        start = space.policies(torch.zeros(1, space.dimension, dtype=torch.float64))(x)[0].numpy()
        evaluated = space.policies(torch.as_tensor(w))(x)[0].numpy()
    gain, _ = task.backup_gain()
    assert start == pytest.approx(observations @ gain.T, abs=1e-6)
    space.write(w[0])
    deployed = policy.predict(observations, deterministic=True)[0]
    assert np.abs(deployed - start).max() > 1e-4
    assert deployed == pytest.approx(evaluated, abs=1e-5)


@pytest.mark.parametrize("name", ["last_layer", "low_rank", "all"])
def test_several_policies_at_once_are_the_same_as_one_by_one(name, task):
    """Slopes are differences between policies of one batch: rows must not be mixed up."""
    space, _ = space_of(name, task)
    w = torch.as_tensor(np.random.default_rng(0).normal(size=(3, space.dimension)))
    x = torch.as_tensor(np.random.default_rng(1).uniform(-0.3, 0.3, (3, 5, 2)))
    together = space.policies(w)(x)
    for i in range(3):
        alone = space.policies(w[i : i + 1])(x[i : i + 1])[0]
        assert together[i].detach().numpy() == pytest.approx(alone.detach().numpy(), abs=1e-12)


def test_last_layer_is_whitened(task):
    """|w| is the root mean square change of the action, in every direction."""
    space, _ = space_of("last_layer", task)
    x = torch.as_tensor(np.stack(task.design_starts(256), axis=-1))[None]
    for j in (0, space.dimension // 2, space.dimension - 1):
        w = torch.zeros(1, space.dimension, dtype=torch.float64)
        start = space.policies(w)(x)
        w[0, j] = 0.3
        change = space.policies(w)(x) - start
        assert float(change.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-6)


def test_policy_weights_are_those_that_shape_the_action():
    """PPO: policy network and action head, without value network and exploration noise."""
    agent = PPO("MlpPolicy", pushing(), policy_kwargs={"net_arch": [8]})
    weights = PolicyWeights(agent.policy)
    assert weights.dimension == (2 * 8 + 8) + (8 + 1)
    assert not weights.read().any()
    change = np.zeros(weights.dimension)
    change[-1] = 0.25
    before = agent.predict(np.zeros((1, 2), np.float32), deterministic=True)[0]
    weights.write(change)
    after = agent.predict(np.zeros((1, 2), np.float32), deterministic=True)[0]
    assert after == pytest.approx(before + 0.25)
    assert weights.read() == pytest.approx(change, abs=1e-7)


def test_discrete_actions_are_refused():
    """An action that cannot be differentiated has no smooth constraint either."""
    with pytest.raises(ValueError, match="needs a Box action space"):
        PolicyWeights(PPO("MlpPolicy", "CartPole-v1").policy)


@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_evaluated_actions_are_those_of_predict(algorithm):
    """The shortcut past ``predict`` gives the same actions, clipped ones included."""
    agent = algorithm("MlpPolicy", pushing(), seed=0)
    weights = PolicyWeights(agent.policy)
    w = np.zeros(weights.dimension)
    w[-1] = 2.0 if algorithm is PPO else 0.5
    weights.write(w)
    observations = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32)
    predicted = agent.predict(observations, deterministic=True)[0]
    act = weights.policies(torch.as_tensor(w)[None])
    assert np.array_equal(act(torch.as_tensor(observations)[None])[0].numpy(), predicted)
    assert algorithm is SAC or predicted.max() == 2.0


# ---- rollouts


@pytest.mark.parametrize("name", SPACES)
def test_batched_rollouts_agree_with_the_environment(name, task):
    """Rollouts and the Gymnasium environment are one system: equal values from equal starts."""
    space, policy = space_of(name, task)
    w = 0.01 * np.random.default_rng(0).normal(size=space.dimension)
    rollouts = BatchedRollouts(task, space, 32, 50.0, ProbeMeter())
    with torch.no_grad():
        ours = rollouts.constraint_values(torch.as_tensor(w)[None])[0].amax(dim=-1).numpy()
    space.write(w)
    env = gym.make_vec(IMITATION, num_envs=32, vectorization_mode="vector_entry_point")
    states = np.stack(task.design_starts(32), axis=-1)
    observations, _ = env.reset(options={"states": states})
    worst = np.full(3, -np.inf)
    for _ in range(30):
        actions, _ = policy.predict(observations, deterministic=True)
        observations, *_, info = env.step(actions)
        worst = np.maximum(worst, info["constraint_values"].max(axis=0))
    # The environment returns float32 observations.
    assert ours == pytest.approx(worst, abs=1e-4)


@pytest.mark.parametrize("name", ["last_layer", "deployed"])
def test_batched_rollouts_bound_the_worst_value_and_count_steps_and_violations(name, task):
    """g bounds the maximum over starts and steps; all steps and violating probes are counted."""
    space, _ = space_of(name, task)
    meter = ProbeMeter()
    rollouts = BatchedRollouts(task, space, 32, 50.0, meter)
    w = np.zeros((3, space.dimension))
    w[1] = np.random.default_rng(0).normal(size=space.dimension)  # leaves the safe set
    g = rollouts(w)[:, 0]
    assert (meter.steps, meter.violations) == (3 * 32 * 30, 1)
    for row, values in zip(w, g):
        with torch.no_grad():
            worst = rollouts.constraint_values(torch.as_tensor(row)[None])[0].amax(dim=-1).numpy()
        assert (values >= worst).all()
        assert (values <= worst + np.log(32 * 30) / 50).all()
    assert (g.max(axis=1) > 0).tolist() == [False, True, False]


def test_noise_belongs_to_the_stream(task):
    """Equal streams mean equal noise for all policies, and each is charged as a rollout."""
    space, _ = space_of("last_layer", task)
    meter = ProbeMeter()
    rollouts = BatchedRollouts(task, space, 32, 50.0, meter, noise_std=0.1, seed=3)
    exact = BatchedRollouts(task, space, 32, 50.0, ProbeMeter())
    assert (exact.exact, rollouts.exact) == (True, False)
    w = 0.01 * np.random.default_rng(0).normal(size=(2, space.dimension))
    y = rollouts(w, (4, 5, 4))
    assert meter.steps == 2 * 32 * 30 * 3
    noise = (y - exact(w)) / 0.1
    assert noise[0] == pytest.approx(noise[1])
    assert np.array_equal(y[:, 0], y[:, 2])
    assert noise[0, 0] == pytest.approx(np.random.default_rng([3, 4]).normal(size=3))


def test_episode_rollouts_do_not_depend_on_the_workers():
    """Two policies, six streams, one process and two: hand-counted costs, steps and violations."""
    agent = PPO("MlpPolicy", pushing(), seed=0, policy_kwargs={"net_arch": [8]})
    weights = PolicyWeights(agent.policy)
    w = np.zeros((2, weights.dimension))
    w[1, -1] = 1.0  # actions of about 1: each of 20 steps costs
    results = []
    for workers in (1, 2):
        meter = ProbeMeter()
        rollouts = EpisodeRollouts(Push, weights, 5.0, 0, workers, meter)
        results.append(rollouts(w, range(6)))
        rollouts.close()
        assert (meter.steps, meter.violations) == (2 * 6 * 20, 6)
    assert results[0].shape == (2, 6, 1)
    assert results[0][0] == pytest.approx(-1.0)  # cost 0 of 5
    assert results[0][1] == pytest.approx(3.0)  # cost 20 of 5
    assert np.array_equal(*results)


def test_one_violated_constraint_makes_a_probe_a_violation():
    """A probe violates if any of its constraints does, not only if all do."""

    class Two(Push):
        def step(self, action):
            *rest, info = super().step(action)
            return (*rest, {**info, "constraint_values": np.array([1.0, -1.0])})

    weights = PolicyWeights(PPO("MlpPolicy", pushing()).policy)
    meter = ProbeMeter()
    rollouts = EpisodeRollouts(Two, weights, 0.0, 0, 1, meter)
    rollouts(np.zeros((1, len(weights.start))), [0, 1, 2])
    assert (meter.violations, meter.steps) == (3, 60)
    rollouts.close()


@pytest.mark.parametrize(
    ("field", "accepted", "refused"),
    [
        ("sharpness", 1e-9, 0.0),
        ("evaluation_starts", 1, 0),
        ("level", 0.5, 0.6),
        ("level", 1e-9, 0.0),
        ("rollouts", 2, 1),
        ("probe_rollouts", 2, 1),
        ("rollout_budget", 8, 7),
        ("predicted_episodes", 0, -1),
        ("reserve", 0.0, -1e-9),
        ("largest_cost", 0.0, -1.0),
        ("cost_limit", 0.0, -1.0),
        ("L", 1e-9, 0.0),
        ("largest_L", 1e-9, 0.0),
        ("probe_radius", 0.0, -1e-9),
        ("reuse", 0.0, -1e-9),
        ("recheck", 1.0, 1.1),
        ("active_starts", 0, -1),
        ("trust_radius", 1e-9, 0.0),
        ("smallest_probe", 1e-9, 0.0),
        ("safety_factor", 1.0, 0.9),
        ("margin", 0.0, -1e-9),
        ("directions", 1, 0),
        ("retries", 1, 0),
    ],
)
def test_configuration_is_checked_at_its_bounds(field, accepted, refused):
    """What no certificate could be built with is refused by name, and nothing else is."""
    assert getattr(ProjectedConfig(**{field: accepted}), field) == accepted
    with pytest.raises(UserError, match=f"ProjectedConfig.{field}: must be"):
        ProjectedConfig(**{field: refused})
