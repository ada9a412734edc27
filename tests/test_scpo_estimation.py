"""Constraints estimated from rollouts: which are drawn, what is kept, and what is concluded."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from push import Push, pushing
from scipy import stats
from stable_baselines3 import PPO

import scpo_bench  # noqa: F401 - registers the tasks
from scpo_bench.contract import ProbeMeter
from scpo_bench.errors import UserError
from scpo_bench.scpo import bounds, estimation
from scpo_bench.scpo.constraints import Exact, RolloutConfig
from scpo_bench.scpo.estimation import Evidence, Expected
from scpo_bench.scpo.evaluation import constraints_from
from scpo_bench.scpo.guard import Guard
from scpo_bench.scpo.guard_config import GuardConfig
from scpo_bench.scpo.rollouts import BatchedRollouts, EpisodeRollouts
from scpo_bench.scpo.spaces import PolicyWeights


class Noisy:
    """y = value + w_0 + noise of the stream's own; remembers which streams were asked for."""

    names, exact = ("g",), False

    def __init__(self, value, std, seed=0, span=None, draw=None):
        self.value, self.std, self.seed, self.span = value, std, seed, span
        self.draw = draw or (lambda rng: rng.normal())
        self.used = []

    def __call__(self, w, streams):
        self.used.append((len(w), list(streams)))
        noise = [self.draw(np.random.default_rng([self.seed, s])) for s in streams]
        return (self.value + w[:, :1])[:, None] + self.std * np.array(noise)[:, None]

    def close(self):
        pass


def noisy(value, std, candidates=8, **kwargs):
    """A constraint measured with normal noise, 8 rollouts at first and 64 at most."""
    source = {k: kwargs.pop(k) for k in ("seed", "span", "draw") if k in kwargs}
    config = RolloutConfig(**{"rollouts": 8, "rollout_budget": 64, "level": 0.05, **kwargs})
    return Expected(Noisy(value, std, **source), config, candidates, Evidence())


def streams(constraint):
    return [stream for _, used in constraint._rollouts.used for stream in used]


def test_exact_rollouts_need_no_confidence_bounds():
    """Where there is no noise the constraint is a function, and it is not evaluated again."""
    task = gym.make("scpo_bench/HarmfulRegression-v0").unwrapped.task
    policy = PPO("MlpPolicy", gym.make("scpo_bench/HarmfulRegression-v0"), device="cpu").policy
    space = PolicyWeights(policy)
    config = RolloutConfig(rollouts=2, rollout_budget=4, level=0.1)
    exact = constraints_from(
        BatchedRollouts(task, space, 32, 50.0, ProbeMeter()), config, GuardConfig(), 0
    )
    assert isinstance(exact, Exact)
    assert not exact.noisy
    known = np.array([-7.0, -8.0])
    assert exact.begin_update(1, np.zeros(space.dimension), known) is known
    noise = BatchedRollouts(task, space, 32, 50.0, ProbeMeter(), noise_std=0.1)
    expected = constraints_from(noise, config, GuardConfig(), 0)
    assert isinstance(expected, Expected)
    assert expected.noisy


def test_evaluation_is_the_upper_confidence_bound():
    """Eight rollouts, no doubling: mean + t s / sqrt(8), the level shared among 10 tests."""
    constraint = noisy(-0.5, 0.1, rollout_budget=8)
    y = -0.5 + 0.1 * np.array([np.random.default_rng([0, s]).normal() for s in range(8)])
    expected = y.mean() + stats.t.ppf(1 - 0.05 / 10, 7) * y.std(ddof=1) / np.sqrt(8)
    assert constraint.evaluate(np.zeros(1)) == pytest.approx([expected])


@pytest.mark.parametrize(("value", "rollouts"), [(-3.0, 8), (3.0, 8), (-0.03, 64)])
def test_rollouts_adapt_to_the_decision(value, rollouts):
    """Far from the limit the first rollouts are enough; near it the budget is used, and no more."""
    constraint = noisy(value, 0.1)
    constraint.evaluate(np.zeros(1))
    assert streams(constraint) == list(range(rollouts))


def test_unsafe_is_accepted_no_oftener_than_the_level():
    """g = +0.02, noise of 0.1: fewer than 5 % are accepted; a plain mean of 8 would in 29 %."""
    accepted = naive = 0
    for seed in range(2000):
        constraint = noisy(0.02, 0.1, seed=seed, candidates=1)
        accepted += bool(constraint.evaluate(np.zeros(1))[0] <= 0)
        naive += bool(constraint._rollouts(np.zeros((1, 1)), range(8)).mean() <= 0)
    assert accepted / 2000 <= 0.05
    assert naive / 2000 > 0.2


def test_paired_differences_cancel_common_noise():
    """Noise of 1, a change of 1e-3: independent rollouts could not resolve it, paired ones do."""
    constraint = noisy(-5.0, 1.0)
    values, half = constraint.probe(
        np.zeros(1), np.array([-5.0]), np.array([[1e-3], [-1e-3]]), np.arange(1)
    )
    assert values == pytest.approx(np.array([[-4.999], [-5.001]]))
    assert half == pytest.approx(0.0, abs=1e-12)


def test_noise_is_no_slope():
    """Policies that differ by noise of their own only: no slope is seen, most of the time.

    The half width covers the difference of the means as measured.
    """
    constraint = noisy(-1.0, 0.0, probe_rollouts=4)
    y = np.random.default_rng(0).normal(size=(401, 4, 1)) - 1.0
    constraint._rollouts = lambda w, used: y
    values, half = constraint.probe(np.zeros(1), np.array([-1.0]), np.zeros((400, 1)), np.arange(1))
    assert np.mean(values == -1.0) > 0.5
    measured = (y[1:] - y[0]).mean(axis=1)
    raw = bounds.student(y[1:] - y[0], 0.05 / 4 / 10 / 400)
    assert (values - half <= measured - 1.0 - raw + 1e-12).all()
    assert (values + half >= measured - 1.0 + raw - 1e-12).all()


def test_no_noise_is_drawn_twice():
    """A candidate chosen by its probes' luck must not be judged by the same luck."""
    constraint = noisy(-0.05, 0.1, rollout_budget=32, probe_rollouts=4)
    for update in range(3):
        g = constraint.begin_update(update, np.zeros(1), None)
        constraint.probe(np.zeros(1), g, np.full((2, 1), 0.1), np.arange(1))
        for candidate in (0.01, 0.005):
            constraint.evaluate(np.full(1, candidate))
    drawn = streams(constraint)
    assert len(drawn) == len(set(drawn)) > 3 * (8 + 4 + 16)


def test_a_candidate_is_not_favoured_by_the_noise_it_was_chosen_under():
    """The best of ten equal policies by their probes: judged anew, its mean is not too low.

    Each policy has noise of its own, as policies have whose episodes diverge.
    """
    errors = []
    for seed in range(300):
        constraint = noisy(-1.0, 1.0, seed=seed, rollout_budget=8, predicted_episodes=0)
        common = constraint._rollouts.__call__

        def own(w, used, common=common, seed=seed):
            y = common(np.zeros_like(w), used)
            for i, row in enumerate(w):
                y[i, :, 0] += [
                    np.random.default_rng([seed, s, int(1000 * row[0])]).normal() for s in used
                ]
            return y

        constraint._rollouts = type("Own", (), {"__call__": staticmethod(own), "names": ("g",)})()
        probes = np.arange(1.0, 11.0)[:, None]
        values, _ = constraint.probe(np.zeros(1), np.array([-1.0]), probes, np.arange(1))
        best = probes[int(np.argmin(values))]
        y = constraint._look(best, None, 8)
        errors.append(y.mean() + 1.0)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(300)


def test_evidence_of_the_deployed_policy_is_pooled():
    """Looks of later updates and the policy's own share of the probes add to the first look."""
    constraint = noisy(-0.5, 0.1, probe_rollouts=4)
    w = np.full(1, 0.001)
    first = constraint.evaluate(w)
    constraint.probe(w, first, np.ones((1, 1)), np.arange(1))
    written = w + 1e-9  # to a network in float32 and back
    second = constraint.evaluate(written)
    y = constraint.evidence.of(w)
    assert len(y) == 8 + 4 + 4
    assert y[-4:].mean() == pytest.approx(-0.5, abs=0.2)
    assert second == pytest.approx(y.mean(axis=0) + bounds.student(y, 0.05 / 4 / 10))
    unsafe = np.full(1, 2.0)
    constraint.evaluate(unsafe)
    assert constraint.evidence.of(unsafe) is None
    assert constraint.evidence.of(w + 0.01) is None


def test_a_policy_is_kept_until_its_evidence_turns():
    """Deployed by a lucky look: kept while its mean may be safe, given up for what later ones show.

    A policy that is kept has a value of at most 0, so that the guard can go on from it.
    """
    constraint = noisy(-0.02, 0.1, rollout_budget=16)
    w = np.zeros(1)
    constraint.evidence.keep(w, np.full((8, 1), -0.3) + np.linspace(-0.1, 0.1, 8)[:, None])
    assert constraint.evaluate(w)[0] <= 0
    constraint._rollouts.value = 0.3
    values = [constraint.evaluate(w)[0] for _ in range(3)]
    assert values[-1] > 0


def test_the_kept_policy_has_the_whole_level():
    """Candidates share the level; the deployed policy, alone at stake, is judged by all of it."""
    constraint = noisy(0.0, 1.0, rollout_budget=8, candidates=30)
    y = np.random.default_rng(3).normal(size=(64, 1))
    whole = bounds.student(y, 0.05 / 2)[0]
    share = bounds.student(y, 0.05 / 32)[0]
    w = np.zeros(1)
    constraint._look = lambda *_: y - y.mean() - 0.5 * (whole + share)
    assert constraint.evaluate(w)[0] > 0
    constraint.evidence.keep(w, y)
    assert constraint.evaluate(w)[0] == 0


def test_a_candidate_refused_by_chance_is_retried_closer_and_teaches_no_curvature():
    """Refused without a certain breach: half as far next time, with L as it was."""

    class Wide(Exact):
        uncertainty = 10.0
        tried: ClassVar[list[float]] = []

        def evaluate(self, w):
            self.tried.append(w[0])
            return np.array([0.5 if w[0] > 0.3 else -1.0])

    guard = Guard(GuardConfig(smoothness="apriori", L=1e-3, trust_radius=10.0, probe_radius=0.1))
    constraints = Wide(("g",), lambda w: np.full((len(w), 1), -1.0))
    decision = guard.update(np.zeros(1), lambda: np.ones(1), constraints, np.random.default_rng(0))
    assert constraints.tried == pytest.approx([0.0, 1.0, 0.5, 0.25])
    assert (decision.status, guard.breaches) == ("projected", 0)
    assert decision.w == pytest.approx([0.25])
    assert decision.diagnostics["L/g"] == 1e-3


def test_the_reserve_is_asked_of_candidates_only():
    """A candidate has to keep it; once deployed, a policy is not given up for using it."""
    plain, careful = (noisy(-0.2, 0.1, rollout_budget=8, reserve=r) for r in (0.0, 0.3))
    w = np.zeros(1)
    assert careful.evaluate(w) == pytest.approx(plain.evaluate(w) + 0.3)
    assert plain.evaluate(w)[0] <= 0 < careful.evaluate(w)[0]
    careful.evidence.keep(w, plain.evidence.of(w))
    assert careful.evaluate(w)[0] <= 0


def test_bad_episodes_are_foreseen():
    """With ``predicted_episodes`` the spread of a few further episodes counts, too."""
    plain, wary = (
        noisy(-0.1, 0.2, rollout_budget=64, rollouts=64, predicted_episodes=n) for n in (0, 2)
    )
    assert plain.evaluate(np.zeros(1))[0] <= 0 < wary.evaluate(np.zeros(1))[0]


def test_a_policy_of_wide_spread_is_not_kept_for_its_mean():
    """Mean -0.3, spread 1: ten further episodes exceed 0 in 17 %, and 10 % is allowed."""
    y = np.random.default_rng(3).normal(size=(256, 1))
    y = (y - y.mean()) / y.std()
    for spread, kept in ((1.0, False), (0.6, True)):
        constraint = noisy(0.0, 1.0, rollout_budget=8, predicted_episodes=10)
        constraint.evidence.keep(np.zeros(1), -0.3 + spread * y)
        constraint._rollouts.value, constraint._rollouts.std = -0.3, 0.01
        assert (constraint.evaluate(np.zeros(1))[0] <= 0) == kept


def costs(share, cost):
    """Draws y of an episode that costs ``cost`` (limit 25) with probability ``share``, or 0."""
    return lambda rng: (cost * (rng.random() < share) - 25.0) / 25.0


@pytest.mark.parametrize(("bound", "missed"), [("student", 0.1), ("mixed", 0.02)])
def test_rare_costs_are_not_overlooked(bound, missed):
    """One episode in eight costs 240 (mean 30, limit 25). Accepted by Student's bound in 1 of 4."""
    accepted = 0
    for seed in range(400):
        constraint = noisy(
            0.0, 1.0, candidates=2, seed=seed, span=(-1.0, 39.0), draw=costs(1 / 8, 240.0),
            bound=bound, rollout_budget=32,
        )  # fmt: skip
        constraint.evidence.keep(np.ones(1), np.full((estimation.KNOWN, 1), 8.6))
        accepted += bool(constraint.evaluate(np.zeros(1))[0] <= 0)
    assert (accepted / 400 <= missed) == (bound == "mixed")


def test_what_costly_episodes_cost_is_learned():
    """Eight zeros: worse where the costly episodes of earlier policies cost 60 than where 10."""
    values = []
    for known in ([0.0], [0.4] * 20 + [0.0], [2.4] * 20, [2.4] * 3):
        constraint = noisy(
            0.0, 1.0, span=(-1.0, 39.0), draw=costs(0.0, 0.0), rollout_budget=8, bound="mixed"
        )
        constraint.evidence.keep(np.ones(1), np.array(known)[:, None] - 1.0)
        values.append(constraint.evaluate(np.zeros(1))[0])
    unknown, mild, severe, few = values
    share = 1 - (0.05 / 10) ** (1 / 8)
    assert values == pytest.approx([share - 1, 0.4 * share - 1, 2.4 * share - 1, share - 1])
    assert mild < unknown == few < severe


def test_betting_needs_no_assumption_but_the_range():
    """As above, nothing known of costs elsewhere; many rollouts of a harmless policy do pass."""
    config = {"bound": "betting", "span": (-1.0, 39.0), "candidates": 2, "rollout_budget": 512}
    risky = [noisy(0.0, 1.0, seed=s, draw=costs(1 / 8, 240.0), **config) for s in range(60)]
    assert sum(c.evaluate(np.zeros(1))[0] <= 0 for c in risky) <= 3
    harmless = noisy(0.0, 1.0, draw=costs(0.0, 1.0), **config)
    assert harmless.evaluate(np.zeros(1))[0] <= 0
    assert 150 < len(streams(harmless)) <= 512
    with pytest.raises(UserError, match="betting needs the largest cost of an episode"):
        noisy(0.0, 1.0, bound="betting")
    dear = noisy(0.0, 1.0, draw=costs(1.0, 2000.0), **config)
    with pytest.raises(UserError, match=r"largest_cost: an episode cost 2 times as much"):
        dear.evaluate(np.zeros(1))


def test_evidence_is_bounded(monkeypatch):
    """Long runs: the newest policies and rollouts are kept, and no more."""
    monkeypatch.setattr(estimation, "POLICIES", 3)
    monkeypatch.setattr(estimation, "EPISODES", 10)
    evidence = Evidence()
    for i in range(5):
        evidence.keep(np.full(2, float(i)), np.full((12, 1), float(i)))
    assert [w[0] for w, _ in evidence.samples] == [2, 3, 4]
    assert {len(y) for _, y in evidence.samples} == {10}


def test_the_range_of_an_episodes_cost():
    """From no cost to one per step; configured; unknown without a specification; none if signed."""
    weights = PolicyWeights(PPO("MlpPolicy", pushing()).policy)
    gym.register("Push-v1", Push, max_episode_steps=20)
    try:
        known = functools.partial(gym.make, "Push-v1")
        for make_env, limit, largest, expected in (
            (known, 5.0, 0.0, (-1.0, 3.0)),
            (known, 5.0, 40.0, (-1.0, 7.0)),
            (known, 0.5, 0.0, (-0.5, 19.5)),
            (Push, 5.0, 0.0, (-1.0, np.inf)),
            (functools.partial(Push, signed=True), 0.0, 0.0, None),
        ):
            rollouts = EpisodeRollouts(make_env, weights, limit, 0, 1, ProbeMeter(), largest)
            assert rollouts.span == expected
            rollouts.close()
    finally:
        del gym.registry["Push-v1"]


def test_bounds_are_checked_by_name():
    """A bound that does not exist is refused with the nearest that does."""
    with pytest.raises(UserError, match=r"bound: expected one of.*did you mean 'betting'"):
        RolloutConfig(bound="beting")
    assert dataclasses.replace(RolloutConfig(), bound="student").bound == "student"
