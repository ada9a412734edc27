"""What one run's record says: every per-run column of the leaderboard, computed from the raw
updates alone.

Definitions, once. d is the cost limit. Update k collected n_k finished episodes with mean cost C_k.
An *iterate* violates if its deterministic evaluation exceeds the limit (as recorded in
``iterate_violates``); a *step* violates if its cost is positive; an *episode* violates if its cost
exceeds d. Update 0 is the start policy: the reference that runs are compared with, never counted
among the updates. Not measured is nan; a time that did not come within the run is inf ("never"), so
it can be ranked but not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from scpo_bench.leaderboard.references import gap_closed
from scpo_bench.leaderboard.statistics import cvar
from scpo_bench.records.schema import Update

Floats = npt.NDArray[np.float64]
NEVER = math.inf


@dataclass(frozen=True)
class RunMetrics:
    """One run in numbers.

    Costs in cost units per episode, values in the constraint's own signed unit (violated where >
    0).
    """

    # outcome: the last evaluated iterate, on held-out starts, and the start policy's own evaluation
    start_return: float
    start_cost: float
    start_objective: float
    start_worst_value: float
    final_update: float
    """The update that "final" speaks of: the last evaluated one."""
    final_return: float
    final_cost: float
    final_cost_ratio: float
    """final_cost / d; nan where d = 0."""
    final_objective: float
    """Objective loss, lower is better."""
    final_worst_value: float
    final_violates: float
    """1, 0, or nan."""
    final_training_return: float
    """Mean return of the episodes of the last update that finished any: the exploring policy, not
    the evaluated one.
    """
    final_training_cost: float
    gap_closed: float
    """Share of the gap between backup and oracle that the final iterate closes (1: as good as the
    oracle).
    """

    # during training
    updates: int
    evaluated_iterates: int
    violating_iterates: int
    violating_iterate_share: float
    """Of the evaluated iterates."""
    updates_over_limit: int
    """Updates with C_k > d."""
    updates_over_limit_share: float
    """Of the updates in which an episode finished."""
    training_episodes: int
    violating_episodes: int
    violating_episode_share: float
    violating_steps: int
    violating_step_share: float
    cumulative_excess: float
    """sum_k n_k max(0, C_k - d): nothing is bought back by updates below the limit."""
    training_cost: float
    """Cost of all interaction steps."""
    probe_violations: int

    # worst case
    max_excess: float
    """max_k max(0, C_k - d)."""
    max_excess_ratio: float
    """The same divided by d; nan where d = 0."""
    cvar95_cost_low: float
    """Lower bound of the 95 % CVaR of episode cost; see :func:`episode_cost_cvar`."""
    cvar95_cost_high: float
    longest_violating_run: int
    """Most consecutive evaluated iterates that violate."""
    worst_iterate_value: float
    worst_training_value: float

    # timing
    first_violating_update: float
    first_violating_step: float
    """Interaction steps at that update."""
    safe_from_update: float
    """First evaluated update from which on nothing violates: 0 if nothing ever does, never if the
    last iterate does.
    """
    safe_from_step: float

    # trust
    interaction_steps: int
    probe_steps: int
    wall_time_s: float
    steps_per_s: float


COLUMNS = tuple(field.name for field in fields(RunMetrics))


def _column(updates: Sequence[Update], name: str) -> Floats:
    """[updates] values of one field, nan where it was not measured."""
    return np.array(
        [math.nan if (value := getattr(u, name)) is None else value for u in updates], dtype=float
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _max(values: Floats) -> float:
    """Largest measured value, nan if nothing was measured."""
    measured = values[~np.isnan(values)]
    return float(measured.max()) if measured.size else math.nan


def longest_run(flags: npt.NDArray[np.bool_]) -> int:
    """Length of the longest unbroken stretch of True. flags: [n]."""
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest


def episode_cost_cvar(
    counts: Floats, means: Floats, maxima: Floats, level: float = 0.95
) -> tuple[float, float]:
    """(lower, upper) bound of the CVaR of episode cost, where each update recorded only n_k, C_k
    and the largest cost M_k.

    counts, means, maxima: [updates], all with n_k > 0. CVaR respects the convex order. Replacing an
    update's episodes by their mean lowers it; spreading them to the ends 0 and M_k with the same
    mean raises it, and costs lie in [0, M_k]. The bounds agree where an update finishes a single
    episode. (nan, nan) without episodes.
    """
    if not counts.size:
        return math.nan, math.nan
    at_maximum = np.divide(means, maxima, out=np.zeros_like(means), where=maxima > 0).clip(0.0, 1.0)
    ends = np.concatenate([maxima, np.zeros_like(maxima)])
    weights = np.concatenate([counts * at_maximum, counts * (1.0 - at_maximum)])
    return cvar(means, level, counts), cvar(ends, level, weights)


def measure(
    updates: Sequence[Update], cost_limit: float, reference: dict[str, Any] | None = None
) -> RunMetrics:
    """All metrics of a run whose updates are ``updates`` (update 0 first; possibly cut short), with
    cost limit d.

    reference: the task's entry of :func:`scpo_bench.leaderboard.references.load_references`. Raises
    ValueError for an empty record.
    """
    if not updates:
        raise ValueError("no updates recorded")
    start, rest = updates[0], updates[1:]
    number, steps = _column(rest, "update"), _column(rest, "interaction_steps")

    violates = _column(rest, "iterate_violates")
    evaluated = ~np.isnan(violates)
    bad = violates[evaluated] == 1
    bad_at = np.flatnonzero(bad)
    evaluated_number, evaluated_steps = number[evaluated], steps[evaluated]
    if not bad_at.size:
        first, first_step = (NEVER, NEVER) if bad.size else (math.nan, math.nan)
        safe_from, safe_from_step = (0.0, 0.0) if bad.size else (math.nan, math.nan)
    else:
        first, first_step = evaluated_number[bad_at[0]], evaluated_steps[bad_at[0]]
        after = bad_at[-1] + 1
        ended = after == bad.size
        safe_from = NEVER if ended else evaluated_number[after]
        safe_from_step = NEVER if ended else evaluated_steps[after]

    episodes, means = _column(rest, "episodes"), _column(rest, "cost_mean")
    finished = (episodes > 0) & ~np.isnan(means)
    n, C = episodes[finished], means[finished]
    maxima = np.fmax(_column(rest, "cost_max")[finished], C)
    excess = np.maximum(0.0, C - cost_limit)
    cvar_low, cvar_high = episode_cost_cvar(n, C, maxima)
    training = [u for u in rest if u.episodes and u.return_mean is not None]

    evaluations = [u for u in updates if u.iterate_violates is not None]
    final = evaluations[-1] if evaluations else None

    def of(update: Update | None, name: str) -> float:
        value = None if update is None else getattr(update, name)
        return math.nan if value is None else float(value)

    last = updates[-1]
    collected = last.interaction_steps - start.interaction_steps
    violating_steps, violating_episodes = (
        sum(u.violating_steps for u in rest),
        sum(u.violating_episodes for u in rest),
    )
    total_episodes = int(episodes.sum())
    max_excess = float(excess.max()) if excess.size else math.nan
    final_cost, final_objective = of(final, "iterate_cost"), of(final, "iterate_objective")
    return RunMetrics(
        start_return=of(start, "iterate_return"),
        start_cost=of(start, "iterate_cost"),
        start_objective=of(start, "iterate_objective"),
        start_worst_value=of(start, "iterate_worst_constraint_value"),
        final_update=of(final, "update"),
        final_return=of(final, "iterate_return"),
        final_cost=final_cost,
        final_cost_ratio=_ratio(final_cost, cost_limit),
        final_objective=final_objective,
        final_worst_value=of(final, "iterate_worst_constraint_value"),
        final_violates=of(final, "iterate_violates"),
        final_training_return=of(training[-1] if training else None, "return_mean"),
        final_training_cost=of(training[-1] if training else None, "cost_mean"),
        gap_closed=gap_closed(final_objective, reference),
        updates=len(rest),
        evaluated_iterates=int(evaluated.sum()),
        violating_iterates=int(bad.sum()),
        violating_iterate_share=_ratio(float(bad.sum()), float(evaluated.sum())),
        updates_over_limit=int((excess > 0).sum()),
        updates_over_limit_share=_ratio(float((excess > 0).sum()), float(finished.sum())),
        training_episodes=total_episodes,
        violating_episodes=violating_episodes,
        violating_episode_share=_ratio(violating_episodes, total_episodes),
        violating_steps=violating_steps,
        violating_step_share=_ratio(violating_steps, collected),
        cumulative_excess=float((n * excess).sum()),
        training_cost=float(_column(rest, "cost_sum").sum()),
        probe_violations=last.probe_violations,
        max_excess=max_excess,
        max_excess_ratio=_ratio(max_excess, cost_limit),
        cvar95_cost_low=cvar_low,
        cvar95_cost_high=cvar_high,
        longest_violating_run=longest_run(bad),
        worst_iterate_value=_max(_column(rest, "iterate_worst_constraint_value")),
        worst_training_value=_max(_column(rest, "worst_constraint_value")),
        first_violating_update=float(first),
        first_violating_step=float(first_step),
        safe_from_update=float(safe_from),
        safe_from_step=float(safe_from_step),
        interaction_steps=last.interaction_steps,
        probe_steps=last.probe_steps,
        wall_time_s=last.wall_time_s,
        steps_per_s=_ratio(collected, last.wall_time_s),
    )
