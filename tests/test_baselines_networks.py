"""The baselines' NumPy networks and actors against torch's autograd, and the replay by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from scpo_bench.baselines.actors import actor_of
from scpo_bench.baselines.first_order import clipped_surrogate_weights
from scpo_bench.baselines.networks import Adam, Mlp, sequential_layers
from scpo_bench.baselines.off_policy_networks import Critics, GaussianActor
from scpo_bench.baselines.replay import FIELDS, CostReplay
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy

torch.set_num_threads(1)  # tiny networks: more threads only get in each other's way

OBSERVATIONS = spaces.Box(-1.0, 1.0, (3,), np.float32)
SPACES = [spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(3)]


def flat(tensors):
    return np.concatenate([t.detach().numpy().ravel() for t in tensors])


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_backward_and_jvp_equal_autograd(activation):
    """A wrong hand-written derivative would train on a wrong gradient without any error."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 8), activation(), nn.Linear(8, 7), activation(), nn.Linear(7, 2)
    ).double()
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    mlp = Mlp(*sequential_layers(net))
    np.testing.assert_allclose(mlp.forward(x.numpy()), net(x).detach().numpy(), rtol=1e-12)
    (net(x) * weight).sum().backward()
    mlp.backward(weight.numpy())
    np.testing.assert_allclose(
        mlp.grad, flat(p.grad for p in net.parameters()), rtol=1e-9, atol=1e-12
    )

    direction = np.random.default_rng(0).normal(size=mlp.theta.size)
    tangent, start, h = mlp.jvp(direction), mlp.theta.copy(), 1e-6
    outputs = []
    for sign in (1, -1):
        mlp.theta[:] = start + sign * h * direction
        outputs.append(mlp.forward(x.numpy()))
    np.testing.assert_allclose(tangent, (outputs[0] - outputs[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_networks_are_written_back():
    """What an update learns reaches the torch policy that acts and is saved."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    mlp = Mlp(*sequential_layers(net))
    mlp.theta += 1.0
    mlp.write_back()
    np.testing.assert_array_equal(flat(net.parameters()), mlp.theta)


def test_unsupported_activation_is_refused():
    """A network that the hand-written derivatives do not cover is refused, not approximated."""
    with pytest.raises(ValueError, match=r"activation_fn: expected nn\.Tanh or nn\.ReLU"):
        sequential_layers(nn.Sequential(nn.Linear(2, 2), nn.ELU(), nn.Linear(2, 1)))
    with pytest.raises(ValueError, match=r"activation_fn"):
        sequential_layers(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1), nn.ReLU()))
    with pytest.raises(ValueError, match="activation: expected 'tanh' or 'relu'"):
        Mlp([nn.Linear(2, 2)], "elu")


def test_adam_equals_torch():
    """Ten steps with gradients of changing scale, against torch's Adam, and the norm's bound."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=6)
    reference = nn.Parameter(torch.tensor(theta.copy()))
    torch_adam, adam = torch.optim.Adam([reference], lr=0.03), Adam(6, np.float64)
    for scale in 10.0 ** np.arange(-5, 5):
        gradient = rng.normal(size=6) * scale
        reference.grad = torch.tensor(gradient.copy())
        torch.nn.utils.clip_grad_norm_([reference], 40.0)
        torch_adam.step()
        adam.update(theta, gradient, 0.03, max_grad_norm=40.0)
    np.testing.assert_allclose(theta, reference.detach().numpy(), rtol=1e-5)


def make_policy(action_space):
    torch.manual_seed(1)
    policy = ActorCriticPolicy(OBSERVATIONS, action_space, lambda _: 1e-3, net_arch=[6, 5])
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return policy


@pytest.mark.parametrize("action_space", SPACES)
def test_actor_equals_the_policy_it_copies(action_space):
    """Log-likelihoods, their gradient, entropy and KL against the torch policy."""
    policy = make_policy(action_space)
    actor = actor_of(policy)
    x = torch.randn(7, 3)
    head = actor.head(x.numpy())
    actions = actor.sample(head, np.random.default_rng(0))
    _, log_prob, entropy = policy.evaluate_actions(x, torch.as_tensor(actions))
    np.testing.assert_allclose(actor.log_prob(head, actions), log_prob.detach().numpy(), rtol=1e-4)
    assert actor.entropy(head) == pytest.approx(entropy.mean().item(), rel=1e-4)

    weights = np.linspace(-1, 1, 7, dtype=np.float32)
    (log_prob * torch.tensor(weights)).sum().backward()
    actor.backward(head, actions, weights)
    expected = flat(p.grad for p in actor.mlp.tensors)
    np.testing.assert_allclose(actor.mlp.grad, expected, rtol=1e-4, atol=1e-5)

    old_head, old_extra = head.copy(), actor.dist_extra()
    old = policy.get_distribution(x).distribution
    with torch.no_grad():
        for p in actor.mlp.tensors:
            p.add_(0.1)
    other = actor_of(policy)
    kl = torch.distributions.kl_divergence(old, policy.get_distribution(x).distribution)
    summed = kl.sum(dim=1) if kl.dim() == 2 else kl  # summed over action dimensions, not averaged
    assert other.kl(old_head, old_extra, other.head(x.numpy())) == pytest.approx(
        summed.mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("action_space", SPACES)
def test_fisher_product_is_the_hessian_of_the_kl(action_space):
    """The trust region's metric agrees with second derivatives by autograd.

    A factor dim(A) would change the trust region's size.
    """
    policy = make_policy(action_space)
    actor = actor_of(policy)
    x = torch.randn(6, 3)
    head = actor.head(x.numpy())
    with torch.no_grad():
        old = policy.get_distribution(x).distribution
        old = (
            type(old)(logits=old.logits)
            if hasattr(old, "logits")
            else type(old)(old.loc, old.scale)
        )
    kl = torch.distributions.kl_divergence(old, policy.get_distribution(x).distribution)
    mean_kl = (kl.sum(dim=1) if kl.dim() == 2 else kl).mean()
    gradient = torch.cat(
        [g.ravel() for g in torch.autograd.grad(mean_kl, actor.mlp.tensors, create_graph=True)]
    )
    direction = np.random.default_rng(0).normal(size=actor.mlp.theta.size).astype(np.float32)
    hessian_product = torch.autograd.grad(gradient @ torch.tensor(direction), actor.mlp.tensors)
    np.testing.assert_allclose(
        actor.fisher_product(head, direction), flat(hessian_product), rtol=1e-3, atol=1e-5
    )


def test_samples_have_the_policys_distribution():
    """20000 draws per distribution agree with it within 4 standard errors."""
    actor = actor_of(make_policy(SPACES[1]))
    head = np.repeat(np.log([[0.2, 0.5, 0.3]]), 20_000, axis=0)
    counts = np.bincount(actor.sample(head, np.random.default_rng(0)), minlength=3) / 20_000
    np.testing.assert_allclose(counts, [0.2, 0.5, 0.3], atol=4 * np.sqrt(0.25 / 20_000))
    actor = actor_of(make_policy(SPACES[0]))
    head = np.repeat(np.float32([[3.0, -1.0]]), 20_000, axis=0)
    actions, std = actor.sample(head, np.random.default_rng(0)), np.exp(actor.dist_extra())
    np.testing.assert_allclose(actions.mean(axis=0), [3.0, -1.0], atol=4 * std.max() / 141)
    np.testing.assert_allclose(actions.std(axis=0), std, rtol=4 / 200)


def test_unsupported_policies_are_refused():
    """A policy that the NumPy actor does not cover is refused, not approximated."""
    with pytest.raises(ValueError, match="policy: needs flat Box observations"):
        actor_of(ActorCriticPolicy(spaces.Discrete(3), SPACES[0], lambda _: 1e-3))
    matrix = spaces.Box(-1.0, 1.0, (2, 2), np.float32)
    with pytest.raises(ValueError, match=r"env\.action_space: expected Discrete or a one-dim"):
        actor_of(ActorCriticPolicy(OBSERVATIONS, matrix, lambda _: 1e-3))
    with pytest.raises(ValueError, match=r"env\.action_space"):
        actor_of(ActorCriticPolicy(OBSERVATIONS, SPACES[0], lambda _: 1e-3, use_sde=True))


def test_large_logits_do_not_overflow():
    """The softmax is computed from differences of logits: a trained policy's may be large."""
    actor = actor_of(make_policy(SPACES[1]))
    head, actions = np.float32([[1e4, 0.0, 1e4]]), np.array([0])
    assert actor.log_prob(head, actions) == pytest.approx([-np.log(2.0)])
    assert actor.kl(head, np.zeros(0), head) == 0.0


def test_actor_with_backup_starts_at_it():
    """``start: backup``: the first mean action is the backup's, exactly."""
    backup = AffineBackup([[0.5, -1.0, 0.25], [0.0, 2.0, 1.0]], [0.1, 0.0])
    policy = BackupActorCriticPolicy(OBSERVATIONS, SPACES[0], lambda _: 1e-3, backup=backup)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_array_equal(actor_of(policy).head(x), backup(torch.from_numpy(x)).numpy())


def test_clipped_surrogate_by_hand():
    """Ratio 1.5 at A = 2 and 0.5 at A = -1 are clipped (gradient 0); vice versa they are not.

    Nor is a ratio of 0.9 or 1.1, within the range of 0.2, for either sign of A.
    """
    ratio = np.array([1.5, 0.5, 1.5, 0.5, 0.9, 0.9, 1.1, 1.1])
    advantages = np.array([2.0, -1.0, -1.0, 2.0, 1.0, -1.0, 1.0, -1.0])
    expected = np.array([0.0, 0.0, 1.5, -1.0, -0.9, 0.9, -1.1, 1.1]) / 8
    weights = clipped_surrogate_weights(ratio, advantages, 0.2)
    np.testing.assert_allclose(weights, expected)


def test_critics_equal_the_networks_written_out():
    """Values, slice by slice, and the hand-written gradient agree with autograd."""
    torch.manual_seed(0)
    critics = Critics(4, 3, spaces.Box(np.float32([-1, 0]), np.float32([1, 4])), [9, 8, 7])
    observations, actions, targets = torch.randn(70, 3), torch.rand(70, 16, 2), torch.randn(4, 70)

    def written_out(actions):
        scaled = (actions - torch.tensor([0.0, 2.0])) / torch.tensor([1.0, 2.0])
        values = []
        for n in range(4):
            hidden = (
                observations.unsqueeze(1) @ critics.state_weight[n]
                + scaled @ critics.action_weight[n]
            )
            hidden = (hidden + critics.first_bias[n]).relu()
            for weight, bias in list(zip(critics.weights, critics.biases))[:-1]:
                hidden = (hidden @ weight[n] + bias[n]).relu()
            values.append((hidden @ critics.weights[-1][n] + critics.biases[-1][n]).squeeze(2))
        return torch.stack(values)

    torch.testing.assert_close(
        critics(observations, actions), written_out(actions).detach(), rtol=1e-5, atol=1e-6
    )

    losses = (written_out(actions[:, :1]).squeeze(2) - targets).square().mean(dim=1)
    expected = torch.autograd.grad(losses.sum(), list(critics.parameters()))
    for _ in range(2):  # overwritten, not accumulated
        measured = critics.regression(observations, actions[:, 0], targets)
    torch.testing.assert_close(measured, losses.detach(), rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(critics.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)

    chosen = actions[:, 0].requires_grad_()
    values = written_out(chosen.unsqueeze(1)).squeeze(2)
    measured = critics.of_actions(observations, chosen)
    torch.testing.assert_close(measured, values, rtol=1e-5, atol=1e-6)
    for of_values in (measured, values):
        chosen.grad = None
        before = [p.grad.clone() for p in critics.parameters()]
        (of_values * targets).sum().backward(retain_graph=True)
        if of_values is measured:
            slope = chosen.grad
            for parameter, gradient in zip(critics.parameters(), before):
                assert torch.equal(parameter.grad, gradient)  # the critics are not trained by it
    torch.testing.assert_close(slope, chosen.grad, rtol=1e-4, atol=1e-6)


def test_actor_entropy_is_that_of_torch_in_half_ranges():
    """In environment units the temperature's target would depend on the unit of an action."""
    space = spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))
    actor = GaussianActor(3, space, [8], 0.5, None)
    mean, std = actor(torch.randn(5, 3))
    scaled = torch.distributions.Normal(mean, std / torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(actor.entropy(std), scaled.entropy().sum(dim=1))


# ---- replay ----


def filled_replay(rows, ends=(), terminated=(), capacity=8):
    """Step t of the one environment: observation t, reward 10^t, cost t, next observation t + 1."""
    replay = CostReplay(capacity, OBSERVATIONS, SPACES[0])
    for t in range(rows):
        replay.add(
            observations=np.full((1, 3), t),
            next_observations=np.full((1, 3), t + 1),
            actions=np.zeros((1, 2)),
            rewards=np.array([10.0**t]),
            costs=np.array([float(t)]),
            ends=np.array([t in ends]),
            terminated=np.array([t in terminated]),
        )
    return replay


def by_start(replay, n_step=3, gamma=0.5):
    """start step -> (reward, cost, next observation, discount), every start drawn at least once."""
    batch = replay.sample(400, n_step, gamma, np.random.default_rng(0))
    rows = zip(
        batch.observations[:, 0],
        batch.rewards,
        batch.costs,
        batch.next_observations[:, 0],
        batch.discounts,
    )
    return {
        int(start): (float(r), float(c), int(following), float(d))
        for start, r, c, following, d in rows
    }


def test_n_step_returns_by_hand():
    """n-step returns inside an episode, across its end, and at the newest step.

    A truncation bootstraps at the terminal observation; a termination has discount 0.
    """
    rows = by_start(filled_replay(6, ends={2, 4}, terminated={4}))
    assert rows[0] == (1 + 5 + 25, 0 + 0.5 + 0.5, 3, 0.125)
    assert rows[1] == (10 + 50, 1 + 1, 3, 0.25)  # truncated at 2: two steps, bootstrapped
    assert rows[3] == (1000 + 5000, 3 + 2, 5, 0.0)  # terminated at 4
    assert rows[5] == (1e5, 5, 6, 0.5)  # the newest step: one step only


def test_replay_normalises_single_rewards_and_observations():
    """Statistics are applied when sampling, to single rewards; costs are not normalised."""

    class Normaliser:
        def normalize_reward(self, rewards):
            return np.minimum(rewards, 5.0)  # as VecNormalize clips

        def normalize_obs(self, observations):
            return observations + 100.0

    batch = filled_replay(3).sample(50, 2, 0.5, np.random.default_rng(0), Normaliser())
    at_start = batch.observations[:, 0] == 100.0
    assert set(batch.rewards[at_start]) == {1 + 2.5}  # rewards 1 and 10 at the first two steps
    assert set(batch.costs[at_start]) == {0.5}
    assert set(batch.next_observations[at_start, 0]) == {102.0}


def test_replay_wraps_around():
    """Windows do not run from the newest row into the oldest."""
    rows = by_start(filled_replay(11))
    assert set(rows) == set(range(3, 11))
    assert rows[10] == (1e10, 10, 11, 0.5)
    assert rows[8][2] == 11


def test_replay_state_round_trip():
    """A resumed run samples what the original run would have sampled."""
    first, second = filled_replay(5), CostReplay(8, OBSERVATIONS, SPACES[0])
    second.load_state_dict(first.state_dict())
    draws = [r.sample(50, 2, 0.9, np.random.default_rng(3)) for r in (first, second)]
    for name in ("observations", "rewards", "costs", "next_observations", "discounts"):
        np.testing.assert_array_equal(getattr(draws[0], name), getattr(draws[1], name))
    # Pickled, only the stored rows travel, and the copy is a full-sized buffer again.
    copied = pickle.loads(pickle.dumps(first))
    assert len(pickle.dumps(filled_replay(5, capacity=100_000))) < 10_000
    for replay in (first, copied):
        replay.add(**{name: np.ones_like(getattr(replay, name)[0]) for name in FIELDS})
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(copied, name), getattr(first, name))
    with pytest.raises(ValueError, match="replay: saved"):
        CostReplay(2, OBSERVATIONS, SPACES[0]).load_state_dict(first.state_dict())
