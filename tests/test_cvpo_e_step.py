"""CVPO's E-step on instances where its dual has a kink or no minimum, against a cone program."""

from __future__ import annotations

import contextlib
import functools
import warnings

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scpo_bench.baselines.cvpo_dual import e_step

STATES, ACTIONS = 4, 5


@functools.cache
def cone_program():
    """(problem, its parameters Q_r, Q_c, eps, d): the E-step's primal."""
    q = cp.Variable((STATES, ACTIONS), nonneg=True)
    reward, cost = (cp.Parameter((STATES, ACTIONS)) for _ in range(2))
    eps, threshold = cp.Parameter(nonneg=True), cp.Parameter()
    kl = cp.sum(cp.rel_entr(q, np.full((STATES, ACTIONS), 1 / ACTIONS))) / STATES
    constraints = [
        cp.sum(q, axis=1) == 1,
        kl <= eps,
        cp.sum(cp.multiply(q, cost)) / STATES <= threshold,
    ]
    problem = cp.Problem(cp.Maximize(cp.sum(cp.multiply(q, reward)) / STATES), constraints)
    return problem, (reward, cost, eps, threshold)


def highest_value(*values):
    """The primal's optimal value, or None: infeasible, or too near the edge for the solver."""
    problem, parameters = cone_program()
    for parameter, value in zip(parameters, values):
        parameter.value = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy warns where Clarabel stops early
        with contextlib.suppress(cp.error.SolverError):
            problem.solve(solver=cp.CLARABEL)
            return problem.value if problem.status == "optimal" else None
    return None


def test_a_bound_that_no_action_reaches_does_not_hide_the_cost():
    """eps above ln K: the KL bound never binds, and the cost must hold all the same.

    One state, actions worth 0 and 1 with costs 0 and 1, d = 1/4: q = (3/4, 1/4) of value 1/4. The
    other vertex, (0, 1), has an excess of 3/4.
    """
    solved = e_step(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]]), 1.0, 0.25)
    np.testing.assert_allclose(solved.weights, [[0.75, 0.25]], atol=1e-8)
    assert solved.kkt_residual <= 1e-8
    assert not solved.recovery


def test_the_multiplier_mixes_two_best_actions_where_the_kl_bound_is_slack():
    """Three actions worth (0, 2, 3) with costs (0, 1, 3), d = 2, eps above ln K: a linear program.

    Mixing actions 2 and 3 equally costs 2 and is worth 5/2; any other mix is worth less: from 2 to
    3, a unit of cost is worth 1/2, so lam = 1/2.
    """
    solved = e_step(np.array([[0.0, 2.0, 3.0]]), np.array([[0.0, 1.0, 3.0]]), 2.0, 2.0)
    np.testing.assert_allclose(solved.weights, [[0.0, 0.5, 0.5]], atol=1e-6)
    assert solved.lam == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_costs_proportional_to_rewards_leave_nothing_to_gain_inside_the_limit(factor):
    """Q_c = f Q_r: the best value is the threshold's, d / f, whichever q attains it.

    Newton's method stops short of it: the dual's minimum is a limit, eta to 0.
    """
    values = np.random.default_rng(0).normal(size=(6, 5))
    for share in (-0.2, 0.05, 0.2):
        threshold = factor * (values.mean() + share)
        solved = e_step(values, factor * values, 0.3, threshold)
        value = float(np.vdot(solved.weights, values)) / 6
        assert value == pytest.approx(threshold / factor, abs=1e-7)
        assert solved.cost_excess <= 1e-7 * factor
        assert solved.kl <= 0.3
        assert solved.kkt_residual <= 1e-7


def instance(seed, family, log_eps, share):
    """(Q_r, Q_c, eps, d) of a family; d is ``share`` of the way from the lowest cost to the mean.

    "like": Q_c a multiple of Q_r; "nearly": up to a difference of 1e-6; "opposed": a negative
    multiple; "steps": costs 0 or 1, as of a violated bound; "ties": few distinct values.
    """
    rng = np.random.default_rng(seed)
    reward, cost = rng.normal(size=(2, STATES, ACTIONS))
    scale = 10 ** rng.uniform(-1, 1)
    if family in ("like", "opposed", "nearly"):
        sign = -1.0 if family == "opposed" else 1.0
        cost = sign * scale * (reward + (1e-6 * cost if family == "nearly" else 0.0))
    elif family == "steps":
        cost = (cost > 0.5).astype(np.float64)
    elif family == "ties":
        reward, cost = np.round(reward), np.round(cost)
    lowest = cost.min(axis=1).mean()
    return reward, cost, 10**log_eps, lowest + share * (cost.mean() - lowest)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    family=st.sampled_from(["any", "like", "nearly", "opposed", "steps", "ties"]),
    log_eps=st.floats(-2.0, 0.5),
    share=st.floats(0.02, 1.9),
)
def test_e_step_agrees_with_a_cone_program_on_degenerate_families(seed, family, log_eps, share):
    """Value, cost and KL, wherever the primal has a solution; ln K = 1.6 is inside eps's range."""
    reward, cost, eps, threshold = instance(seed, family, log_eps, share)
    best = highest_value(reward, cost, eps, threshold)
    solved = e_step(reward, cost, eps, threshold)
    np.testing.assert_allclose(solved.weights.sum(axis=1), 1.0, atol=1e-12)
    assert solved.kl <= eps * (1 + 1e-7)
    scale = max(float(np.std(cost - cost.mean(axis=1, keepdims=True))), 1e-12)
    if best is None:  # infeasible, or so close that the reference cannot tell
        assert solved.recovery or solved.cost_excess <= 1e-7 * scale
        return
    if solved.recovery:  # the reference's own tolerance at the edge of feasibility
        assert solved.cost_excess <= 1e-5 * scale
        return
    assert solved.cost_excess <= 1e-7 * scale
    assert solved.kkt_residual <= 1e-6
    assert float(np.vdot(solved.weights, reward)) / STATES == pytest.approx(best, abs=2e-5)
