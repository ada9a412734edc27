"""Per-update curves of a group of runs: what plots and pages draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from scpo_bench.records.schema import Cell, Update

Floats = npt.NDArray[np.float64]
SERIES = (
    "iterate_objective",
    "iterate_return",
    "iterate_cost",
    "iterate_worst_constraint_value",
    "iterate_violates",
    "cost_mean",
)


@dataclass
class RunCurves:
    """One run: value of each series at every update, nan where it was not measured.

    Arrays are [updates], update 0 first.
    """

    cell: Cell
    status: str
    interaction_steps: Floats
    series: dict[str, Floats]
    diagnostics: dict[str, Floats] = field(default_factory=dict)

    @classmethod
    def of(cls, cell: Cell, status: str, updates: Sequence[Update]) -> RunCurves:
        def column(values: list[float | None]) -> Floats:
            return np.array([math.nan if value is None else value for value in values], dtype=float)

        names = dict.fromkeys(name for update in updates for name in update.diagnostics)
        return cls(
            cell,
            status,
            np.array([update.interaction_steps for update in updates], dtype=float),
            {name: column([getattr(update, name) for update in updates]) for name in SERIES},
            {name: column([update.diagnostics.get(name) for update in updates]) for name in names},
        )

    def constraints(self) -> list[str]:
        """Names of the constraints that the agent recorded a bound and a realised value for."""
        bounds = [
            name.removeprefix("bound/") for name in self.diagnostics if name.startswith("bound/")
        ]
        return [name for name in bounds if f"realised/{name}" in self.diagnostics]


def stack(curves: Sequence[Floats]) -> Floats:
    """[runs, updates] of curves of different lengths, nan beyond each one's end."""
    length = max(map(len, curves), default=0)
    stacked = np.full((len(curves), length), math.nan)
    for row, curve in zip(stacked, curves):
        row[: len(curve)] = curve
    return stacked


def band(curves: Sequence[Floats]) -> tuple[Floats, Floats, Floats, Floats]:
    """(updates, lower quartile, median, upper quartile) over runs, at the updates where any run was
    measured. Arrays are [points].
    """
    stacked = stack(curves)
    measured = np.flatnonzero(~np.isnan(stacked).all(axis=0))
    if not measured.size:
        return (np.zeros(0),) * 4
    low, middle, high = np.nanquantile(stacked[:, measured], [0.25, 0.5, 0.75], axis=0)
    return measured.astype(float), low, middle, high


def share(curves: Sequence[Floats]) -> tuple[Floats, Floats]:
    """(updates, share of the measured runs with value 1). Arrays are [points]."""
    stacked = stack(curves)
    measured = np.flatnonzero(~np.isnan(stacked).all(axis=0))
    return measured.astype(float), np.nanmean(
        stacked[:, measured], axis=0
    ) if measured.size else np.zeros(0)


def robust_range(
    values: Sequence[Floats], always: Sequence[float] = ()
) -> tuple[float, float, float | None] | None:
    """(low, high, largest) of what to show: nearly all values and all of ``always``; None if there
    is nothing.

    One diverging agent would flatten all the others, so far outliers above are left out; then
    ``largest`` is how far they reach.
    """
    known = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.zeros(0)
    fixed = [v for v in always if math.isfinite(v)]
    if not known.size and not fixed:
        return None
    ends = np.quantile(known, [0.01, 0.98]).tolist() if known.size else []
    low, high = min([*ends, *fixed]), max([*ends, *fixed])
    largest = float(known.max()) if known.size else high
    if high > low and largest > high + 2 * (high - low):
        return low, high, largest
    everything = [*known.tolist(), *fixed]
    return min(everything), max(everything), None
