"""The bank of candidate updates, and the memory that its columns come from."""

from __future__ import annotations

import numpy as np
import pytest

from scpo_bench.scpo.bank import DirectionMemory, candidate_bank, orthonormal_bank


@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_orthonormal_bank_starts_with_the_proposal(count):
    """A basis that is not orthonormal would invalidate |Q z| = |z|, and with it the certificate."""
    rng = np.random.default_rng(0)
    proposal = rng.normal(size=7)
    bank = orthonormal_bank(proposal, [proposal * 2, rng.normal(size=7)], count, 0.1, rng)
    assert bank.directions.shape == (7, min(count, 7))
    assert bank.complete == (count >= 7)
    assert bank.directions.T @ bank.directions == pytest.approx(np.eye(min(count, 7)), abs=1e-12)
    assert bank.directions[:, 0] == pytest.approx(proposal / np.linalg.norm(proposal))
    assert bank.lengths == pytest.approx(0.1)
    assert np.array_equal(bank.factor, np.eye(min(count, 7)))


def test_complete_bank_of_an_axis():
    """The reflection must not divide by zero where the proposal is along the first axis."""
    for sign in (1.0, -1.0):
        proposal = np.array([sign, 0.0, 0.0])
        bank = orthonormal_bank(proposal, [], 3, 1.0, np.random.default_rng(0))
        assert bank.directions.T @ bank.directions == pytest.approx(np.eye(3), abs=1e-12)
        assert np.array_equal(bank.directions[:, 0], proposal)


def test_orthonormal_bank_contains_the_remembered_normal():
    """The memory is of use only if steps can be taken along what it remembers."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=50)
    bank = orthonormal_bank(rng.normal(size=50), [normal], 2, 1.0, rng)
    assert np.linalg.norm(bank.basis.T @ normal) == pytest.approx(np.linalg.norm(normal))


def test_bank_of_the_paper_by_hand():
    """Columns are the candidates as they are: raw step, previous step; others as long as the raw.

    |D xi| and the coordinates of a step follow from the factor.
    """
    raw, previous, normal = np.array([3.0, 0, 4]), np.array([0.0, 2, 0]), np.array([1.0, 1, 0])
    bank = candidate_bank(raw, previous, [np.zeros(3), normal], 3)
    assert bank.directions * bank.lengths == pytest.approx(
        np.stack([raw, previous, normal * 5 / np.sqrt(2)], axis=1)
    )
    assert bank.basis.T @ bank.basis == pytest.approx(np.eye(3), abs=1e-12)
    assert bank.basis @ bank.factor == pytest.approx(bank.directions)
    z = np.array([1.0, -2.0, 0.5])
    assert bank.length(z) == pytest.approx(np.linalg.norm(bank.directions @ z))
    assert bank.step(z) == pytest.approx(bank.directions @ z)
    assert bank.coordinates(bank.step(z)) == pytest.approx(z)
    assert bank.complete
    fewer = candidate_bank(raw, previous, [normal], 2)
    assert (fewer.directions.shape, fewer.complete) == ((3, 2), False)


@pytest.mark.parametrize("angle", [0.0, 1e-8, 5e-4])
@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-5])
def test_nearly_collinear_candidates_give_the_raw_step_alone(angle, scale):
    """The paper's rule; a column that adds nothing would make the certificate ill-conditioned."""
    raw = np.array([2.0, 0.0, 0.0])
    previous = scale * np.array([np.cos(angle), np.sin(angle), 0.0])
    bank = candidate_bank(raw, previous, [], 2)
    assert bank.directions.tolist() == [[1.0], [0.0], [0.0]]
    assert bank.lengths.tolist() == [2.0]
    wide = candidate_bank(raw, scale * np.array([np.cos(0.01), np.sin(0.01), 0.0]), [], 2)
    assert wide.directions.shape == (3, 2)


def test_memory_by_hand():
    """Probed components are replaced by the new slopes, the others decay by 0.9."""
    rng = np.random.default_rng(0)
    memory = DirectionMemory.empty(1, 3)
    both = candidate_bank(np.array([1.0, 0, 0]), np.array([0.0, 2, 0]), [], 2)
    memory = memory.with_normals(both, np.array([[3.0, 4.0]])).with_step(np.array([1.0, 2, 0]))
    assert memory.normals == pytest.approx(np.array([[3.0, 4.0, 0.0]]))
    assert memory.momentum == pytest.approx(np.array([1.0, 2.0, 0.0]))
    one = orthonormal_bank(np.array([7.0, 0, 0]), [], 1, 1e-3, rng)
    memory = memory.with_normals(one, np.array([[5.0]])).with_step(np.array([0.5, 0, 0]))
    assert memory.normals == pytest.approx(np.array([[5.0, 3.6, 0.0]]))
    assert memory.momentum == pytest.approx(np.array([1.4, 1.8, 0.0]))
    assert memory.previous == pytest.approx(np.array([0.5, 0, 0]))
    assert memory.with_step(np.zeros(3)).previous == pytest.approx(np.array([0.5, 0, 0]))
    w, cost = np.array([0.0, 0.0, 7.0]), np.array([0.0, 1.0, 0.0])
    kinds = ("start", "cost", "momentum", "normals", "previous")
    start, first, momentum, normal, previous = memory.candidates(w, kinds, [cost])
    assert (start == -w).all()
    assert first is cost
    assert (momentum == memory.momentum).all()
    assert (normal == memory.normals[0]).all()
    assert (previous == memory.previous).all()


def test_a_normal_is_learned_from_columns_that_are_not_orthogonal():
    """Slopes along two columns at 45 degrees determine the gradient in their plane."""
    gradient = np.array([1.0, -2.0, 5.0])
    bank = candidate_bank(np.array([2.0, 0, 0]), np.array([1.0, 1, 0]), [], 2)
    memory = DirectionMemory.empty(1, 3).with_normals(bank, (gradient @ bank.directions)[None])
    assert memory.normals == pytest.approx(np.array([[1.0, -2.0, 0.0]]))
