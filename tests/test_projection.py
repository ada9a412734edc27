"""The projection: agreement with a reference solver, exact feasibility, special cases by hand."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scpo_bench.scpo.projection import Certificate, project


def reference(c: Certificate, target: np.ndarray, radius: float) -> float:
    """Optimal squared distance by cvxpy, with the problem stated as in the paper.

    Solved in units of the problem's own size.
    """
    unit = min(np.linalg.norm(target), radius)
    z = cp.Variable(len(target))
    constraints = [cp.norm(z, 2) <= radius / unit]
    for g, s, e, L in zip(c.values, c.slopes * unit, c.slope_errors * unit, c.smoothness * unit**2):
        constraints.append(g + s @ z + e * cp.norm1(z) + L / 2 * cp.sum_squares(z) <= 0)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(z - target / unit)), constraints)
    with warnings.catch_warnings():
        # At this tolerance Clarabel may call a good solution inaccurate.
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    return problem.value * unit**2


def random_problem(rng: np.random.Generator) -> tuple[Certificate, np.ndarray, float]:
    """A problem of any size up to 64, often degenerate.

    Active, inactive, with equal rows, without slope, with L = 0, or with its boundary at z = 0.
    """
    k = int(rng.choice([1, 2, 4, 8, 16, 64], p=[0.2, 0.25, 0.25, 0.2, 0.07, 0.03]))
    m = int(rng.choice([1, 2, 4, 16, 33, 64]))
    values = -rng.exponential(0.3, k) * rng.integers(0, 2, k) ** rng.integers(0, 2)
    L = rng.exponential(3, k) * (rng.random(k) > 0.1)
    slopes = rng.normal(size=(k, m))
    errors = L * 10 ** rng.uniform(-5, -1) / 2
    if rng.random() < 0.2 and k > 1:
        slopes[1], values[1] = slopes[0], values[0]
    if rng.random() < 0.1:
        slopes[:] = 0
    target = rng.normal(size=m) * 10 ** rng.uniform(-2, 1)
    return Certificate(values, slopes, errors, L), target, 10 ** rng.uniform(-1, 1)


def one_dimensional(value, slope, error=0.0, L=0.0):
    """A certificate value + slope z + error |z| + L/2 z^2 <= 0."""
    arrays = (np.array([value]), np.array([[slope]]), np.array([error]), np.array([L]))
    return Certificate(*arrays)


@pytest.mark.parametrize("block", range(10))
def test_agrees_with_cvxpy_and_is_feasible(block):
    """400 random problems: the distance is cvxpy's, and constraints hold in floating point."""
    rng = np.random.default_rng(block)
    for _ in range(40):
        certificate, target, radius = random_problem(rng)
        result = project(certificate, target, radius)
        assert (certificate.bound(result.z) <= 0).all()
        assert np.linalg.norm(result.z) <= radius * (1 + 1e-12)
        assert (result.bound == certificate.bound(result.z)).all()
        best = reference(certificate, target, radius)
        # Relative to what staying would cost.
        assert np.sum((result.z - target) ** 2) - best <= 1e-7 * target @ target


def test_one_constraint_by_hand():
    """-1 + z <= 0: from a proposal of 3 the step stops at z = 1."""
    result = project(one_dimensional(-1.0, 1.0), np.array([3.0]), 10.0)
    assert result.status == "solved"
    assert result.z == pytest.approx([1.0], abs=1e-8)
    assert result.bound[0] <= 0


def test_slope_error_and_curvature_by_hand():
    """-1 + z + 0.5 |z| + (3 / 2) z^2 <= 0 has its root at z = (-1.5 + sqrt(8.25)) / 3."""
    result = project(one_dimensional(-1.0, 1.0, 0.5, 3.0), np.array([2.0]), 10.0)
    assert result.z == pytest.approx([(-1.5 + np.sqrt(8.25)) / 3], abs=1e-8)


def test_inactive_proposal_is_returned_unchanged():
    """What the certificate allows is not altered, to the last bit."""
    target = np.array([0.1, -0.2])
    certificate = Certificate(np.array([-9.0]), np.ones((1, 2)), np.zeros(1), np.ones(1))
    result = project(certificate, target, 1.0)
    assert (result.status, result.solver_iterations) == ("inactive", 0)
    assert (result.z == target).all()


def test_trust_radius_clips():
    """With nothing active the projection is the radial clip."""
    certificate = Certificate(np.array([-9.0]), np.zeros((1, 2)), np.zeros(1), np.zeros(1))
    result = project(certificate, np.array([3.0, 4.0]), 1.0)
    assert result.z == pytest.approx([0.6, 0.8])


def test_trust_radius_and_constraint_together():
    """z_1 <= 0.5 and |z| <= 1 from (3, 3): the corner (0.5, sqrt(0.75))."""
    certificate = Certificate(np.array([-0.5]), np.array([[1.0, 0.0]]), np.zeros(1), np.zeros(1))
    result = project(certificate, np.array([3.0, 3.0]), 1.0)
    assert result.z == pytest.approx([0.5, np.sqrt(0.75)], abs=1e-7)


@pytest.mark.parametrize("radius", [1e3, 1e7, 1e12])
def test_a_huge_trust_radius_changes_nothing(radius):
    """A radius of 1e7 times the proposal once spoiled the scaling: the update was falsely held."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        certificate, target, _ = random_problem(rng)
        length = np.linalg.norm(target)
        near, far = (project(certificate, target, length * factor) for factor in (1.0, radius))
        assert (near.status, near.z.tolist()) == (far.status, far.z.tolist())


def test_boundary_start_slides_along_the_constraint():
    """g = 0, slope along the first axis: the second component of the proposal survives."""
    certificate = Certificate(np.array([0.0]), np.array([[1.0, 0.0]]), np.zeros(1), np.zeros(1))
    result = project(certificate, np.array([1.0, 1.0]), 10.0)
    assert result.z == pytest.approx([0.0, 1.0], abs=1e-6)
    assert result.bound[0] <= 0


def test_nothing_certified_means_staying():
    """g = 0, no slope, L > 0: only z = 0 is certified, and it is returned."""
    certificate = Certificate(np.zeros(1), np.zeros((1, 3)), np.zeros(1), np.ones(1))
    result = project(certificate, np.ones(3), 1.0)
    assert result.status == "held"
    assert not result.z.any()
    assert result.bound == pytest.approx([0.0])


def test_unsafe_start_is_refused():
    """Nothing can be certified from an unsafe point; the error names the constraint."""
    certificate = Certificate(np.array([-1.0, 0.2]), np.ones((2, 1)), np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="constraint 1 is violated"):
        project(certificate, np.ones(1), 1.0)


@pytest.mark.parametrize("field", ["value", "slope", "error", "L", "target"])
def test_what_is_not_finite_is_refused(field):
    """A NaN would pass every comparison and be deployed as a certified step."""
    parts = {"value": -1.0, "slope": 1.0, "error": 0.1, "L": 1.0, "target": 3.0, field: np.nan}
    target = np.array([parts.pop("target")])
    with pytest.raises(ValueError, match="must be finite"):
        project(one_dimensional(**parts), target, 1.0)


def test_margin_shrinks_to_what_there_is():
    """A margin larger than the slack at z = 0 must not make the problem infeasible."""
    certificate = one_dimensional(-0.01, 1.0)
    assert project(certificate, np.array([1.0]), 1.0, margin=0.5).bound[0] <= -0.01
    assert project(certificate, np.array([-1.0]), 1.0, margin=0.5).z == pytest.approx([-1.0])


def test_margins_can_differ_between_constraints():
    """z_1 <= 1 and z_2 <= 1 with margins 0.25 and 0.5."""
    certificate = Certificate(-np.ones(2), np.eye(2), np.zeros(2), np.zeros(2))
    result = project(certificate, np.array([3.0, 3.0]), 9.0, margin=np.array([0.25, 0.5]))
    assert result.z == pytest.approx([0.75, 0.5], abs=1e-7)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_any_scale_is_feasible(seed, scale):
    """Units do not matter to the guarantee: at any scale of target and radius bound <= 0."""
    certificate, target, radius = random_problem(np.random.default_rng(seed))
    result = project(certificate, target * scale, radius * scale)
    assert (certificate.bound(result.z) <= 0).all()
    assert np.linalg.norm(result.z) <= radius * scale * (1 + 1e-12)
