"""The baselines' pure functions against numbers by hand, independent solvers and properties."""

from __future__ import annotations

import dataclasses
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, NonlinearConstraint, brentq, minimize

from scpo_bench.advantages import discounted_sums, generalised_advantages, next_values
from scpo_bench.baselines.cpo_dual import Case, trust_region_step
from scpo_bench.baselines.cvpo_dual import cost_threshold, e_step, softmax_with_kl, tilt_to_kl
from scpo_bench.baselines.cvpo_m_step import (
    gaussian_kl_split,
    multipliers,
    weighted_moments,
    weighted_nll_split,
)
from scpo_bench.baselines.episode_costs import EpisodeCosts
from scpo_bench.baselines.multipliers import (
    Multipliers,
    lagrangian_advantages,
    projected_adam_ascent,
    projected_ascent,
)
from scpo_bench.baselines.trust_region import conjugate_gradient
from scpo_bench.configuration import resolve_config

INSTANCES = 1000


# ---- advantages ----


def test_discounted_sums_restart_after_an_episode():
    """A sum does not leak over an episode's end, which would credit the next episode's rewards."""
    rewards = np.array([[1.0], [2.0], [4.0], [8.0]])
    ends = np.array([[False], [True], [False], [False]])
    np.testing.assert_allclose(discounted_sums(rewards, ends, 0.5)[:, 0], [2.0, 2.0, 8.0, 8.0])


def test_advantages_with_truncation_and_termination():
    """Truncation bootstraps, termination does not, and neither leaks into the next episode.

    gamma = 1/2, lambda = 1/2. Environment 0 is truncated at t=1 (terminal value 4), environment 1
    terminates there. By hand: t=2: delta = 1 + 2/2 - 2 = 0; t=1: truncated 1 + 4/2 - 2 = 1,
    terminated 1 + 0 - 2 = -1; t=0: delta = 1 + 2/2 - 2 = 0, plus 1/4 of t=1: 0.25 and -0.25.
    """
    ends = np.array([[False, False], [True, True], [False, False]])
    rewards, values, last = np.ones((3, 2)), np.full((3, 2), 2.0), np.array([2.0, 2.0])
    end_values = np.zeros((3, 2))
    end_values[1, 0] = 4.0
    following = next_values(values, last, ends, end_values)
    np.testing.assert_allclose(following, [[2, 2], [4, 0], [2, 2]])
    advantages = generalised_advantages(rewards, values, following, ends, 0.5, 0.5)
    np.testing.assert_allclose(advantages, [[0.25, -0.25], [1.0, -1.0], [0.0, 0.0]])


def test_advantages_of_several_signals_have_their_own_discounts():
    """Costs have their own gamma and lambda; stacking the signals does not mix them."""
    rng = np.random.default_rng(0)
    rewards, values, following = rng.normal(size=(3, 2, 7, 4))
    ends = rng.random((7, 4)) < 0.2
    both = generalised_advantages(rewards, values, following, ends, [0.9, 0.5], [0.8, 0.3])
    for i, (gamma, lam) in enumerate([(0.9, 0.8), (0.5, 0.3)]):
        np.testing.assert_allclose(
            both[i], generalised_advantages(rewards[i], values[i], following[i], ends, gamma, lam)
        )


def test_advantages_equal_the_recursion_written_out():
    """The array scan against the definition, step by step, for random episode ends."""
    rng = np.random.default_rng(1)
    rewards, values, following = rng.normal(size=(3, 30, 3))
    ends = rng.random((30, 3)) < 0.15
    expected = np.zeros((30, 3))
    for n in range(3):
        carry = 0.0
        for t in reversed(range(30)):
            delta = rewards[t, n] + 0.97 * following[t, n] - values[t, n]
            carry = delta + (0.0 if ends[t, n] else 0.97 * 0.9 * carry)
            expected[t, n] = carry
    np.testing.assert_allclose(
        generalised_advantages(rewards, values, following, ends, 0.97, 0.9), expected
    )


# ---- multipliers ----


def test_multiplier_adam_by_hand():
    """The first Adam step is lr * sign(excess), as bias corrections cancel; projected at 0."""
    up = projected_adam_ascent(Multipliers.start([0.1]), [3.0], lr=0.05)
    assert up.value == pytest.approx([0.15], abs=1e-9)
    down = projected_adam_ascent(Multipliers.start([0.01]), [-3.0], lr=0.05)
    assert down.value == pytest.approx([0.0])
    # Second step by hand: m = 0.9*0.3 + 0.1*1 = 0.37, v = 0.999*0.009 + 0.001*1 = 0.009991
    twice = projected_adam_ascent(up, [1.0], lr=0.05)
    expected = 0.15 + 0.05 * (0.37 / (1 - 0.81)) / np.sqrt(0.009991 / (1 - 0.999**2))
    assert twice.value == pytest.approx([expected], abs=1e-8)


def test_multiplier_does_not_wind_up():
    """After a long feasible time a violation raises the multiplier at once.

    A wound-up moment would hold it at 0.
    """
    state = Multipliers.start([0.0])
    for _ in range(200):
        state = projected_adam_ascent(state, [-10.0], lr=0.05)
        assert state.value[0] == 0.0
    assert projected_adam_ascent(state, [1.0], lr=0.05).value[0] > 0.0


def test_multiplier_of_an_infinite_limit_is_zero():
    """cost_limit = inf switches the constraint off, exactly, whatever the multiplier was."""
    state = projected_adam_ascent(Multipliers.start([0.3, 0.3]), [-np.inf, 1.0], lr=0.05)
    assert state.value[0] == 0.0
    assert state.value[1] == pytest.approx(0.35)


def test_projected_ascent_stays_in_its_interval():
    """The M-step's multipliers are never stored outside [0, highest]."""
    assert projected_ascent(0.1, -5.0, 0.1, 10.0) == 0.0
    assert projected_ascent(9.9, 5.0, 0.1, 10.0) == 10.0
    assert projected_ascent(1.0, 2.0, 0.1, 10.0) == pytest.approx(1.2)


def test_lagrangian_advantages_by_hand():
    """(A - l1 c1 - l2 c2) / (1 + l1 + l2): (4 - 1*2 - 3*0)/5 = 0.4 and (0 - 1*1 - 3*2)/5 = -1.4."""
    mixed = lagrangian_advantages(
        np.array([4.0, 0.0]), np.array([[2.0, 1.0], [0.0, 2.0]]), np.array([1.0, 3.0])
    )
    np.testing.assert_allclose(mixed, [0.4, -1.4])


# ---- CPO ----


def test_conjugate_gradient_by_hand():
    """[[4, 1], [1, 3]] x = [1, 2] has the solution [1/11, 7/11], found in two iterations."""
    matrix = np.array([[4.0, 1.0], [1.0, 3.0]])
    np.testing.assert_allclose(
        conjugate_gradient(lambda v: matrix @ v, np.array([1.0, 2.0]), 2), [1 / 11, 7 / 11]
    )


def test_cases_of_cpo_are_numbered_as_documented():
    """Records hold the number of the case."""
    names = ["UNCONSTRAINED", "ALL_FEASIBLE", "FROM_INSIDE", "FROM_OUTSIDE", "RECOVERY"]
    assert [(case.name, case.value) for case in Case] == list(zip(names, range(1, 6)))


def test_conjugate_gradient_of_zero_is_zero():
    """A vanishing cost gradient does not divide by zero."""
    assert not conjugate_gradient(lambda v: v, np.zeros(3), 5).any()


@pytest.mark.parametrize(
    ("q", "r", "s", "c", "case", "on_reward", "on_cost"),
    [
        # delta = 1/2, so the TRPO step is H^-1 g / sqrt(q).
        (4.0, 0.0, 0.0, -1.0, Case.UNCONSTRAINED, 0.5, 0.0),
        (
            4.0,
            0.5,
            0.25,
            -1.0,
            Case.ALL_FEASIBLE,
            0.5,
            0.0,
        ),  # c^2/s = 4 > 1: the boundary is out of reach
        (
            1.0,
            0.6,
            1.0,
            -0.6,
            Case.FROM_INSIDE,
            1.0,
            0.0,
        ),  # TRPO step meets the boundary exactly: b.x = r/sqrt(q) = 0.6
        # g and b orthogonal unit vectors: x = (0.8, -0.6): spend 0.6 on the cost, what is left on
        # the reward
        (1.0, 0.0, 1.0, 0.6, Case.FROM_OUTSIDE, 0.8, -0.6),
        # g = b: from outside, only the retreat -c/s b is possible
        (1.0, 1.0, 1.0, 0.5, Case.FROM_OUTSIDE, 0.0, -0.5),
        (
            1.0,
            0.3,
            4.0,
            5.0,
            Case.RECOVERY,
            0.0,
            -0.5,
        ),  # along -H^-1 b, length sqrt(2 delta / s) = 1/2
        (1.0, 0.0, 0.0, 1.0, Case.RECOVERY, 0.0, 0.0),  # nothing lowers the cost
    ],
)
def test_trust_region_step_by_hand(q, r, s, c, case, on_reward, on_cost):
    """Each of CPO's five cases, with numbers that can be checked on paper."""
    step = trust_region_step(q, r, s, c, 0.5)
    assert step.case is case
    assert (step.on_reward, step.on_cost) == pytest.approx((on_reward, on_cost), abs=1e-12)


def random_trust_region(rng):
    """(g, b, c, delta) in two dimensions with H = I.

    Every instance reduces to this by x -> H^{1/2} x in span(g, b).
    """
    g, b = rng.normal(size=(2, 2)) * 10.0 ** rng.uniform(-2, 2, size=(2, 1))
    if rng.random() < 0.1:
        b = g * rng.choice([-1.0, 1.0]) * 10.0 ** rng.uniform(-1, 1)  # parallel gradients
    delta = 10.0 ** rng.uniform(-3, 0)
    c = rng.uniform(-1.6, 1.6) * np.sqrt(2 * delta) * np.linalg.norm(b)
    return g, b, c, delta


def solve_trust_region_by_angle(g, b, c, delta):
    """The best objective, by enumerating the points where the optimum can lie.

    These are TRPO's point and the ends of the constraint's chord of the circle.
    """
    radius = np.sqrt(2 * delta)
    candidates = [radius * g / np.linalg.norm(g)]
    unit = b / np.linalg.norm(b)
    along = -c / np.linalg.norm(b)
    if abs(along) <= radius:
        normal = np.array([-unit[1], unit[0]])
        half = np.sqrt(radius**2 - along**2)
        candidates += [along * unit + half * normal, along * unit - half * normal]
    feasible = [x for x in candidates if c + b @ x <= 1e-9 * max(1.0, abs(c))]
    return max((g @ x for x in feasible), default=None)


def test_trust_region_step_on_random_instances():
    """1000 instances are feasible, within the trust region, and optimal by enumeration."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(INSTANCES):
        g, b, c, delta = random_trust_region(rng)
        step = trust_region_step(g @ g, g @ b, b @ b, c, delta)
        x = step.on_reward * g + step.on_cost * b
        seen.add(step.case)
        assert x @ x <= 2 * delta * (1 + 1e-9)
        best = solve_trust_region_by_angle(g, b, c, delta)
        if step.case is Case.RECOVERY:
            assert best is None
            np.testing.assert_allclose(
                b @ x, -np.sqrt(2 * delta * (b @ b))
            )  # the steepest possible decrease
        else:
            assert c + b @ x <= 1e-8 * abs(c)
            assert g @ x == pytest.approx(
                best, rel=1e-7, abs=1e-9 * np.linalg.norm(g) * np.sqrt(2 * delta)
            )
            # stationarity, and complementary slackness of both multipliers
            stationary = g - step.cost_multiplier * b
            scale = np.linalg.norm(g)
            np.testing.assert_allclose(stationary, step.kl_multiplier * x, atol=1e-6 * scale)
            assert min(step.cost_multiplier, step.kl_multiplier) >= 0
            assert step.cost_multiplier * abs(c + b @ x) <= 1e-7 * np.linalg.norm(g) * np.sqrt(
                2 * delta
            )
            assert step.kl_multiplier * (2 * delta - x @ x) <= 1e-7 * np.linalg.norm(g) * np.sqrt(
                2 * delta
            )
    assert seen == set(Case) - {Case.UNCONSTRAINED}


def test_trust_region_step_agrees_with_cvxpy():
    """The same problem in six dimensions with a general H, solved as a cone program."""
    rng = np.random.default_rng(1)
    n = 6
    x, g_p, b_p = cp.Variable(n), cp.Parameter(n), cp.Parameter(n)
    root_p, c_p, radius_p = cp.Parameter((n, n)), cp.Parameter(), cp.Parameter(nonneg=True)
    problem = cp.Problem(
        cp.Maximize(g_p @ x), [c_p + b_p @ x <= 0, cp.norm(root_p @ x) <= radius_p]
    )
    compared = infeasible = 0
    for _ in range(INSTANCES):
        root = rng.normal(size=(n, n)) + 2 * np.eye(n)
        hessian = root.T @ root
        g, b = rng.normal(size=(2, n))
        on_g, on_b = np.linalg.solve(hessian, g), np.linalg.solve(hessian, b)
        q, r, s = g @ on_g, g @ on_b, b @ on_b
        delta = 0.5
        c = rng.uniform(-1.4, 1.4) * np.sqrt(2 * delta * s)
        step = trust_region_step(q, r, s, c, delta)
        g_p.value, b_p.value, root_p.value, c_p.value, radius_p.value = (
            g,
            b,
            root,
            c,
            np.sqrt(2 * delta),
        )
        problem.solve(solver=cp.CLARABEL)
        if step.case is Case.RECOVERY:
            infeasible += 1
            assert problem.status.startswith("infeasible")
        else:
            compared += 1
            assert g @ (step.on_reward * on_g + step.on_cost * on_b) == pytest.approx(
                problem.value, rel=1e-6, abs=1e-7
            )
    assert compared > 100
    assert infeasible > 100


# ---- CVPO ----


def test_cost_threshold_by_hand():
    """C = 10, T = 2, gamma = 1/2: 10 (1 - 1/4) / (1/2 * 2) = 7.5; undiscounted it is C."""
    assert cost_threshold(10.0, 0.5, 2) == pytest.approx(7.5)
    assert cost_threshold(10.0, 1.0, 2) == 10.0


def test_softmax_with_kl_by_hand():
    """z = (0, ln 3): q = (1/4, 3/4), log-mean-exp = ln 2, KL to uniform = 3/4 ln 3 - ln 2."""
    q, log_mean, kl = softmax_with_kl(np.array([[0.0, np.log(3.0)]]))
    np.testing.assert_allclose(q, [[0.25, 0.75]])
    assert log_mean == pytest.approx(np.log(2.0))
    assert kl == pytest.approx(0.75 * np.log(3.0) - np.log(2.0))


def test_e_step_without_constraint_by_hand():
    """Two actions worth 0 and 1, with eps = KL((1/4, 3/4) || uniform).

    The answer is that q, at eta = 1 / ln 3.
    """
    eps = 0.75 * np.log(3.0) - np.log(2.0)
    solved = e_step(np.array([[0.0, 1.0]]), np.zeros((1, 2)), eps, np.inf)
    np.testing.assert_allclose(solved.weights, [[0.25, 0.75]], atol=1e-9)
    assert solved.eta == pytest.approx(1 / np.log(3.0))
    assert solved.lam == 0.0


@pytest.mark.parametrize("cost", [[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
def test_e_step_with_active_cost_by_hand(cost):
    """Built backwards from q = (1/2, 1/4, 1/4) and eta = lam = 1, for two Q_c.

    Q_r = ln(4 q) + Q_c = (ln 2, 0, 0) + Q_c. With eps = KL(q || uniform) = ln 3 - 3/2 ln 2 and d =
    E_q[Q_c] both constraints are active at exactly this q.
    """
    eps, cost_1K = np.log(3.0) - 1.5 * np.log(2.0), np.array([cost])
    threshold = float(cost_1K[0] @ [0.5, 0.25, 0.25])
    solved = e_step(np.array([[np.log(2.0), 0.0, 0.0]]) + cost_1K, cost_1K, eps, threshold)
    np.testing.assert_allclose(solved.weights, [[0.5, 0.25, 0.25]], atol=1e-9)
    assert (solved.eta, solved.lam) == pytest.approx((1.0, 1.0))
    assert solved.cost_excess == pytest.approx(0.0, abs=1e-9)


def test_e_step_infeasible_by_hand():
    """No q within eps reaches the threshold: the result is flagged.

    It has the lowest cost in the ball, here (3/4, 1/4).
    """
    eps = 0.75 * np.log(3.0) - np.log(2.0)
    solved = e_step(np.array([[0.0, 5.0]]), np.array([[0.0, 1.0]]), eps, 0.1)
    assert solved.recovery
    np.testing.assert_allclose(solved.weights, [[0.75, 0.25]], atol=1e-9)
    assert solved.cost_excess == pytest.approx(0.15, abs=1e-9)


def random_e_step(rng, states, actions):
    """(Q_r, Q_c, eps, d) over six decades of scale, correlated or not, feasible or not."""
    q_reward = rng.normal(size=(states, actions)) * 10 ** rng.uniform(-3, 3) + 10 * rng.normal(
        size=(states, 1)
    )
    q_cost = rng.normal(size=(states, actions)) * 10 ** rng.uniform(-2, 2) + rng.normal(
        size=(states, 1)
    )
    if rng.random() < 0.3:
        q_cost += q_reward * rng.normal()
    spread = (q_cost - q_cost.mean(axis=1, keepdims=True)).std()
    return (
        q_reward,
        q_cost,
        10 ** rng.uniform(-3, -0.5),
        q_cost.mean() + 0.4 * spread * rng.normal(),
    )


def test_e_step_satisfies_the_optimality_conditions_on_random_instances():
    """1000 instances satisfy the KKT conditions, which imply optimality.

    KL in its bound, cost at its threshold, complementary slackness, softmax form.
    """
    rng = np.random.default_rng(2)
    recoveries = active = 0
    iterations = []
    for _ in range(INSTANCES):
        q_reward, q_cost, eps, threshold = random_e_step(
            rng, rng.integers(2, 40), rng.integers(2, 33)
        )
        solved = e_step(q_reward, q_cost, eps, threshold)
        iterations.append(solved.iterations)
        scale = (q_cost - q_cost.mean(axis=1, keepdims=True)).std()
        np.testing.assert_allclose(solved.weights.sum(axis=1), 1.0, atol=1e-12)
        assert solved.kl <= eps * (1 + 1e-8)
        recoveries += solved.recovery
        if solved.recovery:
            assert solved.cost_excess > 0
            continue
        active += solved.lam > 0
        assert solved.kkt_residual <= 1e-8
        assert solved.cost_excess <= 1e-8 * scale
        assert solved.lam >= 0
        reward_scale = (q_reward - q_reward.mean(axis=1, keepdims=True)).std()
        assert solved.lam * abs(solved.cost_excess) <= 1e-7 * reward_scale
        if solved.eta > 0:
            form, _, _ = softmax_with_kl((q_reward - solved.lam * q_cost) / solved.eta)
            np.testing.assert_allclose(solved.weights, form, atol=1e-7)
    assert recoveries > 100
    assert active > 100
    # Newton's method converges quadratically; a wrong derivative would still descend, but slowly.
    assert np.median(iterations) <= 4
    assert np.quantile(iterations, 0.99) <= 12
    assert max(iterations) <= 25


def test_e_step_multipliers_agree_with_scipy():
    """(eta, lam) themselves agree with nested scalar solvers.

    Brent's root for KL = eps inside Brent's root for the cost.
    """
    rng = np.random.default_rng(3)
    compared = 0
    while compared < 40:
        q_reward, q_cost, eps, threshold = random_e_step(rng, 6, 5)
        solved = e_step(q_reward, q_cost, eps, threshold)
        if solved.recovery or solved.lam == 0.0:
            continue
        compared += 1
        unit = (q_reward - q_reward.mean(axis=1, keepdims=True)).std()

        def at(lam, q_reward=q_reward, q_cost=q_cost, eps=eps, threshold=threshold, unit=unit):
            def kl_excess(log_eta):
                return softmax_with_kl((q_reward - lam * q_cost) * np.exp(-log_eta) / unit)[2] - eps

            eta = unit * np.exp(brentq(kl_excess, -12.0, 30.0, xtol=1e-14))
            q, _, _ = softmax_with_kl((q_reward - lam * q_cost) / eta)
            return eta, float(np.vdot(q, q_cost)) / len(q) - threshold

        lam = brentq(lambda lam, at=at: at(lam)[1], 0.0, 4 * solved.lam, xtol=1e-13 * solved.lam)
        assert solved.lam == pytest.approx(lam, rel=1e-6)
        assert solved.eta == pytest.approx(at(lam)[0], rel=1e-6)


def test_e_step_agrees_with_cvxpy():
    """The primal agrees with an exponential cone program, infeasible instances included."""
    rng = np.random.default_rng(4)
    states, actions = 4, 5
    q = cp.Variable((states, actions), nonneg=True)
    reward_p, cost_p = cp.Parameter((states, actions)), cp.Parameter((states, actions))
    eps_p, slack_p = cp.Parameter(nonneg=True), cp.Parameter()
    kl = cp.sum(cp.rel_entr(q, np.full((states, actions), 1 / actions))) / states
    constraints = [
        cp.sum(q, axis=1) == 1,
        kl <= eps_p,
        cp.sum(cp.multiply(q, cost_p)) / states <= slack_p,
    ]
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(q, reward_p)) / states), constraints)
    infeasible = inaccurate = 0
    for _ in range(INSTANCES):
        reward, cost = rng.normal(size=(2, states, actions))
        eps, slack = 10 ** rng.uniform(-2, -0.5), 0.4 * rng.normal()
        solved = e_step(reward, cost, eps, slack)
        reward_p.value, cost_p.value, eps_p.value, slack_p.value = reward, cost, eps, slack
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # cvxpy warns where Clarabel stops early, near the edge of feasibility
            problem.solve(solver=cp.CLARABEL)
        if "inaccurate" in problem.status:
            inaccurate += 1
        elif solved.recovery:
            infeasible += 1
            assert problem.status == "infeasible"
        else:
            assert np.mean(np.sum(solved.weights * reward, axis=1)) == pytest.approx(
                problem.value, abs=2e-6
            )
    assert infeasible > 50
    assert inaccurate < 0.01 * INSTANCES


def test_recovery_has_the_lowest_reachable_cost():
    """The recovery q agrees with scipy's direct minimisation of the cost over the KL ball."""
    rng = np.random.default_rng(5)
    for _ in range(10):
        cost, eps = rng.normal(size=(1, 4)), 0.1
        solved = e_step(rng.normal(size=(1, 4)), cost, eps, -10.0)
        direct = minimize(
            lambda q, cost=cost: q @ cost[0],
            np.full(4, 0.25),
            jac=lambda q, cost=cost: cost[0],
            bounds=[(1e-9, 1)] * 4,
            constraints=[
                LinearConstraint(np.ones((1, 4)), 1, 1),
                NonlinearConstraint(
                    lambda q: q @ np.log(4 * q), -np.inf, eps, jac=lambda q: np.log(4 * q) + 1
                ),
            ],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert solved.recovery
        assert solved.weights[0] @ cost[0] == pytest.approx(direct.fun, abs=1e-6)


def test_e_step_puts_all_weight_on_the_best_action_where_the_bound_allows_it():
    """eps above KL(one action || uniform) = ln K: no tilt reaches it, and that is no violation."""
    solved = e_step(np.array([[0.0, 1.0, 3.0]]), np.zeros((1, 3)), 2.0, np.inf)
    np.testing.assert_allclose(solved.weights, [[0.0, 0.0, 1.0]], atol=1e-9)
    assert solved.kl == pytest.approx(np.log(3.0))
    assert solved.kkt_residual == 0.0


@pytest.mark.parametrize("cost", [0.0, 2.0])
def test_e_step_when_actions_make_no_difference(cost):
    """Constant Q values (an untrained critic) give the uniform q; constant excess is a recovery."""
    solved = e_step(np.full((3, 4), 7.0), np.full((3, 4), cost), 0.02, 1.0)
    np.testing.assert_allclose(solved.weights, 0.25)
    assert solved.recovery == (cost > 1.0)
    costs = np.arange(12.0).reshape(3, 4)  # of mean 5.5
    solved = e_step(np.full((3, 4), 7.0), costs, 0.02, 5.4)
    assert solved.cost_excess <= 1e-9
    solved = e_step(np.full((3, 4), 7.0), costs, 0.02, 5.6)
    np.testing.assert_allclose(solved.weights, 0.25)
    # Differences that are rounding errors of large values are no differences.
    noise = 1e-5 * np.random.default_rng(0).normal(size=(3, 4))
    np.testing.assert_allclose(e_step(1e9 + noise, costs, 0.02, 5.6).weights, 0.25)


def test_e_step_stays_feasible_where_reward_and_cost_are_the_same():
    """The dual's Hessian is singular there, and the multiplier's optimum a limit."""
    values = np.random.default_rng(0).normal(size=(6, 5))
    for slack in (0.05, 0.2):
        solved = e_step(values, values, 0.1, values.mean() + slack)
        assert solved.cost_excess <= 1e-9
        assert solved.kl <= 0.1 * (1 + 1e-8)
        assert solved.lam == pytest.approx(1.0, abs=1e-3)
        assert not solved.recovery


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-4, 0.5))
def test_tilt_reaches_its_kl(seed, eps):
    """The tilt used in recovery meets KL = eps."""
    scores = np.random.default_rng(seed).normal(size=(5, 6))
    weights, _, _ = tilt_to_kl(scores, eps)
    kl = float(np.mean(np.sum(weights * np.log(np.maximum(6 * weights, 1e-300)), axis=1)))
    assert kl == pytest.approx(eps, rel=1e-8)


def test_effective_sample_size_by_hand():
    """Uniform over four counts four; (1/2, 1/2, 0, 0) counts two; their mean is three."""
    weights = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    solved = dataclasses.replace(e_step(weights, weights, 0.1, np.inf), weights=weights)
    assert solved.effective_sample_size() == pytest.approx(3.0)


def test_gaussian_kl_split_by_hand():
    """Each divergence by hand, summed over two dimensions.

    A shift by one old deviation: KL_mu = 1/2 each. A doubled deviation: KL_Sigma = (1/4 - 1 + 2 ln
    2)/2 each.
    """
    old_mean, old_std = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
    kl_mean, kl_covariance = gaussian_kl_split(
        torch.tensor([[1.0, 3.0]]), 2 * old_std, old_mean, old_std
    )
    assert kl_mean.item() == pytest.approx(1.0)
    assert kl_covariance.item() == pytest.approx(0.25 - 1 + 2 * np.log(2.0), rel=1e-6)


def test_weighted_moments_by_hand():
    """Two samples at -1 and 3 old deviations, weighted 1/4 and 3/4.

    The excess over uniform weights is -1/4 and 1/4: first moment (1 + 3)/4 = 1, second 1 + (9 -
    1)/4 = 3. Uniform weights have the old policy's own moments, 0 and 1, whatever the samples.
    """
    old_mean, old_std = torch.tensor([[5.0]]), torch.tensor([[2.0]])
    actions = torch.tensor([[[3.0], [11.0]]])
    first, second = weighted_moments(actions, torch.tensor([[0.25, 0.75]]), old_mean, old_std)
    assert (first.item(), second.item()) == (1.0, 3.0)
    first, second = weighted_moments(actions, torch.tensor([[0.5, 0.5]]), old_mean, old_std)
    assert (first.item(), second.item()) == (0.0, 1.0)


def test_m_step_multipliers_by_hand():
    """Shifts of (2, 0) and (0, 2) deviations: KL 2, 16 times a bound of 1/8, so 1 + alpha = 4.

    Second moments (1.2, 1) and (1, 0.8): KL 0.2^2 / 4 = 0.01, four times a bound of 0.0025, so 1 +
    beta = 2. Within the bounds both multipliers are 0.
    """
    first, second = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.2, 1.0], [1.0, 0.8]])
    assert multipliers(first, second, 0.125, 0.0025) == pytest.approx((3.0, 1.0), rel=1e-5)
    assert multipliers(first, second, 2.0, 0.01) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert multipliers(first, second, 3.0, 0.1) == (0.0, 0.0)


def test_m_step_multipliers_make_the_fit_meet_its_bounds():
    """The policy that minimises the Lagrangian at these multipliers has exactly the bounds' KL."""
    torch.manual_seed(0)
    first, second = torch.randn(20, 3).double(), 1 + 0.1 * torch.randn(20, 3).double()
    alpha, beta = multipliers(first, second, 0.1, 0.0005)
    shift = torch.zeros(20, 3, dtype=torch.double, requires_grad=True)
    ratio = torch.ones(20, 3, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([shift, ratio], max_iter=200, tolerance_grad=1e-12)
    old = torch.zeros_like(shift), torch.ones_like(ratio)

    def closure():
        optimiser.zero_grad()
        kl = [kl.mean() for kl in gaussian_kl_split(shift, ratio, *old)]
        fit = weighted_nll_split(shift, ratio, first, second)
        loss = fit + alpha * kl[0] + beta * kl[1]
        loss.backward()
        return loss

    optimiser.step(closure)
    kl_mean, kl_std = (kl.mean().item() for kl in gaussian_kl_split(shift, ratio, *old))
    assert kl_mean == pytest.approx(0.1, rel=1e-4)
    assert kl_std == pytest.approx(0.0005, rel=0.05)  # to second order


def test_weighted_likelihood_is_the_sum_over_samples():
    """The form in moments agrees with torch's densities.

    q sums to one over the K samples, so the samples are summed, not averaged. The samples' own
    moments under uniform weights are 0 and 1 here, as those of the old policy are.
    """
    torch.manual_seed(0)
    mean, old_mean = torch.randn(2, 3, 2, dtype=torch.float64)
    std, old_std = torch.rand(2, 3, 2, dtype=torch.float64) + 0.5
    noise = torch.randn(3, 4, 2, dtype=torch.float64)
    noise -= noise.mean(dim=1, keepdim=True)
    noise /= noise.square().mean(dim=1, keepdim=True).sqrt()
    actions = old_mean.unsqueeze(1) + noise * old_std.unsqueeze(1)
    weights = torch.rand(3, 4, dtype=torch.float64).softmax(dim=1)
    moments = weighted_moments(actions, weights, old_mean, old_std)

    def direct(mean, std):
        normal = torch.distributions.Normal
        a = normal(mean.unsqueeze(1), old_std.unsqueeze(1)).log_prob(actions).sum(-1)
        b = normal(old_mean.unsqueeze(1), std.unsqueeze(1)).log_prob(actions).sum(-1)
        return -(weights * (a + b)).sum(dim=1).mean()

    def by_moments(mean, std):
        return weighted_nll_split((mean - old_mean) / old_std, std / old_std, *moments)

    other = (mean + 0.3, std * 1.2)
    difference = by_moments(*other) - by_moments(mean, std)
    assert difference.item() == pytest.approx((direct(*other) - direct(mean, std)).item())


# ---- costs and configuration ----


def test_episode_costs_are_of_this_update_only():
    """J_C is the mean of the episodes that end in this update, wherever they began.

    A moving average would be stale.
    """
    costs = EpisodeCosts(2, 1)
    for step in range(3):
        costs.add(np.array([[1.0], [10.0]]), np.array([step == 2, False]))
    assert costs.estimate()[0] == pytest.approx([3.0])
    costs.start_update()
    costs.add(
        np.array([[1.0], [10.0]]), np.array([False, True])
    )  # began in the last update: 4 steps of 10
    estimate, length = costs.estimate()
    assert estimate == pytest.approx([40.0])
    assert length == 4.0


def test_episode_costs_fall_back_on_partial_data():
    """Where no episode ended: cost per step (11/2) times the longest running episode (3 steps)."""
    costs = EpisodeCosts(2, 1)
    for _ in range(3):
        costs.add(np.array([[1.0], [10.0]]), np.array([False, False]))
    assert costs.estimate()[0] == pytest.approx([16.5])
    assert costs.mean_length() == 3.0
    costs.add(np.array([[1.0], [10.0]]), np.array([True, False]))  # 4 steps, of cost 4
    assert costs.estimate() == (pytest.approx([4.0]), 4.0)
    costs.start_update()
    costs.add(np.array([[2.0], [0.0]]), np.array([True, False]))  # one step
    costs.add(np.array([[2.0], [0.0]]), np.array([False, False]))
    assert costs.mean_length() == 2.5
    assert costs.estimate() == (pytest.approx([2.0]), 1.0)
    # Now nothing ends: cost per step 1, and the second episode is 7 steps long, more than 1 before.
    costs.start_update()
    costs.add(np.array([[2.0], [0.0]]), np.array([False, False]))
    assert costs.estimate() == (pytest.approx([7.0]), 7.0)
    # A reset of the environments drops what the running episodes have cost so far.
    costs.restart_episodes()
    costs.start_update()
    assert costs.estimate() == (pytest.approx([0.0]), 1.0)
    costs.add(np.array([[2.0], [3.0]]), np.array([True, True]))
    assert costs.finished == [[2.0], [3.0]]
    assert costs.lengths == [1.0, 1.0]


def test_unknown_configuration_key_names_the_nearest():
    """A misspelt key is not ignored: a run with silent defaults is a wrong result."""
    from scpo_bench.baselines.cpo import CPOConfig

    with pytest.raises(
        ValueError, match=r"CPOConfig\.cost_limt: unknown field; did you mean 'cost_limit'\?"
    ):
        resolve_config(CPOConfig, {"cost_limt": 3.0})
