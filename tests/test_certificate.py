"""The guard: with a valid L its certificate is never breached, and what it deploys is safe."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from scpo_bench.checks.known_functions import KnownFunctions
from scpo_bench.scpo.bank import DirectionMemory, candidate_bank, orthonormal_bank
from scpo_bench.scpo.certified_step import Objective
from scpo_bench.scpo.constraints import Exact
from scpo_bench.scpo.guard import OLDEST, Guard, UnsafeStartError
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.local_model import FirstOrder
from scpo_bench.scpo.projection import Certificate
from scpo_bench.scpo.smoothness import Smoothness, curvatures


def linear(normal, limit=1.0):
    """One constraint normal . w - limit <= 0."""
    normal = np.asarray(normal, dtype=np.float64)
    return Exact(("plane",), lambda w: (w @ normal - limit)[:, None])


def certified(**config):
    """A guard as in the paper: L is declared, and nothing is evaluated before it is deployed."""
    return Guard(GuardConfig(mode="certified", smoothness="apriori", **config))


def drive(guard, constraints, propose, updates, w, seed=0, objective=None):
    """The decisions of ``updates`` updates from w, each deployed. propose(w) -> change."""
    rng = np.random.default_rng(seed)
    decisions = []
    for _ in range(updates):
        decision = guard.update(w, lambda w=w: propose(w), constraints, rng, objective=objective)
        decisions.append(decision)
        w = decision.w
    return decisions


def random_walk(d, updates, seed, factor=1.0, **config):
    """Updates on functions of known L: (guard, decisions, realised values and bounds of steps)."""
    rng = np.random.default_rng(seed)
    functions = KnownFunctions(d, 3, rng)
    guard = certified(L=factor * functions.L, trust_radius=2.0, **config)
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
        d,
        updates,
        seed=d,
        differences=differences,
        probe_radius=probe_radius,
        directions=8,
        candidates=("normals", "momentum", "start"),
    )
    assert (realised <= bounds + 1e-12).all()
    assert realised.max() <= 1e-12
    assert guard.recoveries == 0
    assert len(realised) == sum(x.status != "held" for x in decisions) > updates / 50


PAPER = {
    "raw and previous": {},
    "three, central": {"directions": 3, "candidates": ("momentum",), "differences": "central"},
    "normals, complete": {"directions": 64, "candidates": ("previous", "normals", "start")},
}


@pytest.mark.parametrize("d", [2, 10, 50])
@pytest.mark.parametrize("bank", list(PAPER))
def test_a_valid_smoothness_constant_is_never_breached_with_the_banks_of_the_paper(d, bank):
    """Candidates evaluated at their full length, columns neither orthogonal nor of equal length.

    Here slope errors are of the size of the step's own curvature.
    """
    # Full steps are short near a bound: a walk of several functions sees more of them.
    taken = 0
    for seed in range(4):
        guard, decisions, realised, bounds = random_walk(d, 150, seed=100 * d + seed, **PAPER[bank])
        assert (realised <= bounds + 1e-12).all()
        assert realised.max() <= 1e-12
        assert (guard.breaches, guard.exceeded, guard.recoveries) == (0, 0, 0)
        taken += sum(x.status == "projected" for x in decisions)
    assert taken > 20


def test_an_understated_smoothness_constant_is_breached_and_recovered_from():
    """With a tenth of the true L breaches happen, are counted, and an unsafe policy is not kept."""
    guard, decisions, realised, bounds = random_walk(
        5, 500, seed=0, factor=0.1, directions=8, probe_radius=1e-3
    )
    # Without a margin, what a step is certified to keep to is 0.
    assert guard.exceeded == (realised > bounds).any(axis=1).sum()
    assert guard.breaches == ((realised > bounds) & (realised > 0)).any(axis=1).sum()
    assert guard.exceeded >= guard.breaches > 10
    assert guard.recoveries > 0
    for before, after in itertools.pairwise(decisions):
        values = [v for k, v in before.diagnostics.items() if k.startswith("realised/")]
        unsafe = before.status != "recovered" and max(values) > 0
        assert (after.status == "recovered") == unsafe


def test_a_value_above_its_bound_is_a_breach_only_above_what_was_certified():
    """g = w + 2 w^2 - 1, declared linear: the step to 0.1 exceeds its bound and breaks nothing.

    With a margin of 0.88 the certificate promised to stay below -0.88: g(0.1) = -0.88 + 0.0 is
    above its bound of -0.9; g = -0.7 at 0.2 was promised to be -0.8 and is a breach.
    """
    bowl = Exact(("g",), lambda w: w + 2 * w**2 - 1)
    for change, margin, breaches in ((0.1, 0.0, 0), (0.1, 0.89, 1), (0.2, 0.0, 0), (0.5, 0.0, 0)):
        guard = certified(L=1e-9, probe_radius=1e-6, margin=margin)
        drive(guard, bowl, lambda w, u=change: np.array([u]), 1, np.zeros(1))
        assert (guard.exceeded, guard.breaches) == (1, breaches)
    guard = certified(L=1e-9, probe_radius=1e-6, trust_radius=2.0)
    drive(guard, bowl, lambda w: np.array([0.6]), 1, np.zeros(1))  # g = 0.32
    assert (guard.exceeded, guard.breaches) == (1, 1)


def test_verified_mode_deploys_only_what_was_evaluated_as_safe():
    """An adapted L falls until it is too small: breaches, but no deployed policy violates."""
    rng = np.random.default_rng(1)
    functions = KnownFunctions(5, 3, rng)
    guard = Guard(GuardConfig(safety_factor=1.0, trust_radius=2.0, directions=5, probe_radius=1e-3))
    constraints = Exact(functions.names, functions)
    decisions = drive(guard, constraints, lambda w: rng.normal(size=5), 300, np.zeros(5))
    assert guard.exceeded >= guard.breaches > 3
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
    assert (decision.status, decision.w.tolist()) == ("held", [0.0])
    assert few.held == {"converged": 0, "coarse": 0, "recheck": 1}


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
    assert guard.smoothness.known(0.0).tolist() == [5.0]


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
        held = int(status == "held")
        assert (decision.status, guard.held["converged"]) == (status, held)
        assert sum(guard.held.values()) == held
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

        def begin_update(self, update, w, g):
            self.update = update
            return self.evaluate(w)

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
        def probe(self, w, g, probes, rows):
            values, noise = super().probe(w, g, probes, rows)
            return values, noise + 1e-4

    constraints = NoisySlopes(("plane",), lambda w: w - 1.0)
    for mode, expected in (("certified", 1 / 1.1), ("verified", 1.0)):
        config = {"smoothness": "apriori", "L": 1e-9, "trust_radius": 10.0, "probe_radius": 1e-3}
        guard = Guard(GuardConfig(mode=mode, **config))
        (decision,) = drive(guard, constraints, lambda w: np.array([5.0]), 1, np.zeros(1))
        assert decision.w == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(
    "bank", [{}, {"probe_radius": 1e-2, "directions": 4}, {"probe_radius": 1e-2, "directions": 64}]
)
def test_an_uncontested_step_is_taken_to_the_last_bit(bank):
    """Components that are exactly 0, as of dead units, come back with rounding errors of a sum."""
    rng = np.random.default_rng(0)
    guard = Guard(GuardConfig(smoothness="apriori", L=1e-3, trust_radius=10.0, **bank))
    w = np.zeros(10)
    for _ in range(20):
        proposal = rng.normal(size=10)
        proposal[rng.permutation(10)[:3]] = 0.0
        decision = guard.update(w, lambda p=proposal: p, linear(np.ones(10), 1e6), rng)
        assert decision.status == "unaltered"
        assert np.array_equal(decision.w, w + proposal)
        w = decision.w


# ---- backtracking


def quadratic_loss(curvature, best):
    """(objective, -gradient) of curvature (w - best)^2 / 2."""
    objective = Objective(
        lambda w: float(curvature * (w - best) @ (w - best) / 2), lambda w: curvature * (w - best)
    )
    return objective, lambda w: curvature * (best - w)


def test_a_step_along_which_the_loss_rises_is_shortened():
    """Loss 10 w^2 / 2 from 1, gradient step of 1: w = -9 is far worse; halved until Armijo holds.

    1 - 10 t, loss 5 (1 - 10 t)^2 <= 5 - 1e-4 t 100: t = 1/8 is the first of the halvings.
    """
    objective, descent = quadratic_loss(10.0, np.zeros(1))
    guard = certified(L=1e-9, trust_radius=100.0)
    (decision,) = drive(guard, linear([1.0], 100.0), descent, 1, np.ones(1), objective=objective)
    assert decision.w == pytest.approx([1 - 10 / 8])
    assert decision.status == "projected"


def test_no_descent_is_no_step():
    """A step uphill would be refused at any length: the policy stays, and it is counted."""
    objective, descent = quadratic_loss(1.0, np.zeros(1))
    guard = certified(L=1e-9)
    (decision,) = drive(
        guard, linear([1.0], 9.0), lambda w: -descent(w), 1, np.ones(1), objective=objective
    )
    assert (decision.status, decision.w.tolist(), sum(guard.held.values())) == ("held", [1.0], 1)


@pytest.mark.parametrize("mode", ["certified", "verified"])
def test_the_loss_falls_at_every_update_that_moves(mode):
    """Steps four times too long for the loss, against curved constraints: Armijo's decrease."""
    rng = np.random.default_rng(4)
    functions = KnownFunctions(6, 3, rng)
    objective, descent = quadratic_loss(1.0, 0.3 * rng.normal(size=6))
    guard = Guard(GuardConfig(mode=mode, smoothness="apriori", L=functions.L, trust_radius=5.0))
    constraints = Exact(functions.names, functions)
    w, moved = np.zeros(6), 0
    for _ in range(100):
        update = lambda w=w: 4 * descent(w)  # noqa: E731
        decision = guard.update(w, update, constraints, rng, objective=objective)
        change, slope = decision.w - w, objective.gradient(w)
        if decision.status != "held":
            moved += 1
            gained = objective.value(decision.w) - objective.value(w)
            assert gained <= 1e-4 * slope @ change + 1e-15
            assert gained < 0
        w = decision.w
    assert moved > 5
    assert functions(w[None]).max() <= 0


# ---- no lock


def test_a_policy_within_the_margin_is_no_dead_end():
    """g = -0.01 with margin 0.25: staying is allowed, so is every step that does not come closer.

    A certificate that asked for -0.25 at once would have no solution.
    """
    normal = np.array([1.0, 0.0])
    guard = certified(L=1e-9, margin=0.25, directions=2, probe_radius=1e-3)
    constraints = linear(normal, 0.01)
    changes = iter([np.array([0.3, 0.1]), np.array([-0.4, 0.1]), np.array([0.4, 0.1])])
    decisions = drive(guard, constraints, lambda w: next(changes), 3, np.zeros(2))
    slid, back, again = (x.w for x in decisions)
    assert slid == pytest.approx([0.0, 0.1], abs=1e-6)
    assert back == pytest.approx([-0.4, 0.2], abs=1e-6)
    assert again == pytest.approx([0.01 - 0.25, 0.3], abs=1e-6)  # from here the margin is kept
    assert not any(guard.held.values())


@pytest.mark.parametrize("rule", ["adaptive", "sampled"])
def test_what_was_held_moves_again(rule):
    """g = -w + w^2 / 2 at 0, and L a million times too large, as after a kink: held at first.

    A step is certified from L |d| / 2 < 1 on; L falls while the policy stays, and it moves.
    """
    constraints = Exact(("g",), lambda w: -w + w**2 / 2)
    guard = Guard(GuardConfig(smoothness=rule))
    guard.memory = DirectionMemory.empty(1, 1)
    guard.smoothness = Smoothness(rule, 1.0, 1.0, np.inf, 1)
    guard.smoothness.constants(np.arange(1), np.ones((1, 1)), np.ones(1), False)
    guard.smoothness.raised(np.arange(1), np.array([1e6]))
    decisions = drive(guard, constraints, lambda w: np.array([0.1]), 80, np.zeros(1))
    statuses = [x.status for x in decisions]
    assert statuses[:20] == ["held"] * 20
    assert guard.held["coarse"] == statuses.count("held")
    assert "unaltered" in statuses
    assert decisions[-1].w > 0.3


def test_held_updates_shrink_L():
    """Every update without a breach lowers an adapted L by 0.8, held ones included."""
    guard = Guard(GuardConfig(smoothness="adaptive"))
    constraints = Exact(("bowl",), lambda w: 3 * w**2 - 3)
    known = []
    for proposal in (1.0, 0.0, 0.0, 1.0):
        drive(guard, constraints, lambda w, u=proposal: np.array([u]), 1, np.ones(1) * -1.0)
        known.append(float(guard.smoothness.known(0.0)[0]) if proposal else None)
    assert guard.held["converged"] == 2
    assert known[3] / known[0] == pytest.approx(0.8**3)


def held(constraints, propose, w, objective=None, **config):
    """Why the first update stays."""
    guard = Guard(GuardConfig(**config))
    (decision,) = drive(guard, constraints, propose, 1, w, objective=objective)
    assert decision.status == "held"
    (reason,) = (reason for reason, count in guard.held.items() if count)
    assert decision.diagnostics["held"] == decision.diagnostics[f"held/{reason}"] == 1
    return reason


def test_why_an_update_is_held():
    """Each reason, by the smallest example: a wall, an L that hides a way, an L that lies."""
    push, zero = lambda w: np.array([0.5]), np.zeros(1)
    exactly = {"smoothness": "apriori", "L": 1e-6, "probe_radius": 1e-3}
    assert held(linear([1.0], 0.0), push, zero, **exactly) == "converged"
    assert held(linear([1.0]), lambda w: zero, zero, **exactly) == "converged"
    # g = -w at w = 0: every step forward is safe, but no curvature is allowed for.
    downhill = linear([-1.0], 0.0)
    assert held(downhill, push, zero, smoothness="apriori", L=1e6, probe_radius=1.0) == "coarse"
    # g = 1 everywhere but at the start: no candidate passes.
    island = Exact(("g",), lambda w: np.where(np.abs(w) > 1e-9, 1.0, -1.0))
    assert held(island, push, zero, smoothness="apriori", L=1e-9, probe_radius=1e9) == "recheck"


# ---- smoothness constants


def test_second_differences_of_quadratics():
    """For g = a x^2 / 2 the second difference is the curvature a, whatever the distance."""
    lengths = np.array([1e-3, 0.5])
    g = np.array([0.0, 1.0])
    plus = np.array([3.0, 5.0]) / 2 * lengths[:, None] ** 2 + g
    assert curvatures(g, plus, plus, lengths) == pytest.approx(np.array([[3.0] * 2, [5.0] * 2]))


def test_raised_by_what_a_step_showed():
    """A breach that was four times what was allowed for needs four times the L; others stay."""
    constants = Smoothness("apriori", 1.0, 1.0, np.inf, 3)
    constants.raised(np.array([0, 2]), np.array([4.0, 0.0]))
    L, errors = constants.constants(np.arange(3), None, np.array([0.5]), False)
    assert pytest.approx([4.0, 1.0, 1.0]) == L
    assert errors == pytest.approx(L[:, None] * 0.25)
    constants.raised(np.array([1]), np.array([1.01]))  # at least twice
    assert constants.known(0.0) == pytest.approx([4.0, 2.0, 1.0])
    declared = Smoothness("apriori", 3.0, 1.0, np.inf, 1)
    declared.carry(relax=True)  # no lower than declared
    assert declared.known(0.0) == pytest.approx([3.0])


@pytest.mark.parametrize("rule", ["sampled", "adaptive"])
def test_rules_for_L(rule):
    """g = 3 w^2 - 9 has curvature 6, and twice that is allowed for; adapted: 0.8 of it then."""
    constraints = Exact(("bowl",), lambda w: 3 * w**2 - 9)
    guard = Guard(GuardConfig(smoothness=rule, safety_factor=2.0, probe_radius=1e-2))
    decisions = drive(guard, constraints, lambda w: np.array([0.1]), 2, np.zeros(1))
    second = 12.0 if rule == "sampled" else 12.0 * 0.8
    assert decisions[0].diagnostics["L/bowl"] == pytest.approx(12.0)
    assert decisions[1].diagnostics["L/bowl"] == pytest.approx(second)


def test_safe_probes_stay_inside_the_certificate():
    """g = -0.1, slope 2, L = 10: 2 rho + 5 rho^2 = 0.1 at rho = 0.0449; else as configured."""
    guard = Guard(
        GuardConfig(
            smoothness="apriori", L=10.0, probe_radius=0.5, safe_probes=True, smallest_probe=0.01
        )
    )
    guard.smoothness = Smoothness("apriori", 10.0, 1.0, np.inf, 1)
    memory = DirectionMemory(np.array([[2.0, 0.0]]), np.zeros(2), np.zeros(2))
    assert guard._radius(np.array([-0.1]), memory) == pytest.approx((-2 + np.sqrt(4 + 2)) / 10)
    assert guard._radius(np.array([-50.0]), memory) == 0.5
    assert guard._radius(np.array([-1e-9]), memory) == 0.5 * 0.01


def test_first_order_bounds_confine_the_step_and_drop_only_what_is_far():
    """100 values from -100 to -1, slope (3, 4), huge L: twice the slope, 10 per unit of length.

    The nearest allows a step of 0.1 by that, less by its curvature; the step is confined to it, and
    at that length none of them rises above 0, so that none needs the certificate.
    """
    values = np.linspace(-100, -1, 100)
    slopes = np.tile([3.0, 4.0], (100, 1))
    certificate = Certificate(values, slopes, np.zeros((100, 2)), np.full(100, 1e9), np.eye(2))
    kinked = FirstOrder(certificate, np.zeros(100), 2.0)
    assert kinked.radius == pytest.approx(0.1)
    assert kinked.bounded.all()
    z = np.array([0.06, 0.08])
    assert kinked.bound(z, 0.1) == pytest.approx(values + 1)
    margin = FirstOrder(certificate, np.full(100, 0.5), 2.0)
    assert margin.radius == pytest.approx(0.05)
    # Where curvature says more, nothing is confined, and only what no step can reach is dropped.
    smooth = replace(certificate, smoothness=np.full(100, 1e-3))
    wide = FirstOrder(smooth, np.zeros(100), 2.0)
    assert wide.radius == 2.0
    assert np.array_equal(wide.bounded, values <= -20)
    assert wide.bound(z, 0.1)[-1] == smooth.bound(z)[-1]
    few = FirstOrder(certificate.rows(np.arange(10)), np.zeros(10), 2.0)
    assert (few.radius, few.bounded.any()) == (2.0, False)


def test_first_order_bounds_of_columns_that_are_nearly_parallel():
    """A constraint across the raw step: its slopes along two columns at 0.002 rad are small.

    It is at 3 after a step of 0.1 across; a first-order bound of -2 would let it drop out.
    """
    bank = candidate_bank(np.array([1.0, 0.0]), np.array([np.cos(0.002), np.sin(0.002)]), [], 2)
    values = np.append(-2.0, np.full(71, -5.0))
    gradients = np.zeros((72, 2))
    gradients[0] = 0.0, 50.0
    slopes = gradients @ bank.directions
    certificate = Certificate(values, slopes, np.zeros((72, 2)), np.zeros(72), bank.factor)
    simple = FirstOrder(certificate, np.zeros(72), 1.0)
    z = bank.coordinates(np.array([0.0, 0.1]))
    assert simple.bound(z, 0.1)[0] >= values[0] + gradients[0] @ np.array([0.0, 0.1]) - 1e-9


def test_kinks_among_many_constraints_are_cut_only_where_evaluation_decides():
    """A second difference of a thousand times the median is no curvature; a few have no median."""
    c = np.ones((100, 2))
    c[5, 1] = 1000.0
    sampled = Smoothness("sampled", 1.0, 1.0, np.inf, 100)
    rows, lengths = np.arange(100), np.full(2, 0.5)
    L, errors = sampled.constants(rows, c, lengths, False)
    assert (L[5], errors[5].tolist()) == (1000.0, [0.25, 250.0])
    L, errors = sampled.constants(rows, c, lengths, True)
    assert (L[4], errors[4].tolist()) == (1.0, [0.25, 0.25])
    assert 1.0 < L[5] < 100.0
    assert errors[5, 1] == L[5] / 4
    assert sampled.constants(rows[:10], c[:10], lengths, True)[0][5] == 1000.0


# ---- probes that serve several updates


class Counted(Exact):
    """Counts the updates that probed."""

    probed = 0

    def probe(self, *arguments):
        self.probed += 1
        return super().probe(*arguments)


def slides(constraints, w, **config):
    """20 small updates, most of them towards the bound: (guard, decisions)."""
    rng = np.random.default_rng(0)
    guard = Guard(
        GuardConfig(
            mode="certified", smoothness="sampled", directions=3, probe_radius=1e-3, **config
        )
    )
    towards = np.array([0.5, 1.0, -0.5])
    return guard, drive(guard, constraints, lambda w: 0.03 * (rng.normal(size=3) + towards), 20, w)


def test_a_linear_constraint_is_probed_only_when_its_probes_are_old():
    """Nothing new is to be learned of it; every step is certified all the same."""
    normal = np.array([1.0, 2.0, -1.0])
    constraints = Counted(("plane",), lambda w: (w @ normal - 0.05)[:, None])
    _, decisions = slides(constraints, np.zeros(3), reuse=0.05, margin=0.01)
    assert constraints.probed == 20 / OLDEST
    assert [x.status for x in decisions].count("projected") > 3
    for decision in decisions:
        bound = decision.diagnostics["bound/plane"]
        assert decision.w @ normal - 0.05 <= bound + 1e-12
        assert bound <= -0.01 + 1e-12
    often = Counted(("plane",), constraints.values)
    slides(often, np.zeros(3), margin=0.01)
    assert often.probed == 20


def test_a_curved_constraint_is_probed_again():
    """Where curvature takes what the linear prediction does not say, old probes are dropped."""
    constraints = Counted(("bowl",), lambda w: (20 * (w**2).sum(axis=1) - 0.05)[:, None])
    guard, decisions = slides(constraints, np.zeros(3), reuse=1e-3)
    assert 1 < constraints.probed <= 20
    assert constraints.values(np.stack([x.w for x in decisions])).max() <= 1e-12
    assert guard.exceeded == 0
    patient = Counted(("bowl",), constraints.values)
    slides(patient, np.zeros(3), reuse=1e3)
    assert patient.probed < constraints.probed


def test_remembered_normals_let_the_guard_slide_along_a_constraint():
    """100 weights, 3 directions: the proposal pushes against a plane and along it.

    With the normal among the probed directions the guard keeps the part along the plane; without
    it, it can only shrink.
    """
    rng = np.random.default_rng(0)
    normal, along = orthonormal_bank(rng.normal(size=100), [], 2, 1.0, rng).basis.T
    proposal = 0.2 * (normal + along)
    progress = {}
    for candidates in ((), ("normals",)):
        guard = certified(
            L=1e-6, directions=3, candidates=candidates, trust_radius=10.0, probe_radius=1e-3
        )
        decisions = drive(guard, linear(normal), lambda w: proposal, 40, np.zeros(100))
        assert decisions[-1].w @ normal <= 1
        progress[candidates] = decisions[-1].w @ along
    assert progress[("normals",)] > 2 * progress[()]
