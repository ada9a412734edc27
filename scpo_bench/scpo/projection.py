"""The SCPO projection: the closest step to a proposal that the certificate allows.

    minimise |D xi - target|^2   subject to   gbar_i(xi) <= -margin_i for i = 1..k,

with D the bank of candidate updates (:mod:`scpo_bench.scpo.bank`), d_j its columns, G_ij =
g_i(theta + d_j), S = D'D, and the certificate (Eq. 29 of the paper, with l = L_i)

    gbar_i(xi) = (1 - 1'xi) g_i + G_i xi + (L_i / 2) [xi' S xi + |xi|' diag(S)].

Here steps have coordinates z_j = |d_j| xi_j along unit columns. With slopes s_ij = (G_ij - g_i) /
|d_j|, slope errors e_ij = L_i |d_j| / 2 and |D xi| = |R z| the same certificate reads

    gbar_i(z) = g_i + s_i . z + e_i . |z| + (L_i / 2) |R z|^2.

Why gbar bounds the constraint. Suppose that g_i is L_i-smooth around theta:

    |g_i(theta + D) - g_i(theta) - grad g_i . D| <= (L_i / 2) |D|^2.

Put D = sum_j z_j d_j / |d_j|, of length |R z|. Then

    g_i(theta + D) <= g_i(theta) + sum_j z_j (grad g_i . d_j) / |d_j| + (L_i / 2) |R z|^2.

Each directional derivative is known as a difference quotient s_ij, off by at most e_ij: the
one-sided quotient (g_i(theta + d_j) - g_i(theta)) / |d_j| is the derivative up to
(L_i / 2) |d_j|^2 / |d_j|, and the central one is the mean of two such quotients. Replacing the
derivatives costs at most sum_j e_ij |z_j|. Hence g_i(theta + D) <= gbar_i(z): every z with
gbar(z) <= 0 is truly safe whenever L_i is a valid bound. Each gbar_i is convex, and gbar_i(0) =
g_i, so from a safe theta the problem is feasible. Orthonormal columns probed at distance rho are
the case D = rho Q, R = I, e_ij = L_i rho / 2.

Source: SCPO, Cao, Borrelli, Joa, arXiv 2512.13788 (bank and Eq. 29), and the derivation above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import clarabel
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import solve_triangular

from scpo_bench.contract import Floats

# Tighter than Clarabel can always reach: it then stops at the best iterate that it has.
_SETTINGS = clarabel.DefaultSettings()
_SETTINGS.verbose = False
_SETTINGS.max_iter = 60
_SETTINGS.direct_solve_method = "qdldl"
_SETTINGS.tol_gap_abs = _SETTINGS.tol_gap_rel = _SETTINGS.tol_feas = 1e-11

# Of many constraints only few are active. More than FIRST are not given to the solver at once: it
# starts with those, and the MORE that its solution violates most are added until none is left.
FIRST, MORE, ROUNDS = 64, 24, 50


@dataclass(frozen=True)
class Certificate:
    """gbar over steps with coordinates z in R^m, for k constraints.

    values: [k] g_i(theta). slopes: [k, m] s_ij. slope_errors: [k, m] e_ij >= 0.
    smoothness: [k] L_i >= 0. factor: [m, m] R, upper triangular; a step's length is |R z|.
    """

    values: Floats
    slopes: Floats
    slope_errors: Floats
    smoothness: Floats
    factor: Floats

    def linear(self, z: Floats) -> Floats:
        """g_i + s_i . z: [k] for z [m]."""
        return self.values + self.slopes @ z

    def uncertainty(self, z: Floats) -> Floats:
        """What the certificate adds to :meth:`linear`: [k] for z [m]."""
        y = self.factor @ z
        return self.slope_errors @ np.abs(z) + 0.5 * self.smoothness * (y @ y)

    def bound(self, z: Floats) -> Floats:
        """gbar(z): [k] for z [m]."""
        return self.linear(z) + self.uncertainty(z)

    def rows(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> Certificate:
        """The certificate of some of the constraints."""
        return Certificate(
            self.values[which],
            self.slopes[which],
            self.slope_errors[which],
            self.smoothness[which],
            self.factor,
        )


@dataclass(frozen=True)
class Projection:
    """The result of :func:`project`.

    z: [m]. status: "inactive" (the target itself is certified), "solved" (by Clarabel), or "held"
    (z = 0: nothing but staying is certified). solver_iterations: 0 where it was not needed.
    """

    z: Floats
    status: Literal["inactive", "solved", "held"]
    solver_iterations: int = 0


def project(certificate: Certificate, target: Floats, margin: Floats | float = 0.0) -> Projection:
    """The certified step closest to ``target``.

    target: [m], in the orthonormal coordinates y = R z. margin: [k] or one number, how far below
    zero the certificate is asked to stay. Where theta itself is closer than that, the margin
    shrinks to what theta has, so that staying is always allowed. The step that is returned
    satisfies bound <= -margin in floating point, whatever the solver did, and is no longer than
    the target, since the set contains 0 and is convex.

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
    whole = solve_triangular(certificate.factor, target)
    if (certificate.bound(whole) <= ceiling).all():
        return Projection(whole, "inactive")

    length = float(np.linalg.norm(target))
    best, iterations = np.zeros_like(target), 0
    # The solver meets a constraint up to its tolerance. Scaling towards 0 repairs that at a cost of
    # the same order, unless the boundary passes through 0 itself (g_i = 0): then only a slightly
    # tighter problem gives a step that can be kept.
    for tightening in (0.0, 1e-9, 1e-7):
        z, steps = _solve_all(certificate, target, ceiling, tightening * length)
        iterations += steps
        t = _share_allowed(certificate, z, length, ceiling)
        z = t * z
        if _distance(certificate, z, target) < _distance(certificate, best, target):
            best = z
        if t > 1 - 1e-7:
            break
    return Projection(best, "solved" if best.any() else "held", iterations)


def _distance(certificate: Certificate, z: Floats, target: Floats) -> float:
    return float(np.sum((certificate.factor @ z - target) ** 2))


def _share_allowed(certificate: Certificate, z: Floats, length: float, ceiling: Floats) -> float:
    """The largest t <= 1 such that t z is allowed in floating point, and no longer than ``length``.

    0 is allowed and the set is convex.
    """
    squared = float(np.sum((certificate.factor @ z) ** 2))
    t = min(1.0, length / np.sqrt(squared)) if squared > 0 else 1.0
    # Along the ray each constraint is a t^2 + b t <= c with a >= 0 and c >= 0: its root, in the
    # form that does not cancel.
    a = 0.5 * certificate.smoothness * squared
    b = certificate.slopes @ z + certificate.slope_errors @ np.abs(z)
    c = ceiling - certificate.values
    root = np.sqrt(b * b + 4 * a * c)
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = np.where(b >= 0, 2 * c / (b + root), (root - b) / (2 * a))
    limit = np.where(np.isfinite(limit), limit, np.inf)
    limit = np.where((b > 0) & (c <= 0), 0.0, limit)
    t = min(t, float(limit.min(initial=np.inf)))
    shrink = 1e-16
    while t > 0 and not (certificate.bound(t * z) <= ceiling).all():
        t = t * (1 - shrink) if shrink < 1 else 0.0
        shrink *= 4
    return t


def _solve_all(
    certificate: Certificate, target: Floats, ceiling: Floats, tightening: float
) -> tuple[Floats, int]:
    """(z, iterations): the projection by Clarabel, by cutting planes if the constraints are many.

    ``tightening``: by how much more than to ``ceiling`` the constraints are tightened.
    """
    length, k = float(np.linalg.norm(target)), len(ceiling)
    if k <= FIRST:
        return _solve(certificate, target, length, ceiling - tightening)
    reach = np.linalg.norm(certificate.slopes, axis=1) * length - (ceiling - certificate.values)
    chosen = np.argpartition(-reach, FIRST)[:FIRST]
    iterations = 0
    for _ in range(ROUNDS):
        part = certificate.rows(chosen)
        z, steps = _solve(part, target, length, ceiling[chosen] - tightening)
        iterations += steps
        excess = certificate.bound(z) - ceiling
        excess[chosen] = -np.inf
        worst = np.argpartition(-excess, MORE)[:MORE]
        violated = worst[excess[worst] > 0]
        if not len(violated):
            break
        chosen = np.concatenate([chosen, violated])
    return z, iterations


def _solve(
    certificate: Certificate, target: Floats, length: float, ceiling: Floats
) -> tuple[Floats, int]:
    """(z, iterations): the projection by Clarabel, up to its tolerance. length: |target|.

    Minimises |R x - target / length|^2 over columns x = z / length, q >= |R x|^2 and, where there
    are slope errors, a_j >= |x_j|. Rows: the certificate and q <= 1, which are linear in these
    columns; x - a <= 0 and -x - a <= 0; and the second-order cone |(2 R x, q - 1)| <= q + 1, which
    says q >= |R x|^2.
    """
    k, m = certificate.slopes.shape
    R = certificate.factor
    n_a = m if certificate.slope_errors.any() else 0
    linear = k + 1 + 2 * n_a  # rows A x <= b; those of the cone, b - A x, follow
    A = np.zeros((linear + m + 2, m + 1 + n_a))
    b = np.zeros(len(A))
    A[:k, :m] = certificate.slopes * length
    A[:k, m] = 0.5 * certificate.smoothness * length**2
    if n_a:
        A[:k, m + 1 :] = certificate.slope_errors * length
    b[:k] = ceiling - certificate.values
    A[k, m], b[k] = 1.0, 1.0
    if n_a:
        signs = np.vstack([np.eye(m), -np.eye(m)])
        A[k + 1 : linear, :m], A[k + 1 : linear, m + 1 :] = signs, -np.abs(signs)
    A[linear, m], b[linear] = -1.0, 1.0
    A[linear + 1 : -1, :m] = -2.0 * R
    A[-1, m], b[-1] = -1.0, -1.0

    n = A.shape[1]
    P = np.zeros((n, n))
    P[:m, :m] = np.triu(2.0 * R.T @ R)
    cost = np.append(-2.0 * R.T @ target / length, np.zeros(n - m))
    cones = [clarabel.NonnegativeConeT(linear), clarabel.SecondOrderConeT(m + 2)]
    matrices = sparse.csc_matrix(P), sparse.csc_matrix(A)
    solver = clarabel.DefaultSolver(matrices[0], cost, matrices[1], b, cones, _SETTINGS)
    solution = solver.solve()
    # Where it fails, the last iterate may be anything: what follows makes a certified step of it.
    return np.nan_to_num(np.array(solution.x[:m])) * length, solution.iterations
