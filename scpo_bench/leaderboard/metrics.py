"""What the record of one run says: its metrics, computed from the raw updates alone.

Definitions, once. d is the cost limit. Update k collected n_k finished episodes with mean cost C_k.
An *iterate* violates if its deterministic evaluation exceeds the limit (as recorded in
``iterate_violates``), a *step* if its cost is positive, and an *episode* if its cost exceeds d.
Update 0 is the start policy: what runs are compared with, never counted among the updates. Not
measured is nan; a time that was not reached within the run is inf ("never"), so it can be ranked
but not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from scpo_bench.contract import Floats
from scpo_bench.leaderboard.references import gap_closed
from scpo_bench.leaderboard.statistics import cvar
from scpo_bench.records.schema import Update

NEVER = math.inf


@dataclass(frozen=True)
class RunMetrics:
    """One run in numbers.

    Costs are per episode; constraint values have their own signed unit and are violated above 0.
    """

    # Outcome: evaluations of the start policy and of the last evaluated ("final") iterate.
    start_return: float
    start_objective: float
    final_return: float
    final_cost: float
    final_objective: float
    """Objective loss, lower is better."""
    final_violates: float
    """1, 0, or nan."""
    final_training_return: float
    """Mean return of the last update that finished an episode: of the exploring policy."""
    final_training_cost: float
    gap_closed: float
    """See :func:`scpo_bench.leaderboard.references.gap_closed`."""

    # During training.
    updates: int
    evaluated_iterates: int
    violating_iterates: int
    distinct_policies: int
    """Evaluated iterates that differ in their evaluation, the start policy left out."""
    violating_policies: int
    """Of these, those that violate."""
    held_updates: int
    """Evaluated updates after which the evaluation is the same, number for number, as before."""
    held_early_share: float
    """Held updates per evaluated update, up to the one from which on the objective stays within 1 %
    of its final value; nan without an objective.
    """
    updates_over_limit_share: float
    """Of the updates in which an episode finished."""
    training_episodes: int
    violating_episodes: int
    violating_steps: int
    cumulative_excess: float
    """sum_k n_k max(0, C_k - d): nothing is bought back by updates below the limit."""
    probe_violations: int

    # Worst case.
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

    # Timing.
    first_violating_update: float
    first_violating_step: float
    """Interaction steps at that update."""
    safe_from_update: float
    """First evaluated update from which on nothing violates.

    0 if nothing ever does, never if the last evaluated iterate does.
    """

    # Trust.
    interaction_steps: int
    probe_steps: int
    total_steps: int
    """Interaction and probe steps."""
    wall_time_s: float
    steps_per_s: float


METRICS = tuple(field.name for field in fields(RunMetrics))
_FIELDS = [name for name in Update.model_fields if name != "diagnostics"]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _last(updates: pd.DataFrame) -> pd.Series:
    """The last of these updates; one of which nothing was measured if there is none."""
    return pd.Series(math.nan, index=_FIELDS) if updates.empty else updates.iloc[-1]


def longest_run(flags: Iterable[bool]) -> int:
    """Length of the longest unbroken stretch of True."""
    return max((sum(stretch) for _, stretch in groupby(map(int, flags))), default=0)


def episode_cost_cvar(
    counts: Floats, means: Floats, maxima: Floats, level: float = 0.95
) -> tuple[float, float]:
    """(lower, upper) bound of the CVaR of episode cost, from n_k, C_k and the largest cost M_k.

    counts, means, maxima: [updates], all with n_k > 0. CVaR respects the convex order: replacing
    the episodes of an update by their mean lowers it, and moving them to the ends 0 and M_k with
    the same mean raises it, since costs lie in [0, M_k]. The bounds agree where every update
    finishes a single episode. (nan, nan) without episodes.
    """
    if not counts.size:
        return math.nan, math.nan
    at_maximum = np.divide(means, maxima, out=np.zeros_like(means), where=maxima > 0)
    ends = np.concatenate([maxima, np.zeros_like(maxima)])
    weights = np.concatenate([counts * at_maximum, counts * (1.0 - at_maximum)])
    return cvar(means, level, counts), cvar(ends, level, weights)


# Equal policies give equal numbers, and policies that differ practically never do: a deterministic
# evaluation on the same starts is a fingerprint.
_FINGERPRINT = [
    *("iterate_return", "iterate_cost", "iterate_objective", "iterate_worst_constraint_value")
]


def _policies(table: pd.DataFrame) -> tuple[int, int, int, float]:
    """(distinct policies, of these violating, held updates, share held early) of a run's updates.

    table: one row per update, the start policy first.
    """
    evaluated = table[table["iterate_violates"].notna()]
    prints = evaluated[_FINGERPRINT].fillna(0.0)
    new = ~prints.duplicated()
    held = (prints == prints.shift()).all(axis=1)
    distinct, held = evaluated[new].iloc[1:], held.iloc[1:]
    objective = evaluated["iterate_objective"].iloc[1:]
    early = math.nan
    if len(objective) and objective.notna().all():
        final = objective.iloc[-1]
        far = (objective - final).abs() > 0.01 * abs(final)
        settled = int(far.to_numpy().nonzero()[0].max(initial=-1)) + 1
        early = _ratio(float(held.iloc[:settled].sum()), settled) if settled else 0.0
    violating = int((distinct["iterate_violates"] == 1).sum())
    return len(distinct), violating, int(held.sum()), early


def measure(
    updates: Sequence[Update], cost_limit: float, reference: dict[str, Any] | None = None
) -> RunMetrics:
    """All metrics of a run with these updates (update 0 first, possibly cut short) and limit d.

    reference: the task's entry of :func:`scpo_bench.leaderboard.references.load_references`. Raises
    ValueError for an empty record.
    """
    if not updates:
        raise ValueError("no updates recorded")
    table = pd.DataFrame([vars(u) for u in updates], columns=_FIELDS).astype(float)
    start, rest, last = table.iloc[0], table.iloc[1:], table.iloc[-1]
    final = _last(table[table["iterate_violates"].notna()])

    evaluated = rest[rest["iterate_violates"].notna()]
    violating = evaluated[evaluated["iterate_violates"] == 1]
    first_update = first_step = safe_from = math.nan
    if len(violating):
        first_update, first_step = violating.iloc[0][["update", "interaction_steps"]]
        after = evaluated.loc[violating.index[-1] + 1 :, "update"]
        safe_from = after.iloc[0] if len(after) else NEVER
    elif len(evaluated):
        first_update, first_step, safe_from = NEVER, NEVER, 0.0

    finished = rest[rest["episodes"] > 0]
    n, C, maxima = (finished[name] for name in ("episodes", "cost_mean", "cost_max"))
    excess = (C - cost_limit).clip(lower=0)
    cvar_low, cvar_high = episode_cost_cvar(n.to_numpy(), C.to_numpy(), maxima.to_numpy())
    training = _last(finished)

    distinct, unsafe, held, held_early = _policies(table)
    totals = rest.sum()
    return RunMetrics(
        start_return=start["iterate_return"],
        start_objective=start["iterate_objective"],
        final_return=final["iterate_return"],
        final_cost=final["iterate_cost"],
        final_objective=final["iterate_objective"],
        final_violates=final["iterate_violates"],
        final_training_return=training["return_mean"],
        final_training_cost=training["cost_mean"],
        gap_closed=gap_closed(final["iterate_objective"], reference),
        updates=len(rest),
        evaluated_iterates=len(evaluated),
        violating_iterates=len(violating),
        distinct_policies=distinct,
        violating_policies=unsafe,
        held_updates=held,
        held_early_share=held_early,
        updates_over_limit_share=_ratio((excess > 0).sum(), len(finished)),
        training_episodes=int(totals["episodes"]),
        violating_episodes=int(totals["violating_episodes"]),
        violating_steps=int(totals["violating_steps"]),
        cumulative_excess=(n * excess).sum(),
        probe_violations=int(last["probe_violations"]),
        max_excess=excess.max(),
        max_excess_ratio=_ratio(excess.max(), cost_limit),
        cvar95_cost_low=cvar_low,
        cvar95_cost_high=cvar_high,
        longest_violating_run=longest_run(evaluated["iterate_violates"] == 1),
        worst_iterate_value=rest["iterate_worst_constraint_value"].max(),
        worst_training_value=rest["worst_constraint_value"].max(),
        first_violating_update=first_update,
        first_violating_step=first_step,
        safe_from_update=safe_from,
        interaction_steps=int(last["interaction_steps"]),
        probe_steps=int(last["probe_steps"]),
        total_steps=int(last["interaction_steps"]) + int(last["probe_steps"]),
        wall_time_s=last["wall_time_s"],
        steps_per_s=_ratio(last["interaction_steps"], last["wall_time_s"]),
    )
