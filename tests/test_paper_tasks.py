"""Version 1 of the tasks, after the paper: labels, held-out inputs, demonstrators, the target."""

from __future__ import annotations

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.baselines.actors import actor_of
from scpo_bench.envs import double_integrator_control as control
from scpo_bench.envs.double_integrator_v1 import TARGET_SHARE, ImitationV1Task
from scpo_bench.envs.harmful_regression import PaperRegressionTask
from scpo_bench.policies import AffineBackup, BackupActorCriticPolicy, TargetBackup, backup_of
from scpo_bench.records.schema import Cell
from scpo_bench.runs.agents import make_agent
from scpo_bench.runs.environments import make_training_env
from scpo_bench.runs.evaluation import Evaluator
from scpo_bench.scpo.spaces import make_space
from scpo_bench.suites.registry import load_agent

REGRESSION = "scpo_bench/HarmfulRegression-v1"
IMITATION = "scpo_bench/DoubleIntegratorImitation-v1"
DIVERGING = "scpo_bench/DoubleIntegratorDiverging-v1"

# ---- regression


def test_paper_regression_by_hand():
    """f(pi/2) = 1 - 1 - 1 and f(pi/6) = 1/2 + 1 - 1/2; the bounds are +-1.4; every input counts."""
    task = PaperRegressionTask()
    x = (np.array([np.pi / 2, np.pi / 6, 0.0]),)
    assert task.label(x)[0] == pytest.approx([-1.0, 1.0, 0.0])
    y = (np.array([2.1, -1.4, 9.0]),)
    values = np.stack(task.constraint_values(x, y, x, True))
    assert values == pytest.approx(np.array([[0.5, -2.0, 3 / 1.4 - 1], [-2.5, 0.0, -3 / 1.4 - 1]]))
    loss, counts = task.objective_loss(x, y, 0)
    assert counts.all()
    assert loss == pytest.approx([3.1**2, 2.4**2, 9.0])  # predictions are cut at 3


def test_labels_leave_the_bounds_and_can_be_predicted():
    """The task is the paper's only if f leaves +-1.4; the action space has to have room for f."""
    task = gym.make(REGRESSION).unwrapped.task
    (labels,) = task.label(task.design_starts(10_001))
    assert 1.9 < np.abs(labels).max() < task.action_space.high[0]
    assert 0.1 < np.mean(np.abs(labels) > 1.4) < 0.5


def test_design_and_held_out_inputs_are_grids():
    """64 points from -3 to 3 as in the paper; 10 001 in evaluation, the same at every call."""
    task = PaperRegressionTask()
    for starts in (task.design_starts, task.held_out_starts):
        (x,) = starts(64)
        assert (x[0], x[-1], len(x)) == (-3.0, 3.0, 64)
        assert np.diff(x) == pytest.approx(np.full(63, 6 / 63))


def test_evaluation_shows_violations_between_the_design_points():
    """A policy that is safe on all 64 points, but not between them, is seen to violate."""
    (design,) = PaperRegressionTask().design_starts(64)
    seen = []

    def between(observations):
        seen.append(observations[:, 0].copy())
        distance = np.abs(observations - design.astype(np.float32)).min(axis=1, keepdims=True)
        return np.where(distance > 0.04, 2.0, 0.0).astype(np.float32)

    assert Evaluator(REGRESSION, {}, 64, native=True)(between).worst == -1.0
    evaluator = Evaluator(REGRESSION, {}, 10_001, native=True)
    found = evaluator(between)
    assert found.worst == pytest.approx(2.0 / 1.4 - 1)
    assert evaluator(between) == found
    np.testing.assert_array_equal(seen[1], np.linspace(-3, 3, 10_001).astype(np.float32))


@pytest.mark.parametrize("name", ["DoubleIntegratorImitation", "HarmfulRegression"])
def test_version_0_is_evaluated_on_drawn_starts(name):
    """Committed records stay reproducible: nothing of version 1 reaches the tasks of version 0."""
    task = gym.make(f"scpo_bench/{name}-v0").unwrapped.task
    assert task.held_out_starts(5) is None
    assert task.backup_target() is None
    assert type(backup_of(task)) is AffineBackup


def test_version_0_is_used_without_a_warning():
    """Gymnasium calls every version but the highest out of date; here they are different tasks."""
    program = "import gymnasium as gym; gym.make('scpo_bench:scpo_bench/HarmfulRegression-v0')"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "out of date" not in result.stderr


# ---- imitation


def share_violating(task):
    """Of 1000 start states, from which following the expert violates a constraint."""
    state = task.sample_starts(1000, np.random.default_rng(0))
    violates = np.zeros(1000, dtype=bool)
    for step in range(task.horizon):
        action = task.label(state)
        following = task.next_state(state, action)
        values = task.constraint_values(state, action, following, step + 1 == task.horizon)
        violates |= np.max(values, axis=0) > 0
        state = following
    return violates.mean()


def test_diverging_expert_is_unsafe_and_lqr_is_safe():
    """Following the one leaves the bounds from most starts, following the other from none."""
    assert share_violating(gym.make(DIVERGING).unwrapped.task) > 0.9
    assert share_violating(ImitationV1Task(expert="lqr")) == 0.0


def test_experts_by_hand():
    """u = 2 p, saturated at 1; the LQR is the regulation task's own, which pulls to the origin."""
    state = (np.array([0.2, 0.8, -0.8]), np.array([0.5, 0.0, 0.0]))
    assert ImitationV1Task(expert="diverging").label(state)[0] == pytest.approx([0.4, 1.0, -1.0])
    gain = control.sensible_gain()[0]
    expected = np.clip([0.2 * gain[0] + 0.5 * gain[1], 0.8 * gain[0], -0.8 * gain[0]], -1, 1)
    assert ImitationV1Task(expert="lqr").label(state)[0] == pytest.approx(expected)
    assert gym.make(IMITATION).unwrapped.task.expert == "malicious"


def test_fixed_initial_states():
    """``starts=3``: episodes, constraint evaluation and held-out evaluation use the same three."""
    vector = gym.make_vec(
        IMITATION, num_envs=60, vectorization_mode="vector_entry_point", starts=3
    ).unwrapped
    task = vector.task
    fixed = np.stack(task.design_starts(512), axis=-1)
    assert fixed.shape == (3, 2)
    value = task.lyapunov(tuple(fixed.T)) / control.backup().level
    assert value == pytest.approx(np.full(3, 0.8))
    drawn = vector.reset(seed=0)[0]
    assert {tuple(row) for row in drawn} == {tuple(row) for row in fixed.astype(np.float32)}
    held_out = np.stack(task.held_out_starts(7), axis=-1)
    np.testing.assert_array_equal(held_out, fixed[[0, 1, 2, 0, 1, 2, 0]])
    everywhere = ImitationV1Task()
    assert everywhere.held_out_starts(7) is None
    assert len(everywhere.design_starts(512)[0]) == 512


def test_fixed_initial_states_do_not_limit_the_policy():
    """Features are compared over the whole start set: three states would leave three directions."""
    cell = Cell(
        agent="sgd",
        task=IMITATION,
        seed=0,
        steps=120,
        num_envs=4,
        start="backup",
        cost_limit=0.0,
        env={"starts": 3},
        config={"features": 16},
    )
    model = make_agent(cell, make_training_env(cell))
    model.learn(120)
    assert model.space.dimension > 10


# ---- the backup alone near the target


def ring(share, n=40):
    """[n, 2] float32: states with V = share * the target's level."""
    lqr = control.backup()
    angle = np.linspace(0, 2 * np.pi, n)
    radius = np.linalg.cholesky(np.linalg.inv(lqr.P) * lqr.level * TARGET_SHARE * share)
    return (radius @ np.stack([np.cos(angle), np.sin(angle)])).T.astype(np.float32)


def test_residual_scale_by_hand():
    """0 up to the target's level, 1/2 half way, 1 from twice the level; slopes vanish at both."""
    backup = backup_of(ImitationV1Task())

    def scale(share):
        return backup.residual_scale(torch.from_numpy(ring(share))).detach().numpy()

    for share, expected in ((0.5, 0.0), (0.99, 0.0), (1.5, 0.5), (2.01, 1.0), (30.0, 1.0)):
        assert scale(share) == pytest.approx(np.full((40, 1), expected), abs=1e-5)
    for share in (1.001, 1.999):  # a kink would change it by 1e-3
        assert scale(share) == pytest.approx(np.full((40, 1), round(share - 1)), abs=1e-5)


SMALL = {
    "sgd": {"features": 16},
    "scpo": {"features": 16, "evaluation_starts": 32},
    "penalty": {"features": 16},
    "scpo-ppo": {"n_steps": 30, "batch_size": 60},
    "ppo": {"n_steps": 30, "batch_size": 60, "learning_rate": 0.01},
    "ppo-lagrangian": {"steps_per_update": 120, "critic_passes": 1, "actor_lr": 0.01},
    "ppo-pid": {"steps_per_update": 120, "critic_passes": 1, "actor_lr": 0.01},
    "focops": {"steps_per_update": 120, "critic_passes": 1, "actor_lr": 0.01},
    "p3o": {"steps_per_update": 120, "critic_passes": 1, "actor_lr": 0.01},
    "cpo": {"steps_per_update": 120, "critic_passes": 1, "target_kl": 0.1},
    "trpo-lagrangian": {"steps_per_update": 120, "critic_passes": 1, "target_kl": 0.1},
    "crpo": {"steps_per_update": 120, "critic_passes": 1, "target_kl": 0.1},
    "cvpo": {"steps_per_update": 120, "learning_starts": 0, "updates_per_step": 0.2},
    "sac-lagrangian": {"steps_per_update": 120, "learning_starts": 0, "updates_per_step": 0.2},
}


@pytest.mark.parametrize("agent", SMALL)
def test_every_agent_leaves_the_target_to_the_backup(agent, tmp_path):
    """After training, the action near the target is the backup's; elsewhere it is not."""
    cell = Cell(
        agent=agent,
        task=IMITATION,
        seed=0,
        steps=480,
        num_envs=4,
        start="backup",
        cost_limit=0.0,
        config=SMALL[agent],
    )
    model = make_agent(cell, make_training_env(cell))
    model.learn(480)
    model.save(tmp_path / "agent")
    gain = control.backup().gain.astype(np.float32)
    for acting in (model, load_agent(agent).load(tmp_path / "agent")):
        for share, same in ((0.5, True), (0.99, True), (10.0, False)):
            states = ring(share)
            actions = acting.predict(states, deterministic=True)[0]
            difference = np.abs(actions - (states @ gain.T).clip(-1, 1)).max()
            assert (difference < 1e-6) == same, (share, difference)


def policy_at(backup, log_std=-1.0):
    torch.manual_seed(0)
    task = ImitationV1Task()
    policy = BackupActorCriticPolicy(
        task.observation_space,
        task.action_space,
        lambda _: 0.0,
        backup=backup,
        net_arch={"pi": [16], "vf": []},
        log_std_init=log_std,
    )
    torch.nn.init.normal_(policy.action_net.linear.weight, 0.0, 0.1)
    return policy


@pytest.mark.parametrize("name", ["last_layer", "low_rank", "all"])
def test_evaluated_actions_are_the_deployed_ones(name):
    """SCPO's float64 policies have the same scale: else it would certify what never acts."""
    task = ImitationV1Task()
    policy = policy_at(backup_of(task))
    reference = torch.as_tensor(np.stack(task.reference_states(256), axis=-1))
    space = make_space(name, policy, reference, rank=2)
    w = 0.1 * np.random.default_rng(0).normal(size=(1, space.dimension))
    states = np.concatenate([ring(share) for share in (0.5, 1.3, 1.7, 5.0)])
    with torch.no_grad():
        evaluated = space.policies(torch.as_tensor(w))(torch.as_tensor(states).double()[None])[0]
    space.write(w[0])
    deployed = policy.predict(states, deterministic=True)[0]
    assert deployed == pytest.approx(evaluated.numpy().clip(-1, 1), abs=1e-5)
    gain = control.backup().gain
    assert np.abs(deployed[:40] - states[:40] @ gain.T).max() < 1e-6
    assert np.abs(deployed[120:] - (states[120:] @ gain.T).clip(-1, 1)).max() > 1e-2


def test_a_whitened_step_is_measured_where_it_acts():
    """|w| is the root mean square change of the action, with the scale in it."""
    task = ImitationV1Task()
    reference = torch.as_tensor(np.stack(task.reference_states(256), axis=-1))
    space = make_space("last_layer", policy_at(backup_of(task)), reference, rank=2)
    w = torch.randn(2, space.dimension, dtype=torch.float64)
    actions = space.policies(w)(reference.expand(2, -1, -1))
    change = (actions[1] - actions[0]).square().mean().sqrt()
    assert float(change) == pytest.approx(float((w[1] - w[0]).norm()), rel=1e-9)


def test_gradients_of_the_numpy_actor_carry_the_scale():
    """PPO-Lagrangian's and CPO's gradient and Fisher product agree with autograd."""
    policy = policy_at(backup_of(ImitationV1Task()))
    actor = actor_of(policy)
    states = np.concatenate([ring(share, 5) for share in (0.5, 1.3, 1.7, 5.0)])
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(20, 1)).astype(np.float32)
    weights = rng.normal(size=20).astype(np.float32)
    head = actor.head(states)
    x = torch.from_numpy(states)
    with torch.no_grad():
        assert head == pytest.approx(policy.get_distribution(x).distribution.mean.numpy(), abs=1e-6)
    parameters = [
        *policy.mlp_extractor.extractor.policy_net.parameters(),
        *policy.action_net.parameters(),
        policy.log_std,
    ]

    def flat_gradient(value, **options):
        parts = torch.autograd.grad(value, parameters, **options)
        return torch.cat([part.reshape(-1) for part in parts])

    _, log_prob, _ = policy.evaluate_actions(x, torch.from_numpy(actions))
    expected = flat_gradient((torch.from_numpy(weights) * log_prob).sum())
    assert actor.gradient(head, actions, weights) == pytest.approx(expected.numpy(), abs=1e-4)

    direction = rng.normal(size=actor.mlp.theta.size).astype(np.float32)
    now = policy.get_distribution(x).distribution
    old = torch.distributions.Normal(now.mean.detach(), now.stddev.detach())
    kl = torch.distributions.kl_divergence(old, now).sum(dim=-1).mean()
    slope = flat_gradient(kl, create_graph=True)
    product = flat_gradient((slope * torch.from_numpy(direction)).sum())
    head = actor.head(states)
    found = actor.fisher_product(head, direction)
    assert found == pytest.approx(product.numpy(), rel=1e-3, abs=1e-4)


def test_target_backup_is_a_backup_that_moves_nothing_else():
    """Its own action is that of the affine controller, and nothing of it is trained."""
    task = ImitationV1Task()
    ours, plain = backup_of(task), AffineBackup(*task.backup_gain())
    assert isinstance(ours, TargetBackup)
    states = torch.from_numpy(ring(3.0))
    torch.testing.assert_close(ours(states), plain(states), rtol=0, atol=0)
    assert list(ours.parameters()) == []
