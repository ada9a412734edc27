"""The certificate: never breached with a valid L, found to be breached with an understated one."""

from __future__ import annotations

import numpy as np
import pytest

from scpo_bench.checks.known_functions import KnownFunctions
from scpo_bench.scpo import smoothness
from scpo_bench.scpo.directions import DirectionMemory, probe_basis
from scpo_bench.scpo.projection import Certificate, project

RHO = 1e-3


def certified_steps(
    d: int, steps: int, factor: float, seed: int, central: bool = False
) -> tuple[int, float, int]:
    """(breaches, largest realised value, steps that moved) over certified updates with L scaled by
    ``factor``.
    """
    rng = np.random.default_rng(seed)
    g = KnownFunctions(d, 3, rng)
    x, memory = np.zeros(d), DirectionMemory.empty(3, d)
    breaches, worst, moved = 0, -np.inf, 0
    for _ in range(steps):
        here = g(x[None])[0]
        if (here > 0).any():  # an understated L has led out of the safe set: start again
            x = np.zeros(d)
            here = g(x[None])[0]
        proposal = rng.normal(size=d)
        basis = probe_basis(
            proposal, memory.candidates(x, ("normals", "momentum", "start"), ()), min(8, d), rng
        )
        plus, minus = g(x + RHO * basis.T), g(x - RHO * basis.T)
        slopes = (plus - minus).T / (2 * RHO) if central else (plus - here).T / RHO
        L = g.L * factor
        certificate = Certificate(here, slopes, 0.5 * L * RHO, L)
        result = project(certificate, basis.T @ proposal, 2.0)
        x = x + basis @ result.z
        realised = g(x[None])[0]
        breaches += bool((realised > result.bound + 1e-12).any())
        worst = max(worst, realised.max())
        moved += bool(result.z.any())
        memory = memory.seen(basis, slopes, result.z)
    return breaches, worst, moved


@pytest.mark.parametrize(("d", "steps"), [(1, 2500), (5, 2500), (40, 2500), (200, 2500)])
def test_valid_smoothness_is_never_breached(d, steps):
    """10 000 certified steps: no realised value above its bound, none unsafe, and the iterates do
    move.
    """
    breaches, worst, moved = certified_steps(d, steps, 1.0, seed=d, central=d == 5)
    assert breaches == 0
    assert worst <= 1e-12
    assert moved > steps / 50


def test_understated_smoothness_is_found_out():
    """With a tenth of the true L, breaches happen and are seen: the falsification test can fail."""
    breaches, _, _ = certified_steps(5, 500, 0.1, seed=1)
    assert breaches > 10


def test_second_differences_of_a_quadratic():
    """For g = 3 x^2 / 2 the second difference is the curvature, 3."""
    values = smoothness.second_differences(
        np.zeros(1), np.array([[1.5e-6]]), np.array([[1.5e-6]]), 1e-3
    )
    assert values == pytest.approx([3.0])


def test_after_breach_learns_what_the_step_showed():
    """|z| = 1, linear part 0, realised 4: only L >= 8 would have covered it; unbreached constraints
    keep theirs.
    """
    raised = smoothness.after_breach(
        np.array([1.0, 1.0]), np.array([True, False]), np.array([4.0, -1.0]), np.zeros(2), 1.0
    )
    assert raised == pytest.approx([8.0, 1.0])


@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_probe_basis_is_orthonormal_and_starts_with_the_proposal(count):
    """A basis that is not orthonormal would invalidate |Q z| = |z|, and with it the certificate."""
    rng = np.random.default_rng(0)
    proposal = rng.normal(size=7)
    basis = probe_basis(proposal, [proposal * 2, rng.normal(size=7)], count, rng)
    assert basis.shape == (7, min(count, 7))
    assert basis.T @ basis == pytest.approx(np.eye(basis.shape[1]), abs=1e-12)
    assert basis[:, 0] == pytest.approx(proposal / np.linalg.norm(proposal))


def test_probe_basis_contains_the_remembered_normal():
    """The memory is of use only if what it remembers can be stepped along."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=50)
    basis = probe_basis(rng.normal(size=50), [normal], 2, rng)
    assert np.linalg.norm(basis.T @ normal) == pytest.approx(np.linalg.norm(normal))
