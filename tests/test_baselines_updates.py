"""The agents' updates, step by step: each against numbers by hand or the same step by autograd."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
import torch
from constrained_mdps import MdpVecEnv, Speed
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch.distributions import Normal

from scpo_bench.baselines import cvpo, ppo_lagrangian
from scpo_bench.baselines.actors import actor_of
from scpo_bench.baselines.cpo import CPO, CPOConfig
from scpo_bench.baselines.crpo import CRPO, CRPOConfig
from scpo_bench.baselines.cvpo import CVPO, CVPOConfig
from scpo_bench.baselines.cvpo_dual import cost_threshold, e_step
from scpo_bench.baselines.cvpo_m_step import gaussian_kl_split, multipliers, weighted_moments
from scpo_bench.baselines.normalisation import normalisation_state, restore_normalisation
from scpo_bench.baselines.off_policy import ConstrainedOffPolicy
from scpo_bench.baselines.on_policy import OnPolicyConfig
from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian
from scpo_bench.baselines.rollout import Rollout
from scpo_bench.baselines.sac_lagrangian import SACLagrangian, SACLagrangianConfig
from scpo_bench.baselines.trpo_lagrangian import TRPOLagrangian, TRPOLagrangianConfig
from scpo_bench.policies import AffineBackup

torch.set_num_threads(1)  # the networks are too small for more threads to help

BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)
ON_POLICY = {"steps_per_update": 400, "critic_passes": 3, "batch_size": 100}
OFF_POLICY = {
    "steps_per_update": 100,
    "learning_starts": 100,
    "updates_per_step": 0.05,
    "batch_size": 32,
    "net_arch": (16, 16),
    "buffer_size": 2000,
    "gamma": 0.9,
}


def make(agent_class, env=None, **config):
    """A small agent on Speed (5 environments, limit 10)."""
    small = OFF_POLICY if issubclass(agent_class, ConstrainedOffPolicy) else ON_POLICY
    if agent_class is CVPO:
        small = small | {"episode_steps": 40}
    config = {"cost_limit": 10.0} | small | config
    return agent_class("MlpPolicy", env or MdpVecEnv(Speed(), 5), seed=0, **config)


# ---- collected data ----


class Linear:
    """A critic whose value is a multiple of the observation."""

    def __init__(self, slope):
        self.slope = slope

    def forward(self, observations):
        return np.float32(self.slope) * observations


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_time_limits_bootstrap_and_terminations_do_not(scale):
    """An episode cut by its time limit is worth what would have followed; a terminated one is not.

    Two environments of three steps: at t = 1 the first is truncated (at an observation of value 4),
    the second terminates. Reward and value 1 and 2 everywhere, gamma = lambda = 1/2. t = 2: delta
    = 1 + 2/2 - 2 = 0; t = 1: 1 + 4/2 - 2 = 1 and 1 + 0 - 2 = -1; t = 0: delta = 0, plus 1/4 of
    t = 1. The cost is the same signal with gamma = 1 and lambda = 0: t = 2: 1 + 2 - 2 = 1; t = 1:
    1 + 4 - 2 = 3 and 1 + 0 - 2 = -1; t = 0: 1. ``return_scale``: critics predict, and are fitted
    to, scaled returns; advantages are not scaled.
    """
    rollout = Rollout(3, BOX, BOX, n_envs=2, n_costs=1)
    twos = np.full((2, 1), 2.0, np.float32)
    for _ in range(2):  # a second collection forgets the truncations of the first
        rollout.reset()
        for t in range(3):
            ended = np.full(2, t == 1)
            infos = [{"terminal_observation": np.array([4.0])} for _ in range(2)]
            infos[0]["TimeLimit.truncated"] = True
            rollout.store(t, twos, twos, np.ones(2), np.ones((2, 1)), ended, infos)
    advantages, returns = rollout.advantages_and_returns(
        [Linear(scale)] * 2, twos, [0.5, 1.0], [0.5, 0.0], scale
    )
    expected = [[[0.25, -0.25], [1, -1], [0, 0]], [[1, 1], [3, -1], [1, 1]]]
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    np.testing.assert_allclose(returns, scale * (np.array(expected) + 2), atol=1e-6)
    assert rollout.truncated_at == [(1, 0)]


@pytest.mark.parametrize("agent_class", [PPOLagrangian, CPO])
def test_collected_steps_are_what_the_environment_returned(agent_class):
    """Rewards, costs and ends reach the update in order, 400 steps rounded up to 7 environments."""
    agent = make(agent_class, MdpVecEnv(Speed(), 7))
    agent.learn(1)
    rollout = agent.rollout_buffer
    assert rollout.ends.shape == (58, 7)
    assert rollout.ends[39].all()
    assert rollout.ends.sum() == 7
    following = 0.8 * rollout.observations[:, :, 0]
    following += 0.2 * np.clip(rollout.actions[:, :, 0], -1, 1)
    np.testing.assert_allclose(rollout.signals[0], following, atol=1e-5)
    np.testing.assert_allclose(rollout.signals[1], following**2, atol=1e-5)
    assert np.abs(rollout.actions).max() > 1.0  # stored as sampled, applied clipped


def test_the_batch_of_an_update_has_a_discount_per_signal():
    """Rewards and costs have their own gamma and lambda; ``return_scale`` reaches the targets."""
    config = {"gamma": 0.5, "gae_lambda": 0.25, "cost_gamma": 0.75, "cost_gae_lambda": 0.125}
    agent = make(PPOLagrangian, return_scale=0.5, **config)
    agent.learn(1)
    seen = {}

    def record(*arguments):
        seen["gammas"], seen["lambdas"], seen["scale"] = arguments[2:]
        return np.zeros((2, 80, 5)), np.ones((2, 80, 5))

    agent.rollout_buffer.advantages_and_returns = record
    batch = agent._batch(actor_of(agent.policy), agent._critics())
    assert seen == {"gammas": [0.5, 0.75], "lambdas": [0.25, 0.125], "scale": 0.5}
    assert batch.advantages.shape == batch.returns.shape == (2, 400)
    np.testing.assert_array_equal(batch.observations[:5], agent.rollout_buffer.observations[0])


@pytest.mark.parametrize(
    "agent_class", [PPOLagrangian, CPO, TRPOLagrangian, CRPO, CVPO, SACLagrangian]
)
def test_cost_estimates_are_of_one_update(agent_class):
    """Episodes of earlier updates are not counted again."""
    agent = make(agent_class, steps_per_update=400)
    agent.learn(800)
    assert agent.diagnostics["episodes"] == 10
    assert agent.episode_costs.all_episodes == 20


@pytest.mark.parametrize(
    "agent_class", [PPOLagrangian, CPO, TRPOLagrangian, CRPO, CVPO, SACLagrangian]
)
def test_a_reset_from_outside_drops_running_episodes(agent_class):
    """A cost collected before a reset would be charged to an episode that never ended."""
    agent = make(agent_class, **{"steps_per_update": 100})
    agent.learn(100)  # half of an episode each
    assert agent.episode_costs.length_N.tolist() == [20.0] * 5
    agent.learn(200)  # SB3 resets the environments first
    assert agent.episode_costs.lengths == [40.0] * 5


# ---- on-policy updates ----


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_critic_step_descends_the_squared_error_and_the_penalty(l2):
    """Every critic's gradient against autograd; its error is reported; its optimiser is its own."""
    agent = make(CPO, critic_l2=l2, max_grad_norm=1e9)
    critics = agent._critics()
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(9, 1)).astype(np.float32)
    returns = rng.normal(size=(2, 9)).astype(np.float32)
    for critic, target in zip(critics, torch.from_numpy(returns)):
        value = critic_of(critic)(torch.from_numpy(observations))[:, 0]
        error = (value - target).square().mean()
        penalty = sum(p.square().sum() for p in critic.tensors)
        gradients = torch.autograd.grad(error + l2 * penalty, critic.tensors)
        critic.expected = (error.item(), np.concatenate([g.numpy().ravel() for g in gradients]))
    starts = [critic.theta.copy() for critic in critics]
    errors = agent._critic_step(critics, observations, returns)
    for i, critic in enumerate(critics):
        assert errors[i] == pytest.approx(critic.expected[0], rel=1e-5)
        np.testing.assert_allclose(critic.grad, critic.expected[1], rtol=1e-3, atol=1e-6)
        moved = np.abs(critic.grad) > 1e-4  # Adam's first step has the length of the step size
        step = -agent.config.critic_lr * np.sign(critic.grad[moved])
        np.testing.assert_allclose((critic.theta - starts[i])[moved], step, rtol=2e-2)
        assert agent.optimizers[f"critic_{i}"].steps == 1


def critic_of(mlp):
    """The critic's network in torch, from the parameters that ``mlp`` copies."""

    def forward(x):
        for weight, bias in zip(mlp.tensors[:-2:2], mlp.tensors[1:-2:2]):
            x = torch.tanh(x @ weight.T + bias)
        return x @ mlp.tensors[-2].T + mlp.tensors[-1]

    return forward


def test_minibatches_cover_the_data_once_in_random_order():
    """A step left out, or used twice, would weight the data of an update wrongly."""
    agent = make(CPO, batch_size=100)
    parts = list(agent._minibatches(250))
    assert [len(part) for part in parts] == [100, 100, 50]
    order = np.concatenate(parts)
    assert sorted(order) == list(range(250))
    assert list(order) != list(range(250))


def diagnostics_of(agent, steps):
    """The diagnostics of every update of a run."""
    collected, publish = [], agent._publish
    agent._publish = lambda numbers: (publish(numbers), collected.append(agent.diagnostics))
    agent.learn(steps)
    return collected


def test_ppo_lagrangian_multiplier_follows_this_updates_excess():
    """Adam's first step has length lr in the direction of J_C - limit: up above it, down below."""
    for limit, expected in ((1e-3, 0.25), (1e3, 0.15), (np.inf, 0.0)):
        agent = make(PPOLagrangian, cost_limit=limit, multiplier_init=0.2, multiplier_lr=0.05)
        agent.learn(400)
        assert agent.diagnostics["multiplier"] == pytest.approx(expected, abs=1e-6)
        assert agent.diagnostics["episodic_cost"] == pytest.approx(
            np.mean(agent.episode_costs.finished)
        )
        assert agent.diagnostics["episodes"] == 10


@pytest.mark.parametrize("standardise", [True, False])
def test_ppo_lagrangian_advantages_are_centred_and_only_rewards_scaled(standardise, monkeypatch):
    """A cost advantage divided by its deviation would give the multiplier another unit."""
    agent, seen = make(PPOLagrangian, standardise_rewards=standardise, critic_passes=1), {}
    original = agent._batch

    def batch(*arguments):
        seen["batch"] = original(*arguments)
        return seen["batch"]

    def mixed(reward, cost, multipliers):
        seen["reward"], seen["cost"] = reward, cost
        return reward - cost[0]

    agent._batch = batch
    monkeypatch.setattr(ppo_lagrangian, "lagrangian_advantages", mixed)
    agent.learn(400)
    raw = seen["batch"].advantages
    scale = raw[0].std() if standardise else 1.0
    np.testing.assert_allclose(seen["reward"], (raw[0] - raw[0].mean()) / scale, atol=1e-5)
    np.testing.assert_allclose(seen["cost"][0], raw[1] - raw[1].mean(), atol=1e-6)


def test_ppo_lagrangian_step_size_decays_from_its_full_value():
    """Four updates: the first uses all of ``actor_lr``, the last a quarter; constant on request."""
    decaying = diagnostics_of(make(PPOLagrangian, actor_lr=4e-3), 1600)
    assert [d["actor_lr"] for d in decaying] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    constant = diagnostics_of(make(PPOLagrangian, actor_lr=4e-3, actor_lr_decay=False), 800)
    assert [d["actor_lr"] for d in constant] == [4e-3, 4e-3]


def test_ppo_lagrangian_stops_its_passes_beyond_the_kl_bound():
    """The pass that exceeds ``target_kl`` is the last one; without a bound all passes are taken."""
    short = make(PPOLagrangian, target_kl=1e-9, actor_lr=1e-3).learn(400)
    assert short.diagnostics["passes"] == 1
    assert short.diagnostics["kl"] > 1e-9
    assert make(PPOLagrangian, target_kl=1e9).learn(400).diagnostics["passes"] == 3


# ---- the initial deviation ----


class Ranges(Speed):
    """Two actions, of half range 0.4 and, off centre, 3. Only the first counts."""

    action_space = spaces.Box(np.array([-0.4, 0.0], np.float32), np.array([0.4, 6.0], np.float32))


@pytest.mark.parametrize("agent_class", [PPOLagrangian, CPO])
def test_the_initial_deviation_is_in_half_ranges_of_the_actions(agent_class):
    """With a deviation of 1 on Humanoid's actions of +-0.4, half of the samples are clipped.

    log 0.5 + log (0.4, 3). What ``policy_kwargs`` says is SB3's, in action units. A loaded
    policy keeps what it has learned.
    """
    agent = make(agent_class, MdpVecEnv(Ranges(), 5), initial_log_std=np.log(0.5))
    std = agent.policy.log_std.detach().exp().numpy()
    np.testing.assert_allclose(std, [0.2, 1.5], rtol=1e-6)
    given = make(agent_class, MdpVecEnv(Ranges(), 5), policy_kwargs={"log_std_init": -2.0})
    assert given.policy.log_std.tolist() == [-2.0] * 2
    agent.learn(400)
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    loaded = agent_class.load(file, MdpVecEnv(Ranges(), 5))
    assert loaded.policy.log_std.tolist() == agent.policy.log_std.tolist()
    assert agent.policy.log_std[0].item() != pytest.approx(np.log(0.2), abs=1e-6)


# ---- CVPO ----


class Ends(MdpVecEnv):
    """Two environments: at step 3 the first is truncated, the second terminates."""

    def step_wait(self):
        observations, rewards, dones, infos = super().step_wait()
        if self.elapsed == 3:
            dones = np.ones(2, dtype=bool)
            for info, observation in zip(infos, observations):
                info["terminal_observation"] = observation
            infos[0]["TimeLimit.truncated"] = True
            observations = self._start()
        return observations, rewards, dones, infos


@pytest.mark.parametrize("normalised", [False, True])
def test_cvpo_stores_transitions_unnormalised(normalised):
    """Statistics change during training: what is stored must be what the environment returned.

    At an episode's end the next observation is the terminal one, and only a termination ends the
    returns.
    """
    env = Ends(Speed(), 2)
    agent = make(CVPO, VecNormalize(env, gamma=0.9) if normalised else env, learning_starts=1000)
    agent.learn(20)
    replay = agent.replay_buffer
    assert replay.stored >= 10
    observations, actions = replay.observations[:10, :, 0], replay.actions[:10, :, 0]
    following = 0.8 * observations + 0.2 * actions
    for stored in (replay.next_observations[:10, :, 0], replay.rewards[:10]):
        np.testing.assert_allclose(stored, following, atol=1e-4)
    np.testing.assert_allclose(replay.costs[:10], following**2, atol=1e-4)
    ends = np.arange(10) % 3 == 2
    np.testing.assert_array_equal(replay.ends[:10], np.stack([ends, ends], axis=1))
    np.testing.assert_array_equal(replay.terminated[:10], np.stack([ends & False, ends], axis=1))
    np.testing.assert_allclose(observations[1:][~ends[:-1]], following[:-1][~ends[:-1]], atol=1e-4)


def trained_cvpo(**config):
    """CVPO after one training phase, so that networks and targets differ."""
    return make(CVPO, **config).learn(300)


@pytest.mark.parametrize("pessimistic", [True, False])
def test_cvpo_critic_targets(pessimistic):
    """scale (r + gamma r') + gamma^2 Q: Q the lower for rewards, the higher or mean for costs.

    The next actions are the present policy's, clipped to the action space.
    """
    agent = trained_cvpo(return_scale=0.5, pessimistic_cost=pessimistic, initial_std=2.0)
    policy, seen = agent.policy, {}

    def regression(observations, actions, targets):
        seen["targets"], seen["observations"] = targets, observations
        return torch.tensor([1.0, 3.0, 5.0, 9.0])

    policy.critics.regression = regression
    state = copy.deepcopy(agent.rng)
    observations, losses = agent._critic_step(32)
    assert losses == {"reward_critic_loss": 2.0, "cost_critic_loss": 7.0}
    assert observations is seen["observations"]

    agent.rng = state
    batch = agent.replay_buffer.sample(32, agent.config.n_step, 0.9, agent.rng)
    rewards, costs, discounts = map(torch.from_numpy, (batch.rewards, batch.costs, batch.discounts))
    following = torch.from_numpy(batch.next_observations)
    with torch.no_grad():
        mean, std = policy.actor(following)
        noise = agent.rng.standard_normal((32, 1, 1), dtype=np.float32)[:, 0]
        actions = (mean + std * torch.from_numpy(noise)).clamp(-1.0, 1.0)
        values = policy.critics_target(following, actions.unsqueeze(1))[:, :, 0]
    cost = torch.maximum(values[2], values[3]) if pessimistic else (values[2] + values[3]) / 2
    reward_target = 0.5 * rewards + discounts * torch.minimum(values[0], values[1])
    cost_target = 0.5 * costs + discounts * cost
    expected = torch.stack([reward_target, reward_target, cost_target, cost_target])
    torch.testing.assert_close(seen["targets"], expected)
    assert (actions.abs() == 1.0).any()


def test_cvpo_e_step_gets_values_and_a_threshold_in_the_critics_unit(monkeypatch):
    """``return_scale`` applies to the threshold as to the critics; d is discounted over T steps."""
    agent, seen = trained_cvpo(return_scale=0.5, kl_bound=0.03, pessimistic_cost=True), {}
    assert agent.threshold() == pytest.approx(cost_threshold(10.0, 0.9, 40))

    def record(*arguments):
        seen["arguments"] = arguments
        return e_step(*arguments)

    monkeypatch.setattr(cvpo, "e_step", record)
    observations, actions = torch.rand(6, 1), 3 * torch.randn(6, 4, 1)
    agent._e_step(observations, actions)
    reward, cost, eps, threshold = seen["arguments"]
    values = agent.policy.critics_target(observations, actions.clamp(-1.0, 1.0)).numpy()
    np.testing.assert_allclose(reward, values[:2].min(axis=0))
    np.testing.assert_allclose(cost, values[2:].max(axis=0))
    assert eps == 0.03
    assert threshold == pytest.approx(0.5 * cost_threshold(10.0, 0.9, 40))


def test_cvpo_m_step_fits_the_weights_within_the_kl_bounds():
    """One Adam step on the loss written with torch's densities.

    Of the weights' excess over uniform ones the samples' densities are taken, of the uniform ones
    the expectation under the old policy: -1/2 shift^2 and -log std - 1/2 (old std / std)^2.
    """
    config = {"mean_kl_bound": 0.001, "covariance_kl_bound": 0.0001}
    agent = trained_cvpo(max_grad_norm=1e9, return_scale=0.5, **config)
    torch.manual_seed(0)
    observations = torch.rand(6, 1)
    mean, std = (t.detach() for t in agent.policy.actor(observations))
    old_mean, old_std = mean + 0.2 * std, 1.3 * std
    actions = old_mean.unsqueeze(1) + torch.randn(6, 4, 1) * old_std.unsqueeze(1)
    best = e_step(*np.random.default_rng(0).normal(size=(2, 6, 4)), 0.1, 0.0)
    tilt = torch.from_numpy(best.weights).float() - 0.25
    twin = copy.deepcopy(agent.policy)
    trained = twin.actor_optimizer.param_groups[0]["params"]
    assert {id(p) for p in trained} == {id(p) for p in twin.actor.parameters()}

    mean, std = twin.actor(observations)
    by_mean, by_std = Normal(mean, old_std), Normal(old_mean, std)
    log_prob = sum(
        Normal(d.loc.unsqueeze(1), d.scale.unsqueeze(1)).log_prob(actions).sum(-1)
        for d in (by_mean, by_std)
    )
    uniform = -0.5 * ((mean - old_mean) / old_std) ** 2 - std.log() - 0.5 * (old_std / std) ** 2
    fit = (tilt * log_prob).sum(dim=1).mean() + uniform.sum(dim=1).mean()
    kl_mean, kl_std = (
        torch.distributions.kl_divergence(Normal(old_mean, old_std), d).sum(-1).mean()
        for d in (by_mean, by_std)
    )
    moments = weighted_moments(actions, tilt + 0.25, old_mean, old_std)
    alpha, beta = multipliers(*moments, 0.001, 0.0001)
    assert alpha > 1.0
    assert beta > 1.0
    twin.actor_optimizer.zero_grad()
    (-fit + alpha * kl_mean + beta * kl_std).backward()
    twin.actor_optimizer.step()

    best = dataclasses.replace(best, cost_excess=0.25)
    numbers = agent._m_step(observations, old_mean, old_std, actions, best)
    for measured, expected in zip(agent.policy.actor.parameters(), twin.actor.parameters()):
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=2e-6)
    assert numbers["mean_kl_multiplier"] == pytest.approx(alpha)
    assert numbers["covariance_kl_multiplier"] == pytest.approx(beta)
    assert numbers["std"] == pytest.approx(std.mean().item())
    assert numbers["cost_value_excess"] == 0.5  # in the environment's unit
    assert numbers["multiplier"] == best.lam
    unlimited = dataclasses.replace(best, cost_excess=-np.inf)
    numbers = agent._m_step(observations, old_mean, old_std, actions, unlimited)
    assert numbers["cost_value_excess"] == 0.0  # a record cannot hold infinity


def test_cvpo_training_phase_is_a_mean_over_its_gradient_steps():
    """Diagnostics are means, counters are totals, and targets follow after every gradient step."""
    agent = trained_cvpo()
    updates, recoveries = agent._n_updates, agent.recoveries
    followed, m_steps = [], []
    agent.policy.follow = followed.append
    agent._e_step = lambda *a: e_step(np.zeros((32, 16)), np.ones((32, 16)), 0.1, 0.0)
    agent._m_step = lambda *a: (m_steps.append(a), {"std": float(len(m_steps))})[1]
    agent.train(4, 32)
    assert followed == [agent.config.tau] * 4
    assert agent.diagnostics["std"] == 2.5
    assert agent.recoveries == agent.diagnostics["recoveries"] == recoveries + 4
    assert agent._n_updates == agent.diagnostics["gradient_updates"] == updates + 4
    _, old_mean, old_std, actions, _ = m_steps[0]
    assert actions.shape == (32, 16, 1)
    spread = (actions - old_mean.unsqueeze(1)) / old_std.unsqueeze(1)
    assert abs(spread.mean().item()) < 0.2
    assert abs(spread.std().item() - 1) < 0.2


def shifted(agent, log_ratio=0.0, shift=0.0):
    """Change the actor's outputs: the mean before its tanh, the deviation before its softplus."""
    with torch.no_grad():
        agent.policy.actor.mean.bias += shift
        agent.policy.actor.raw_std.bias += log_ratio


def test_cvpo_old_policy_is_the_one_that_collected():
    """E- and M-step refer to the actor as it was before the update's first gradient step.

    An anchor that follows the actor bounds each gradient step, and not what is deployed.
    """
    agent, seen = trained_cvpo(mean_kl_bound=1e9, covariance_kl_bound=1e9), []
    collected = copy.deepcopy(agent.policy.actor)

    def m_step(observations, old_mean, old_std, *_):
        for measured, expected in zip((old_mean, old_std), collected(observations)):
            torch.testing.assert_close(measured, expected)
        seen.append(agent.policy.actor(observations)[0] - old_mean)
        shifted(agent, shift=0.5)
        return {}

    agent._m_step = m_step
    agent.train(3, 32)
    assert [change.abs().max().item() > 0.01 for change in seen] == [False, True, True]


@pytest.mark.parametrize(("shift", "log_ratio"), [(1.0, 0.0), (0.0, 2.0), (1.0, -2.0)])
def test_cvpo_update_ends_within_both_kl_bounds(shift, log_ratio):
    """Whatever the gradient steps did, the policy deployed next keeps the bounds, measured anew."""
    agent = trained_cvpo()
    old = copy.deepcopy(agent.policy.actor)
    agent._m_step = lambda *_: shifted(agent, log_ratio, shift) or {}
    agent.train(1, 32)
    states = torch.from_numpy(agent.replay_buffer.observations[:50].reshape(-1, 1))
    kl_mean, kl_std = (
        kl.mean().item() for kl in gaussian_kl_split(*agent.policy.actor(states), *old(states))
    )
    diagnostics = agent.diagnostics
    bounds = diagnostics["kl_mean_bound"], diagnostics["kl_covariance_bound"]
    assert bounds == (agent.config.mean_kl_bound, agent.config.covariance_kl_bound)
    assert diagnostics["kl_mean"] == pytest.approx(kl_mean, rel=0.1, abs=1e-9)
    assert diagnostics["kl_covariance"] == pytest.approx(kl_std, rel=0.1, abs=1e-9)
    assert diagnostics["kl"] == diagnostics["kl_mean"] + diagnostics["kl_covariance"]
    fractions = diagnostics["kl_mean"] / bounds[0], diagnostics["kl_covariance"] / bounds[1]
    assert 0.5 < max(fractions) <= 1.0  # no further back than needed
    assert 0 < diagnostics["step_fraction"] < 1


def test_cvpo_update_inside_the_bounds_is_left_alone():
    """The way back is taken only where a bound is exceeded."""
    agent = trained_cvpo(mean_kl_bound=1e9, covariance_kl_bound=1e9)
    before = agent.policy.actor.mean.bias.item()
    agent._m_step = lambda *_: shifted(agent, shift=0.25) or {}
    agent.train(1, 32)
    assert agent.diagnostics["step_fraction"] == 1.0
    assert agent.policy.actor.mean.bias.item() == pytest.approx(before + 0.25)


@pytest.mark.parametrize("broken", ["shift", "log_ratio"])
def test_cvpo_returns_to_the_old_policy_where_no_step_keeps_the_bounds(broken):
    """A policy that cannot be measured (a parameter is not a number) must not be deployed."""
    agent = trained_cvpo()
    old = copy.deepcopy(agent.policy.actor)
    agent._m_step = lambda *_: shifted(agent, **{broken: np.nan}) or {}
    agent.train(1, 32)
    for p, q in zip(agent.policy.actor.parameters(), old.parameters()):
        assert torch.equal(p, q)
    assert agent.diagnostics["step_fraction"] == 0.0


def test_critic_targets_move_by_tau():
    """targets += tau (critics - targets)."""
    policy = trained_cvpo().policy
    with torch.no_grad():
        for p in policy.critics.parameters():
            p += 1.0
    before = [p.detach().clone() for p in policy.critics_target.parameters()]
    policy.follow(0.25)
    pairs = zip(policy.critics.parameters(), policy.critics_target.parameters(), before)
    for p, q, start in pairs:
        torch.testing.assert_close(q, start + 0.25 * (p - start))
        assert not q.requires_grad


def test_cvpo_actor_starts_with_the_stated_deviation():
    """``initial_std`` is in half ranges of the action space; the mean stays inside the space."""
    mdp = Speed()
    mdp.action_space = spaces.Box(-1.0, 3.0, (1,), np.float32)
    agent = make(CVPO, MdpVecEnv(mdp, 2), initial_std=0.7)
    mean, std = agent.policy.actor(10 * torch.randn(50, 1))
    torch.testing.assert_close(std, torch.full((50, 1), 1.4))
    assert (mean >= -1.0).all()
    assert (mean <= 3.0).all()
    with torch.no_grad():
        agent.policy.actor.mean.bias += 100.0
        agent.policy.actor.raw_std.bias -= 100.0
    mean, std = agent.policy.actor(torch.zeros(1, 1))
    assert mean.item() == pytest.approx(3.0)
    assert std.item() == pytest.approx(0.002)


def test_cvpo_samples_have_the_policys_distribution():
    """Actions acted with, and actions predicted, are the Gaussian's, not its mean."""
    agent = make(CVPO, initial_std=0.1)
    agent._last_obs = np.full((4000, 1), 0.3, np.float32)
    with torch.no_grad():
        mean, std = (t.item() for t in agent.policy.actor(torch.full((1, 1), 0.3)))
    acted, stored = agent._sample_action(0)
    np.testing.assert_array_equal(acted, stored)
    predicted = agent.policy._predict(torch.full((4000, 1), 0.3)).detach().numpy()
    for actions in (acted, predicted):
        assert actions.mean() == pytest.approx(mean, abs=0.01)
        assert actions.std() == pytest.approx(std, rel=0.05)
    exact = agent.policy._predict(torch.full((1, 1), 0.3), deterministic=True)
    assert exact.item() == pytest.approx(mean)


def test_cvpo_episode_length_without_a_time_limit_is_measured():
    """T in the threshold: the mean length of the run's finished episodes."""
    agent = make(CVPO, episode_steps=None)
    assert agent.threshold() == pytest.approx(cost_threshold(10.0, 0.9, 1))
    agent.learn(300)
    assert agent.threshold() == pytest.approx(cost_threshold(10.0, 0.9, 40))


@pytest.mark.parametrize("name", ["observation_space", "action_space"])
def test_cvpo_refuses_spaces_that_it_does_not_cover(name):
    """Its networks take flat observations and a vector of actions."""
    mdp = Speed()
    other = spaces.Discrete(3) if name == "observation_space" else spaces.Box(-1.0, 1.0, (2, 2))
    setattr(mdp, name, other)
    with pytest.raises(ValueError, match="env: CVPO needs Box observations"):
        make(CVPO, MdpVecEnv(mdp, 2))


def test_cvpo_counts_its_steps_and_updates():
    """100 steps of 7 environments, rounded up, and 0.05 gradient updates per step between them."""
    agent = make(CVPO, MdpVecEnv(Speed(), 7), learning_starts=105)
    assert (agent.gradient_steps, agent.train_freq.frequency) == (5, 15)
    assert make(CVPO, updates_per_step=1e-6).gradient_steps == 1
    steps = Counter()
    agent.train = lambda gradient_steps, batch_size: steps.update([(gradient_steps, batch_size)])
    agent.learn(315)
    assert steps == {(5, 32): 2}  # at 210 and 315 steps: none up to learning_starts


# ---- SAC-Lagrangian ----


def test_sac_adds_the_entropy_to_the_rewards_target_alone():
    """gamma^n temperature H(next state) on top of the targets without entropy; costs have none."""
    agent, seen = make(SACLagrangian).learn(300), []

    def regression(observations, actions, targets):
        seen.append(targets)
        return torch.zeros(4)

    agent.policy.critics.regression = regression
    state = copy.deepcopy(agent.rng)
    agent._critic_step(32)
    agent.rng = copy.deepcopy(state)
    agent._critic_step(32, 0.25)
    agent.rng = state
    batch = agent.replay_buffer.sample(32, agent.config.n_step, 0.9, agent.rng)
    with torch.no_grad():
        _, std = agent.policy.actor(torch.from_numpy(batch.next_observations))
    entropy = Normal(0.0, std).entropy()[:, 0]
    bonus = 0.25 * torch.from_numpy(batch.discounts) * entropy
    torch.testing.assert_close(seen[1][:2], seen[0][:2] + bonus)
    torch.testing.assert_close(seen[1][2:], seen[0][2:])
    assert bonus.abs().min() > 0.01


def test_sac_actor_ascends_the_lagrangian():
    """One Adam step down -(Q_r + temperature H - multiplier Q_c) / (1 + multiplier), by autograd.

    The temperature rises where the entropy is below its target: by one Adam step of its logarithm.
    """
    config = {"target_entropy": 5.0, "temperature_lr": 0.01, "return_scale": 0.5}
    config |= {"max_grad_norm": 1e9, "pessimistic_cost": True}
    agent = make(SACLagrangian, **config).learn(300)
    agent.multiplier = 3.0
    observations, twin = torch.rand(6, 1), copy.deepcopy(agent.policy)
    state = copy.deepcopy(agent.rng)
    log_temperature = agent.log_temperature.item()
    agent.temperature_optimizer.state.clear()
    numbers = agent._policy_step(observations, 0.2)
    assert agent.log_temperature.item() == pytest.approx(log_temperature + 0.01, abs=1e-6)

    mean, std = twin.actor(observations)
    noise = torch.from_numpy(state.standard_normal((6, 1, 1), dtype=np.float32))[:, 0]
    values = twin.critics.of_actions(observations, (mean + std * noise).clamp(-1.0, 1.0))
    reward, cost = torch.minimum(values[0], values[1]), torch.maximum(values[2], values[3])
    entropy = Normal(mean, std).entropy()
    twin.actor_optimizer.zero_grad()
    (-(reward + 0.2 * entropy[:, 0] - 3.0 * cost).mean() / 4.0).backward()
    twin.actor_optimizer.step()
    for measured, expected in zip(agent.policy.actor.parameters(), twin.actor.parameters()):
        torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-6)
    assert numbers["entropy"] == pytest.approx(entropy.mean().item())
    assert numbers["cost_value"] == pytest.approx(2.0 * cost.mean().item())


@pytest.mark.parametrize(("side", "moves"), [(1.0, False), (-1.0, True)])
def test_sac_policy_outside_the_action_space_comes_back(side, moves):
    """Where all samples are clipped, a gradient that points inside still moves the mean.

    Q_r = a: from above the space there is nothing to gain, from below there is.
    """
    backup = AffineBackup([[0.0]], [5.0 * side])
    agent = make(
        SACLagrangian, initial_std=0.1, temperature_init=1e-9, policy_kwargs={"backup": backup}
    )
    agent.policy.critics.of_actions = lambda _, actions: (
        actions[:, 0] * torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    )
    observations = torch.rand(6, 1)
    before = agent.policy.actor(observations)[0].detach()
    agent._policy_step(observations, 0.0)
    after = agent.policy.actor(observations)[0].detach()
    assert bool((after > before).all()) == moves
    assert torch.equal(after, before) == (not moves)


def test_sac_multiplier_follows_the_episodic_cost():
    """0.01 times (episodic cost - limit) per update, never below 0, and none without a limit."""
    config = {"multiplier_lr": 0.01, "multiplier_init": 0.5}
    agent = make(SACLagrangian, steps_per_update=200, learning_starts=200, **config).learn(600)
    before = agent.multiplier
    agent.train(1, 32)
    excess = agent.diagnostics["episodic_cost"] - 10.0
    assert excess != 0.0
    assert agent.multiplier == pytest.approx(before + 0.01 * excess)
    assert agent.diagnostics["multiplier"] == agent.multiplier
    agent.multiplier = 1e-9
    agent.episode_costs.finished = [np.array([2.0])]
    agent.train(1, 32)
    assert agent.multiplier == 0.0
    assert make(SACLagrangian, cost_limit=np.inf, **config).learn(300).multiplier == 0.0


def test_sac_training_phase_follows_after_every_gradient_step():
    """The critics' targets follow by tau, and diagnostics are means over gradient steps."""
    agent, followed, steps = make(SACLagrangian).learn(300), [], []
    agent.policy.follow = followed.append
    agent._policy_step = lambda *a: (steps.append(a), {"std": float(len(steps))})[1]
    updates = agent._n_updates
    agent.train(4, 32)
    assert followed == [agent.config.tau] * 4
    assert agent.diagnostics["std"] == 2.5
    assert agent._n_updates == agent.diagnostics["gradient_updates"] == updates + 4
    assert [temperature for _, temperature in steps] == [agent.diagnostics["temperature"]] * 4


# ---- saving ----


def test_normalisation_is_restored_except_for_other_numbers_of_environments():
    """Statistics apply to any number of environments; running returns only to the same number."""
    saved = VecNormalize(MdpVecEnv(Speed(), 3))
    saved.reset()
    for _ in range(5):
        saved.step(np.ones((3, 1), np.float32))
    state = normalisation_state(saved)
    for number in (3, 2):
        env = VecNormalize(MdpVecEnv(Speed(), number))
        restore_normalisation(env, state)
        assert env.obs_rms.mean == saved.obs_rms.mean
        assert env.ret_rms.var == saved.ret_rms.var
        expected = saved.returns if number == 3 else np.zeros(2)
        np.testing.assert_array_equal(env.returns, expected)
    assert env.obs_rms is not state["obs_rms"]  # a copy: the state may be restored again
    assert normalisation_state(None) is None
    restore_normalisation(None, state)


# ---- configuration ----


@pytest.mark.parametrize(
    ("config_class", "field", "good", "bad"),
    [
        (OnPolicyConfig, "steps_per_update", [1], [0]),
        (OnPolicyConfig, "critic_passes", [1], [0]),
        (OnPolicyConfig, "batch_size", [1], [0]),
        (OnPolicyConfig, "gamma", [0.0, 1.0], [-0.1, 1.1]),
        (OnPolicyConfig, "cost_gae_lambda", [0.0, 1.0], [-0.1, 1.1]),
        (OnPolicyConfig, "critic_lr", [1e-9], [0.0]),
        (OnPolicyConfig, "return_scale", [1e-9], [0.0]),
        (OnPolicyConfig, "target_kl", [1e-9], [0.0]),
        (OnPolicyConfig, "max_grad_norm", [1e-9], [0.0]),
        (OnPolicyConfig, "critic_l2", [0.0], [-1.0]),
        (OnPolicyConfig, "cost_limit", [0.0, (3.0,)], [-1.0, (1.0, 2.0), np.nan]),
        (OnPolicyConfig, "cost_keys", [("cost",)], [(), (3,), ("a", "b")]),
        (CPOConfig, "cg_iterations", [1], [0]),
        (CPOConfig, "fisher_stride", [1], [0]),
        (CPOConfig, "line_search_steps", [1], [0]),
        (CPOConfig, "cg_damping", [0.0], [-1.0]),
        (CPOConfig, "line_search_shrink", [0.5], [0.0, 1.0]),
        (TRPOLagrangianConfig, "multiplier_init", [0.0], [-1.0]),
        (TRPOLagrangianConfig, "multiplier_lr", [0.0], [-1.0]),
        (TRPOLagrangianConfig, "cg_iterations", [1], [0]),
        (CRPOConfig, "tolerance", [0.0], [-1.0]),
        (CRPOConfig, "cg_iterations", [1], [0]),
        (CVPOConfig, "n_step", [1], [0]),
        (CVPOConfig, "buffer_size", [1], [0]),
        (CVPOConfig, "action_samples", [2], [1]),
        (CVPOConfig, "gamma", [0.0, 0.999], [-0.1, 1.0]),
        (CVPOConfig, "tau", [1.0], [0.0, 1.1]),
        (CVPOConfig, "initial_std", [0.01, 10], [0.001, 11]),
        (CVPOConfig, "kl_bound", [1e-9], [0.0]),
        (CVPOConfig, "mean_kl_bound", [1e-9], [0.0]),
        (CVPOConfig, "covariance_kl_bound", [1e-9], [0.0]),
        (SACLagrangianConfig, "multiplier_lr", [1e-9], [0.0]),
        (SACLagrangianConfig, "multiplier_init", [0.0], [-1.0]),
        (SACLagrangianConfig, "temperature_init", [1e-9], [0.0]),
        (SACLagrangianConfig, "temperature_lr", [0.0], [-1.0]),
        (SACLagrangianConfig, "target_entropy", [-20.0, 20.0], [-21.0, 21.0]),
        (CVPOConfig, "updates_per_step", [1e-9], [0.0]),
        (CVPOConfig, "return_scale", [1e-9], [0.0]),
        (CVPOConfig, "learning_starts", [0], [-1]),
        (CVPOConfig, "cost_limit", [0.0, np.inf], [-1.0, (1.0,)]),
    ],
)
def test_configuration_ranges(config_class, field, good, bad):
    """Each field takes its documented range, ends included where they are, and nothing beyond."""
    for value in good:
        assert getattr(config_class(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{config_class.__name__}\.(cost_|{field})"):
            config_class(**{field: value})


def test_every_limit_is_checked_and_has_its_key():
    """One bad limit among several is refused."""
    keys = {"cost_keys": ("a", "b")}
    np.testing.assert_array_equal(OnPolicyConfig(**keys, cost_limit=(1, 2)).limits(), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"cost_limit: expected 2 number\(s\) >= 0"):
        OnPolicyConfig(**keys, cost_limit=(-1.0, 2.0))


@pytest.mark.parametrize("agent_class", [PPOLagrangian, CPO, TRPOLagrangian, CRPO])
def test_on_policy_agents_run_on_the_cpu(agent_class):
    """A device that is asked for and not used would be a surprise."""
    assert make(agent_class, device="auto").device.type == "cpu"
    with pytest.raises(ValueError, match=r"device: .* runs on 'cpu', got 'cuda'"):
        make(agent_class, device="cuda")
