"""The SCPO projection: the closest step to a proposal that the certificate allows.

    minimise |z - target|^2   subject to   gbar_i(z) <= -margin_i for i = 1..k,   |z| <= radius,
    gbar_i(z) = g_i + s_i . z + e_i |z|_1 + (L_i / 2) |z|_2^2.

Why gbar bounds the constraint (the certificate). Let Q have orthonormal columns q_1..q_m and
suppose that g_i is L_i-smooth around theta:

    |g_i(theta + D) - g_i(theta) - grad g_i . D| <= (L_i / 2) |D|^2.

Put D = Q z, so |D|_2 = |z|_2. Then

    g_i(theta + Q z) <= g_i(theta) + (Q' grad g_i) . z + (L_i / 2) |z|^2.

Each component of Q' grad g_i is known as a difference quotient s_ij along q_j with probe radius
rho, off by at most e_i = L_i rho / 2: the one-sided quotient (g_i(theta + rho q_j) - g_i(theta)) /
rho is grad g_i . q_j up to (L_i / 2) rho^2 / rho, and the central one is the mean of two such
quotients. Replacing the true slope costs at most sum_j e_i |z_j| = e_i |z|_1. Hence
g_i(theta + Q z) <= gbar_i(z): every z with gbar(z) <= 0 is truly safe whenever L_i is a valid
bound. Each gbar_i is convex, and gbar_i(0) = g_i, so from a safe theta the problem is feasible.

Source: SCPO, Cao, Borrelli, Joa, arXiv 2512.13788, and the derivation above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import clarabel
import numpy as np
from scipy import sparse

from scpo_bench.contract import Floats

# Tighter than Clarabel can always reach: it then stops at the best iterate that it has.
_SETTINGS = clarabel.DefaultSettings()
_SETTINGS.verbose = False
_SETTINGS.max_iter = 60
_SETTINGS.direct_solve_method = "qdldl"
_SETTINGS.tol_gap_abs = _SETTINGS.tol_gap_rel = _SETTINGS.tol_feas = 1e-11


@dataclass(frozen=True)
class Certificate:
    """gbar over steps z in R^m, for k constraints.

    values: [k] g_i(theta). slopes: [k, m] s_ij. slope_errors: [k] e_i >= 0.
    smoothness: [k] L_i >= 0.
    """

    values: Floats
    slopes: Floats
    slope_errors: Floats
    smoothness: Floats

    def bound(self, z: Floats) -> Floats:
        """gbar(z): [k] for z [m]."""
        return (
            self.values
            + self.slopes @ z
            + self.slope_errors * np.abs(z).sum()
            + 0.5 * self.smoothness * (z @ z)
        )


@dataclass(frozen=True)
class Projection:
    """The result of :func:`project`.

    z: [m]. bound: [k] gbar(z). status: "inactive" (the target itself, or its radial clip, is
    certified), "solved" (by Clarabel), or "held" (z = 0: nothing but staying is certified).
    solver_iterations: 0 where it was not needed.
    """

    z: Floats
    bound: Floats
    status: Literal["inactive", "solved", "held"]
    solver_iterations: int = 0


def project(
    certificate: Certificate, target: Floats, radius: float, margin: Floats | float = 0.0
) -> Projection:
    """The certified step closest to ``target``.

    target: [m]; radius: the trust radius |z| <= radius within which the smoothness constants hold;
    margin: [k] or one number, how far below zero the certificate is asked to stay. Where theta
    itself is closer than that, the margin shrinks to what theta has. The returned step satisfies
    bound <= -margin and |z| <= radius in floating point, whatever the solver did.

    Raises ValueError if the certificate's values are not all <= 0 (theta is unsafe: nothing can be
    certified from there) or anything is not finite.
    """
    values = certificate.values
    parts = (values, certificate.slopes, certificate.slope_errors, certificate.smoothness, target)
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("projection: the certificate and the target must be finite")
    if (values > 0).any():
        worst = int(np.argmax(values))
        raise ValueError(
            f"projection: constraint {worst} is violated at z = 0 (value {values[worst]:.3g} > 0)"
        )
    ceiling = np.maximum(values, -np.asarray(margin))

    length = float(np.linalg.norm(target))
    clipped = target if length <= radius else target * (radius / length)
    if _allowed(certificate, clipped, radius, ceiling):
        return Projection(clipped, certificate.bound(clipped), "inactive")

    best, iterations = np.zeros_like(target), 0
    # The solver meets a constraint up to its tolerance. Scaling towards 0 repairs that at a cost of
    # the same order, unless the boundary passes through 0 itself (g_i = 0): then only a slightly
    # tighter problem gives a step that can be kept.
    for tightening in (0.0, 1e-9, 1e-7):
        # The projection onto a convex set that contains 0 is no longer than the target, whatever
        # the trust radius.
        z, steps = _solve(certificate, target, min(radius, length), ceiling - tightening * length)
        iterations += steps
        z, shrunk = _into_feasible_set(certificate, z, radius, ceiling)
        if np.sum((z - target) ** 2) < np.sum((best - target) ** 2):
            best = z
        if shrunk > 1 - 1e-7:
            break
    return Projection(best, certificate.bound(best), "solved" if best.any() else "held", iterations)


def _allowed(certificate: Certificate, z: Floats, radius: float, ceiling: Floats) -> bool:
    return bool(
        (certificate.bound(z) <= ceiling).all() and np.linalg.norm(z) <= radius * (1 + 1e-12)
    )


def _into_feasible_set(
    certificate: Certificate, z: Floats, radius: float, ceiling: Floats
) -> tuple[Floats, float]:
    """(t z, t): the largest such step with t <= 1 that is allowed in floating point.

    0 is allowed and the set is convex.
    """
    length = float(np.linalg.norm(z))
    t = 1.0 if length <= radius else radius / length
    # Along the ray each constraint is a t^2 + b t <= c with a >= 0 and c >= 0: its root, in the
    # form that does not cancel.
    a = 0.5 * certificate.smoothness * (z @ z)
    b = certificate.slopes @ z + certificate.slope_errors * np.abs(z).sum()
    c = ceiling - certificate.values
    root = np.sqrt(b * b + 4 * a * c)
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = np.where(b >= 0, 2 * c / (b + root), (root - b) / (2 * a))
    limit = np.where(np.isfinite(limit), limit, np.inf)
    limit = np.where((b > 0) & (c <= 0), 0.0, limit)
    t = min(t, float(limit.min(initial=np.inf)))
    shrink = 1e-16
    while t > 0 and not _allowed(certificate, t * z, radius, ceiling):
        t = t * (1 - shrink) if shrink < 1 else 0.0
        shrink *= 4
    return t * z, t


def _solve(
    certificate: Certificate, target: Floats, radius: float, ceiling: Floats
) -> tuple[Floats, int]:
    """(z, iterations): the projection by Clarabel, up to its tolerance. radius: at most |target|.

    Minimises |y - target / radius|^2 over columns y = z / radius, q >= |y|^2 and, where there are
    slope errors, a_j >= |y_j|. Rows: the certificate and q <= 1, which are linear in these columns;
    y - a <= 0 and -y - a <= 0; and the second-order cone |(2 y, q - 1)| <= q + 1, which says
    q >= |y|^2.
    """
    k, m = certificate.slopes.shape
    n_a = m if certificate.slope_errors.any() else 0
    linear = k + 1 + 2 * n_a  # rows A x <= b; those of the cone, b - A x, follow
    A = np.zeros((linear + m + 2, m + 1 + n_a))
    b = np.zeros(len(A))
    A[:k, :m] = certificate.slopes * radius
    A[:k, m] = 0.5 * certificate.smoothness * radius**2
    A[:k, m + 1 :] = certificate.slope_errors[:, None] * radius
    b[:k] = ceiling - certificate.values
    A[k, m], b[k] = 1.0, 1.0
    if n_a:
        signs = np.vstack([np.eye(m), -np.eye(m)])
        A[k + 1 : linear, :m], A[k + 1 : linear, m + 1 :] = signs, -np.abs(signs)
    A[linear, m], b[linear] = -1.0, 1.0
    A[linear + 1 : -1, :m] = -2.0 * np.eye(m)
    A[-1, m], b[-1] = -1.0, -1.0

    n = A.shape[1]
    quadratic = sparse.csc_matrix((np.full(m, 2.0), (range(m), range(m))), shape=(n, n))
    cost = np.append(-2.0 * target / radius, np.zeros(n - m))
    cones = [clarabel.NonnegativeConeT(linear), clarabel.SecondOrderConeT(m + 2)]
    solver = clarabel.DefaultSolver(quadratic, cost, sparse.csc_matrix(A), b, cones, _SETTINGS)
    solution = solver.solve()
    # Where it fails, the last iterate may be anything: what follows makes a certified step of it.
    return np.nan_to_num(np.clip(solution.x[:m], -1.0, 1.0)) * radius, solution.iterations
