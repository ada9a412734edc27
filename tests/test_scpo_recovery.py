"""Back to safety: earlier policies, a margin that learns, and unsafe start policies."""

from __future__ import annotations

import cvxpy as cp
import gymnasium as gym
import numpy as np
import pytest
import torch

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.checks.known_functions import KnownFunctions
from scpo_bench.errors import UserError
from scpo_bench.policies import AffineBackup
from scpo_bench.runs.environments import NativeVecEnv
from scpo_bench.scpo import recovery
from scpo_bench.scpo.agent import SCPO
from scpo_bench.scpo.constraints import Exact
from scpo_bench.scpo.guard import Guard, UnsafeStartError
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.projection import Certificate
from scpo_bench.scpo.recovery import Verified, descend, fall_back, least_violation, pushed

torch.set_num_threads(1)


def policy(x, g=-1.0):
    return Verified(np.array([float(x)]), np.array([g]))


# ---- earlier policies


def test_the_stack_keeps_the_start_policy_and_the_newest():
    """A policy that is held is on it once, with its newest value; the start policy never goes."""
    stack = []
    for x in range(40):
        stack = pushed(stack, policy(x))
        stack = pushed(stack, policy(x, g=-0.5))
    assert [int(p.w[0]) for p in stack] == [0, *range(41 - recovery.KEPT, 40)]
    assert {p.g[0] for p in stack} == {-0.5}


def test_fall_back_skips_the_failed_policy_and_what_is_no_longer_safe():
    """The newest policy that is found safe now; never the one that failed, unless none is left."""
    values = {0: 0.9, 1: -0.3, 2: 0.2, 3: -0.1}
    stack, evaluated = [policy(x) for x in range(4)], []

    def evaluate(old):
        evaluated.append(int(old.w[0]))
        return np.array([values[evaluated[-1]]])

    left = fall_back(stack, np.array([3.0]), evaluate)
    assert [int(p.w[0]) for p in left] == [0, 1]
    assert (evaluated, left[-1].g[0]) == ([2, 1], -0.3)
    left = fall_back(stack, np.array([7.0]), evaluate)  # failed before it was ever on the stack
    assert [int(p.w[0]) for p in left] == [0, 1, 2, 3]
    (start,) = fall_back(stack[:1], np.array([1.0]), evaluate)
    assert start.g[0] == 0.9  # unsafe, but there is nothing else
    assert fall_back([policy(0)], np.array([0.0]), evaluate) == [policy(0)]


class Turning(Exact):
    """g = w - 1, and more at policies in ``bad`` from update ``when`` on. Counts as noisy."""

    noisy = True

    def __init__(self, bad, when):
        super().__init__(("g",), self.value)
        self.bad, self.when, self.update = bad, when, 0

    def begin_update(self, update, w, g):
        self.update = update
        return self.evaluate(w)

    def value(self, w):
        turned = [self.update >= self.when and round(row[0], 6) in self.bad for row in w]
        return w - 1.0 + 5.0 * np.array(turned)[:, None]


def walk(guard, constraints, change, updates):
    """Decisions of so many updates from w = 0, each deployed."""
    w, decisions = np.zeros(1), []
    for _ in range(updates):
        decisions.append(
            guard.update(w, lambda: np.array([change]), constraints, np.random.default_rng(0))
        )
        w = decisions[-1].w
    return decisions


def test_the_policy_that_failed_is_not_returned_to():
    """0.3 turns out unsafe, and so does 0.2, to which it would have returned for ever."""
    guard = Guard(GuardConfig(smoothness="apriori", L=1e-9, trust_radius=10.0, recheck=0.0))
    decisions = walk(guard, Turning({0.2, 0.3}, when=4), 0.1, 8)
    assert [x.status == "recovered" for x in decisions] == [x == 3 for x in range(8)]
    assert decisions[3].w == pytest.approx([0.1])
    assert decisions[3].diagnostics == {"recoveries": 1.0, "step_norm": 0.0}


def test_where_no_policy_is_left_training_goes_on_from_the_first():
    """All policies turn out unsafe: it stays at the start policy, and does not stop."""
    guard = Guard(GuardConfig(smoothness="apriori", L=1e-9, trust_radius=10.0, recheck=0.0))
    decisions = walk(guard, Turning({0.0, 0.1, 0.2, 0.3}, when=4), 0.1, 6)
    assert [x.status for x in decisions[3:]] == ["recovered"] * 3
    assert [x.w[0] for x in decisions[3:]] == [0.0] * 3


def test_the_margin_learns_from_returns():
    """It grows with each, keeps the next steps further from the limit, and decays."""
    guard = Guard(GuardConfig(smoothness="apriori", L=1e-9, trust_radius=10.0, recheck=0.0))
    (*_, last) = walk(guard, Turning({0.3}, when=4), 0.1, 4)
    assert last.status == "recovered"
    assert guard.learned_margin == recovery.FIRST
    margins = [0.0]
    for _ in range(12):
        margins.append(recovery.margin_after_return(margins[-1]))
    assert margins[-1] == recovery.MOST
    assert np.all(np.diff(margins) >= 0)
    decision = guard.update(
        last.w, lambda: np.array([5.0]), Turning(set(), 9), np.random.default_rng(0)
    )
    learned = recovery.FIRST * recovery.DECAY
    assert decision.w == pytest.approx([1 - learned], abs=1e-5)
    assert decision.diagnostics["learned_margin"] == pytest.approx(learned)


# ---- from an unsafe start


@pytest.mark.parametrize("seed", range(12))
def test_least_violation_agrees_with_cvxpy(seed):
    """The largest bound among the violated constraints is as small as the reference solver's."""
    rng = np.random.default_rng(seed)
    k, m = int(rng.integers(1, 9)), int(rng.integers(1, 17))
    values = rng.normal(size=k)
    values[0] = abs(values[0])
    slopes = rng.normal(size=(k, m))
    c = Certificate(values, slopes, np.zeros((k, m)), rng.exponential(2, k), np.eye(m))
    radius, margin = 10 ** rng.uniform(-2, 0.5), 0.1
    z, t = cp.Variable(m), cp.Variable()
    bounds = [
        g + s @ z + L / 2 * cp.sum_squares(z) for g, s, L in zip(c.values, c.slopes, c.smoothness)
    ]
    limits = [b <= (t if g > 0 else 0.0) for b, g in zip(bounds, values)]
    problem = cp.Problem(cp.Minimize(t), [*limits, cp.norm(z, 2) <= radius, t >= -margin])
    problem.solve(solver=cp.CLARABEL)
    ours = least_violation(c, radius, margin)
    bound = c.bound(ours)
    assert max(bound[values > 0].max(), -margin) == pytest.approx(problem.value, abs=1e-4)
    assert bound[values <= 0].max(initial=-1.0) <= 1e-6
    assert np.linalg.norm(ours) <= radius * (1 + 1e-6)


def test_a_step_is_taken_only_if_the_violation_falls():
    """Evaluation decides: not a rise, and not a fall bought by another constraint's violation."""
    g, slopes = np.array([0.5, -0.2]), np.array([[-1.0], [0.0]])
    settings = {"radius": 1.0, "margin": 0.0, "retries": 6}
    for values, taken in (
        (lambda z: np.array([0.5 - z[0], -0.2]), True),
        (lambda z: np.array([0.5 + z[0], -0.2]), False),
        (lambda z: np.array([0.5 - z[0], 0.1]), False),
    ):
        step = descend(g, np.arange(2), slopes, values, **settings)
        assert bool(step.z.any()) == taken
        assert (step.g[0] < 0.5) == taken
        assert step.radius == pytest.approx(1.0 if taken else 0.5, rel=0.01)


@pytest.mark.parametrize("d", [3, 20])
def test_known_functions_are_left_unsafe_no_longer_than_needed(d):
    """From violated constraints to safe ones: the largest value never rises; then SCPO goes on."""
    functions = KnownFunctions(d, 3, np.random.default_rng(d))
    shift = np.array([0.5, 0.3, -0.2]) - functions(np.zeros((1, d)))[0]
    values = Exact(functions.names, lambda w: functions(w) + shift)
    w, rng = np.zeros(d), np.random.default_rng(0)
    with pytest.raises(UnsafeStartError, match="or set recovery"):
        Guard(GuardConfig()).update(w, lambda: np.ones(d), values, rng)
    guard = Guard(GuardConfig(recovery=True, trust_radius=0.5))
    worst, statuses = [values.evaluate(w).max()], []
    satisfied = values.evaluate(w) <= 0
    for _ in range(40):
        decision = guard.update(w, lambda: rng.normal(size=d), values, rng)
        w = decision.w
        g = values.evaluate(w)
        assert (g[satisfied] <= 0).all()
        satisfied |= g <= 0
        worst.append(g.max())
        statuses.append(decision.status)
    recovering = statuses.count("recovering")
    assert 1 <= recovering < 20
    assert guard.recovery_radius != recovery.FIRST_RADIUS
    assert set(statuses[:recovering]) == {"recovering"}
    assert np.all(np.diff(worst[: recovering + 1]) <= 0)
    assert worst[recovering] <= 0
    assert max(worst[recovering:]) <= 0
    assert {"projected", "unaltered"} & set(statuses[recovering:])


def test_a_policy_recovers_on_a_batched_task():
    """Imitation from a policy that leaves the bounds: safe after some updates, and stays it."""
    env = NativeVecEnv(
        gym.make_vec(
            "scpo_bench/DoubleIntegratorImitation-v0",
            num_envs=8,
            vectorization_mode="vector_entry_point",
        )
    )
    gain, *rest = env.task.backup_gain()
    backup = AffineBackup(0.2 * gain, *rest)
    agent = SCPO(
        "MlpPolicy",
        env,
        seed=0,
        policy_kwargs={"backup": backup},
        features=16,
        evaluation_starts=64,
        recovery=True,
    )
    start = agent.constraints.evaluate(np.zeros(agent.space.dimension)).max()
    assert start > 0
    largest, recovering = [start], 0
    for _ in range(40):
        agent.learn(240, reset_num_timesteps=False)
        recovering += int(agent.guard.g.max() > 0)
        largest.append(agent.guard.g.max())
    assert np.all(np.diff(largest[: recovering + 1]) <= 0)
    assert recovering < 30
    assert max(largest[recovering + 1 :]) <= 0


def test_a_constraint_without_value_is_refused():
    """NaN is neither above nor below the limit: it must not pass for safe."""
    constraints = Exact(("a", "b"), lambda w: np.array([[-1.0, np.nan]]))
    with pytest.raises(UserError, match="constraint 'b' has value nan"):
        Guard(GuardConfig()).start(np.zeros(1), constraints)
