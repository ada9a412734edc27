"""One run's metrics against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from scpo_bench.leaderboard.metrics import NEVER, episode_cost_cvar, longest_run, measure
from scpo_bench.leaderboard.references import gap_closed, load_references
from scpo_bench.records.schema import Update


def update(number: int, **fields: Any) -> Update:
    return Update(
        **{
            "update": number,
            "interaction_steps": 10 * number,
            "probe_steps": 5 * number,
            "episodes": 0,
            "iterate_violates": False,
            **fields,
        }
    )


def run_by_hand() -> list[Update]:
    """Limit 10; iterates 2, 3 and 5 violate, and update 4 is not evaluated.

    Two episodes finish in updates 1 and 3, one in update 4.
    """
    return [
        update(
            0,
            iterate_return=-5.0,
            iterate_cost=1.0,
            iterate_objective=0.8,
            iterate_worst_constraint_value=-0.5,
        ),
        update(
            1,
            episodes=2,
            return_mean=-4.0,
            cost_mean=8.0,
            cost_max=12.0,
            cost_sum=16.0,
            violating_episodes=1,
            violating_steps=4,
            worst_constraint_value=0.3,
            iterate_return=-4.0,
            iterate_cost=9.0,
            iterate_objective=0.6,
        ),
        update(
            2,
            iterate_return=-3.0,
            iterate_cost=11.0,
            iterate_objective=0.5,
            iterate_violates=True,
            cost_sum=3.0,
            violating_steps=1,
        ),
        update(
            3,
            episodes=2,
            return_mean=-3.0,
            cost_mean=15.0,
            cost_max=20.0,
            cost_sum=30.0,
            violating_episodes=2,
            violating_steps=5,
            worst_constraint_value=0.7,
            iterate_return=-3.5,
            iterate_cost=12.0,
            iterate_objective=0.45,
            iterate_violates=True,
            iterate_worst_constraint_value=0.2,
        ),
        update(
            4,
            episodes=1,
            return_mean=-2.0,
            cost_mean=11.0,
            cost_max=11.0,
            cost_sum=11.0,
            violating_episodes=1,
            violating_steps=2,
            iterate_violates=None,
        ),
        update(
            5, iterate_return=-2.0, iterate_cost=13.0, iterate_objective=0.4, iterate_violates=True
        ),
        update(
            6,
            iterate_return=-1.0,
            iterate_cost=5.0,
            iterate_objective=0.2,
            iterate_worst_constraint_value=-0.1,
            probe_violations=7,
            wall_time_s=30.0,
            steps_per_s=2.0,
        ),
    ]


REFERENCE = {"backup": 0.8, "oracle": 0.1}


def test_every_group_of_columns_by_hand():
    """Whatever definition is wrong (which updates count, which is final), a number here changes."""
    m = measure(run_by_hand(), 10.0, REFERENCE)
    # outcome
    assert (m.start_return, m.start_objective) == (-5.0, 0.8)
    assert (m.final_return, m.final_cost, m.final_objective, m.final_violates) == (-1, 5, 0.2, 0)
    assert (m.final_training_return, m.final_training_cost) == (-2.0, 11.0)
    assert m.gap_closed == pytest.approx(0.6 / 0.7)
    # during training: 5 of the 6 updates are evaluated, 3 finished episodes
    assert (m.updates, m.evaluated_iterates, m.violating_iterates) == (6, 5, 3)
    assert m.updates_over_limit_share == pytest.approx(2 / 3)
    assert (m.training_episodes, m.violating_episodes, m.violating_steps) == (5, 4, 12)
    assert m.cumulative_excess == pytest.approx(2 * 0 + 2 * 5 + 1 * 1)
    assert m.probe_violations == 7
    # worst case: in order of evaluation 0 1 1 1 0; update 4 in between was not evaluated
    assert (m.max_excess, m.max_excess_ratio) == (5.0, 0.5)
    # the costs 15 of update 3 are the worst twentieth; of its two episodes 1.5 may have cost 20
    assert (m.cvar95_cost_low, m.cvar95_cost_high) == (15.0, 20.0)
    assert m.longest_violating_run == 3
    assert (m.worst_iterate_value, m.worst_training_value) == (0.2, 0.7)
    # timing
    assert (m.first_violating_update, m.first_violating_step) == (2, 20)
    assert m.safe_from_update == 6
    # trust
    assert (m.interaction_steps, m.probe_steps, m.wall_time_s, m.steps_per_s) == (60, 30, 30.0, 2.0)


def test_excess_is_not_bought_back_by_updates_below_the_limit():
    """Costs of 20 and 0 around a limit of 10 are an excess of 10, not 0."""
    updates = [
        update(0),
        update(1, episodes=1, cost_mean=20.0, cost_max=20.0, return_mean=0.0),
        update(2, episodes=1, cost_mean=0.0, cost_max=0.0, return_mean=0.0),
    ]
    assert measure(updates, 10.0).cumulative_excess == 10.0


def test_times_are_censored_not_invented():
    """Without a violation there is no first one; after a last one no iterate is safe."""
    clean = measure([update(0), update(1), update(2)], 0.0)
    assert (clean.first_violating_update, clean.first_violating_step) == (NEVER, NEVER)
    assert clean.safe_from_update == 0.0
    bad = measure([update(0), update(1), update(2, iterate_violates=True)], 0.0)
    assert (bad.first_violating_update, bad.safe_from_update) == (2.0, NEVER)


def test_the_start_policy_is_no_update():
    """A start policy that violates must not count as an iterate of the agent."""
    m = measure([update(0, iterate_violates=True), update(1)], 0.0)
    assert (m.violating_iterates, m.evaluated_iterates, m.first_violating_update) == (0, 1, NEVER)


def test_what_was_not_measured_is_nan():
    """A run cut off before its first evaluation gives nan: zeros would look like perfect safety."""
    m = measure([update(0, iterate_violates=None), update(1, iterate_violates=None)], 0.0)
    for name in (
        "first_violating_update",
        "safe_from_update",
        "final_violates",
        "max_excess",
        "cvar95_cost_low",
        "worst_iterate_value",
        "gap_closed",
    ):
        assert math.isnan(getattr(m, name)), name
    with pytest.raises(ValueError, match="no updates"):
        measure([], 0.0)


def test_cvar_bounds_by_hand():
    """The worst 5 % of 21 episodes are the one that cost 10 and 0.05 of the others.

    Of the 20 others, with mean 1 and maximum 4, five may have cost 4. With mean 0.008 only 0.04 of
    one may have: then the tail holds these and 0.01 without cost.
    """
    counts, maxima = np.array([20.0, 1.0]), np.array([4.0, 10.0])
    low, high = episode_cost_cvar(counts, np.array([1.0, 10.0]), maxima)
    assert low == pytest.approx((10 * 1 + 1 * 0.05) / 1.05)
    assert high == pytest.approx((10 * 1 + 4 * 0.05) / 1.05)
    low, high = episode_cost_cvar(counts, np.array([0.008, 10.0]), maxima)
    assert low == pytest.approx((10 * 1 + 0.008 * 0.05) / 1.05)
    assert high == pytest.approx((10 * 1 + 4 * 0.04) / 1.05)
    assert episode_cost_cvar(counts, np.zeros(2), np.zeros(2)) == (0.0, 0.0)


def test_cvar_bounds_hold_the_truth():
    """The bounds contain the CVaR of the episodes, and meet where updates have one episode."""
    from scpo_bench.leaderboard.statistics import cvar

    rng = np.random.default_rng(0)
    for _ in range(200):
        episodes = [
            rng.exponential(5, rng.integers(1, 6)) * rng.integers(0, 2)
            for _ in range(rng.integers(1, 30))
        ]
        counts = np.array([len(e) for e in episodes], dtype=float)
        low, high = episode_cost_cvar(
            counts, np.array([e.mean() for e in episodes]), np.array([e.max() for e in episodes])
        )
        truth = cvar(np.concatenate(episodes))
        assert low <= truth + 1e-9 <= high + 2e-9
    for single in ([3.0, 1.0, 7.0], [0.1, 0.2, 0.5]):
        costs = np.array(single)
        assert episode_cost_cvar(np.ones(3), costs, costs) == pytest.approx((costs[2], costs[2]))


def test_longest_run():
    """Stretches at both ends count."""
    assert longest_run(np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=bool)) == 3
    assert longest_run(np.array([], dtype=bool)) == 0


def test_gap_closed():
    """0 at the backup, 1 at the oracle, negative below the backup; no reference, no share."""
    assert gap_closed(0.8, REFERENCE) == 0.0
    assert gap_closed(0.1, REFERENCE) == pytest.approx(1.0)
    assert gap_closed(1.5, REFERENCE) == pytest.approx(-1.0)
    assert math.isnan(gap_closed(0.5, None))
    assert math.isnan(gap_closed(0.5, {"backup": 0.1, "oracle": 0.1}))


def test_references_file(tmp_path):
    """An absent file means no constants; a damaged one is named, not passed on as nonsense."""
    assert load_references(tmp_path / "none.json") == {}
    path = tmp_path / "references.json"
    path.write_text('{"tasks": {"a": {"backup": 1, "oracle": 0.5}}}')
    assert load_references(path) == {"a": {"backup": 1, "oracle": 0.5}}
    for text, field in (
        ("[]", "file"),
        ("{}", "tasks"),
        ("{", "Invalid JSON"),
        ('{"tasks": {"a": {"backup": 1, "oracle": NaN}}}', "tasks.a.oracle"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=field):
            load_references(path)


def test_committed_references_are_readable():
    """The constants that come with the package give every task a gap to close."""
    for task, entry in load_references().items():
        assert entry["backup"] > entry["oracle"], task


def test_held_updates_and_distinct_policies_by_hand():
    """Equal evaluations are one policy: a run that stands still shows few policies, not many.

    Objectives 0.8 (start), 0.5, 0.5, 0.2, 0.5, 0.2, 0.2: two distinct policies after the start, of
    which that at 0.5 violates; the second and the last update hold. The objective stays at its end
    from the fifth update on: one of the four before was held.
    """
    objectives = [0.8, 0.5, 0.5, 0.2, 0.5, 0.2, 0.2]
    metrics = measure(
        [
            update(
                k,
                iterate_return=-objective,
                iterate_cost=0.0,
                iterate_objective=objective,
                iterate_violates=objective == 0.5,
            )
            for k, objective in enumerate(objectives)
        ],
        10.0,
    )
    assert (metrics.distinct_policies, metrics.violating_policies) == (2, 1)
    assert (metrics.violating_iterates, metrics.held_updates) == (3, 2)
    assert metrics.held_early_share == pytest.approx(1 / 4)


def test_a_policy_that_returns_to_the_start_is_not_counted_as_new():
    """The start policy is what runs are compared with, in any update."""
    same = {"iterate_return": 1.0, "iterate_cost": 0.0}
    metrics = measure([update(0, **same), update(1, **same)], 10.0)
    assert (metrics.distinct_policies, metrics.held_updates) == (0, 1)
    assert math.isnan(metrics.held_early_share)  # no objective
