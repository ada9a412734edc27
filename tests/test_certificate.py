"""The guard: with a valid L its certificate is never breached, and what it deploys is safe."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scpo_bench.checks.known_functions import KnownFunctions
from scpo_bench.scpo import smoothness
from scpo_bench.scpo.constraints import Exact
from scpo_bench.scpo.directions import DirectionMemory, probe_basis
from scpo_bench.scpo.guard import Guard, GuardConfig, UnsafeStartError


def linear(normal, limit=1.0):
    """One constraint normal . w - limit <= 0."""
    normal = np.asarray(normal, dtype=np.float64)
    return Exact(("plane",), lambda w: (w @ normal - limit)[:, None])


def certified(**config):
    """A guard as in the paper: L is declared, and nothing is evaluated before it is deployed."""
    return Guard(GuardConfig(mode="certified", smoothness="apriori", **config))


def drive(guard, constraints, propose, updates, w, seed=0):
    """The decisions of ``updates`` updates from w, each deployed. propose(w) -> change."""
    rng = np.random.default_rng(seed)
    decisions = []
    for _ in range(updates):
        decisions.append(guard.update(w, lambda w=w: propose(w), constraints, rng))
        w = decisions[-1].w
    return decisions


def random_walk(d, updates, seed, factor=1.0, **config):
    """Updates on functions of known L: (guard, decisions, realised values and bounds of steps)."""
    rng = np.random.default_rng(seed)
    functions = KnownFunctions(d, 3, rng)
    guard = certified(L=factor * functions.L, directions=min(8, d), trust_radius=2.0, **config)
    decisions = drive(
        guard,
        Exact(functions.names, functions),
        lambda w: rng.normal(size=d),
        updates,
        np.zeros(d),
        seed,
    )
    steps = [x for x in decisions if x.status in ("unaltered", "projected")]
    realised = functions(np.stack([x.w for x in steps]))
    bounds = np.array([[x.diagnostics[f"bound/{name}"] for name in functions.names] for x in steps])
    return guard, decisions, realised, bounds


@pytest.mark.parametrize(
    ("d", "differences", "probe_radius"),
    [
        (1, "forward", 1e-3),
        (5, "central", 1e-3),
        (5, "forward", 0.1),
        (40, "forward", 0.1),
        (200, "forward", 1e-3),
    ],
)
def test_a_valid_smoothness_constant_is_never_breached(d, differences, probe_radius):
    """No realised value above its bound, none unsafe, at small and at large probe radii.

    At a radius of 0.1 a difference quotient is off by up to L rho / 2: a certificate without that
    slope error is breached.
    """
    updates = 2000
    guard, decisions, realised, bounds = random_walk(
        d, updates, seed=d, differences=differences, probe_radius=probe_radius
    )
    assert (realised <= bounds + 1e-12).all()
    assert realised.max() <= 1e-12
    assert guard.recoveries == 0
    assert len(realised) == sum(x.status != "held" for x in decisions) > updates / 50


def test_an_understated_smoothness_constant_is_breached_and_recovered_from():
    """With a tenth of the true L breaches happen, are counted, and an unsafe policy is not kept."""
    guard, decisions, realised, bounds = random_walk(5, 500, seed=1, factor=0.1)
    assert guard.breaches > 10
    assert guard.breaches == (realised > bounds).any(axis=1).sum()
    assert guard.recoveries > 0
    for before, after in itertools.pairwise(decisions):
        values = [v for k, v in before.diagnostics.items() if k.startswith("realised/")]
        unsafe = before.status != "recovered" and max(values) > 0
        assert (after.status == "recovered") == unsafe


def test_verified_mode_deploys_only_what_was_evaluated_as_safe():
    """The same understated L: breaches happen, but no deployed policy violates."""
    rng = np.random.default_rng(1)
    functions = KnownFunctions(5, 3, rng)
    guard = Guard(GuardConfig(mode="verified", smoothness="apriori", L=1.0, trust_radius=2.0))
    constraints = Exact(functions.names, functions)
    decisions = drive(guard, constraints, lambda w: rng.normal(size=5), 300, np.zeros(5))
    assert guard.breaches > 10
    assert functions(np.stack([x.w for x in decisions])).max() <= 0
    assert sum(x.status != "held" for x in decisions) > 30


def test_verified_mode_raises_L_until_the_step_is_safe():
    """g = 50 w^2 - 1 with L = 1: retries must end at a safe step, not at the first or at none."""
    constraints = Exact(("bowl",), lambda w: 50 * (w**2).sum(axis=1, keepdims=True) - 1)
    guard = Guard(GuardConfig(smoothness="apriori", L=1.0, probe_radius=1e-6))
    (decision,) = drive(guard, constraints, lambda w: np.ones(1), 1, np.zeros(1))
    assert decision.status == "projected"
    assert 0.1 < decision.w[0] <= np.sqrt(1 / 50)
    assert decision.diagnostics["L/bowl"] == pytest.approx(100, rel=1e-3)
    few = Guard(GuardConfig(smoothness="apriori", L=1.0, probe_radius=1e-6, retries=1))
    (decision,) = drive(few, constraints, lambda w: np.ones(1), 1, np.zeros(1))
    assert (decision.status, decision.w.tolist(), few.held) == ("held", [0.0], 1)


def test_the_margin_is_kept():
    """w - 1 <= 0 with margin 0.25: a proposal of 5 ends at 0.75, not at 1."""
    guard = certified(L=1e-6, margin=0.25, trust_radius=10.0)
    (decision,) = drive(guard, linear([1.0]), lambda w: np.array([5.0]), 1, np.zeros(1))
    assert decision.w == pytest.approx([0.75], abs=1e-5)
    assert decision.diagnostics["bound/plane"] <= -0.25


def test_one_jump_does_not_stop_learning_for_long():
    """A count jumps by 10: the L that this shows is used for retries, and only 5 of it later."""
    constraints = Exact(("count",), lambda w: np.where(w > 0.05, 9.0, -1.0))
    guard = Guard(GuardConfig(largest_L=5.0, trust_radius=10.0, probe_radius=1e-3))
    decision, *_ = drive(guard, constraints, lambda w: np.ones(1), 1, np.zeros(1))
    assert guard.breaches > 0
    assert decision.diagnostics["L/count"] > 100
    assert decision.w[0] <= 0.05
    assert guard.smoothness.tolist() == [5.0]


@pytest.mark.parametrize("mode", ["certified", "verified"])
def test_rounding_widens_slope_error_and_margin(mode):
    """Values off by up to 0.01, probe radius 0.1: s = 1 +- 0.2, and 0.02 away from the limit."""
    guard = Guard(
        GuardConfig(mode=mode, smoothness="apriori", L=1e-9, trust_radius=10.0, probe_radius=0.1)
    )
    constraints = Exact(("plane",), lambda w: w - 1.0, lambda w: np.full(1, 0.01))
    (decision,) = drive(guard, constraints, lambda w: np.array([5.0]), 1, np.zeros(1))
    assert decision.w == pytest.approx([0.98 / 1.2], abs=1e-6)


def test_statuses():
    """What is deployed, before a plane and on it: the proposal, its projection, or w itself."""
    for limit, radius, change, status, expected in (
        (1.0, 10.0, 0.5, "unaltered", 0.5),
        (1.0, 10.0, 5.0, "projected", 1.0),
        (1.0, 0.1, 0.5, "projected", 0.1),
        (0.0, 10.0, 5.0, "held", 0.0),
        (0.0, 10.0, 0.0, "held", 0.0),
        (0.0, 10.0, -5.0, "unaltered", -5.0),
    ):
        guard, w = certified(L=1e-9, trust_radius=radius), np.zeros(1)
        constraints, proposal = linear([1.0], limit), np.array([change])
        decision = guard.update(w, lambda p=proposal: p, constraints, np.random.default_rng(0))
        assert (decision.status, guard.held) == (status, int(status == "held"))
        assert decision.w == pytest.approx([expected], abs=1e-6)


def test_unsafe_start_is_refused():
    """The induction needs a safe start: the error names the worst constraint."""
    constraints = Exact(("a", "b"), lambda w: np.array([[-1.0, 0.3]]))
    with pytest.raises(UnsafeStartError, match=r"constraint 'b' has value 0\.3 > 0"):
        drive(certified(), constraints, lambda w: np.ones(1), 1, np.zeros(1))


def test_no_proposal_is_made_from_an_unsafe_policy():
    """Recovery returns the last safe policy and leaves the optimiser's state alone."""

    class Redrawn(Exact):
        """Noise: every update evaluates the deployed policy again."""

        def begin_update(self, update):
            self.update = update
            return True

    constraints = Redrawn(("g",), lambda w: (w - 1) + 10.0 * (constraints.update == 2))
    guard = certified(L=1e-9, trust_radius=10.0)
    proposals = []

    def propose(w):
        proposals.append(w)
        return np.array([0.5])

    decisions = drive(guard, constraints, propose, 3, np.zeros(1))
    assert [x.status for x in decisions] == ["unaltered", "recovered", "unaltered"]
    assert decisions[1].w.tolist() == [0.0]
    assert decisions[1].diagnostics == {"recoveries": 1.0, "step_norm": 0.0}
    assert len(proposals) == 2


def test_noise_in_the_slopes_is_covered_in_certified_mode_only():
    """Certified: the bound allows for it. Verified: an evaluation decides; the step is longer."""

    class NoisySlopes(Exact):
        def probe(self, w, g, probes):
            values, noise = super().probe(w, g, probes)
            return values, noise + 1e-4

    constraints = NoisySlopes(("plane",), lambda w: w - 1.0)
    for mode, expected in (("certified", 1 / 1.1), ("verified", 1.0)):
        config = {"smoothness": "apriori", "L": 1e-9, "trust_radius": 10.0, "probe_radius": 1e-3}
        guard = Guard(GuardConfig(mode=mode, **config))
        (decision,) = drive(guard, constraints, lambda w: np.array([5.0]), 1, np.zeros(1))
        assert decision.w == pytest.approx([expected], abs=1e-6)


# ---- smoothness constants


def test_second_differences_of_a_quadratic():
    """For g = 3 x^2 / 2 the second difference is the curvature, 3."""
    values = smoothness.second_differences(
        np.zeros(1), np.array([[1.5e-6]]), np.array([[1.5e-6]]), 1e-3
    )
    assert values == pytest.approx([3.0])


def test_after_breach_learns_what_the_step_showed():
    """|z| = 1, linear part 0, realised 4: only L >= 8 would have covered it; the other is kept."""
    raised = smoothness.after_breach(
        np.array([1.0, 1.0]), np.array([True, False]), np.array([4.0, -1.0]), np.zeros(2), 1.0
    )
    assert raised == pytest.approx([8.0, 1.0])


@pytest.mark.parametrize(("rule", "second"), [("sampled", 12.0), ("adaptive", 12.0 * 0.8 * 0.8)])
def test_rules_for_L(rule, second):
    """g = 3 w^2 - 9 has curvature 6: sampled twice that; adapted by 0.8 after each success."""
    constraints = Exact(("bowl",), lambda w: 3 * w**2 - 9)
    guard = Guard(GuardConfig(smoothness=rule, safety_factor=2.0, probe_radius=1e-2))
    decisions = drive(guard, constraints, lambda w: np.array([0.1]), 2, np.zeros(1))
    first = 12.0 if rule == "sampled" else 12.0 * 0.8
    assert decisions[0].diagnostics["L/bowl"] == pytest.approx(first)
    assert decisions[1].diagnostics["L/bowl"] == pytest.approx(second)


def test_safe_probes_stay_inside_the_certificate():
    """g = -0.1, slope 2, L = 10: 2 rho + 5 rho^2 = 0.1 at rho = 0.0449; else as configured."""
    guard = Guard(GuardConfig(probe_radius=0.5, safe_probes=True, smallest_probe=0.01))
    guard.smoothness = np.array([10.0])
    memory = DirectionMemory(np.array([[2.0, 0.0]]), np.zeros(2))
    assert guard._radius(np.array([-0.1]), memory) == pytest.approx((-2 + np.sqrt(4 + 2)) / 10)
    assert guard._radius(np.array([-50.0]), memory) == 0.5
    assert guard._radius(np.array([-1e-9]), memory) == 0.5 * 0.01


# ---- directions


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
    """The memory is of use only if steps can be taken along what it remembers."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=50)
    basis = probe_basis(rng.normal(size=50), [normal], 2, rng)
    assert np.linalg.norm(basis.T @ normal) == pytest.approx(np.linalg.norm(normal))


def test_memory_by_hand():
    """Probed components are replaced by the new slopes, the others decay by 0.9."""
    e1, e2 = np.eye(3)[:, :1], np.eye(3)[:, 1:2]
    memory = DirectionMemory.empty(1, 3)
    memory = memory.updated(np.hstack([e1, e2]), np.array([[3.0, 4.0]]), np.array([1.0, 2.0]))
    assert memory.normals == pytest.approx(np.array([[3.0, 4.0, 0.0]]))
    assert memory.momentum == pytest.approx(np.array([1.0, 2.0, 0.0]))
    memory = memory.updated(e1, np.array([[5.0]]), np.array([0.5]))
    assert memory.normals == pytest.approx(np.array([[5.0, 3.6, 0.0]]))
    assert memory.momentum == pytest.approx(np.array([1.4, 1.8, 0.0]))
    w, cost = np.array([0.0, 0.0, 7.0]), np.array([0.0, 1.0, 0.0])
    kinds = ("start", "cost", "momentum", "normals")
    start, first, momentum, normal = memory.candidates(w, kinds, [cost])
    assert (start == -w).all()
    assert first is cost
    assert (momentum == memory.momentum).all()
    assert (normal == memory.normals[0]).all()


def test_remembered_normals_let_the_guard_slide_along_a_constraint():
    """100 weights, 3 directions: the proposal pushes against a plane and along it.

    With the normal among the probed directions the guard keeps the part along the plane; without
    it, it can only shrink.
    """
    rng = np.random.default_rng(0)
    normal, along = probe_basis(rng.normal(size=100), [], 2, rng).T
    proposal = 0.2 * (normal + along)
    progress = {}
    for candidates in ((), ("normals",)):
        guard = certified(L=1e-6, directions=3, candidates=candidates, trust_radius=10.0)
        decisions = drive(guard, linear(normal), lambda w: proposal, 40, np.zeros(100))
        assert decisions[-1].w @ normal <= 1
        progress[candidates] = decisions[-1].w @ along
    assert progress[("normals",)] > 2 * progress[()]
