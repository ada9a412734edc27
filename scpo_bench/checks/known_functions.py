"""Constraints whose smoothness constant is known exactly, to hold the certificate against."""

from __future__ import annotations

import numpy as np

from scpo_bench.contract import Floats


class KnownFunctions:
    """k sums of a quadratic and sines in d dimensions, strictly safe at x = 0.

    g(x) = c + b.x + x'Ax / 2 + sum_j a_j sin(w_j . x + p_j), scaled so that ``L``, which bounds the
    Hessian's norm |A|_2 + sum_j |a_j| |w_j|^2, is the same for all of them.
    """

    L = 10.0

    def __init__(self, d: int, k: int, rng: np.random.Generator) -> None:
        self.names = tuple(f"constraint_{i}" for i in range(k))
        A = rng.normal(size=(k, d, d)) / np.sqrt(d)
        self.A = (A + A.transpose(0, 2, 1)) / 2
        self.b = rng.normal(size=(k, d))
        self.amplitude = rng.normal(size=(k, 3)) * 0.3
        self.w = rng.normal(size=(k, 3, d)) / np.sqrt(d) * 3
        self.phase = rng.uniform(0, 6, size=(k, 3))
        waves = (np.abs(self.amplitude) * (self.w**2).sum(-1)).sum(-1)
        scale = self.L / (np.linalg.norm(self.A, 2, axis=(1, 2)) + waves)
        self.A *= scale[:, None, None]
        self.b *= scale[:, None]
        self.amplitude *= scale[:, None]
        self.c = np.zeros(k)
        self.c = -self(np.zeros((1, d)))[0] - scale * rng.exponential(0.5, k)

    def __call__(self, x: Floats) -> Floats:
        """[M, k] at x [M, d]."""
        waves = np.sin(np.einsum("kjd,md->mkj", self.w, x) + self.phase)
        quadratic = x @ self.b.T + 0.5 * np.einsum("md,kde,me->mk", x, self.A, x)
        return quadratic + (waves * self.amplitude).sum(-1) + self.c
