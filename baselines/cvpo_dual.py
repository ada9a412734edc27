"""CVPO's E-step, solved exactly: reweight sampled actions within a KL and a cost bound.

    max_q  mean_b E_q[Q_r]   s.t.   mean_b KL(q_b || uniform_K) <= eps,   mean_b E_q[Q_c] <= d
    q(k|b) = softmax_k((Q_r - lam Q_c) / eta),  (eta, lam) minimising the convex dual
    g(eta, lam) = eta eps + lam d + (eta/B) sum_b log[(1/K) sum_k exp((Q_r - lam Q_c) / eta)].

Source: Liu et al. 2022, arXiv 2201.11927, equations 8-10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]
MIN_LOG_ETA, MAX_LOG_ETA = -14.0, 14.0  # of eta in units of the spread of Q_r
NEWTON_RESIDUAL = 1e-8  # KKT residual above which Newton's method has not converged


@dataclass(frozen=True)
class EStep:
    """The reweighting, its multipliers, and how well it satisfies the optimality conditions."""

    weights: Array
    """q [B, K]; each row sums to one."""
    eta: float
    """Temperature, in the unit of Q_r."""
    lam: float
    """Multiplier of the cost threshold, in units of Q_r per unit of Q_c.

    0 in a recovery step, where no dual solution exists.
    """
    kl: float
    """mean_b KL(q_b || uniform)."""
    cost_excess: float
    """mean_b E_q[Q_c] - d."""
    kkt_residual: float
    """Largest violation of the optimality conditions, in scaled units (KL relative to eps).

    0 in a recovery step.
    """
    iterations: int
    recovery: bool
    """Whether no q in the KL ball reaches d; ``weights`` then has the lowest reachable cost."""

    def effective_sample_size(self) -> float:
        """Mean over states of 1 / sum_k q^2, in [1, K]."""
        return float(np.mean(1.0 / np.sum(self.weights**2, axis=1)))


def cost_threshold(episodic_limit: float, gamma: float, episode_steps: float) -> float:
    """The episodic limit C as a threshold on Q_c: d = C (1 - gamma^T) / ((1 - gamma) T).

    C is undiscounted; d = C where gamma = 1. A constant cost C/T per step has exactly this
    discounted sum over T steps. Source: Liu et al. 2022, appendix.
    """
    if gamma == 1.0:
        return episodic_limit
    return episodic_limit * (1 - gamma**episode_steps) / ((1 - gamma) * episode_steps)


def softmax_with_kl(z: Array) -> tuple[Array, float, float]:
    """(q, mean log[(1/K) sum_k exp z], mean KL(q || uniform)) for z [B, K], q = softmax_k(z)."""
    top = z.max(axis=1, keepdims=True)
    q = np.exp(z - top)
    total = q.sum(axis=1, keepdims=True)
    q /= total
    log_mean = float(np.mean(top + np.log(total))) - np.log(z.shape[1])
    return q, log_mean, max(float(np.vdot(q, z)) / len(z) - log_mean, 0.0)


def tilt_to_kl(scores: Array, eps: float, tolerance: float = 1e-12) -> tuple[Array, float, int]:
    """(q, eta, iterations) with q = softmax(scores / eta) and mean KL(q || uniform) = eps.

    scores: [B, K] with a spread near one. Safeguarded Newton in log eta; KL falls in eta. If eps
    exceeds the KL at every eta, the smallest eta is returned (ties share the mass).
    """
    low, high = MIN_LOG_ETA, MAX_LOG_ETA
    x = _small_tilt(eps)
    q = np.empty(0)
    iteration = 0
    while iteration < 100:
        iteration += 1
        z = scores * np.exp(-x)
        q, _, kl = softmax_with_kl(z)
        gap = kl - eps
        if abs(gap) <= tolerance * eps or high - low < 1e-14:
            break
        low, high = (x, high) if gap > 0 else (low, x)
        slope = -_covariances(q, z, z)[0]  # d KL / d log eta
        # Newton on log KL: close to linear in log eta
        step = -np.log(kl / eps) * kl / slope if slope < 0 and kl > 0 else np.inf
        x = x + step if low < x + step < high else 0.5 * (low + high)
    return q, float(np.exp(x)), iteration


def _small_tilt(eps: float) -> float:
    """log eta where KL = eps in the limit of small tilts: KL = Var / (2 eta^2), Var = 1."""
    return float(np.clip(-0.5 * np.log(2 * eps), MIN_LOG_ETA, MAX_LOG_ETA))


def _covariances(q: Array, a: Array, b: Array) -> tuple[float, float, float]:
    """mean_b Cov_{q_b} of (a, a), (a, b), (b, b)."""
    qa, qb = q * a, q * b
    mean_a, mean_b = qa.sum(axis=1), qb.sum(axis=1)
    return (
        float(np.vdot(qa, a) - mean_a @ mean_a) / len(q),
        float(np.vdot(qa, b) - mean_a @ mean_b) / len(q),
        float(np.vdot(qb, b) - mean_b @ mean_b) / len(q),
    )


def e_step(
    q_reward: Array, q_cost: Array, eps: float, threshold: float, max_iterations: int = 30
) -> EStep:
    """Solve the E-step for Q values [B, K] of K actions per state, drawn from the old policy.

    eps > 0: KL bound; threshold: d, infinite for no constraint. Works in float64 on Q centred per
    state and scaled by its spread.
    """
    q_reward, q_cost = np.asarray(q_reward, np.float64), np.asarray(q_cost, np.float64)
    reward, reward_scale = _centred(q_reward)
    cost, cost_scale = _centred(q_cost)
    # d for the centred, scaled costs, whose uniform mean is 0.
    slack = (threshold - float(q_cost.mean())) / cost_scale
    constrained = np.isfinite(threshold) and cost_scale < np.inf and bool(np.any(cost))

    def finish(
        weights: Array, eta: float, lam: float, kkt: float, iterations: int, recovery: bool
    ) -> EStep:
        ratio = np.maximum(weights * weights.shape[1], 1e-300)
        kl = float(np.mean(np.sum(weights * np.log(ratio), axis=1)))
        excess = float(np.vdot(weights, q_cost)) / len(weights) - threshold
        return EStep(
            weights,
            eta * reward_scale,
            lam * reward_scale / cost_scale,
            kl,
            excess,
            kkt,
            iterations,
            recovery,
        )

    if not constrained:
        weights, eta, iterations = tilt_to_kl(reward, eps)
        kl = softmax_with_kl(reward / eta)[2]
        kkt = 0.0 if not np.any(reward) else _eta_residual(kl, eps, np.log(eta))
        return finish(weights, eta, 0.0, kkt, iterations, bool(slack < 0))
    if slack < 0:  # the uniform q violates: is there any q in the ball that does not?
        weights, eta, iterations = tilt_to_kl(-cost, eps)
        lowest = float(np.vdot(weights, cost)) / len(cost)
        if lowest >= slack or not np.any(reward):
            return finish(weights, eta, 0.0, 0.0, iterations, lowest > slack)
    elif not np.any(reward):
        return finish(np.full_like(reward, 1.0 / reward.shape[1]), 1.0, 0.0, 0.0, 0, False)
    x, lam, kkt, iterations = _minimise_dual(reward, cost, eps, slack, max_iterations)
    if kkt > NEWTON_RESIDUAL:
        x, lam, kkt, evaluations = _nested_roots(reward, cost, eps, slack)
        iterations += evaluations
    weights = softmax_with_kl((reward - lam * cost) * np.exp(-x))[0]
    return finish(weights, float(np.exp(x)), lam, kkt, iterations, False)


def _centred(q: Array) -> tuple[Array, float]:
    """(q minus its mean per state, over its standard deviation; that deviation).

    Where actions make no difference: zeros, and 1.
    """
    centred = q - q.mean(axis=1, keepdims=True)
    scale = float(centred.std())
    if scale <= 1e-12 * max(1.0, float(np.abs(q).max())):
        return np.zeros_like(q), 1.0
    return centred / scale, scale


def _eta_residual(kl: float, eps: float, log_eta: float) -> float:
    """Relative violation of KL = eps; at the smallest eta, KL below eps is no violation."""
    return max(kl / eps - 1.0, 0.0) if log_eta <= MIN_LOG_ETA + 1e-6 else abs(kl / eps - 1.0)


@dataclass(frozen=True)
class _DualPoint:
    """The dual and what its derivatives need, at (x = log eta, lam), in scaled units."""

    x: float
    lam: float
    value: float
    z: Array
    q: Array
    g_eta: float
    g_lam: float
    kkt: float


def _dual_point(
    reward: Array, cost: Array, eps: float, slack: float, x: float, lam: float
) -> _DualPoint:
    eta = np.exp(x)
    z = (reward - lam * cost) / eta
    q, log_mean, kl = softmax_with_kl(z)
    g_lam = slack - float(np.vdot(q, cost)) / len(cost)
    kkt = max(_eta_residual(kl, eps, x), abs(lam - max(lam - g_lam, 0.0)))
    return _DualPoint(x, lam, eta * (eps + log_mean) + lam * slack, z, q, eps - kl, g_lam, kkt)


def _minimise_dual(
    reward: Array,
    cost: Array,
    eps: float,
    slack: float,
    max_iterations: int,
    tolerance: float = 1e-10,
) -> tuple[float, float, float, int]:
    """Projected Newton in (x = log eta, lam >= 0). Returns (x, lam, KKT residual, iterations).

    Gradient in eta: eps - KL; in lam: slack - E_q[cost]. Hessian in (eta, lam): (1/eta) mean_b
    Cov_q of (z, cost). In x: g_x = eta g_eta, g_xx = eta^2 g_etaeta + eta g_eta, the last term kept
    only where it adds convexity.
    """
    at = _dual_point(reward, cost, eps, slack, _small_tilt(eps), 0.0)
    for iteration in range(1, max_iterations + 1):
        if at.kkt <= tolerance:
            return at.x, at.lam, at.kkt, iteration - 1
        eta = np.exp(at.x)
        var_z, h_xl, var_cost = _covariances(at.q, at.z, cost)
        g_x, h_xx, h_ll = eta * at.g_eta, eta * (var_z + max(at.g_eta, 0.0)), var_cost / eta
        determinant = h_xx * h_ll - h_xl * h_xl
        if at.lam == 0.0 and at.g_lam >= 0.0:  # the bound holds lam; only eta moves
            dx, dlam = -g_x / max(h_xx, 1e-300), 0.0
        elif determinant > 1e-14 * h_xx * h_ll:
            dx = -(h_ll * g_x - h_xl * at.g_lam) / determinant
            dlam = -(h_xx * at.g_lam - h_xl * g_x) / determinant
        else:
            dx, dlam = -g_x / max(h_xx, 1e-300), -at.g_lam / max(h_ll, 1e-300)
        # At most a factor e^2 in eta at once, and 100 in 1 + lam: on a flat dual, more overflows.
        shrink = min(1.0, 2.0 / max(abs(dx), 1e-300), 100 * (1 + at.lam) / max(abs(dlam), 1e-300))
        for halving in range(40):
            step = shrink * 0.5**halving
            new_x = float(np.clip(at.x + step * dx, MIN_LOG_ETA, MAX_LOG_ETA))
            new = _dual_point(reward, cost, eps, slack, new_x, max(at.lam + step * dlam, 0.0))
            predicted = g_x * (new.x - at.x) + at.g_lam * (new.lam - at.lam)
            # Near the optimum the value's differences are lost in rounding; there a falling
            # residual decides.
            if new.value <= at.value + 1e-4 * predicted or new.kkt <= 0.5 * at.kkt:
                break
        else:
            return at.x, at.lam, at.kkt, iteration
        at = new
    return at.x, at.lam, at.kkt, max_iterations


def _nested_roots(
    reward: Array, cost: Array, eps: float, slack: float
) -> tuple[float, float, float, int]:
    """As ``_minimise_dual``, by bracketing: lam at a given eta, inside eta.

    For instances on which Newton's method stalls: eta goes to 0 where the KL bound is not active
    (it exceeds what any q needs, or Q_c is a multiple of Q_r), and the dual has a kink there.
    At given eta, E_q[cost] falls in lam; along those lam, the dual is convex in eta with slope eps
    - KL, so KL falls in eta.
    """
    evaluations = 0

    def at(x: float, lam: float) -> _DualPoint:
        nonlocal evaluations
        evaluations += 1
        return _dual_point(reward, cost, eps, slack, x, lam)

    def root(function: Callable[[float], float], low: float, high: float) -> float:
        return float(brentq(function, low, high, xtol=1e-300, rtol=4 * np.finfo(float).eps))

    def cheapest_feasible(x: float) -> float:
        """The smallest lam >= 0 at which the cost is at most ``slack``."""
        if at(x, 0.0).g_lam >= 0.0:
            return 0.0
        high = 1.0
        while at(x, high).g_lam < 0.0 and high < 1e15:
            high *= 2.0
        if at(x, high).g_lam < 0.0:
            return high
        return root(lambda lam: at(x, lam).g_lam, 0.0, high)

    def kl_slack(x: float) -> float:
        return at(x, cheapest_feasible(x)).g_eta

    x = MIN_LOG_ETA
    if kl_slack(x) < 0.0:
        reaches = kl_slack(MAX_LOG_ETA) > 0.0
        x = root(kl_slack, MIN_LOG_ETA, MAX_LOG_ETA) if reaches else MAX_LOG_ETA
    best = at(x, cheapest_feasible(x))
    return best.x, best.lam, best.kkt, evaluations
