"""Agents over all tasks of a suite that have committed constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scpo_bench.errors import printable
from scpo_bench.leaderboard.statistics import (
    UNKNOWN,
    Estimate,
    Profile,
    iqm_interval,
    performance_profile,
    probability_of_improvement,
    wilson,
)
from scpo_bench.leaderboard.text import interval, percent

PROFILE_THRESHOLDS = tuple(float(t) for t in np.round(np.linspace(-0.5, 1.2, 171), 4))


@dataclass(frozen=True)
class Aggregate:
    """One agent over the tasks of a suite; runs that did not finish count at the floor."""

    agent: str
    tasks: int
    clean_runs: Estimate
    """Share of the planned runs that finished without a violating iterate, with its Wilson
    interval.
    """
    score: Estimate
    """IQM of the gap closed, over seeds and tasks, with its stratified bootstrap interval."""
    improvement: dict[str, Estimate]
    """other agent -> chance that a run of this one scores higher, over the tasks that both have."""
    profile: Profile
    """Share of runs above each of :data:`PROFILE_THRESHOLDS`."""


def aggregate(runs: pd.DataFrame) -> list[Aggregate]:
    """The agents of one suite over its tasks, best IQM first.

    runs: as from :func:`scpo_bench.leaderboard.tables.load`. ValueError for several suites at once:
    a task would be weighted by the number of suites that have it.
    """
    if runs["suite"].nunique() > 1:
        raise ValueError(f"aggregate: one suite at a time, got {sorted(runs['suite'].unique())}")
    scored = runs[runs["score_kind"] == "gap closed"].dropna(subset=["score"])
    scores: dict[str, dict[str, np.ndarray]] = {}
    for (agent, task), group in scored.groupby(["agent", "task"], sort=True):
        scores.setdefault(str(agent), {})[str(task)] = group["score"].to_numpy(dtype=float)
    found = []
    for agent, own in scores.items():
        improvement = {}
        for other, theirs in scores.items():
            common = [task for task in own if task in theirs]
            if other != agent and common:
                improvement[other] = probability_of_improvement(
                    [own[t] for t in common], [theirs[t] for t in common]
                )
        of_agent = scored[scored["agent"] == agent]
        clean = (of_agent["status"] == "finished") & (of_agent["violating_iterates"] == 0)
        found.append(
            Aggregate(
                agent,
                len(own),
                wilson(int(clean.sum()), len(clean)),
                iqm_interval(list(own.values())),
                improvement,
                performance_profile(list(own.values()), PROFILE_THRESHOLDS),
            )
        )
    return sorted(found, key=lambda a: (-a.score.value, a.agent))


def aggregate_cells(aggregates: Sequence[Aggregate]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of cells) as plain text: one row and one column of chances per agent."""

    def cell(e: Estimate) -> str:
        return interval(e.value, e.low, e.high, percent)

    headings = ["agent", "tasks", "% runs without\nviolation", "% of gap closed\n(IQM)"]
    headings += [f"% chance to beat\n{printable(a.agent)}" for a in aggregates]
    return headings, [
        [printable(a.agent), str(a.tasks), cell(a.clean_runs), cell(a.score)]
        + [cell(a.improvement.get(other.agent, UNKNOWN)) for other in aggregates]
        for a in aggregates
    ]


def profile_range(aggregates: Sequence[Aggregate]) -> slice:
    """The thresholds worth drawing: from just before the first profile falls to the end of all."""
    shares = np.array([a.profile.share for a in aggregates])
    falling = np.flatnonzero(
        ((shares < 1) & (shares > 0)).any(axis=0) | (np.ptp(shares, axis=0) > 0)
    )
    first, last = (falling[0], falling[-1]) if falling.size else (0, len(PROFILE_THRESHOLDS) - 1)
    return slice(max(0, int(first) - 10), int(last) + 2)
