"""Curves of runs over their updates, and what figures show of several runs at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scpo_bench.contract import Floats
from scpo_bench.records.schema import Cell, Update


@dataclass(frozen=True)
class RunCurves:
    """One run: the value of each series at every update, nan where it was not measured.

    Arrays are [updates], update 0 first.
    """

    cell: Cell
    series: dict[str, Floats]
    diagnostics: dict[str, Floats] = field(default_factory=dict)

    @classmethod
    def of(cls, cell: Cell, updates: Sequence[Update]) -> RunCurves:
        def column(values: list[float | None]) -> Floats:
            return np.array([math.nan if value is None else value for value in values], dtype=float)

        series = [name for name in Update.model_fields if name.startswith("iterate_")]
        names = dict.fromkeys(name for update in updates for name in update.diagnostics)
        measured = {name: column([getattr(u, name) for u in updates]) for name in series}
        # As numbers of any size: a record may hold anything.
        measured["total_steps"] = column(
            [float(u.interaction_steps + u.probe_steps) for u in updates]
        )
        return cls(
            cell,
            measured,
            {name: column([update.diagnostics.get(name) for update in updates]) for name in names},
        )

    def constraints(self) -> list[str]:
        """Names of the constraints for which the agent recorded a bound and a realised value."""
        names = [name.removeprefix("bound/") for name in self.diagnostics]
        known = self.diagnostics.keys()
        return [name for name in names if {f"bound/{name}", f"realised/{name}"} <= known]


def stack(curves: Sequence[Floats]) -> Floats:
    """[runs, updates] of curves of different lengths, nan beyond the end of each."""
    stacked = np.full((len(curves), max(map(len, curves), default=0)), math.nan)
    for row, curve in zip(stacked, curves):
        row[: len(curve)] = curve
    return stacked


def band(curves: Sequence[Floats]) -> tuple[Floats, Floats, Floats, Floats]:
    """(updates, lower quartile, median, upper quartile) over runs.

    Only updates at which some run was measured. Arrays are [points].
    """
    stacked = stack(curves)
    measured = np.flatnonzero(~np.isnan(stacked).all(axis=0))
    if not measured.size:
        return (np.zeros(0),) * 4
    low, middle, high = np.nanquantile(stacked[:, measured], [0.25, 0.5, 0.75], axis=0)
    return measured.astype(float), low, middle, high


def share(curves: Sequence[Floats]) -> tuple[Floats, Floats]:
    """(updates, share of the measured runs whose value is 1). Arrays are [points]."""
    stacked = stack(curves)
    measured = np.flatnonzero(~np.isnan(stacked).all(axis=0))
    shares = np.nanmean(stacked[:, measured], axis=0) if measured.size else np.zeros(0)
    return measured.astype(float), shares


def robust_range(values: Floats, always: Sequence[float] = ()) -> tuple[float, float, float | None]:
    """(low, high, largest) of what to show: nearly all values, and all of ``always``.

    One diverging agent would flatten all the others, so values far above are left out. Then
    ``largest`` is how far they reach.
    """
    low, high = min(values.min(), *always, math.inf), max(values.max(), *always, -math.inf)
    ends = [*np.quantile(values, [0.01, 0.98]).tolist(), *always]
    if max(ends) > min(ends) and high > max(ends) + 2 * (max(ends) - min(ends)):
        return min(ends), max(ends), float(high)
    return float(low), float(high), None
