"""Constraints whose smoothness constants are known exactly: what the certificate can be held
against.
"""

from __future__ import annotations

import numpy as np

from scpo_bench.scpo.projection import Floats


class KnownFunctions:
    """k sums of a quadratic and sines in d dimensions, strictly safe at x = 0, with exact
    smoothness constants ``L`` [k].

    g(x) = c + b.x + x'Ax / 2 + sum_j a_j sin(w_j . x + p_j): L = |A|_2 + sum_j |a_j| |w_j|^2 bounds
    the Hessian's norm.
    """

    def __init__(self, d: int, k: int, rng: np.random.Generator) -> None:
        a = rng.normal(size=(k, d, d)) / np.sqrt(d)
        self.names = tuple(f"constraint_{i}" for i in range(k))
        self.A = (a + a.transpose(0, 2, 1)) / 2
        self.b = rng.normal(size=(k, d))
        self.amplitude = rng.normal(size=(k, 3)) * 0.3
        self.w = rng.normal(size=(k, 3, d)) / np.sqrt(d) * 3
        self.phase = rng.uniform(0, 6, size=(k, 3))
        self.L: Floats = np.linalg.norm(self.A, 2, axis=(1, 2)) + (
            np.abs(self.amplitude) * (self.w**2).sum(-1)
        ).sum(-1)
        self.c = np.zeros(k)
        self.c = -self(np.zeros((1, d)))[0] - rng.exponential(
            0.5, k
        )  # so that x = 0 is strictly safe

    def __call__(self, x: Floats) -> Floats:
        """[M, k] at x [M, d]."""
        waves = np.sin(np.einsum("kjd,md->mkj", self.w, x) + self.phase)
        value = (
            x @ self.b.T
            + 0.5 * np.einsum("md,kde,me->mk", x, self.A, x)
            + (waves * self.amplitude).sum(-1)
        )
        return value + self.c
