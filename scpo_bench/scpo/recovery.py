"""Back to safety: earlier policies to return to, a margin that learns, and unsafe start policies.

The recovery phase has the paper's form with the violation as its objective; that it may be needed,
and the rest of this module, are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import clarabel
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scpo_bench.contract import Floats
from scpo_bench.scpo import smoothness
from scpo_bench.scpo.projection import Certificate

KEPT = 16  # policies to return to, the start policy included
FIRST_RADIUS = 1.0  # of the recovery phase's first step, in units of w

# The margin that a return to an earlier policy adds, in units of relative constraint values: it
# starts with FIRST, grows by GROWTH up to MOST, and decays by DECAY in every update.
FIRST, GROWTH, MOST, DECAY = 0.05, 1.5, 0.4, 0.95


@dataclass(frozen=True)
class Verified:
    """A policy that was evaluated as safe. w: [d]; g: [k], its values when it last was."""

    w: Floats
    g: Floats


def pushed(stack: list[Verified], policy: Verified) -> list[Verified]:
    """The stack with ``policy`` on top, once. Beyond KEPT the oldest but the first is dropped."""
    if stack and np.array_equal(stack[-1].w, policy.w):
        stack = stack[:-1]
    if len(stack) >= KEPT:
        stack = [stack[0], *stack[2:]]
    return [*stack, policy]


def fall_back(
    stack: list[Verified], failed: Floats, evaluate: Callable[[Verified], Floats]
) -> list[Verified]:
    """The stack without ``failed`` [d] and what is no longer found safe; its top is to be deployed.

    evaluate: gives the present values of a policy on it. The first policy stays whatever it gives:
    there is nothing else to return to.
    """
    while True:
        top = stack[-1]
        if not np.array_equal(top.w, failed):
            top = replace(top, g=evaluate(top))
            if len(stack) == 1 or (top.g <= 0).all():
                return [*stack[:-1], top]
        elif len(stack) == 1:
            return stack
        stack = stack[:-1]


def margin_after_return(margin: float) -> float:
    """The learned margin after an update that had to return to an earlier policy."""
    return min(max(FIRST, GROWTH * margin), MOST)


# ---- from an unsafe start


@dataclass(frozen=True)
class Descent:
    """A step of the recovery phase.

    z: [m]; zero if none was found. g: [K], where it leads. target: the largest
    violation that was aimed at. radius: to try first next time, twice this step or, where none was
    found, half of what was tried first now.
    """

    z: Floats
    g: Floats
    target: float
    radius: float


def descend(
    g: Floats,
    rows: NDArray[np.intp],
    slopes: Floats,
    evaluate: Callable[[Floats], Floats],
    *,
    radius: float,
    margin: float,
    retries: int,
) -> Descent:
    """A step that lowers the largest constraint value.

    g: [K], not all <= 0; evaluate: g [K] at z [m]. rows: [k], the constraints that the step is
    computed with, and slopes: [k, m], along orthonormal directions. The step is chosen by the
    certificate with L as small as evaluated steps have not refuted, within a radius that is halved
    when a step fails: what counts is that evaluation shows a decrease, and that constraints which
    were satisfied still are.
    """
    L = np.full(len(rows), smoothness.FLOOR)
    violated, worst, first = g > 0, float(g.max()), radius
    no_errors, factor = np.zeros_like(slopes), np.eye(slopes.shape[1])
    for _ in range(retries):
        certificate = Certificate(g[rows], slopes, no_errors, L, factor)
        z = least_violation(certificate, radius, margin)
        bound = certificate.bound(z)
        length = float(np.linalg.norm(z))
        if length == 0 or bound.max() >= worst:
            break
        values = evaluate(z)
        if values.max() < worst and (values[~violated] <= 0).all():
            return Descent(z, values, float(bound.max()), 2 * length)
        shown = 2.0 * (values[rows] - certificate.linear(z)) / length**2
        L = np.where(values[rows] > bound, np.maximum(smoothness.GROW * L, shown), L)
        radius = 0.5 * length
    return Descent(np.zeros(slopes.shape[1]), g, worst, 0.5 * first)


def least_violation(certificate: Certificate, radius: float, margin: float) -> Floats:
    """z [m] with the smallest t such that, within |z| <= radius and up to the solver's tolerance,

    gbar_i(z) <= t for the constraints violated at z = 0 and gbar_i(z) <= 0 for the others; no
    t < -margin is asked for. Without slope errors. Zero where the solver fails.
    """
    k, m = certificate.slopes.shape
    violated = certificate.values > 0
    # Columns: y = z / radius [m], q >= |y|^2, t. Rows of A x <= b: the constraints, q <= 1,
    # -t <= margin; then the cone |(2 y, q - 1)| <= q + 1.
    n, linear = m + 2, k + 2
    A, b = np.zeros((linear + m + 2, n)), np.zeros(linear + m + 2)
    A[:k, :m] = certificate.slopes * radius
    A[:k, m] = 0.5 * certificate.smoothness * radius**2
    A[:k, -1] = -violated.astype(np.float64)
    b[:k] = -certificate.values
    A[k, m], b[k] = 1.0, 1.0
    A[k + 1, -1], b[k + 1] = -1.0, margin
    A[linear, m], b[linear] = -1.0, 1.0
    A[linear + 1 : -1, :m] = -2.0 * np.eye(m)
    A[-1, m], b[-1] = -1.0, -1.0
    cost = np.zeros(n)
    cost[m], cost[-1] = 1e-6, 1.0  # of steps that promise the same, a short one
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    cones = [clarabel.NonnegativeConeT(linear), clarabel.SecondOrderConeT(m + 2)]
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix((n, n)), cost, sparse.csc_matrix(A), b, cones, settings
    )
    solution = solver.solve()
    z = np.asarray(solution.x[:m]) * radius
    return z if np.isfinite(z).all() else np.zeros(m)
