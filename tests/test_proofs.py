"""Proofs: enclosures that enclose, verdicts that hold, and mode `proven` that deploys no other."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from adversary import action, attack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scpo_bench.envs.double_integrator import ImitationTask
from scpo_bench.envs.double_integrator_v1 import ImitationV1Task
from scpo_bench.envs.harmful_regression import HarmfulRegressionTask, PaperRegressionTask
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup, backup_of
from scpo_bench.proofs.cells import cover, split
from scpo_bench.proofs.enclosures import _tanh_derivatives, enclose
from scpo_bench.proofs.invariance import check, margins
from scpo_bench.proofs.plants import plant_of, problem
from scpo_bench.proofs.policy import EPS32, Policy, from_modules, rounding_error
from scpo_bench.proofs.prove import prove
from scpo_bench.proofs.trajectories import cells_safe, clip_enclosure, worst_values
from scpo_bench.records.schema import Cell
from scpo_bench.runs.agents import make_agent
from scpo_bench.runs.environments import make_training_env
from scpo_bench.runs.prove import describe
from scpo_bench.scpo.closed_form import nearest

IMITATION = "scpo_bench/DoubleIntegratorImitation-v0"
REGRESSION = "scpo_bench/HarmfulRegression-v0"


def network(kind, inputs=2, scale=2.0, gate=None, seed=0):
    """A random policy: one or two tanh layers, or two ReLU layers."""
    rng = np.random.default_rng(seed)
    widths = {"tanh": [12], "deep": [10, 8], "relu": [10, 8]}[kind]
    layers, n = [], inputs
    for h in widths:
        layers.append((scale * rng.normal(size=(h, n)) / np.sqrt(n), rng.normal(size=h)))
        n = h
    head = rng.normal(size=n)
    activation = "relu" if kind == "relu" else "tanh"
    return Policy(
        rng.normal(size=inputs), 0.1, tuple(layers), head, 0.2, activation=activation, gate=gate
    )


def acting(policy):
    """The policy's network in float32, as it would be deployed."""

    def predict(x):
        h = torch.as_tensor(np.asarray(x), dtype=torch.float32)
        small = {name: np.float32(value) for name, value in vars(policy).items() if name in "gain"}
        backup = h @ torch.as_tensor(small["gain"]) + np.float32(policy.offset)
        for W, b in policy.hidden:
            z = h @ torch.as_tensor(np.float32(W)).T + torch.as_tensor(np.float32(b))
            h = torch.tanh(z) if policy.activation == "tanh" else torch.relu(z)
        residual = h @ torch.as_tensor(np.float32(policy.head)) + np.float32(policy.head_bias)
        if policy.gate is not None:
            P = torch.as_tensor(np.float32(policy.gate[0]))
            x32 = torch.as_tensor(np.asarray(x), dtype=torch.float32)
            t = (((x32 @ P) * x32).sum(dim=1) / np.float32(policy.gate[1]) - 1).clamp(0, 1)
            residual = t * t * (3 - 2 * t) * residual
        return (backup + residual)[:, None].numpy()

    return predict


def rounded(policy):
    """The policy with weights that float32 holds exactly, as those of every deployed network."""

    def r(value):
        return np.float32(value).astype(np.float64)

    gate = None if policy.gate is None else (r(policy.gate[0]), float(np.float32(policy.gate[1])))
    return replace(
        policy,
        gain=r(policy.gain),
        offset=float(np.float32(policy.offset)),
        hidden=tuple((r(W), r(b)) for W, b in policy.hidden),
        head=r(policy.head),
        head_bias=float(np.float32(policy.head_bias)),
        gate=gate,
    )


def backup_policy(task, head_scale=0.0, seed=0):
    """The task's backup plus ``head_scale`` times a random network of 16 tanh units."""
    backup = backup_of(task)
    torch.manual_seed(seed)
    n = task.observation_space.shape[0]
    hidden, head = nn.Linear(n, 16), nn.Linear(16, 1)
    nn.init.normal_(hidden.weight, 0.0, 2.0)
    policy = from_modules(nn.Sequential(hidden, nn.Tanh()), head, backup)
    weights = np.float32(head_scale * np.append(policy.head, policy.head_bias))
    return replace(policy, head=weights[:-1].astype(np.float64), head_bias=float(weights[-1]))


def scaled(policy, factor):
    """The residual times ``factor``, with float32 weights."""
    return rounded(replace(policy, head=factor * policy.head, head_bias=factor * policy.head_bias))


@pytest.fixture(scope="module")
def trained():
    """A policy of mode `proven` after 12 updates: it acts at its bounds."""
    return describe(learned("proven", IMITATION, 12))


@pytest.fixture(scope="module")
def roaming():
    """A safe policy that does not keep the level set in every step: only trajectories prove it."""
    task = ImitationTask()
    policy = rounded(replace(backup_policy(task, 0.2), gain=np.array([-0.7, -0.4])))
    assert not check(problem(plant_of(task), policy)).proved
    return policy


def learned(mode, task, updates, **config):
    """An SCPO agent after that many updates on a small vector environment."""
    env_steps = 30 if "Integrator" in task else 10
    cell = Cell(
        agent="scpo",
        task=task,
        seed=0,
        steps=updates * 16 * env_steps,
        start="backup",
        num_envs=16,
        cost_limit=0.0,
        config={"mode": mode, "learning_rate": 0.3, **config},
    )
    env = make_training_env(cell)
    agent = make_agent(cell, env)
    agent.learn(cell.steps)
    env.close()
    return agent


# ---- enclosures


@pytest.mark.parametrize("gate", [None, (np.array([[2.0, 0.3], [0.3, 1.0]]), 0.3)])
@pytest.mark.parametrize("kind", ["tanh", "deep", "relu"])
@settings(max_examples=25, deadline=None)
@given(
    centre=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    size=st.tuples(st.floats(1e-6, 0.5), st.floats(1e-6, 0.5)),
    seed=st.integers(0, 5),
)
def test_enclosures_hold_at_every_sampled_point(kind, gate, centre, size, seed):
    """A proof is worth what its enclosures are worth: no point of a box may lie outside."""
    policy = network(kind, gate=gate, seed=seed)
    c, r = np.array([centre]), np.array([size])
    found = enclose(policy, c, r)
    ticks = np.linspace(-1, 1, 21)
    d = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2) * r
    error = policy(c + d) - found.value - d @ found.gradient[0]
    assert np.abs(error).max() <= found.slack[0]


@pytest.mark.parametrize("kind", ["tanh", "deep"])
def test_enclosures_tighten_with_the_square_of_the_box(kind):
    """What makes a proof end: a box half as wide has to be enclosed four times as tightly."""
    policy, c = network(kind), np.array([[0.2, -0.4]])
    wide, narrow = (enclose(policy, c, np.full((1, 2), h)).slack[0] for h in (1e-2, 5e-3))
    assert wide / narrow == pytest.approx(4, rel=0.2)


def test_prover_and_deployed_network_compute_the_same_action():
    """A proof about another function than the agent's would prove nothing."""
    for task in (ImitationTask(), ImitationV1Task(), HarmfulRegressionTask()):
        policy = backup_policy(task, 0.5)
        states = np.stack(task.sample_starts(500, np.random.default_rng(0)), axis=-1)
        assert policy(states) == pytest.approx(action(policy, torch.as_tensor(states)).numpy())
        # In the prover's own coordinates too.
        plant = plant_of(task)
        inside = problem(plant, policy).policy(states @ np.linalg.inv(plant.M).T)
        assert inside == pytest.approx(policy(states), abs=1e-9)


@pytest.mark.parametrize("kind", ["tanh", "deep", "relu"])
@pytest.mark.parametrize("gate", [None, (np.array([[2.0, 0.3], [0.3, 1.0]]), 0.3)])
def test_rounding_error_bounds_the_float32_network(kind, gate):
    """What is deployed computes in float32; its distance from the proved function is bounded."""
    policy = rounded(network(kind, scale=3.0, gate=gate))
    x = np.random.default_rng(1).uniform(-1, 1, size=(200_000, 2))
    off = np.abs(acting(policy)(np.float32(x))[:, 0].astype(np.float64) - policy(x))
    error, ramp = rounding_error(policy, np.ones(2))
    assert 1e-8 < off.max() <= error + ramp
    assert error + ramp < 1e-2
    if gate is not None:
        value = np.einsum("ni,ij,nj->n", x, policy.gate[0], x)
        assert off[value > 2.01 * policy.gate[1]].max() <= error


def test_rounding_error_is_no_smaller_than_a_sum_may_be_off():
    """The textbook bound of a dot product of h terms, in whatever order they are added."""
    h = 100
    hidden = ((np.full((h, 2), 1e-3), np.zeros(h)),)
    policy = replace(network("tanh"), hidden=hidden, head=np.linspace(-1, 1, h))
    assert rounding_error(policy, np.ones(2))[0] >= h * EPS32 * np.abs(policy.head).sum()


def test_rounding_on_the_ramp_counts_on_the_ramp_only():
    """Near the target a rounded V(x) moves the residual's share; beyond it the share is exactly 1.

    A box that touches the ramp anywhere counts as on it.
    """
    subject = problem(plant_of(ImitationV1Task()), backup_policy(ImitationV1Task(), 0.5))
    ends = np.sqrt(2 * 0.02)  # |y| where the ramp ends
    y = np.array([[0.9 * ends, 0.0], [1.1 * ends, 0.0], [1.1 * ends, 0.0]])
    errors = subject.errors(y, np.array([[0, 0], [0, 0], [0.15 * ends, 0]]))
    whole = subject.error + subject.ramp_error
    assert errors.tolist() == [whole, subject.error, whole]
    assert subject.ramp_error > subject.error


@settings(max_examples=200, deadline=None)
@given(st.floats(-4, 4), st.floats(1e-3, 3))
def test_derivatives_of_tanh_over_an_interval(z, d):
    """The ranges of tanh' and tanh'', which have their extremes inside of intervals, are exact."""
    first, second = _tanh_derivatives(np.array([z]), np.array([d]))
    t = np.tanh(np.linspace(z - d, z + d, 20_001))
    for (middle, radius), values in ((first, 1 - t * t), (second, 2 * t * (t * t - 1))):
        assert middle[0] - radius[0] == pytest.approx(values.min(), abs=1e-6)
        assert middle[0] + radius[0] == pytest.approx(values.max(), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.floats(0, 4))
def test_clip_enclosure(low, width):
    """Every clipped action lies within the line that stands for the clip."""
    slope, offset, radius = clip_enclosure(np.array([low]), np.array([low + width]), 1.0)
    u = np.linspace(low, low + width, 101)
    assert np.abs(np.clip(u, -1, 1) - slope * u - offset).max() <= radius[0] + 1e-12


def test_cells_cover_the_ball_and_their_halves_cover_them():
    """A start state that no cell holds would be proved by nobody."""
    y = np.random.default_rng(0).normal(size=(5000, 2))
    y *= 0.9 / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 0.9)
    for cells in (cover(2, 0.9, 7), split(cover(2, 0.9, 7), 0.9)):
        distance = np.abs(y[:, None] - cells.centre).max(axis=2) - cells.half
        assert distance.min(axis=1).max() <= 1e-12


# ---- one step


def test_safe_actions_are_those_that_stay_in_the_set():
    """The closed form: lo and hi are where |A y + B u| = 1."""
    plant = plant_of(ImitationTask())
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 2))
    y /= np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1)
    low, high = plant.safe_actions(y)
    for u in (low, high):
        assert np.linalg.norm(y @ plant.A.T + u[:, None] * plant.B, axis=1) == pytest.approx(1)
    middle = y @ plant.A.T + ((low + high) / 2)[:, None] * plant.B
    assert (np.linalg.norm(middle, axis=1) < 1).all()


def test_margins_of_cells_hold_at_every_point(trained):
    """A cell that is called proved keeps every one of its states in the set, clip included."""
    subject = problem(plant_of(ImitationTask()), trained)
    plant, rng = subject.plant, np.random.default_rng(0)
    cells = cover(2, 1.0, 40)
    value = margins(subject, cells)
    assert (value >= 0).any()
    proved = cells[value >= 0]
    for _ in range(50):
        y = proved.centre + rng.uniform(-1, 1, proved.centre.shape) * proved.half[:, None]
        y = y[np.linalg.norm(y, axis=1) <= 1]
        u = np.clip(subject.policy(y), -1, 1)
        assert np.linalg.norm(y @ plant.A.T + u[:, None] * plant.B, axis=1).max() <= 1


def test_invariance_of_the_backup_and_of_a_bad_policy():
    """The backup's level set is invariant by construction; full acceleration leaves it."""
    plant = plant_of(ImitationTask())
    assert check(problem(plant, backup_policy(ImitationTask()))).proved
    away = replace(backup_policy(ImitationTask()), head_bias=1.5)
    found = check(problem(plant, away))
    assert not found.proved
    assert found.cells < 2000  # it ends at the first state that shows it
    assert found.deficit.max() > 0


# ---- verdicts


def largest_safe_factor(plant, policy):
    """(a factor of the residual that the adversary does not break, one that it does)."""
    safe, unsafe = 1.0, 1.0
    while attack(plant, scaled(policy, unsafe), 2000, steps=10) <= 0:
        unsafe *= 1.5
    while unsafe - safe > 1e-3:
        middle = (safe + unsafe) / 2
        if attack(plant, scaled(policy, middle), 2000, steps=10) > 0:
            unsafe = middle
        else:
            safe = middle
    return safe, unsafe


def test_proved_policies_withstand_an_adversary(trained, roaming):
    """Many starts and gradient ascent through the dynamics find nothing where all is proved.

    The policies are proved in the two ways that there are.
    """
    plant = plant_of(ImitationTask())
    for policy in (trained, roaming):
        verdict = prove(problem(plant, policy), acting(policy))
        assert verdict.status == "proved"
        assert attack(plant, policy, 10_000) <= 0


def test_barely_unsafe_policy_gets_a_counterexample(trained):
    """Scaled until it violates by a little, a policy must not be proved: its start is found."""
    task = ImitationTask()
    plant = plant_of(task)
    unsafe = scaled(trained, largest_safe_factor(plant, trained)[1] + 2e-3)
    assert 0 < attack(plant, unsafe, 5000) < 0.1
    verdict = prove(problem(plant, unsafe), acting(unsafe))
    assert verdict.status == "violating"
    found = verdict.counterexample
    # The state is a start state, and it violates in another simulation as well.
    assert task.lyapunov(found.state) <= 0.8 * task.lyapunov(plant.M[:, 0]) * (1 + 1e-9)
    y = np.linalg.solve(plant.M, found.state)[None]
    assert worst_values(problem(plant, unsafe), y)[0] == pytest.approx(found.value, abs=1e-3)
    assert found.constraint in task.constraint_names


def test_unsafe_policy_is_found_out_at_once():
    """An untrained network of large weights needs no branch and bound."""
    policy = backup_policy(ImitationTask(), 8.0)
    verdict = prove(problem(plant_of(ImitationTask()), policy), acting(policy))
    assert verdict.status == "violating"
    assert verdict.cells == 0
    assert verdict.counterexample.value > 0


def test_a_budget_too_small_decides_nothing(roaming):
    """Undecided is not proved."""
    plant = plant_of(ImitationTask())
    assert prove(problem(plant, roaming), acting(roaming), budget=10).status == "undecided"


def test_trajectory_cells_hold_at_every_start():
    """Every start of a cell that is called safe keeps the constraints, also near those that do not.

    The policies are wild, and the cells as large as can be proved: what is missed by linear
    enclosures decides.
    """
    plant, rng = plant_of(ImitationTask()), np.random.default_rng(0)
    proved = 0
    for seed in range(6):
        subject = problem(plant, backup_policy(ImitationTask(), 2.0, seed))
        for per_side in (40, 80):
            cells = cover(2, plant.start, per_side)
            cells = cells[cells_safe(subject, cells)]
            proved += len(cells)
            for _ in range(12):
                d = rng.uniform(-1, 1, cells.centre.shape)
                d = np.where(rng.uniform(size=d.shape) < 0.5, np.sign(d), d)
                y = cells.centre + d * cells.half[:, None]
                assert worst_values(subject, y).max(initial=-1) <= 0
    assert proved > 3000


@pytest.mark.parametrize("task", [HarmfulRegressionTask(), PaperRegressionTask()])
def test_regression_verdicts(task):
    """On an interval the bound is met or a start shows that it is not, also where it is close."""
    plant = plant_of(task)
    policy = backup_policy(task, 1.0)
    x = np.linspace(-task.input_max, task.input_max, 200_001)[:, None]
    largest = np.abs(policy(x)).max()
    for share, status in ((0.999, "proved"), (1.001, "violating")):
        own = scaled(policy, share * task.bound / largest)
        verdict = prove(problem(plant, own), acting(own))
        assert verdict.status == status
        assert (attack(plant, own, 2000) > 0) == (status == "violating")


# ---- what is not covered


def test_what_is_not_covered_is_named():
    """A proof that silently left something out would be wrong."""
    with pytest.raises(UserError, match=r"noise_std: expected 0, got 0\.1"):
        plant_of(ImitationTask(noise_std=0.1))
    with pytest.raises(UserError, match="can be proved, got a task without"):
        plant_of(None)
    linear = nn.Linear(2, 4)
    with pytest.raises(UserError, match="all tanh or all ReLU"):
        from_modules(nn.Sequential(linear, nn.ELU()), nn.Linear(4, 1), None)
    with pytest.raises(UserError, match="of one action"):
        from_modules(nn.Sequential(linear, nn.Tanh()), nn.Linear(4, 2), None)
    with pytest.raises(UserError, match="affine backups are covered, got ReLU"):
        from_modules(nn.Sequential(linear, nn.Tanh()), nn.Linear(4, 1), nn.ReLU())


@pytest.mark.parametrize(
    "agent", ["sgd", "ppo", "ppo-lagrangian", "focops", "cpo", "crpo", "cvpo", "sac-lagrangian"]
)
def test_every_agent_that_starts_at_a_backup_is_described(agent):
    """The prover's function is the deployed policy's own, for all agents of the suites."""
    cell = Cell(agent=agent, task=IMITATION, seed=0, steps=100, start="backup", cost_limit=0.0)
    env = make_training_env(cell)
    found = make_agent(cell, env)
    with torch.no_grad():  # the networks start at zero
        for p in found.policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = np.stack(ImitationTask().design_starts(200), axis=-1)
    own = np.clip(describe(found)(x), -1, 1)
    deployed = found.predict(np.float32(x), deterministic=True)[0][:, 0]
    assert np.clip(deployed, -1, 1) == pytest.approx(own, abs=1e-5)
    assert own.std() > 0.1


# ---- mode proven


def test_projection_agrees_with_cvxpy():
    """The QP is the closest point of the polyhedron, by another solver."""
    cp = pytest.importorskip("cvxpy")
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows, target = rng.normal(size=(40, 12)), 3 * rng.normal(size=12)
        low, high = -rng.uniform(0.1, 1, 40), rng.uniform(0.1, 1, 40)
        low[:5], high[5:10] = -np.inf, np.inf
        point = cp.Variable(12)
        bounds = [rows[5:] @ point >= low[5:]]
        bounds += [rows[[*range(5), *range(10, 40)]] @ point <= high[[*range(5), *range(10, 40)]]]
        cp.Problem(cp.Minimize(cp.sum_squares(point - target)), bounds).solve(solver=cp.CLARABEL)
        assert nearest(target, rows, low, high) == pytest.approx(point.value, abs=1e-4)


@pytest.mark.parametrize(
    ("task", "config"),
    [
        (IMITATION, {}),
        ("scpo_bench/DoubleIntegratorImitation-v1", {}),
        (REGRESSION, {}),
        (
            "scpo_bench/HarmfulRegression-v1",
            {"n_steps": 1, "labels": "visited", "feature_scale": 4.0, "feature_bias": 8.0},
        ),
    ],
)
def test_proven_mode_learns_and_every_step_is_proved(task, config):
    """No rollouts, and yet no policy from which an adversary finds a violation."""
    agent = learned("proven", task, 15, **config)
    plant = plant_of(agent.env.task)
    assert check(problem(plant, describe(agent))).proved
    assert attack(plant, describe(agent), 5000) <= 0
    assert sum(agent.guard.held.values()) == 0
    assert agent.diagnostics["loss"] < 0.6 * float(np.mean(agent._data[1] ** 2))
    assert {"proposal_norm", "step_norm", "held", "cells", "cuts"} <= set(agent.diagnostics)


def test_proven_mode_meets_its_bounds(trained):
    """A guard that only ever makes small steps would be safe too: this one uses the room."""
    plant = plant_of(ImitationTask())
    assert attack(plant, trained, 5000) > -0.05


def test_a_step_without_proof_is_held(monkeypatch):
    """Whatever the solver returns, what is not proved is not deployed."""
    agent = learned("proven", IMITATION, 3)
    before, closed_form = agent.w, agent.constraints
    missing = check(problem(closed_form.plant, replace(describe(agent), head_bias=3.0)))
    assert not missing.proved
    monkeypatch.setattr(closed_form, "prove", lambda w: missing)
    agent.train()
    assert (agent.w == before).all()
    assert agent.guard.held["recheck"] == agent.diagnostics["held"] == 1


def test_proven_mode_is_deterministic_and_survives_saving(tmp_path):
    """Two runs agree to the bit; a loaded agent acts as the saved one did."""
    a, b = learned("proven", IMITATION, 5), learned("proven", IMITATION, 5)
    assert (a.w == b.w).all()
    a.save(tmp_path / "agent")
    x = np.zeros((1, 2), np.float32) + 0.3
    loaded = type(a).load(tmp_path / "agent")
    assert loaded.predict(x, deterministic=True)[0] == a.predict(x, deterministic=True)[0]


@pytest.mark.parametrize(
    ("config", "env", "message"),
    [
        ({"space": "all"}, {}, "needs space 'last_layer'"),
        ({}, {"noise_std": 0.1}, "noise_std: expected 0"),
    ],
)
def test_proven_mode_names_what_it_cannot_prove(config, env, message):
    """One clear line, before anything is trained."""
    cell = Cell(
        agent="scpo",
        task=IMITATION,
        seed=0,
        steps=30,
        start="backup",
        cost_limit=0.0,
        env=env,
        config={"mode": "proven", **config},
    )
    agent = make_agent(cell, make_training_env(cell))
    with pytest.raises(UserError, match=message):
        agent.learn(30)


def test_proven_mode_refuses_an_unproved_start():
    """The induction needs a safe start here as well."""
    cell = Cell(
        agent="scpo",
        task=IMITATION,
        seed=0,
        steps=30,
        start="backup",
        cost_limit=0.0,
        config={"mode": "proven"},
    )
    env = make_training_env(cell)
    agent = make_agent(cell, env)
    backup = copy.deepcopy(agent.policy.mlp_extractor.backup)
    agent.policy.mlp_extractor.backup = AffineBackup(-backup.gain, 0.0)
    with pytest.raises(UserError, match="start policy is not proved safe"):
        agent.learn(30)
