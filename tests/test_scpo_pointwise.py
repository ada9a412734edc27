"""The agents `scpo` and `scpo-pointwise` on their tasks: what they certify, probe and re-check.

Each test here fails if one line of the certificate is broken: a slope error, the margin, a sign,
the quadratic term, the memory of normals, the re-check, the cutting planes.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from test_projection import reference

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.contract import ProbeMeter
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup, backup_of
from scpo_bench.runs.environments import NativeVecEnv
from scpo_bench.scpo import certified_step, projection
from scpo_bench.scpo.agent import SCPO, PointwiseSCPO
from scpo_bench.scpo.bank import candidate_bank
from scpo_bench.scpo.constraints import Exact
from scpo_bench.scpo.guard import Guard
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.local_model import probe
from scpo_bench.scpo.pointwise import Pointwise
from scpo_bench.scpo.rollouts import BatchedRollouts

torch.set_num_threads(1)
IMITATION, REGRESSION = "scpo_bench/DoubleIntegratorImitation-v0", "scpo_bench/HarmfulRegression-v0"
TASKS = {
    IMITATION: {"learning_rate": 0.3, "features": 16, "evaluation_starts": 32},
    REGRESSION: {
        "n_steps": 10,
        "labels": "visited",
        "learning_rate": 0.3,
        "features": 16,
        "feature_scale": 4.0,
        "evaluation_starts": 32,
    },
}


TASKS["scpo_bench/HarmfulRegression-v1"] = TASKS[REGRESSION]


def make(agent_class=SCPO, task=IMITATION, seed=0, **config):
    env = NativeVecEnv(gym.make_vec(task, num_envs=8, vectorization_mode="vector_entry_point"))
    kwargs = {"backup": AffineBackup(*env.task.backup_gain())}
    agent = agent_class(
        "MlpPolicy", env, seed=seed, policy_kwargs=kwargs, **{**TASKS[task], **config}
    )
    env.probe_meter = ProbeMeter()
    return agent


def learn(agent, updates, callback=None, **kwargs):
    return agent.learn(updates * agent.n_envs * agent.config.n_steps, callback, **kwargs)


class Visited(BaseCallback):
    """The parameters of every deployed policy, the last one included, and of each update's g."""

    def __init__(self):
        super().__init__()
        self.w, self.g = [], []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.w.append(self.model.w)
        self.g.append(self.model.guard.g)

    def _on_training_end(self):
        self._on_rollout_start()


class Projections:
    """Every call of the projection: (certificate, target, margin, result)."""

    def __init__(self, monkeypatch):
        self.calls = []
        project = certified_step.project

        def watched(certificate, target, margin):
            result = project(certificate, target, margin)
            self.calls.append((certificate, target, margin, result))
            return result

        monkeypatch.setattr(certified_step, "project", watched)


# ---- one constraint per start, step and bound


@pytest.mark.parametrize("task", [IMITATION, REGRESSION, "scpo_bench/HarmfulRegression-v1"])
def test_the_largest_pointwise_values_are_those_of_the_task(task):
    """Signed bounds amount to the task's constraints: the same maximum, for safe and unsafe w."""
    agent = make(task=task)
    env_task = agent.env.task
    rollouts = BatchedRollouts(env_task, agent.space, 24, 100.0, meter := ProbeMeter())
    w = 0.3 * np.random.default_rng(0).normal(size=(5, agent.space.dimension))
    w[0] = 0.0
    values, names = rollouts.bounds(w), np.tile(rollouts.bound_names, 24)
    with torch.no_grad():
        expected = rollouts.constraint_values(torch.as_tensor(w)).amax(dim=-1).numpy()
    for name in range(len(env_task.constraint_names)):
        assert values[:, names == name].max(axis=1) == pytest.approx(expected[:, name], abs=1e-12)
    assert (expected.max(axis=1) > 0).any()
    assert meter.steps == 5 * 24 * env_task.constraint_horizon
    assert meter.violations == (expected.max(axis=1) > 0).sum()
    some = rollouts.bounds(w, np.array([3, 20]))
    per_start = len(rollouts.bound_names)
    assert some == pytest.approx(values.reshape(5, 24, per_start)[:, [3, 20]].reshape(5, -1))


def test_slopes_and_second_differences_by_hand():
    """g = (a, a^2 + b, a b) at (1, 2), along (3, 0) and (0, 1): forward and central quotients."""
    values = Exact(
        ("linear", "square", "product"),
        lambda w: np.stack([w[:, 0], w[:, 0] ** 2 + w[:, 1], w[:, 0] * w[:, 1]], axis=1),
    )
    w, rows = np.array([1.0, 2.0]), np.arange(3)
    bank = candidate_bank(np.array([3.0, 0.0]), np.array([0.0, 1.0]), [], 2)
    g = values.evaluate(w)
    forward = probe(values, w, g, rows, bank, central=False)
    assert forward.slopes == pytest.approx(np.array([[1, 0], [(16 - 1) / 3, 1], [2, 1]]))
    assert forward.curvatures is None
    central = probe(values, w, g, rows, bank, central=True)
    assert central.slopes == pytest.approx(np.array([[1, 0], [2, 1], [2, 1]]), abs=1e-12)
    assert central.curvatures == pytest.approx(np.array([[0, 0], [2, 0], [0, 0]]), abs=1e-12)


class Parabola:
    """The policies y = w_0 + w_1 x + w_2 x^2."""

    dimension, vectorized = 3, True

    def policies(self, w):
        powers = torch.arange(3, dtype=torch.float64)
        return lambda x: (x**powers * w[:, None, :]).sum(dim=-1, keepdim=True)


def test_a_start_that_was_not_probed_and_would_violate_is_probed():
    """Five inputs, of which the ends are probed: the step would violate in the middle only.

    The re-check finds the three inner starts; they are probed too, and the step bends. Counted:
    5 at the start, 2 starts x 6 probes, 5 for the candidate that fails, 3 and 3 x 6 for the missed
    ones, 5 for the next candidate.
    """
    task = gym.make(REGRESSION).unwrapped.task
    rollouts = BatchedRollouts(task, Parabola(), 5, 100.0, meter := ProbeMeter())
    constraints = Pointwise(rollouts, active=1, kept=0, fresh=0, alarming=0.0, seed=0)
    config = GuardConfig(smoothness="sampled", directions=3, probe_radius=1e-3, trust_radius=9.0)
    guard, w = Guard(config), np.array([0.3, 0.05, 0.0])
    g = guard.start(w, constraints)
    assert constraints.nearest(g).tolist() == [0, 1, 8, 9]
    change = np.array([0.4, 0.0, -0.4])  # 0 at both ends; 0.7 in the middle
    decision = guard.update(w, lambda: change, constraints, np.random.default_rng(0))
    assert decision.status == "projected"
    assert 0.499 < decision.w[0] <= 0.5  # the least curvature that is believed costs the rest
    assert guard.exceeded == 0  # nothing that was certified proved wrong
    assert meter.steps == 5 + 2 * 6 + 5 + 3 + 3 * 6 + 5


def test_certified_mode_refuses_what_nothing_would_evaluate():
    """Starts that are neither probed nor evaluated would not be certified at all."""
    for agent_class, config in (
        (PointwiseSCPO, {}),
        (SCPO, {"pointwise": True, "active_starts": 4, "smoothness": "sampled"}),
    ):
        with pytest.raises(UserError, match="active_starts: expected 0 in certified mode"):
            make(agent_class, mode="certified", **config)
    make(PointwiseSCPO, mode="certified", active_starts=0)


def test_noisy_constraints_are_not_pointwise():
    """There are no values per start where every rollout draws its own noise."""
    with pytest.raises(UserError, match="pointwise: constraints are evaluated pointwise on tasks"):
        make(PointwiseSCPO, constraint_noise=0.1).constraints  # noqa: B018 - it is built there


# ---- the agents, line by line of the certificate


@pytest.mark.parametrize(
    "bank", [{}, {"directions": 4, "probe_radius": 0.1, "candidates": ("normals",)}]
)
@pytest.mark.parametrize("task", [IMITATION, REGRESSION])
def test_what_the_agent_certifies_is_equation_29(task, bank, monkeypatch):
    """In each update: gbar as the paper states it, from evaluations of our own, for random xi.

    (1 - 1'xi) g0 + G xi + (l/2) [xi'S xi + |xi|'diag(S)] with G_ij = g_i(theta + d_j). A slope
    error that is left out, a sign, a quadratic term: each shows.
    """
    agent = make(task=task, mode="certified", smoothness="apriori", L=60.0, **bank)
    seen, probed = Projections(monkeypatch), []
    original = certified_step.probe

    def watched(constraints, w, values, rows, bank, central):
        probed.append((w, bank))
        return original(constraints, w, values, rows, bank, central)

    monkeypatch.setattr(certified_step, "probe", watched)
    learn(agent, 6)
    rng = np.random.default_rng(0)
    assert len(probed) >= 4
    widest = 0
    for w, model_bank in probed:
        D = model_bank.directions * model_bank.lengths
        g0 = agent.constraints.evaluate(w)
        G = np.stack([agent.constraints.evaluate(w + d) for d in D.T], axis=1)
        certificate = next(c for c, *_ in seen.calls if np.array_equal(c.values, g0))
        S = D.T @ D
        for _ in range(5):
            xi = rng.normal(size=D.shape[1])
            quadratic = xi @ S @ xi + np.abs(xi) @ np.diag(S)
            expected = (1 - xi.sum()) * g0 + G @ xi + 30.0 * quadratic
            scale = np.abs(G).max() + 30.0 * quadratic
            off = np.abs(certificate.bound(xi * model_bank.lengths) - expected)
            assert off.max() <= 1e-9 * scale
        widest = max(widest, D.shape[1])
    assert widest == (4 if bank else 2)


@pytest.mark.parametrize("bank", [{}, {"directions": 99, "probe_radius": 1e-3, "candidates": ()}])
@pytest.mark.parametrize("task", [IMITATION, REGRESSION])
def test_the_agent_takes_the_step_that_cvxpy_finds(task, bank, monkeypatch):
    """Each projection of a run, stated to cvxpy: as close to the raw step, and certified."""
    agent = make(task=task, mode="certified", smoothness="apriori", L=20.0, margin=0.01, **bank)
    seen, active = Projections(monkeypatch), 0
    learn(agent, 12)
    for certificate, target, margin, result in seen.calls:
        assert (certificate.bound(result.z) <= np.maximum(certificate.values, -margin)).all()
        if result.status != "inactive":
            off = np.sum((certificate.factor @ result.z - target) ** 2)
            assert off - reference(certificate, target, margin) <= 1e-6 * target @ target
            active += 1
    assert active >= 3


def test_the_slopes_of_the_pointwise_agent_are_gradients(monkeypatch):
    """Predictions are linear in w, so central quotients are exact: compared in every update."""
    agent = make(PointwiseSCPO, REGRESSION, fresh_starts=0, kept_starts=0)
    models, original = [], certified_step.probe
    monkeypatch.setattr(
        certified_step, "probe", lambda *a, **k: models.append(original(*a, **k)) or models[-1]
    )
    learn(agent, 8)
    for model in models:
        there = model.w + 1e-5 * model.bank.directions.T
        slopes = (agent.constraints._rollouts.bounds(there) - agent.constraints.evaluate(model.w)).T
        assert model.slopes == pytest.approx(slopes[model.rows] / 1e-5, abs=1e-6)
        assert model.curvatures == pytest.approx(0.0, abs=1e-6)
    assert len(models) >= 2


@pytest.mark.parametrize(
    "bank",
    [
        {},
        {"candidates": ()},
        {"directions": 99, "probe_radius": 1e-3, "candidates": ()},
    ],
)
def test_a_valid_constant_is_never_breached_by_the_agent(bank):
    """Regression in certified mode with an L that is proved, not sampled: the theorem, end to end.

    The constraints are log-sum-exp maxima, of sharpness 5, of functions that are linear in w: L is
    at most 5 times the largest squared gradient. No value is above its bound, none above -margin.
    """
    agent = make(
        task=REGRESSION, sharpness=5.0, mode="certified", smoothness="apriori", trust_radius=0.05,
        margin=0.02, **bank,
    )  # fmt: skip
    d = agent.space.dimension
    inputs = torch.linspace(-1, 1, 32, dtype=torch.float64)[None, :, None]
    psi = agent.space.policies(torch.eye(d, dtype=torch.float64))(inputs.expand(d, -1, -1))
    steepest = float(psi[..., 0].norm(dim=0).max()) / 0.5
    assert 0.05 * steepest < 1  # no probe's prediction is clipped
    config = {**agent.config.__dict__, "L": 5.0 * steepest**2}
    agent = make(task=REGRESSION, **config)
    visited = Visited()
    learn(agent, 150, visited)
    assert (agent.guard.exceeded, agent.guard.breaches, agent.guard.recoveries) == (0, 0, 0)
    largest = np.array(visited.g).max(axis=1)
    assert largest.max() <= -0.02 + 1e-9
    assert (largest > -0.1).sum() > 10  # the bound is met
    assert agent.diagnostics["loss"] < 0.3


def test_the_agent_keeps_its_margin():
    """Certified, pointwise, linear constraints: values come up to -0.1 and never above."""
    agent = make(
        SCPO, REGRESSION, mode="certified", pointwise=True, smoothness="apriori", L=1e-3,
        margin=0.1, directions=99, candidates=(), probe_radius=1e-3,
    )  # fmt: skip
    visited = Visited()
    learn(agent, 40, visited)
    largest = np.array(visited.g).max(axis=1)
    assert largest.max() <= -0.1 + 1e-9
    assert largest.max() > -0.1001


def test_the_agent_remembers_the_gradients_of_its_constraints():
    """With a complete bank, its memory of a normal is the gradient where it last probed."""
    agent = make(directions=99, candidates=("normals",), probe_radius=1e-3, learning_rate=0.1)
    learn(agent, 3)
    learn(agent, 1, reset_num_timesteps=False)
    before = agent.w
    agent.train()
    steps = 1e-4 * np.eye(len(before))
    values = agent.constraints.values
    gradients = (values(before + steps) - values(before - steps)).T / 2e-4
    for name in range(2):
        found = agent.guard.memory.normals[name]
        assert found == pytest.approx(gradients[name], abs=0.05 * np.linalg.norm(gradients[name]))


def test_remembered_normals_help_the_agent():
    """Three directions among hundreds of weights: with the normals the loss falls further."""
    losses = {}
    for candidates in ((), ("normals",)):
        agent = make(
            space="all", directions=4, candidates=candidates, probe_radius=1e-3, learning_rate=0.02
        )
        learn(agent, 30)
        losses[candidates] = agent.diagnostics["loss"]
    assert losses[("normals",)] < losses[()]


@pytest.mark.parametrize("task", [IMITATION, REGRESSION])
def test_verified_mode_deploys_no_evaluated_violation(task):
    """With an L of nearly nothing, only the re-check stands between the proposal and its harm."""
    agent = make(PointwiseSCPO, task, smoothness="apriori", L=1e-6, fresh_starts=0, kept_starts=0)
    visited = Visited()
    learn(agent, 20, visited)
    assert agent.guard.exceeded > 0 or task == REGRESSION
    for w in visited.w:
        assert agent.constraints.evaluate(w).max() <= 0
    assert agent.env.probe_meter.violations > 0  # candidates violated; no policy did


@pytest.mark.parametrize("task", [IMITATION, REGRESSION])
def test_cutting_planes_find_the_projection_on_all_constraints(task, monkeypatch):
    """Solved with every constraint at once, each projection of a run is as close to its target."""
    agent = make(PointwiseSCPO, task, mode="certified", active_starts=0, fresh_starts=0, reuse=0.0)
    seen = Projections(monkeypatch)
    learn(agent, 8)
    monkeypatch.setattr(projection, "FIRST", 10**9)
    many = 0
    for certificate, target, margin, result in seen.calls:
        if result.status != "inactive" and len(certificate.values) > 64:
            distance = np.linalg.norm(certificate.factor @ result.z - target)
            best = projection.project(certificate, target, margin).z
            at_once = np.linalg.norm(certificate.factor @ best - target)
            assert distance <= at_once + 1e-5 * np.linalg.norm(target)
            many += 1
    assert many >= 3


def test_unprobed_violations_are_probed_by_the_agent():
    """Whenever a candidate fails at starts that were not probed, the worst is probed next."""
    agent = make(PointwiseSCPO, REGRESSION, active_starts=1, fresh_starts=0, kept_starts=0)
    constraints, events = agent.constraints, []
    evaluate, probe_rows = constraints.evaluate, constraints.probe

    def evaluated(w):
        values = evaluate(w)
        events.append(("evaluated", values))
        return values

    def probed(w, g, probes, rows):
        events.append(("probed", rows))
        return probe_rows(w, g, probes, rows)

    constraints.evaluate, constraints.probe = evaluated, probed
    found, known = 0, set()
    learn(agent, 1)
    for _ in range(15):
        events.clear()
        had_model = agent.guard._model
        known = set() if had_model is None else set(had_model.rows.tolist())
        agent.train()
        for (kind, what), following in zip(events, [*events[1:], None]):
            if kind == "probed":
                known |= set(what.tolist())
                continue
            worst = int(np.argmax(what))
            if what[worst] > 0 and worst not in known:
                assert following is not None
                assert following[0] == "probed"
                assert worst in following[1]
                found += 1
    assert found > 0


@pytest.mark.parametrize("task", [IMITATION, REGRESSION])
@pytest.mark.parametrize("mode", ["verified", "certified"])
def test_pointwise_learns_and_stays_safe_on_what_it_evaluates(task, mode):
    """20 updates: no violation from any start that is evaluated, and the loss falls."""
    config = {"active_starts": 0, "fresh_starts": 0} if mode == "certified" else {}
    agent = make(PointwiseSCPO, task, mode=mode, **config)
    visited = Visited()
    learn(agent, 20, visited)
    assert mode == "certified" or np.max([g.max() for g in visited.g]) <= 0
    assert np.median([g.max() for g in visited.g]) <= 0
    assert agent.diagnostics["loss"] < (0.35 if task == IMITATION else 0.15)


@pytest.mark.parametrize("task", [IMITATION, REGRESSION])
def test_a_resumed_run_makes_the_same_update(task, tmp_path):
    """Model, constants, trust region and start states travel with a saved agent."""
    agent = make(PointwiseSCPO, task)
    learn(agent, 5)
    agent.save(tmp_path / "agent")
    loaded = PointwiseSCPO.load(tmp_path / "agent", env=agent.env)
    loaded.start_training()
    for _ in range(4):
        agent.train()
        loaded.train()
        assert np.array_equal(agent.w, loaded.w)
        assert np.array_equal(agent.guard.g, loaded.guard.g)
    assert agent.guard.held == loaded.guard.held


@pytest.mark.parametrize(
    ("config", "field"),
    [({}, "smoothness"), ({"smoothness": "sampled", "safe_probes": True}, "safe_probes")],
)
def test_options_that_do_not_go_with_pointwise_constraints_are_refused(config, field):
    """Adaptive L is one per constraint for good; safe probes need one normal per constraint."""
    with pytest.raises(UserError, match=f"{field}: expected"):
        make(SCPO, pointwise=True, **config)


# ---- start states beside the fixed ones


def pointwise(fresh, kept=4, alarming=-0.5, starts=16, seed=0):
    """(constraints on imitation, parameters of a policy) with start states that are drawn."""
    agent = make(PointwiseSCPO, task=IMITATION, evaluation_starts=starts)
    rollouts = agent.constraints._rollouts
    rollouts._starts = tuple(component[:starts] for component in rollouts._starts)
    rollouts.starts = starts
    constraints = Pointwise(
        rollouts, active=0, kept=kept, fresh=fresh, alarming=alarming, seed=seed
    )
    return constraints, np.zeros(agent.space.dimension)


def test_fresh_starts_depend_on_seed_and_update_alone():
    """The same run draws the same start states: without that, no record could be repeated."""
    drawn = []
    for seed, updates in ((0, (1, 2)), (0, (1, 2)), (1, (1, 2))):
        constraints, w = pointwise(fresh=16, seed=seed)
        g = constraints.begin_update(0, w, None)
        for update in updates:
            g = constraints.begin_update(update, w, g)
        drawn.append(np.stack(constraints.state[:2]))
        assert g == pytest.approx(constraints.evaluate(w))  # what it says of the new starts is true
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0][:, -16:] != drawn[2][:, -16:]).all()


def test_an_alarming_start_is_kept_and_the_fixed_ones_stay():
    """From the fresh starts with the largest values; below the alarm none is kept."""
    for alarming, replaced in ((-2.0, True), (0.0, False)):
        constraints, w = pointwise(fresh=16, alarming=alarming)
        before = np.stack(constraints.state[:2])
        g = constraints.begin_update(1, w, constraints.begin_update(0, w, None))
        after = np.stack(constraints.state[:2])
        assert (after[:, :16] == before[:, :16]).all()
        assert (after[:, 16:20] != before[:, 16:20]).any() == replaced
        assert set(constraints.changed // (len(g) // 36)) >= set(range(20, 36))


def test_neighbours_that_part_are_searched_between():
    """A policy that turns round at a narrow strip of starts: the drawn starts close in on it."""
    constraints, w = pointwise(fresh=64, starts=64, seed=1)
    rollouts = constraints._rollouts

    def strip(w, starts=None):
        """One bound per start: safe on both sides of p = 0.0123, violated within 1e-4 of it."""
        states = starts if isinstance(starts, tuple) else rollouts.start_states
        p = np.asarray(states[0]) - 0.0123
        if not isinstance(starts, tuple) and starts is not None:
            p = p[starts]
        side = np.stack([np.where(p > 0, -0.9, -0.1), np.where(p > 0, -0.1, -0.9)], axis=-1)
        side[np.abs(p) < 1e-4] = 0.5
        return side.reshape(1, -1)

    rollouts.bounds, constraints._per_start = strip, 2
    g = strip(w)[0]
    assert g.max() < 0  # none of the fixed starts shows it
    for update in range(1, 4):
        g = constraints.begin_update(update, w, g)
    assert g.max() > 0


def test_states_between_fixed_initial_states_are_not_searched():
    """With fixed initial states, the ones between them are no starts: they are not certified."""
    env = gym.make_vec(
        "scpo_bench/DoubleIntegratorImitation-v1",
        num_envs=8,
        vectorization_mode="vector_entry_point",
        starts=300,
    )
    kwargs = {"backup": backup_of(env.unwrapped.task)}
    agent = PointwiseSCPO("MlpPolicy", NativeVecEnv(env), seed=0, policy_kwargs=kwargs)
    agent.learn(240 * 3)
    admissible = np.stack(env.unwrapped.task.design_starts(300), axis=-1)
    states = np.stack(agent.constraints.state[:2], axis=-1)
    distance = np.linalg.norm(states[:, None] - admissible, axis=-1).min(axis=1)
    assert distance.max() < 1e-12
    assert agent.guard.updates == 3


def test_fewer_starts_than_neighbours():
    """Two start states in all: each has one neighbour to search towards."""
    constraints, w = pointwise(fresh=1, kept=0, starts=1)
    g = constraints.begin_update(1, w, constraints.begin_update(0, w, None))
    assert np.isfinite(g).all()


def test_what_was_learned_of_replaced_starts_is_forgotten(monkeypatch):
    """A reused model must not certify by the slopes of a start state that is no longer there."""
    constraints, w = pointwise(fresh=16, alarming=-2.0)
    config = {"smoothness": "sampled", "directions": 4096, "probe_radius": 1e-3, "reuse": 1e9}
    guard, rng = Guard(GuardConfig(**config)), np.random.default_rng(0)
    w = guard.update(w, lambda: np.full(len(w), 1e-4), constraints, rng).w
    before, seen = guard._model, []
    assert before is not None
    guard.smoothness._scale[:] = 3.0
    monkeypatch.setattr(guard, "_project", lambda w, g, *_: seen.append((guard._model, g)))
    guard.update(w, lambda: np.zeros(len(w)), constraints, rng)
    ((model, g),) = seen
    replaced = np.intersect1d(before.rows, constraints.changed)
    assert len(replaced) > 0
    assert set(model.rows) == set(before.rows) - set(constraints.changed)
    assert len(model.slopes) == len(model.curvatures) == len(model.rows)
    assert (model.values[constraints.changed] == g[constraints.changed]).all()
    assert (guard.smoothness._scale[constraints.changed] == 1.0).all()
    assert (guard.smoothness._scale[model.rows] == 3.0).all()
