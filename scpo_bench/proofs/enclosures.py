"""Enclosures of a policy over boxes: a linear function of the state, and a bound on the rest.

Over the box {c + d : |d_i| <= r_i}, u(c + d) lies in value + gradient . d +- slack. For tanh
networks the remainder is that of a second-order Taylor expansion whose Hessian is enclosed over the
box, so that curvatures of units cancel as their outputs do; for ReLU networks and on the ramp of a
gate, the mean value form with an enclosed gradient.

All arrays of a network's layers are [..., N, h], N boxes and h units. Intervals are (centre,
radius).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scpo_bench.contract import Floats
from scpo_bench.proofs.policy import Policy

Interval = tuple[Floats, Floats]
_PEAK = 1.0 / np.sqrt(3.0)  # tanh'' is extreme where |tanh| is this: 4 / (3 sqrt 3)
_PEAK_VALUE = 4.0 / (3.0 * np.sqrt(3.0))
# The arithmetic of the enclosures themselves is float64: far below this share of their size.
ROUNDING = 1e-12


class Enclosure(NamedTuple):
    """value [N], gradient [N, n], slack [N]: see the module's docstring."""

    value: Floats
    gradient: Floats
    slack: Floats


class _Network(NamedTuple):
    """N(x) over boxes: N(c) [N], N'(c) [n, N], and N' over the box within ``gradient_error``.

    curvature: (centre, radius) [pairs, N] of N'' over the box; zero for ReLU networks, whose
    gradient jumps.
    """

    value: Floats
    gradient: Floats
    jump: Floats
    curvature: Interval


def _times(a: Interval, b: Interval) -> Interval:
    (x, dx), (y, dy) = a, b
    return x * y, np.abs(x) * dy + dx * (np.abs(y) + dy)


def _from_ends(low: Floats, high: Floats) -> Interval:
    return (low + high) / 2, (high - low) / 2


def _pairs(n: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(n) for j in range(i, n)]


def _symmetric(pairs: Floats, n: int) -> Floats:
    """[n, n, ...] from the entries i <= j."""
    full = np.empty((n, n, *pairs.shape[1:]))
    for entry, (i, j) in zip(pairs, _pairs(n)):
        full[i, j] = full[j, i] = entry
    return full


def _tanh_derivatives(z: Floats, d: Floats) -> tuple[Interval, Interval]:
    """tanh' and tanh'' over [z - d, z + d]."""
    low, high = np.tanh(z - d), np.tanh(z + d)
    nearest = np.where((low < 0) & (high > 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    farthest = np.maximum(np.abs(low), np.abs(high))
    first = _from_ends(1 - farthest**2, 1 - nearest**2)
    at_low, at_high = 2 * low * (low * low - 1), 2 * high * (high * high - 1)
    least = np.where((low < _PEAK) & (high > _PEAK), -_PEAK_VALUE, np.minimum(at_low, at_high))
    most = np.where((low < -_PEAK) & (high > -_PEAK), _PEAK_VALUE, np.maximum(at_low, at_high))
    return first, _from_ends(least, most)


def _tanh_network(policy: Policy, centre: Floats, radius: Floats) -> _Network:
    """Second-order Taylor models, layer by layer."""
    n = centre.shape[1]
    pairs = _pairs(n)
    (W, b), *rest = policy.hidden
    rest = [*rest, (policy.head[None], np.array([policy.head_bias]))]
    z = centre @ W.T + b
    gradient = np.repeat(W.T[:, None], len(centre), axis=1)
    curvature: Interval | None = None  # of an affine function: none
    r = radius.T[:, :, None]
    for W, b in rest:
        gradient_error = None
        d = (np.abs(gradient) * r).sum(axis=0)
        if curvature is not None:
            bound = _symmetric(np.abs(curvature[0]) + curvature[1], n)
            gradient_error = (bound * r).sum(axis=1)
            d = d + 0.5 * (gradient_error * r).sum(axis=0)
        first, second = _tanh_derivatives(z, d)
        h = np.tanh(z)
        slope = 1 - h * h
        parts = []
        for k, (i, j) in enumerate(pairs):
            if gradient_error is None or curvature is None:
                product = gradient[i] * gradient[j]
                parts.append((second[0] * product, second[1] * np.abs(product)))
                continue
            slopes = _times((gradient[i], gradient_error[i]), (gradient[j], gradient_error[j]))
            bent, carried = (
                _times(second, slopes),
                _times(first, (curvature[0][k], curvature[1][k])),
            )
            parts.append((bent[0] + carried[0], bent[1] + carried[1]))
        curvature = (
            np.stack([part[0] for part in parts]) @ W.T,
            np.stack([part[1] for part in parts]) @ np.abs(W).T,
        )
        gradient = (slope * gradient) @ W.T
        z = h @ W.T + b
    assert curvature is not None
    return _Network(
        z[:, 0],
        gradient[..., 0],
        np.zeros((n, len(centre))),
        (curvature[0][..., 0], curvature[1][..., 0]),
    )


def _relu_network(policy: Policy, centre: Floats, radius: Floats) -> _Network:
    """The gradient over the box; relu(z) - relu(z_c) = lambda (z - z_c), lambda in [0, 1]."""
    n = centre.shape[1]
    (W, b), *rest = policy.hidden
    rest = [*rest, (policy.head[None], np.array([policy.head_bias]))]
    z = centre @ W.T + b
    gradient = np.repeat(W.T[:, None], len(centre), axis=1)
    error = np.zeros_like(gradient)
    r = radius.T[:, :, None]
    for W, b in rest:
        d = ((np.abs(gradient) + error) * r).sum(axis=0)
        slope = _from_ends((z - d >= 0) * 1.0, (z + d > 0) * 1.0)
        gradient, error = _times((gradient, error), slope)
        gradient, error = gradient @ W.T, error @ np.abs(W).T
        z = np.maximum(z, 0.0) @ W.T + b
    nothing = np.zeros((len(_pairs(n)), len(centre)))
    return _Network(z[:, 0], gradient[..., 0], error[..., 0], (nothing, nothing))


def _ramp(policy: Policy, centre: Floats, radius: Floats) -> tuple[Interval, Interval]:
    """s over the box [N], and its gradient [n, N]."""
    assert policy.gate is not None
    P, level = policy.gate
    slope, bend = 2 * centre @ P / level, 2 * radius @ np.abs(P) / level
    t = np.einsum("ni,ij,nj->n", centre, P, centre) / level - 1
    spread = ((np.abs(slope) + bend / 2) * radius).sum(axis=1)
    low, high = np.clip(t - spread, 0.0, 1.0), np.clip(t + spread, 0.0, 1.0)
    at_low, at_high = 6 * low * (1 - low), 6 * high * (1 - high)
    most = np.where((low < 0.5) & (high > 0.5), 1.5, np.maximum(at_low, at_high))
    rate = _from_ends(np.minimum(at_low, at_high), most)
    value = _from_ends(low * low * (3 - 2 * low), high * high * (3 - 2 * high))
    return value, _times(rate, (slope.T, bend.T))


def enclose(policy: Policy, centre: Floats, radius: Floats) -> Enclosure:
    """The policy over N boxes. centre, radius: [N, n]."""
    n = centre.shape[1]
    build = _tanh_network if policy.activation == "tanh" else _relu_network
    network = build(policy, centre, radius)
    r = radius.T
    middle, error = (_symmetric(part, n) for part in network.curvature)
    outer = r[:, None] * r[None]
    # d' H d / 2 with d_i^2 in [0, r_i^2]: half of the diagonal moves the value.
    diagonal = np.einsum("iin,iin->n", middle, outer) / 4
    twice = np.abs(middle).copy()
    for i in range(n):
        twice[i, i] /= 2
    slack = 0.5 * ((twice + error) * outer).sum(axis=(0, 1)) + (network.jump * r).sum(axis=0)
    value, gradient = network.value + diagonal, network.gradient
    if policy.gate is not None:
        value, gradient, slack = _gated(policy, centre, radius, network, (value, gradient, slack))
    total = np.abs(value) + (np.abs(gradient) * r).sum(axis=0)
    return Enclosure(
        value + centre @ policy.gain + policy.offset,
        (gradient + policy.gain[:, None]).T,
        slack + ROUNDING * (1.0 + total + np.abs(policy.head).sum()),
    )


def _gated(
    policy: Policy, centre: Floats, radius: Floats, network: _Network, plain: tuple[Floats, ...]
) -> tuple[Floats, Floats, Floats]:
    """s N where the box touches the ramp, by the mean value form; N or 0 elsewhere."""
    n, r = centre.shape[1], radius.T
    s, s_gradient = _ramp(policy, centre, radius)
    value, gradient, slack = plain
    one, zero = (s[0] == 1) & (s[1] == 0), (s[0] == 0) & (s[1] == 0)
    bound = _symmetric(np.abs(network.curvature[0]) + network.curvature[1], n)
    slopes = network.gradient, network.jump + (bound * r).sum(axis=1)
    spread = ((np.abs(slopes[0]) + slopes[1]) * r).sum(axis=0)
    left, right = _times(s_gradient, (network.value, spread)), _times(s, slopes)
    product = left[0] + right[0], left[1] + right[1]
    at_centre = policy.scale(centre) * network.value
    return (
        np.where(one, value, np.where(zero, 0.0, at_centre)),
        np.where(one, gradient, np.where(zero, 0.0, product[0])),
        np.where(one, slack, np.where(zero, 0.0, (product[1] * r).sum(axis=0))),
    )
