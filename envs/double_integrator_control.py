"""The double integrator's plant and controllers: LQR, backup, experts.

The plant is p'' = u with the state x = (p [m], v [m/s]) and |p|, |v|, |u| <= 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Array

DT_S = 0.1
P_MAX_M = 1.0
V_MAX_M_S = 1.0
U_MAX_M_S2 = 1.0
# Exact zero-order-hold discretisation of p'' = u.
A = np.array([[1.0, DT_S], [0.0, 1.0]])
B = np.array([[0.5 * DT_S**2], [DT_S]])

# The regulation task's set-point lies near the edge of the backup's invariant set: from far starts
# a good controller has to cross the whole range, and meets the velocity bound. The stage cost is
# e'Qe + u'Ru with e = (p - p_ref, v); control is cheap.
SETPOINT_M = 0.6
STAGE_Q = np.diag([1.0, 0.1])
STAGE_R = np.array([[0.02]])
# The backup is an LQR for fifty times dearer control: gentle, hence safe far from the origin, and
# slow.
BACKUP_Q = np.diag([1.0, 0.1])
BACKUP_R = np.array([[1.0]])
# Width [m] of the strip around p = 0 over which the malicious expert turns from sensible to
# malicious; a jump could not be imitated.
SWITCH_WIDTH_M = 0.1
# The diverging expert [1/s^2]: full acceleration from |p| = 0.5 m on.
DIVERGING_GAIN = 2.0


@dataclass(frozen=True)
class LQR:
    """The controller u = gain @ x with V(x) = x'Px, and its largest admissible level set.

    gain: [1, 2]; P: [2, 2]; level: {V <= level} is invariant under the controller, and the largest
    such set within |p| <= 1, |v| <= 1 and |u| <= 1.
    """

    gain: NDArray[np.float64]
    P: NDArray[np.float64]
    level: float


def lqr(Q: NDArray[np.float64], R: NDArray[np.float64]) -> LQR:
    """Discrete LQR and its largest admissible level set.

    P solves the discrete algebraic Riccati equation; over {x'Px <= c} the maximum of |h.x| is
    sqrt(c h'P^-1 h), so the largest c with |h_j.x| <= b_j for every bound j is min_j b_j^2 /
    (h_j'P^-1 h_j). V decreases along u = gain @ x, which is unclipped in the set, so the set is
    invariant.
    """
    from scipy.linalg import solve_discrete_are

    P = solve_discrete_are(A, B, Q, R)
    gain = -np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)
    rows = np.vstack([np.eye(2), gain])
    bounds = np.array([P_MAX_M, V_MAX_M_S, U_MAX_M_S2])
    level = float(np.min(bounds**2 / np.einsum("ij,ij->i", rows @ np.linalg.inv(P), rows)))
    return LQR(gain, P, level)


@functools.cache
def backup() -> LQR:
    """The stabilising backup controller of both tasks."""
    return lqr(BACKUP_Q, BACKUP_R)


@functools.cache
def sensible_gain() -> NDArray[np.float64]:
    """[1, 2]: the LQR gain for the regulation task's own stage cost."""
    return lqr(STAGE_Q, STAGE_R).gain


class ModelPredictiveController:
    """Regulates to the set-point within the bounds: a QP over ``steps`` inputs, solved by OSQP.

    min sum_t e_t'Qe_t + u_t'Ru_t + e_N'Pe_N, e = x - (p_ref, 0), subject to the dynamics and |p|,
    |v|, |u| <= 1. Condensed over the inputs, so that one matrix serves every state and only the
    bounds change between calls. The terminal weight P is the Riccati solution of the same stage
    cost. Source: Rawlings, Mayne, Diehl, Model Predictive Control, ch. 2.
    """

    def __init__(self, steps: int = 30) -> None:
        import osqp
        import scipy.sparse as sp

        self._steps = steps
        # x_{1..N} = phi x_0 + gamma u_{0..N-1}
        phi = np.vstack([np.linalg.matrix_power(A, t + 1) for t in range(steps)])
        gamma = np.zeros((2 * steps, steps))
        for t in range(steps):
            for s in range(t + 1):
                gamma[2 * t : 2 * t + 2, s : s + 1] = np.linalg.matrix_power(A, t - s) @ B
        weight = np.kron(np.eye(steps), STAGE_Q)
        weight[-2:, -2:] = lqr(STAGE_Q, STAGE_R).P
        hessian = 2 * (gamma.T @ weight @ gamma + STAGE_R[0, 0] * np.eye(steps))
        self._phi, self._linear = phi, 2 * gamma.T @ weight @ phi
        rows = sp.csc_matrix(np.vstack([gamma, np.eye(steps)]))
        # Tightened by more than OSQP's tolerance: a plan that touches a bound must not cross it.
        self._x_max = np.tile([P_MAX_M, V_MAX_M_S], steps) - 1e-5
        bound = np.concatenate([self._x_max, np.full(steps, U_MAX_M_S2)])
        self._solver = osqp.OSQP()
        self._solver.setup(
            P=sp.triu(sp.csc_matrix(hessian), format="csc"),
            q=np.zeros(steps),
            A=rows,
            l=-bound,
            u=bound,
            **{"verbose": False, "eps_abs": 1e-7, "eps_rel": 1e-7, "max_iter": 20_000},
        )

    def action(self, p: float, v: float) -> float:
        """First input [m/s^2] of the optimal plan from (p [m], v [m/s]).

        Raises RuntimeError if no plan respects the bounds.
        """
        # (p_ref, 0) is an equilibrium of A, so the error obeys the same dynamics as the state.
        error = np.array([p - SETPOINT_M, v])
        drift = self._phi @ np.array([p, v])
        u_max = np.full(self._steps, U_MAX_M_S2)
        lower = np.concatenate([-self._x_max - drift, -u_max])
        upper = np.concatenate([self._x_max - drift, u_max])
        # A cold start makes the action a function of the state alone; OSQP's own warm start
        # depends on what was solved before.
        self._solver.update(q=self._linear @ error, l=lower, u=upper)
        self._solver.warm_start(x=np.zeros(self._steps), y=np.zeros(3 * self._steps))
        result = self._solver.solve(raise_error=False)
        if result.info.status not in ("solved", "solved inaccurate"):
            raise RuntimeError(
                f"MPC: no admissible plan from p={p:.4f} m, v={v:.4f} m/s "
                f"(OSQP: {result.info.status})"
            )
        return float(np.clip(result.x[0], -U_MAX_M_S2, U_MAX_M_S2))

    def actions(self, p: Array, v: Array) -> NDArray[np.float64]:
        """:meth:`action` for arrays of states, one QP each."""
        flat = [self.action(float(a), float(b)) for a, b in zip(np.ravel(p), np.ravel(v))]
        return np.array(flat).reshape(np.shape(p))


def sensible_action(p: Array, v: Array) -> Array:
    """The regulation task's own LQR, saturated: faster to the origin than the backup."""
    k_p, k_v = (float(k) for k in sensible_gain()[0])
    return (k_p * p + k_v * v).clip(-U_MAX_M_S2, U_MAX_M_S2)


def diverging_action(p: Array, v: Array) -> Array:
    """A proportional controller of the wrong sign, saturated: it drives away from the origin."""
    return (DIVERGING_GAIN * p + 0.0 * v).clip(-U_MAX_M_S2, U_MAX_M_S2)


def malicious_action(p: Array, v: Array) -> Array:
    """The malicious expert: regulates well where p < 0, accelerates out of bounds where p > 0."""
    malice = (0.5 + p / SWITCH_WIDTH_M).clip(0.0, 1.0)
    return (1.0 - malice) * sensible_action(p, v) + malice * U_MAX_M_S2
