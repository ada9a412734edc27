"""The SCPO projection: the closest step to a proposal that the certificate allows.

    minimise |z - target|^2   subject to   gbar_i(z) <= -margin_i for i = 1..k,   |z| <= radius,
    gbar_i(z) = g_i + s_i . z + e_i |z|_1 + (L_i / 2) |z|_2^2.

Why gbar bounds the constraint (the certificate). Let Q have orthonormal columns q_1..q_m and
suppose that g_i is L_i-smooth around
theta: |g_i(theta + D) - g_i(theta) - grad g_i . D| <= (L_i / 2) |D|^2. Put D = Q z, so |D|_2 =
|z|_2. Then

    g_i(theta + Q z) <= g_i(theta) + (Q' grad g_i) . z + (L_i / 2) |z|^2,

and each component of Q' grad g_i is known as a difference quotient s_ij along q_j with probe radius
rho, off by at most e_i = L_i rho / 2: the one-sided quotient (g_i(theta + rho q_j) - g_i(theta)) /
rho is grad g_i . q_j up to (L_i / 2) rho^2 / rho, and the central one is the mean of two such
quotients. Replacing the true slope costs at most sum_j e_i |z_j| = e_i |z|_1. Hence g_i(theta + Q
z) <= gbar_i(z): every z with gbar(z) <= 0 is truly safe whenever L_i is a valid bound. Source:
SCPO, Cao, Borrelli, Joa, arXiv 2512.13788, and the derivation above. Each gbar_i is convex, and z =
0 satisfies gbar_i(0) = g_i, so from a safe theta the problem is feasible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scpo_bench.contract import Floats


@dataclass(frozen=True)
class Certificate:
    """gbar over steps z in R^m, for k constraints.

    values: [k] g_i(theta). slopes: [k, m] s_ij. slope_errors: [k] e_i >= 0. smoothness: [k] L_i >=
    0.
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
    certified), "solved" (by the interior point method), or "held" (z = 0: nothing but staying is
    certified). solver_iterations: 0 where it was not needed.
    """

    z: Floats
    bound: Floats
    status: str
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
    if not all(
        np.isfinite(part).all()
        for part in (values, certificate.slopes, certificate.smoothness, target)
    ):
        raise ValueError("projection: the certificate and the target must be finite")
    if (values > 0).any():
        worst = int(np.argmax(values))
        raise ValueError(
            f"projection: constraint {worst} is violated at z = 0 (value {values[worst]:.3g} > 0)"
        )
    ceiling = -np.minimum(
        np.broadcast_to(np.asarray(margin, dtype=np.float64), values.shape), -values
    )

    length = float(np.linalg.norm(target))
    clipped = target if length <= radius else target * (radius / length)
    if _allowed(certificate, clipped, radius, ceiling):
        return Projection(clipped, certificate.bound(clipped), "inactive")

    scale = max(length, 1e-300)
    best: Floats | None = None
    iterations = 0
    # The solver meets a constraint up to its tolerance. Scaling towards 0 repairs that at a cost of
    # the same order, unless the boundary passes through 0 itself (g_i = 0): then only a slightly
    # tighter problem gives a step that can be kept.
    for tightening in (0.0, 1e-9, 1e-7):
        z, steps = _interior_point(certificate, target, radius, ceiling - tightening * scale)
        iterations += steps
        z, shrunk = _into_feasible_set(certificate, z, radius, ceiling)
        if best is None or np.sum((z - target) ** 2) < np.sum((best - target) ** 2):
            best = z
        if shrunk > 1 - 1e-7:
            break
    if best is None or not best.any() or np.sum((best - target) ** 2) >= length**2:
        return Projection(np.zeros_like(target), values.copy(), "held", iterations)
    return Projection(best, certificate.bound(best), "solved", iterations)


def _allowed(certificate: Certificate, z: Floats, radius: float, ceiling: Floats) -> bool:
    return bool(
        (certificate.bound(z) <= ceiling).all() and np.linalg.norm(z) <= radius * (1 + 1e-12)
    )


def _into_feasible_set(
    certificate: Certificate, z: Floats, radius: float, ceiling: Floats
) -> tuple[Floats, float]:
    """The largest step t z, t <= 1, that is allowed in floating point, and t. 0 is allowed and the
    set is convex.
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


def _interior_point(
    certificate: Certificate,
    target: Floats,
    radius: float,
    ceiling: Floats,
    max_iterations: int = 60,
) -> tuple[Floats, int]:
    """(z, iterations): the projection by a primal-dual interior point method with Mehrotra's
    predictor and corrector.

    Variables y = z / unit and a_j >= |y_j|. Rows: the k of the certificate, the trust radius (a row
    with L = 1), and the two sides y_j <= a_j, -y_j <= a_j. Because every row's Hessian is a
    multiple of the identity, the Newton system splits into a 2 x 2 block per coordinate and one
    Schur complement of size k + 1.
    Source: Boyd and Vandenberghe, Convex Optimization, ch. 11.7; Mehrotra, SIAM J. Optim. 2 (1992).
    """
    m = len(target)
    unit = min(float(np.linalg.norm(target)), radius)
    t = target / unit
    slopes = np.vstack([certificate.slopes * unit, np.zeros(m)])
    errors = np.append(certificate.slope_errors * unit, 0.0)
    curvature = np.append(certificate.smoothness * unit**2, 1.0)
    offset = np.append(certificate.values - ceiling, -0.5 * (radius / unit) ** 2)
    # Each row in its own units, so that one tolerance serves all; the solution does not change.
    size = np.maximum.reduce(
        [np.abs(slopes).max(axis=1), errors, curvature, np.full(len(offset), 1e-12)]
    )
    slopes, errors, curvature, offset = (
        slopes / size[:, None],
        errors / size,
        curvature / size,
        offset / size,
    )
    l1 = bool(
        errors.max() > 1e-13
    )  # else the slope errors are left to the exact check that follows

    n_rows = len(offset)
    # Multipliers and slacks in one array each: [rows of the certificate and trust radius, y <= a,
    # -y <= a].
    rows, up, down = slice(0, n_rows), slice(n_rows, n_rows + m), slice(n_rows + m, n_rows + 2 * m)
    count = n_rows + (2 * m if l1 else 0)
    y, a = np.zeros(m), np.ones(m)
    dual, slack = np.ones(count), np.ones(count)
    slack[rows] = np.maximum(-offset, 1.0)
    zero, diagonal = np.zeros(m), np.arange(n_rows)
    d_up = d_down = zero

    for iterations in range(1, max_iterations + 1):
        lam = dual[rows]
        jacobian = slopes + curvature[:, None] * y
        r_y = y - t + lam @ jacobian
        r_c = offset + slopes @ y + errors * a.sum() + 0.5 * curvature * (y @ y) + slack[rows]
        residual = np.abs(r_c).max()
        if l1:
            r_y += dual[up] - dual[down]
            r_a = lam @ errors - dual[up] - dual[down]
            r_up, r_down = y - a + slack[up], slack[down] - y - a
            residual = max(residual, np.abs(r_a).max())
        mu = dual @ slack / count
        # r_up and r_down shrink with the steps taken and never grow; the others carry the rounding
        # errors.
        if max(residual, np.abs(r_y).max()) < 1e-9 and mu < 1e-12:
            break

        h = 1.0 + lam @ curvature
        if l1:
            d_up, d_down = dual[up] / slack[up], dual[down] / slack[down]
            both, difference = d_up + d_down, d_up - d_down
            det = h * both + 4 * d_up * d_down
            b_yy, b_ya, b_aa = both / det, difference / det, (h + both) / det
        else:
            b_yy, b_ya, b_aa = zero + 1.0 / h, zero, zero
        # Schur complement G B^-1 G' + diag(slack / lam), with G = [jacobian, errors 1'].
        schur = (jacobian * b_yy) @ jacobian.T
        if l1:
            cross = (jacobian @ b_ya + 0.5 * b_aa.sum() * errors)[:, None] * errors
            schur += cross + cross.T
        schur[diagonal, diagonal] += slack[rows] / lam + 1e-15

        def newton(c: Floats) -> tuple[Floats, Floats, Floats, Floats]:
            """(d_y, d_a, d_dual, d_slack) of the Newton step that changes the products dual * slack
            by c.
            """
            d_dual, d_slack = np.empty(count), np.empty(count)
            rhs_y, x_a = -r_y, zero
            if l1:
                alpha = (dual[up] * r_up + c[up]) / slack[up]
                beta = (dual[down] * r_down + c[down]) / slack[down]
                rhs_y = rhs_y - alpha + beta
                rhs_a = -r_a + alpha + beta
                x_a = b_ya * rhs_y + b_aa * rhs_a
                x_y = b_yy * rhs_y + b_ya * rhs_a
            else:
                x_y = b_yy * rhs_y
            d_lam = np.linalg.solve(
                schur, jacobian @ x_y + errors * x_a.sum() + r_c + c[rows] / lam
            )
            g_y, g_a = d_lam @ jacobian, d_lam @ errors
            d_y = x_y - b_yy * g_y - b_ya * g_a
            d_a = x_a - b_ya * g_y - b_aa * g_a
            d_dual[rows], d_slack[rows] = d_lam, (c[rows] - slack[rows] * d_lam) / lam
            if l1:
                d_slack[up], d_slack[down] = d_a - d_y - r_up, d_a + d_y - r_down
                d_dual[up] = (c[up] - dual[up] * d_slack[up]) / slack[up]
                d_dual[down] = (c[down] - dual[down] * d_slack[down]) / slack[down]
            return d_y, d_a, d_dual, d_slack

        def step_length(d_dual: Floats, d_slack: Floats) -> float:
            """The largest step <= 1 that keeps every multiplier and slack non-negative."""
            return 1.0 / max(1.0, float((-d_dual / dual).max()), float((-d_slack / slack).max()))

        try:
            _, _, d_dual, d_slack = newton(-dual * slack)
            s = step_length(d_dual, d_slack)
            mu_ahead = (dual + s * d_dual) @ (slack + s * d_slack) / count
            centre = max(float((mu_ahead / mu) ** 3 * mu), 1e-14)
            d_y, d_a, d_dual, d_slack = newton(centre - dual * slack - d_dual * d_slack)
        except np.linalg.LinAlgError:
            break
        s = 0.995 * step_length(d_dual, d_slack)
        if not (np.isfinite(s) and s > 1e-10):
            break
        y, a, dual, slack = y + s * d_y, a + s * d_a, dual + s * d_dual, slack + s * d_slack
    return y * unit, iterations
