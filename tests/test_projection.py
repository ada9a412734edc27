"""The projection: agreement with a reference solver, exact feasibility, special cases by hand."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scpo_bench.scpo.projection import Certificate, project


def reference(c: Certificate, target: np.ndarray, margin: np.ndarray | float = 0.0) -> float:
    """Optimal squared distance by cvxpy, in the coordinates z.

    Solved in units of the problem's own size.
    """
    unit = np.linalg.norm(target)
    R, ceiling = c.factor, np.maximum(c.values, -margin)
    z = cp.Variable(len(target))
    constraints = []
    for i, (g, s, e, L) in enumerate(
        zip(c.values, c.slopes * unit, c.slope_errors * unit, c.smoothness * unit**2)
    ):
        bound = g + s @ z + e @ cp.abs(z) + L / 2 * cp.sum_squares(R @ z)
        constraints.append(bound <= ceiling[i])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(R @ z - target / unit)), constraints)
    return solved(problem) * unit**2


def solved(problem: cp.Problem) -> float:
    """The optimal value, to a tight tolerance."""
    with warnings.catch_warnings():
        # At this tolerance Clarabel may call a good solution inaccurate.
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return problem.value


def random_problem(rng: np.random.Generator) -> tuple[Certificate, np.ndarray]:
    """A problem of any size up to 64, often degenerate.

    Active, inactive, with equal rows, without slope, with L = 0, with its boundary at z = 0, with
    orthonormal columns or without.
    """
    k = int(rng.choice([1, 2, 4, 8, 16, 64], p=[0.2, 0.25, 0.25, 0.2, 0.07, 0.03]))
    m = int(rng.choice([1, 2, 4, 16, 33, 64]))
    values = -rng.exponential(0.3, k) * rng.integers(0, 2, k) ** rng.integers(0, 2)
    L = rng.exponential(3, k) * (rng.random(k) > 0.1)
    slopes = rng.normal(size=(k, m))
    errors = np.outer(L, 10 ** rng.uniform(-5, -1, m) / 2)
    if rng.random() < 0.2 and k > 1:
        slopes[1], values[1] = slopes[0], values[0]
    if rng.random() < 0.1:
        slopes[:] = 0
    R = np.eye(m)
    if rng.random() < 0.5:
        columns = np.eye(m) + 0.5 * rng.normal(size=(m, m)) / np.sqrt(m)
        R = np.linalg.qr(columns / np.linalg.norm(columns, axis=0))[1]
    target = rng.normal(size=m) * 10 ** rng.uniform(-2, 1)
    return Certificate(values, slopes, errors, L, R), target


def orthonormal(values, slopes, errors=0.0, L=0.0):
    """A certificate along orthonormal columns; errors and L: one number, or one per constraint."""
    values, slopes = np.asarray(values, np.float64), np.asarray(slopes, np.float64)
    k, m = slopes.shape
    errors = np.broadcast_to(np.asarray(errors, np.float64).reshape(-1, 1), (k, m))
    return Certificate(values, slopes, errors, np.full(k, L, np.float64), np.eye(m))


def one_dimensional(value, slope, error=0.0, L=0.0):
    """A certificate value + slope z + error |z| + L/2 z^2 <= 0."""
    return orthonormal([value], [[slope]], error, L)


@pytest.mark.parametrize("block", range(10))
def test_agrees_with_cvxpy_and_is_feasible(block):
    """400 random problems: the distance is cvxpy's, and constraints hold in floating point."""
    rng = np.random.default_rng(block)
    for _ in range(40):
        certificate, target = random_problem(rng)
        result = project(certificate, target)
        assert (certificate.bound(result.z) <= 0).all()
        step = certificate.factor @ result.z
        assert np.linalg.norm(step) <= np.linalg.norm(target) * (1 + 1e-12)
        best = reference(certificate, target)
        # Relative to what staying would cost.
        assert np.sum((step - target) ** 2) - best <= 1e-7 * target @ target


def paper_problem(rng, d, m, k):
    """(D [d, m], g0 [k], G [k, m], l [k], raw step [d]), with raw the first column of D."""
    D = rng.normal(size=(d, m)) * 10 ** rng.uniform(-1, 0.5, m)
    D[:, 1] = D[:, 0] + 0.05 * D[:, 1]  # far from orthogonal
    lengths = np.linalg.norm(D, axis=0)
    g0 = -rng.exponential(0.2, k)
    G = g0[:, None] + rng.normal(size=(k, d)) @ D / np.sqrt(d) + 0.1 * lengths * rng.random((k, m))
    return D, g0, G, rng.exponential(1.0, k), D[:, 0]


def projected_by_us(D, g0, G, ell, raw, margin=0.0):
    """xi [m] for the problem in the paper's terms, by way of the bank's unit columns."""
    lengths = np.linalg.norm(D, axis=0)
    Q, R = np.linalg.qr(D / lengths)
    slopes = (G - g0[:, None]) / lengths
    certificate = Certificate(g0, slopes, np.outer(ell, lengths / 2), ell, R)
    return project(certificate, Q.T @ raw, margin).z / lengths


def equation_29(xi, D, g0, G, ell):
    """[k]: (1 - 1'xi) g0 + G xi + (ell / 2) [xi'S xi + |xi|'diag(S)], with NumPy."""
    S = D.T @ D
    return (1 - xi.sum()) * g0 + G @ xi + ell / 2 * (xi @ S @ xi + np.abs(xi) @ np.diag(S))


@pytest.mark.parametrize("k", [1, 5, 40, 2000])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_equation_29_as_the_paper_states_it(k, margin):
    """A bank of any columns, in the paper's variables xi: the distance is cvxpy's, to 1e-7.

    With 2000 constraints the solver sees only some at a time: the result must not depend on that.
    """
    rng, active = np.random.default_rng(k), 0
    for _ in range(2 if k > 1000 else 8):
        D, g0, G, ell, raw = paper_problem(rng, 6, int(rng.integers(2, 5)), k)
        xi = projected_by_us(D, g0, G, ell, raw, margin)
        ceiling = np.maximum(g0, -margin)
        assert (equation_29(xi, D, g0, G, ell) <= ceiling + 1e-12).all()
        x, S = cp.Variable(len(xi)), D.T @ D
        quadratic = cp.quad_form(x, cp.psd_wrap(S)) + cp.abs(x) @ np.diag(S)
        region = (1 - cp.sum(x)) * g0 + G @ x + cp.multiply(ell / 2, quadratic) <= ceiling
        best = solved(cp.Problem(cp.Minimize(cp.sum_squares(D @ x - raw)), [region]))
        assert np.sum((D @ xi - raw) ** 2) - best <= 1e-7 * raw @ raw
        active += best > 1e-3 * raw @ raw
    assert active >= 2  # where the raw step itself is certified there is nothing to compare


def test_thousands_of_constraints_are_all_kept():
    """A disc of 3000 half planes: what the first round leaves out is added until none is cut."""
    angles = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    normals = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    certificate = orthonormal(np.full(3000, -1.0), normals)
    for angle in np.random.default_rng(0).uniform(0, 2 * np.pi, 20):
        target = 3 * np.array([np.cos(angle), np.sin(angle)])
        result = project(certificate, target)
        assert (certificate.bound(result.z) <= 0).all()
        assert np.linalg.norm(result.z) == pytest.approx(1.0, abs=1e-5)
        assert np.linalg.norm(result.z - target) == pytest.approx(2.0, abs=1e-5)


def test_cutting_planes_do_not_stop_at_the_first_solution():
    """The 64 constraints that look closest do not bind; the one that does looks the furthest.

    Scaling the first solution towards 0 would be safe too, but lose the part along the bound.
    """
    first = np.tile([0.0, 0.0, 5.0], (100, 1))  # steep, across what is proposed
    certificate = orthonormal([-1e-3] * 100 + [-1.0], np.vstack([first, [1.0, 0.0, 0.0]]))
    result = project(certificate, np.array([3.0, 3.0, 0.0]))
    assert result.z == pytest.approx([1.0, 3.0, 0.0], abs=1e-6)


def test_one_constraint_by_hand():
    """-1 + z <= 0: from a proposal of 3 the step stops at z = 1."""
    certificate = one_dimensional(-1.0, 1.0)
    result = project(certificate, np.array([3.0]))
    assert result.status == "solved"
    assert result.z == pytest.approx([1.0], abs=1e-8)
    assert certificate.bound(result.z)[0] <= 0


def test_slope_error_and_curvature_by_hand():
    """-1 + z + 0.5 |z| + (3 / 2) z^2 <= 0 has its root at z = (-1.5 + sqrt(8.25)) / 3."""
    result = project(one_dimensional(-1.0, 1.0, 0.5, 3.0), np.array([2.0]))
    assert result.z == pytest.approx([(-1.5 + np.sqrt(8.25)) / 3], abs=1e-8)


def test_bound_by_hand():
    """Two columns at 60 degrees: |R z|^2 = z1^2 + z1 z2 + z2^2, and each column's own error."""
    R = np.array([[1.0, 0.5], [0.0, np.sqrt(0.75)]])
    certificate = Certificate(
        np.array([-2.0]), np.array([[1.0, -3.0]]), np.array([[0.25, 0.5]]), np.array([4.0]), R
    )
    z = np.array([2.0, -1.0])
    assert certificate.linear(z) == pytest.approx([-2 + 2 + 3])
    assert certificate.uncertainty(z) == pytest.approx([0.5 + 0.5 + 2 * 3])
    assert certificate.bound(z) == pytest.approx([10.0])


def test_inactive_proposal_is_returned_unchanged():
    """What the certificate allows is not altered, to the last bit."""
    target = np.array([0.1, -0.2])
    result = project(orthonormal([-9.0], np.ones((1, 2)), 0.0, 1.0), target)
    assert (result.status, result.solver_iterations) == ("inactive", 0)
    assert (result.z == target).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_the_size_of_the_proposal_does_not_spoil_the_scaling(scale):
    """A badly scaled problem once was falsely held: in units of the proposal all are the same."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        c, target = random_problem(rng)
        one = project(c, target)
        other = project(
            Certificate(
                c.values,
                c.slopes / scale,
                c.slope_errors / scale,
                c.smoothness / scale**2,
                c.factor,
            ),
            target * scale,
        )
        assert one.status == other.status
        assert other.z / scale == pytest.approx(one.z, abs=1e-5 * np.linalg.norm(target))


def test_a_long_proposal_is_not_exceeded():
    """No step is longer than its proposal: the guard's trust region rests on that."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        certificate, target = random_problem(rng)
        step = certificate.factor @ project(certificate, target).z
        assert np.linalg.norm(step) <= np.linalg.norm(target) * (1 + 1e-12)


def test_boundary_start_slides_along_the_constraint():
    """g = 0, slope along the first axis: the second component of the proposal survives."""
    certificate = orthonormal([0.0], [[1.0, 0.0]])
    result = project(certificate, np.array([1.0, 1.0]))
    assert result.z == pytest.approx([0.0, 1.0], abs=1e-6)
    assert certificate.bound(result.z)[0] <= 0


def test_nothing_certified_means_staying():
    """g = 0, no slope, L > 0: only z = 0 is certified, and it is returned."""
    result = project(orthonormal([0.0], np.zeros((1, 3)), 0.0, 1.0), np.ones(3))
    assert result.status == "held"
    assert not result.z.any()


def test_unsafe_start_is_refused():
    """Nothing can be certified from an unsafe point; the error names the constraint."""
    with pytest.raises(ValueError, match="constraint 1 is violated"):
        project(orthonormal([-1.0, 0.2], np.ones((2, 1)), 0.0, 1.0), np.ones(1))


@pytest.mark.parametrize("field", ["value", "slope", "error", "L", "target"])
def test_what_is_not_finite_is_refused(field):
    """A NaN would pass every comparison and be deployed as a certified step."""
    parts = {"value": -1.0, "slope": 1.0, "error": 0.1, "L": 1.0, "target": 3.0, field: np.nan}
    target = np.array([parts.pop("target")])
    with pytest.raises(ValueError, match="must be finite"):
        project(one_dimensional(**parts), target)


def test_margin_shrinks_to_what_there_is():
    """A margin larger than the slack at z = 0 must not make the problem infeasible."""
    certificate = one_dimensional(-0.01, 1.0)
    towards = project(certificate, np.array([1.0]), margin=0.5)
    assert certificate.bound(towards.z)[0] <= -0.01
    assert project(certificate, np.array([-1.0]), margin=0.5).z == pytest.approx([-1.0])


def test_margins_can_differ_between_constraints():
    """z_1 <= 1 and z_2 <= 1 with margins 0.25 and 0.5."""
    result = project(
        orthonormal([-1.0, -1.0], np.eye(2)), np.array([3.0, 3.0]), margin=np.array([0.25, 0.5])
    )
    assert result.z == pytest.approx([0.75, 0.5], abs=1e-7)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_any_scale_is_feasible(seed, scale):
    """Units do not matter to the guarantee: at any scale of the target bound <= 0."""
    certificate, target = random_problem(np.random.default_rng(seed))
    result = project(certificate, target * scale)
    assert (certificate.bound(result.z) <= 0).all()
    length = np.linalg.norm(certificate.factor @ result.z)
    assert length <= np.linalg.norm(target) * scale * (1 + 1e-12)
