"""The equations of PPO-PID, FOCOPS and P3O by hand, and the gradient of each agent's loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from constrained_mdps import MdpVecEnv, Speed, TwoState
from torch.distributions import Categorical, Normal, kl_divergence

from scpo_bench.baselines.actors import actor_of
from scpo_bench.baselines.first_order import ClippedConfig, FirstOrderConfig
from scpo_bench.baselines.focops import FOCOPS, FOCOPSConfig, focops_weights
from scpo_bench.baselines.multipliers import Multipliers, projected_adam_ascent
from scpo_bench.baselines.p3o import P3O, P3OConfig, p3o_weights
from scpo_bench.baselines.ppo_lagrangian import PPOLagrangian, PPOLagrangianConfig
from scpo_bench.baselines.ppo_pid import PPOPID, Controller, PPOPIDConfig, controlled

torch.set_num_threads(1)  # the networks are too small for more threads to help

AGENTS = [PPOLagrangian, PPOPID, FOCOPS, P3O]


def make(agent_class, mdp=None, **config):
    """A small agent (5 environments, limit 10)."""
    config = {
        "cost_limit": 10.0,
        "steps_per_update": 400,
        "critic_passes": 3,
        "batch_size": 100,
        **config,
    }
    return agent_class("MlpPolicy", MdpVecEnv(mdp or Speed(), 5), seed=0, **config)


# ---- PPO-PID ----


def test_controller_by_hand():
    """Each term of the controller for costs of 6, 3 and 0 at a limit of 2, with smoothing 1/2.

    Excess 4, 1, -2. Integral (gain 0.1, from 0.5): 0.9, 1.0, 0.8. Smoothed excess: 2, 1.5, -0.25.
    Smoothed cost: 3, 3, 1.5; its rise over two updates, from 0 at the start: 3, 3 and (-1.5)_+ = 0.
    """
    config = PPOPIDConfig(
        proportional_gain=1.0,
        integral_gain=0.1,
        derivative_gain=10.0,
        derivative_delay=2,
        smoothing=0.5,
    )
    state, limit = Controller.start([0.5]), np.array([2.0])
    for cost, integral, smoothed, rise in (
        (6, 0.9, 2.0, 3.0),
        (3, 1.0, 1.5, 3.0),
        (0, 0.8, -0.25, 0),
    ):
        state = controlled(state, np.array([float(cost)]), limit, config)
        assert state.integral == pytest.approx([integral])
        assert state.smoothed_excess == pytest.approx([smoothed])
        assert state.multipliers == pytest.approx([smoothed + integral + 10 * rise])
    assert len(state.smoothed_costs) == 2


def test_controller_is_projected_and_does_not_wind_up():
    """After a long feasible time the integral is 0, not far below, and answers at once."""
    config = PPOPIDConfig(proportional_gain=0.0, integral_gain=0.5, derivative_gain=0.0)
    state, limit = Controller.start([1.0]), np.array([2.0])
    for _ in range(50):
        state = controlled(state, np.zeros(1), limit, config)
    assert state.multipliers == state.integral == 0.0
    assert controlled(state, np.array([3.0]), limit, config).multipliers == pytest.approx([0.5])
    proportional = PPOPIDConfig(proportional_gain=1.0, integral_gain=0.0, smoothing=0.0)
    assert controlled(state, np.zeros(1), limit, proportional).multipliers == 0.0  # not -2


def test_controller_has_one_multiplier_per_limit():
    """Constraints do not mix, and an infinite limit's multiplier is 0 whatever the cost does."""
    config = PPOPIDConfig(proportional_gain=1.0, integral_gain=1.0, smoothing=0.0)
    state = controlled(
        Controller.start([0.0, 1.0]), np.array([3.0, 9.0]), np.array([1.0, np.inf]), config
    )
    # 1 * 2 + (0 + 1 * 2) + 0.01 * 3, and nothing
    assert state.multipliers == pytest.approx([4.03, 0.0])


# ---- FOCOPS ----


def test_focops_weights_by_hand():
    """Four steps, temperature 2: -ratio A / (2 * 4) and 1/4, nothing where the KL is too large."""
    of_log_prob, of_kl = focops_weights(
        np.array([1.0, 2.0, 0.5, 1.0], np.float32),
        np.array([4.0, -2.0, 8.0, 4.0], np.float32),
        np.array([0.0, 0.02, 0.01, 0.021], np.float32),
        2.0,
        np.float32(0.02),
    )
    np.testing.assert_allclose(of_log_prob, [-0.5, 0.5, -0.5, 0.0])
    np.testing.assert_allclose(of_kl, [0.25, 0.25, 0.25, 0.0])


def test_multipliers_stay_below_their_bound_and_come_back_from_it():
    """FOCOPS's nu_max: a wound-up moment would hold the multiplier there."""
    state = Multipliers.start([1.9])
    for _ in range(100):
        state = projected_adam_ascent(state, [10.0], lr=0.2, highest=2.0)
    assert state.value == 2.0
    assert projected_adam_ascent(state, [-1.0], lr=0.2, highest=2.0).value < 2.0
    agent = make(FOCOPS, cost_limit=0.0, multiplier_lr=1.0, multiplier_max=1.5).learn(1200)
    assert agent.diagnostics["multiplier"] == 1.5


# ---- P3O ----


def test_p3o_weights_by_hand():
    """Two steps, two constraints, kappa 3, clip 0.2.

    Reward: -ratio A / 2 = (-0.5, 0.45), the second clipped away only if A < 0 and ratio < 0.8.
    First cost, A = (1, 2): max(r A, clip(r) A) - A = (0, -0.2), mean -0.1, plus 0.2: on; weight
    3 ratio A / 2 = (1.5, 2.7). Second cost, the same with an excess of 0.05: off.
    """
    ratio = np.array([1.0, 0.9])
    weights, on = p3o_weights(
        ratio, np.array([[1.0, -1.0], [1.0, 2.0], [1.0, 2.0]]), np.array([0.2, 0.05]), 3.0, 0.2
    )
    assert on.tolist() == [True, False]
    np.testing.assert_allclose(weights, [-0.5 + 1.5, 0.45 + 2.7])


def test_p3o_does_not_push_a_cost_below_what_the_clip_allows():
    """A ratio below 0.8 has done its part in reducing the cost; a raised cost is never clipped.

    A_c = (1, 1): ratios 0.5 and 2: max(r A, clip(r) A) - A = (-0.2, 1), on; the weights
    2 ratio A / 2 are 0 (clipped) and 2.
    """
    zeros = np.zeros(2)
    weights, on = p3o_weights(
        np.array([0.5, 2.0]), np.array([zeros, zeros + 1]), np.array([-0.3]), 2.0, 0.2
    )
    assert on.tolist() == [True]
    np.testing.assert_allclose(weights, [0.0, 2.0])
    _, off = p3o_weights(
        np.array([0.5, 2.0]), np.array([zeros, zeros + 1]), np.array([-0.41]), 2.0, 0.2
    )
    assert off.tolist() == [False]


def test_p3o_excess_is_per_step():
    """J_C - limit of an episode, spread over its 40 steps: the surrogate is a mean over steps."""
    agent = make(P3O, cost_limit=2.0).learn(400)
    expected = (np.mean(agent.episode_costs.finished) - 2.0) / 40
    assert agent.excess == pytest.approx([expected])


def test_p3o_reports_the_average_price_of_cost():
    """kappa times the share of minibatches with the penalty on: all above the limit, none below."""
    assert make(P3O, cost_limit=0.0, penalty=7.0).learn(400).diagnostics["multiplier"] == 7.0
    assert make(P3O, cost_limit=1e3, penalty=7.0).learn(400).diagnostics["multiplier"] == 0.0


# ---- what they share ----


@pytest.mark.parametrize("discrete", [False, True])
def test_kl_to_the_old_policy_equals_torch(discrete):
    """FOCOPS bounds KL(new || old), the other way round from ``Actor.kl``; both from torch."""
    actor = actor_of(make(FOCOPS, TwoState(discrete)).policy)
    rng = np.random.default_rng(0)
    width = 2 if discrete else 1
    old_head, head = rng.normal(size=(2, 6, width)).astype(np.float32)
    old_extra = np.full(0 if discrete else 1, 0.3, np.float32)

    def distribution(at, log_std):
        at = torch.as_tensor(at)
        return Categorical(logits=at) if discrete else Normal(at, torch.as_tensor(log_std).exp())

    head_t = torch.tensor(head, requires_grad=True)
    log_std_t = torch.tensor(actor.dist_extra(), requires_grad=True)
    kl = kl_divergence(distribution(head_t, log_std_t), distribution(old_head, old_extra))
    kl = kl if discrete else kl.sum(dim=1)
    np.testing.assert_allclose(actor.kl_to(old_head, old_extra, head), kl.detach(), rtol=1e-5)
    weights = rng.normal(size=6).astype(np.float32)
    (kl * torch.from_numpy(weights)).sum().backward()
    d_head, d_extra = actor.kl_to_gradient(old_head, old_extra, head, weights)
    np.testing.assert_allclose(d_head, head_t.grad, rtol=1e-4, atol=1e-6)
    if not discrete:
        np.testing.assert_allclose(d_extra, log_std_t.grad, rtol=1e-4)


def ppo_loss(ratio, advantages, clip=0.2):
    return -np.minimum(ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages).mean()


def lagrangian_loss(agent, ratio, kl, advantages):
    return ppo_loss(ratio, advantages)


def focops_loss(agent, ratio, kl, advantages):
    kept = kl <= agent.config.state_kl_bound
    return np.mean(kept * (kl - ratio * advantages / agent.config.temperature))


def p3o_loss(agent, ratio, kl, advantages):
    cost = advantages[1]
    change = np.mean(np.maximum(ratio * cost, np.clip(ratio, 0.8, 1.2) * cost) - cost)
    return ppo_loss(ratio, advantages[0]) + agent.config.penalty * max(change + agent.excess[0], 0)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize(
    ("agent_class", "loss"),
    [
        (PPOLagrangian, lagrangian_loss),
        (PPOPID, lagrangian_loss),
        (FOCOPS, focops_loss),
        (P3O, p3o_loss),
    ],
)
def test_actor_gradient_is_that_of_the_loss(agent_class, loss, discrete):
    """The weights on log pi and KL, put through the network, against differences of the loss.

    In float64, away from the old policy: some ratios are clipped, some states beyond FOCOPS's
    bound, and P3O's penalty is on.
    """
    agent = make(agent_class, TwoState(discrete), cost_limit=4.0, policy_kwargs={"net_arch": [4]})
    seen = {}
    agent._actor_gradient = lambda *arguments: seen.setdefault("arguments", arguments)
    agent.learn(400)
    del agent._actor_gradient
    _, _, surrogate, _ = seen["arguments"]
    observations = agent.rollout_buffer.observations.reshape(400, -1).astype(np.float64)
    agent.policy.double()
    actor, index = actor_of(agent.policy), np.arange(0, 400, 3)
    theta = actor.mlp.theta
    theta += (0.3 if discrete else 0.1) * np.random.default_rng(4).normal(size=theta.size)

    def value():
        head = actor.head(observations[index])
        old = (surrogate.old_head[index].astype(np.float64), surrogate.old_extra)
        ratio, kl = surrogate.ratio(actor, head, index), actor.kl_to(*old, head)
        seen["clipped"] = np.mean(np.abs(ratio - 1) > 0.2)
        seen["beyond"] = np.mean(kl > 0.02)
        return loss(agent, ratio, kl, surrogate.advantages[..., index].astype(np.float64))

    value()
    assert 0.05 < seen["clipped"] < 0.95
    assert 0.05 < seen["beyond"] < 0.95
    agent._actor_gradient(actor, actor.head(observations[index]), surrogate, index)
    gradient, numerical = actor.mlp.grad.copy(), np.zeros_like(theta)
    for i in range(theta.size):
        at = []
        for move in (1e-6, -2e-6):
            theta[i] += move
            at.append(value())
        theta[i] += 1e-6
        numerical[i] = (at[0] - at[1]) / 2e-6
    assert np.abs(gradient).max() > 1e-2
    np.testing.assert_allclose(gradient, numerical, atol=1e-5 * np.abs(gradient).max() + 1e-7)


@pytest.mark.parametrize("agent_class", AGENTS)
def test_multiplier_follows_this_updates_costs(agent_class):
    """The second update's multiplier answers to its own episodes, not to those before.

    The cost falls from far above the limit to 0: an average over both updates would still be above.
    """

    class Falling(Speed):
        price = 5.0

        def step(self, state, actions, rng):
            following, rewards, costs = super().step(state, actions, rng)
            return following, rewards, np.full_like(costs, self.price)

    mdp, seen = Falling(), []
    config = {"proportional_gain": 0.0, "derivative_gain": 0.0} if agent_class is PPOPID else {}
    agent = make(agent_class, mdp, **config)
    publish = agent._publish

    def published(diagnostics):
        publish(diagnostics)
        seen.append(agent.diagnostics)
        mdp.price = 0.0

    agent._publish = published
    agent.learn(800)
    assert [d["episodic_cost"] for d in seen] == [200.0, 0.0]
    if agent_class is P3O:
        assert [d["multiplier"] for d in seen] == [20.0, 0.0]
    elif agent_class is PPOPID:  # 0.001 + 0.01 * 190, then - 0.01 * 10
        assert [d["multiplier"] for d in seen] == pytest.approx([1.901, 1.801])
    else:  # Adam: moments 0.1 * 190 and 0.9 * 19 - 0.1 * 10
        second = 0.035 * (16.1 / 0.19) / np.sqrt((0.999 * 36.1 + 0.1) / (1 - 0.999**2))
        assert [d["multiplier"] for d in seen] == pytest.approx([0.036, 0.036 + second])


@pytest.mark.parametrize(
    ("config_class", "field", "good", "bad"),
    [
        (FirstOrderConfig, "actor_lr", [1e-9], [0.0]),
        (ClippedConfig, "clip_range", [1e-9], [0.0]),
        (PPOLagrangianConfig, "multiplier_init", [0.0], [-1.0]),
        (PPOLagrangianConfig, "multiplier_lr", [0.0], [-1.0]),
        (PPOPIDConfig, "multiplier_init", [0.0], [-1.0]),
        (PPOPIDConfig, "proportional_gain", [0.0], [-1.0]),
        (PPOPIDConfig, "integral_gain", [0.0], [-1.0]),
        (PPOPIDConfig, "derivative_gain", [0.0], [-1.0]),
        (PPOPIDConfig, "derivative_delay", [1], [0]),
        (PPOPIDConfig, "smoothing", [0.0, 0.99], [-0.1, 1.0]),
        (FOCOPSConfig, "multiplier_init", [0.0], [-1.0]),
        (FOCOPSConfig, "multiplier_lr", [0.0], [-1.0]),
        (FOCOPSConfig, "multiplier_max", [0.0, np.inf], [-1.0]),
        (FOCOPSConfig, "temperature", [1e-9], [0.0]),
        (FOCOPSConfig, "state_kl_bound", [1e-9], [0.0]),
        (P3OConfig, "penalty", [0.0], [-1.0]),
    ],
)
def test_configuration_ranges(config_class, field, good, bad):
    """Each field takes its documented range, ends included where they are, and nothing beyond."""
    for value in good:
        assert getattr(config_class(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{config_class.__name__}\.{field}"):
            config_class(**{field: value})
