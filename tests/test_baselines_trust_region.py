"""Updates of the trust-region agents (CPO, TRPO-Lagrangian, CRPO), step by step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from constrained_mdps import MdpVecEnv, SharedSpeed, Speed, TwoState

from scpo_bench.baselines import cpo
from scpo_bench.baselines.actors import actor_of
from scpo_bench.baselines.cpo import CPO, CPOConfig
from scpo_bench.baselines.cpo_dual import Case, TrustRegionStep
from scpo_bench.baselines.crpo import CRPO
from scpo_bench.baselines.trpo_lagrangian import TRPOLagrangian
from scpo_bench.baselines.trust_region import Step, Surrogates

torch.set_num_threads(1)  # the networks are too small for more threads to help


def make(agent_class, mdp=None, **config):
    """A small agent on Speed (5 environments, limit 10)."""
    config = {
        "cost_limit": 10.0,
        "steps_per_update": 400,
        "critic_passes": 3,
        "batch_size": 100,
    } | config
    return agent_class("MlpPolicy", MdpVecEnv(mdp or Speed(), 5), seed=0, **config)


def dense_solve(agent, batch, gradient):
    """(F / A + damping I)^-1 gradient / A, with the Fisher matrix F written out.

    F / A is the Hessian of the KL's mean over the A action dimensions.
    """
    actor, dims = actor_of(agent.policy), len(batch.actions[0])
    head = actor.head(batch.observations, batch.offset)
    columns = [
        actor.fisher_product(head, column)
        for column in np.eye(actor.mlp.theta.size, dtype=np.float32)
    ]
    mean = np.array(columns, np.float64) / dims
    return np.linalg.solve(mean + agent.config.cg_damping * np.eye(len(columns)), gradient) / dims


def surrogate_gradient(policy, batch, advantages):
    """d/d theta of mean_b A_b log pi(a_b | s_b), by autograd: [P]."""
    _, log_prob, _ = policy.evaluate_actions(
        *map(torch.from_numpy, (batch.observations, batch.actions))
    )
    gradients = torch.autograd.grad(
        (log_prob * torch.from_numpy(advantages)).mean(), actor_of(policy).mlp.tensors
    )
    return np.concatenate([t.numpy().ravel() for t in gradients])


def record_update(agent, monkeypatch):
    """{batch, policy (a copy from before the step), advantages, step}, filled by ``learn``.

    The policy stays as it is.
    """
    seen, original = {}, agent._batch

    def batch(*arguments):
        seen["batch"] = original(*arguments)
        seen["policy"] = copy.deepcopy(agent.policy)
        return seen["batch"]

    def search(actor, batch, head, advantages, step):
        seen["advantages"], seen["step"] = advantages, step
        return Surrogates(np.zeros(len(advantages)), 0.0), 0.0, 1

    monkeypatch.setattr(agent, "_batch", batch)
    monkeypatch.setattr(agent, "_line_search", search)
    return seen


@pytest.mark.parametrize("mdp", [Speed(), SharedSpeed()], ids=["one action", "two actions"])
def test_cpo_solves_the_subproblem_of_its_data(mdp, monkeypatch):
    """q, r, s from gradients of the surrogates by autograd and a dense Fisher matrix; c per step.

    b.x is a change of cost per step, so c must be the episode's excess over the limit, per step.
    With two action dimensions the bound on the summed KL is twice ``target_kl``.
    """
    agent = make(
        CPO, mdp, cg_iterations=60, policy_kwargs={"net_arch": [4]}, cost_limit=2.0, target_kl=0.01
    )
    seen = record_update(agent, monkeypatch)

    def subproblem(*arguments):
        seen["subproblem"] = arguments
        return TrustRegionStep(Case.FROM_INSIDE, 2.0, -3.0, 1.0, 1.0)

    monkeypatch.setattr(cpo, "trust_region_step", subproblem)
    agent.learn(400)
    q, r, s, c, delta = seen["subproblem"]
    data, policy = seen["batch"], seen["policy"]
    assert c == pytest.approx((np.mean(agent.episode_costs.finished) - 2.0) / 40)
    assert delta == 0.01 * mdp.action_space.shape[0]

    raw = data.advantages
    reward = (raw[0] - raw[0].mean()) / raw[0].std()
    cost = raw[1] - raw[1].mean()
    g, b = (surrogate_gradient(policy, data, advantages) for advantages in (reward, cost))
    agent.policy = policy
    on_g, on_b = dense_solve(agent, data, g), dense_solve(agent, data, b)
    np.testing.assert_allclose([q, r, s], [g @ on_g, g @ on_b, b @ on_b], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(seen["step"].direction, 2 * on_g - 3 * on_b, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(seen["advantages"], [reward, cost], atol=1e-5)
    assert agent.diagnostics["c"] == c


def test_fisher_matrix_of_every_nth_state():
    """``fisher_stride``: the curvature comes from a subset of the states, as documented."""
    agent = make(CPO, fisher_stride=4, cg_damping=0.0)
    agent.learn(400)
    actor = actor_of(agent.policy)
    batch = agent._batch(actor, agent._critics())
    states, product = [], actor.fisher_product
    actor.fisher_product = lambda head, v: (states.append(len(head)), product(head, v))[1]
    agent._inverse_curvature(actor, batch)(np.ones(actor.mlp.theta.size, np.float32))
    assert set(states) == {100}


@pytest.mark.parametrize(
    ("mdp", "dims"),
    [(Speed(), 1), (SharedSpeed(), 2), (TwoState(discrete=True), 1)],
    ids=["one action", "two actions", "discrete"],
)
def test_the_kl_bound_is_per_action_dimension(mdp, dims):
    """OmniSafe bounds the KL's mean over action dimensions.

    With its number for the sum, steps would be shorter by the root of the number of dimensions.
    """
    agent = make(CPO, mdp, cost_limit=np.inf, target_kl=1e-3, cg_damping=1e-3).learn(1200)
    assert agent.diagnostics["kl_bound"] == pytest.approx(1e-3 * dims)
    fraction = agent.diagnostics["step_fraction"]
    assert agent.diagnostics["kl"] == pytest.approx(1e-3 * dims * fraction**2, rel=0.2)
    assert fraction >= 0.8**2


# ---- the line search ----


def line_search(agent, direction_scale, advantages=None, accepts=lambda at: True):
    """(theta before, theta after, result) of one line search along scale * ones, on fresh data."""
    actor = actor_of(agent.policy)
    batch = agent._batch(actor, agent._critics())
    head = actor.head(batch.observations, batch.offset)
    before = actor.mlp.theta.copy()
    step = Step(np.full_like(before, direction_scale), accepts, {})
    if advantages is None:
        advantages = np.zeros((2, len(batch.observations)), np.float32)
    return before, actor.mlp.theta, agent._line_search(actor, batch, head, advantages, step)


@pytest.fixture
def collected():
    """CPO with one update's data."""
    return make(CPO).learn(400)


@pytest.mark.parametrize("scale", [1e3, np.inf, np.nan])
def test_failed_line_search_restores_exactly(collected, scale):
    """Steps too long, and non-finite ones, are tried, shrunk, and then undone to the last bit."""
    before, after, (surrogates, fraction, tried) = line_search(collected, scale)
    np.testing.assert_array_equal(before, after)
    assert (fraction, tried, surrogates.kl) == (0.0, CPOConfig().line_search_steps, 0.0)
    assert surrogates.gains.tolist() == [0.0, 0.0]


def test_line_search_shrinks_past_a_non_finite_step(collected):
    """A step that overflows must be shrunk like any other, not tried again at the same length."""
    collected.config = CPOConfig(line_search_steps=200, line_search_shrink=0.5, target_kl=0.01)
    before, after, (surrogates, fraction, _) = line_search(collected, 1e30)
    assert 0 < fraction < 1e-25
    assert 0 < surrogates.kl <= 0.01
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("row", [0, 1])
def test_a_non_finite_gain_is_refused(collected, row):
    """An overflow of one surrogate passes comparisons, or does not, by its sign."""
    advantages = np.zeros((2, 400), np.float32)
    advantages[row, 7] = np.inf
    before, after, (_, fraction, _) = line_search(collected, 1e-3, advantages)
    assert fraction == 0.0
    np.testing.assert_array_equal(before, after)


def test_line_search_of_one_step(collected):
    """``line_search_steps`` counts the first, full step."""
    collected.config = CPOConfig(line_search_steps=1)
    assert line_search(collected, 1e-4)[2][1:] == (1.0, 1)
    assert line_search(collected, 1e3)[2][1:] == (0.0, 1)


@pytest.mark.parametrize("bad", range(3))
def test_surrogates_are_finite_only_if_all_of_them_are(bad):
    """A single NaN makes a trial step invalid; comparisons with it would be silently false."""
    assert Surrogates(np.zeros(2), 0.0).finite()
    values = np.where(np.arange(3) == bad, np.nan, 0.0)
    assert not Surrogates(values[:2], values[2]).finite()


@pytest.mark.parametrize("mdp", [Speed(), SharedSpeed()], ids=["one action", "two actions"])
def test_line_search_takes_the_longest_step_within_the_trust_region(mdp):
    """Fraction 0.8^n for the first n that fits, with the KL of that step."""
    agent, bound = make(CPO, mdp).learn(400), 0.002 * mdp.action_space.shape[0]
    agent.config = CPOConfig(target_kl=0.002)
    before, after, (surrogates, fraction, tried) = line_search(agent, 0.03)
    assert tried > 1
    assert fraction == pytest.approx(0.8 ** (tried - 1))
    np.testing.assert_allclose(after - before, 0.03 * fraction, rtol=1e-4)
    assert bound * 0.8**2.5 < surrogates.kl <= bound


def test_surrogates_are_importance_weighted_means(collected):
    """Gains are mean ((new / old likelihood) - 1) A, a row each; a refused step is shrunk."""
    actor = actor_of(collected.policy)
    batch = collected._batch(actor, collected._critics())
    head = actor.head(batch.observations, batch.offset)
    old = actor.log_prob(head, batch.actions)
    tried = []

    def accepts(at):
        tried.append(at)
        return len(tried) == 2

    advantages = np.random.default_rng(0).normal(size=(2, 400)).astype(np.float32)
    _, _, (at, fraction, _) = line_search(collected, 1e-3, advantages, accepts)
    actor.mlp.theta += np.float32(0.8e-3)
    new = actor.log_prob(actor.head(batch.observations, batch.offset), batch.actions)
    assert (fraction, at) == (0.8, tried[1])
    np.testing.assert_allclose(
        at.gains, ((np.exp(new - old) - 1) * advantages).mean(axis=1), rtol=1e-3, atol=1e-7
    )


@pytest.mark.parametrize(
    ("reward", "cost", "c", "accepted"),
    [
        (1.0, 0.0, -1.0, True),
        (0.0, 0.0, -1.0, True),
        (-1.0, 0.0, -1.0, False),  # loses reward
        (-1.0, 0.0, 0.0, False),
        (-1.0, 0.0, 1e-9, True),  # which a step from outside may
        (0.0, 0.5, -1.0, True),  # costs less than what is left
        (0.0, 1.5, -1.0, False),  # costs more than what is left
        (0.0, 1e-9, 1.0, False),  # from outside, the cost must not rise at all
        (-1.0, -1.0, 1.0, True),
    ],
)
def test_cpo_acceptance(reward, cost, c, accepted):
    """A step is taken only if it keeps the constraint and, from inside the limit, the reward."""
    assert cpo.acceptable(Surrogates(np.array([reward, cost]), 0.0), c) is accepted


def test_cpo_accepts_by_the_constraint_value_of_its_update(monkeypatch):
    """The rule is bound to this update's c: above the limit a loss of reward is taken."""
    for limit, accepted in ((1.0, True), (100.0, False)):
        agent = make(CPO, cost_limit=limit)
        seen = record_update(agent, monkeypatch)
        agent.learn(400)
        assert seen["step"].accepts(Surrogates(np.array([-1.0, -1.0]), 0.0)) is accepted


def test_diagnostics_are_of_the_accepted_step(monkeypatch):
    """A gain reported under another signal's name would make a record say the opposite."""
    agent = make(CPO)

    def search(*arguments):
        return Surrogates(np.array([0.25, -0.5]), 0.003), 0.64, 3

    monkeypatch.setattr(agent, "_line_search", search)
    agent.learn(400)
    expected = {"reward_gain": 0.25, "cost_gain": -0.5, "kl": 0.003}
    expected |= {"step_fraction": 0.64, "line_search_tried": 3.0}
    assert expected.items() <= agent.diagnostics.items()


# ---- TRPO on weighted advantages ----


@pytest.mark.parametrize("mdp", [Speed(), SharedSpeed()], ids=["one action", "two actions"])
@pytest.mark.parametrize("standardise", [True, False])
def test_trpo_lagrangian_takes_the_natural_gradient_of_its_lagrangian(
    mdp, standardise, monkeypatch
):
    """The step is sqrt(2 delta / g'H^-1 g) H^-1 g, with g by autograd and H written out.

    The multiplier is 0.5 plus one Adam step of 0.1 up; it is accepted by the Lagrangian's gain.
    """
    agent = make(
        TRPOLagrangian,
        mdp,
        cg_iterations=60,
        policy_kwargs={"net_arch": [4]},
        cost_limit=0.0,
        multiplier_init=0.5,
        multiplier_lr=0.1,
        standardise_rewards=standardise,
    )
    seen = record_update(agent, monkeypatch)
    agent.learn(400)
    assert agent.diagnostics["multiplier"] == pytest.approx(0.6, abs=1e-6)
    reward, cost = seen["batch"].advantages
    reward = (reward - reward.mean()) / (reward.std() if standardise else 1.0)
    lagrangian = (reward - 0.6 * (cost - cost.mean())) / 1.6
    g = surrogate_gradient(seen["policy"], seen["batch"], lagrangian)
    agent.policy = seen["policy"]
    on_g = dense_solve(agent, seen["batch"], g)
    expected = np.sqrt(2 * 0.01 * mdp.action_space.shape[0] / (g @ on_g)) * on_g
    np.testing.assert_allclose(seen["step"].direction, expected, rtol=2e-2, atol=1e-3)
    assert seen["step"].accepts(Surrogates(np.array([0.6001, 1.0]), 0.0))
    assert not seen["step"].accepts(Surrogates(np.array([0.5999, 1.0]), 0.0))


def test_trpo_lagrangian_weights_by_hand():
    """(A_r - sum lambda_i A_ci) / (1 + sum lambda_i): the violated constraint's price rises."""
    agent = make(
        TRPOLagrangian,
        cost_keys=("a", "b"),
        cost_limit=(1.0, np.inf),
        multiplier_init=2.9,
        multiplier_lr=0.1,
    )
    weights, diagnostics = agent._weights(np.array([4.0, -np.inf]))
    np.testing.assert_allclose(weights, [0.25, -0.75, 0.0], atol=1e-8)
    assert diagnostics == {"multiplier_a": pytest.approx(3.0), "multiplier_b": 0.0}


@pytest.mark.parametrize(
    ("excess", "weights"),
    [
        ([2.0, -3.0], [1.0, 0.0, 0.0]),  # within the tolerance of 2
        ([-np.inf, -np.inf], [1.0, 0.0, 0.0]),
        ([2.1, -3.0], [0.0, -1.0, 0.0]),
        ([2.1, 3.0], [0.0, 0.0, -1.0]),  # the worst of several
    ],
)
def test_crpo_steps_on_the_reward_or_on_the_worst_violated_cost(excess, weights):
    """Xu et al., algorithm 1, with tolerance eta = 2; each kind of update is counted."""
    agent = make(CRPO, cost_keys=("a", "b"), cost_limit=(1.0, 1.0), tolerance=2.0)
    chosen, diagnostics = agent._weights(np.array(excess))
    assert chosen.tolist() == weights
    on_cost = weights[0] == 0.0
    assert diagnostics == {
        "on_cost": on_cost,
        "updates_on_reward": 1 - on_cost,
        "updates_on_cost": on_cost,
    }


def test_crpo_lowers_the_cost_where_it_violates():
    """A whole update from outside: the surrogate cost falls, whatever the reward does."""
    agent = make(CRPO, cost_limit=0.0, tolerance=0.0).learn(800)
    assert agent.diagnostics["updates_on_cost"] == 2
    assert agent.diagnostics["cost_gain"] < 0
    agent = make(CRPO, cost_limit=1e6).learn(800)
    assert agent.diagnostics["updates_on_reward"] == 2
    assert agent.diagnostics["reward_gain"] > 0
