"""What the figures of a leaderboard show, computed from the records.

A figure is specified here once, as plain data. :mod:`scpo_bench.leaderboard.plots` draws it with
matplotlib, the page draws it with uPlot; neither computes anything of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from scpo_bench.contract import Floats
from scpo_bench.errors import printable
from scpo_bench.leaderboard.aggregate import Aggregate, profile_range
from scpo_bench.leaderboard.columns import Row
from scpo_bench.leaderboard.curves import RunCurves, band, robust_range, share, stack
from scpo_bench.leaderboard.references import load_references
from scpo_bench.leaderboard.render import tasks
from scpo_bench.leaderboard.styles import BREACH, REFERENCE, Style, Styles, agent_styles
from scpo_bench.leaderboard.tables import Record, leaderboard, load, reference_of
from scpo_bench.records.schema import Cell

MAX_POINTS = 400
"""Points per series. Longer series are thinned, but never so that a violation disappears."""
MAX_CONSTRAINTS = 12
"""Panels of a certificate; a record may name any number of constraints."""
LINEAR_WIDTH = 0.02
"""Constraint values are drawn on a scale asinh(value / LINEAR_WIDTH): linear around the limit 0, so
that -0.02 is told from 0, and logarithmic far away, so that 170 fits the same axis.
"""


@dataclass(frozen=True)
class Series:
    """One line, staircase or set of points, perhaps with a band from ``low`` to ``high``.

    All lists are [points]; a step holds from its x to the next.
    """

    name: str
    style: Style
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    kind: Literal["line", "steps", "points"] = "line"


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    y_label: str
    series: list[Series]
    bounds: tuple[float, float]
    """What the y axis shows."""
    x_bounds: tuple[float, float]
    x_label: str = "policy update"
    limit: float | None = None
    """Values above it are violations."""
    marks: dict[str, float] = field(default_factory=dict)
    """Name -> value of further horizontal lines."""
    linear_width: float | None = None
    """The y axis is asinh(y / linear_width); linear if None."""
    ticks: Sequence[float] = ()
    """Of the y axis; chosen by the drawing library if empty."""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    suite: str
    task: str
    """"" for a figure over all tasks of the suite."""
    name: str
    title: str
    panels: list[Panel]
    columns: int = 3


Groups = dict[str, list[RunCurves]]
"""Agent, as the table names it -> its runs on one task."""


# Series and panels.


def _rounded(values: npt.ArrayLike) -> list[float]:
    return [float(f"{value:.5g}") for value in np.asarray(values, dtype=float).ravel()]


def _line(name: str, style: Style, x: Floats, *curves: Floats) -> Series:
    """``curves``: the lower end of the band, the line and the upper end."""
    kept = np.arange(0, x.size, math.ceil(x.size / MAX_POINTS) or 1)
    low, y, high = (_rounded(curve[kept]) for curve in curves)
    ends = (low, high) if not np.isnan([*low, *high]).any() else ()
    return Series(printable(name), style, _rounded(x[kept]), y, *ends)


def quartiles(name: str, style: Style, curves: Sequence[Floats]) -> Series:
    return _line(name, style, *band(curves))


def percentage(name: str, style: Style, curves: Sequence[Floats]) -> Series:
    """Percentage of runs whose value is 1, as steps."""
    updates, shares = share(curves)
    begins = np.arange(0, updates.size, math.ceil(updates.size / MAX_POINTS) or 1)
    # The largest of each stretch: thinning must not hide a violation.
    largest = np.maximum.reduceat(shares, begins) if updates.size else shares
    x, y = _rounded(updates[begins]), _rounded(100 * largest)
    return Series(printable(name), style, x, y, kind="steps")


def asinh_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, 0 and -0.02; within [-1, 1] also 2 and 5 times these."""
    tens = [10.0**k for k in range(-1, math.floor(math.log10(max(-low, high, 0.1))) + 1)]
    tens = tens[:: math.ceil(len(tens) / 5)]
    coarse = [*(-size for size in reversed(tens)), -LINEAR_WIDTH, 0.0, *tens]
    fine = [sign * size for sign in (-1, 1) for size in (0.02, 0.05, 0.1, 0.2, 0.5)]
    ticks = coarse if max(-low, high) > 1 else sorted([0.0, *fine])
    return [tick for tick in ticks if low <= tick <= high]


def panel(
    title: str, y_label: str, series: Sequence[Series], scale: str = "linear", **fields: Any
) -> Panel:
    """A panel that shows its series, limit and marks. scale: "linear", "asinh" or "percent"."""
    drawn = [one for one in series if one.x]
    fixed = [*fields.get("marks", {}).values()]
    fixed += [fields["limit"]] if fields.get("limit") is not None else []
    values = np.array([v for one in drawn for v in (*one.y, *one.low, *one.high)] or fixed or [0.0])
    if scale == "asinh":
        ends = np.arcsinh(np.array([values.min(), values.max(), *fixed]) / LINEAR_WIDTH)
        pad = 0.06 * (np.ptp(ends) or 1.0)
        low, high = LINEAR_WIDTH * np.sinh([ends.min() - pad, ends.max() + pad])
        fields |= {"linear_width": LINEAR_WIDTH, "ticks": asinh_ticks(low, high)}
    elif scale == "percent":
        low, high = -3.0, 103.0
        fields["ticks"] = (0.0, 25.0, 50.0, 75.0, 100.0)
    else:
        low, high, largest = robust_range(values, fixed)
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = low - pad, high + pad
        if largest is not None:
            fields["note"] = f"off the scale, up to {largest:.3g}"
    x = np.array([v for one in drawn for v in one.x] or [0.0])
    # Single points must not lie on the frame.
    x_pad = (0.05 if any(len(one.x) == 1 for one in drawn) else 0.01) * np.ptp(x) or 1.0
    bounds, x_bounds = _rounded([low, high]), _rounded([x.min() - x_pad, x.max() + x_pad])
    return Panel(
        title, y_label, drawn, (bounds[0], bounds[1]), (x_bounds[0], x_bounds[1]), **fields
    )


# Figures.


def task_panels(
    groups: Groups, styles: Styles, references: dict[str, dict[str, Any]]
) -> list[Panel]:
    """Objective or return, constraint value or cost, and violations, per update."""
    cells = [run.cell for runs in groups.values() for run in runs]

    def of_all(name: str, summary: Any = quartiles) -> list[Series]:
        return [
            summary(agent, styles[agent], [run.series[name] for run in runs])
            for agent, runs in groups.items()
        ]

    def measured(name: str) -> bool:
        return any(one.x for one in of_all(name))

    if measured("iterate_objective"):
        reference = reference_of(cells[0], references) or {}
        marks = {name: float(reference[name]) for name in ("backup", "oracle") if name in reference}
        first = panel(
            "Objective (lower is better)",
            "objective loss",
            of_all("iterate_objective"),
            marks=marks,
        )
    else:
        first = panel("Return (higher is better)", "return", of_all("iterate_return"))
    if measured("iterate_worst_constraint_value"):
        second = panel(
            "Constraints (violated above 0)",
            "worst constraint value",
            of_all("iterate_worst_constraint_value"),
            "asinh",
            limit=0.0,
        )
    else:
        limit = cells[0].cost_limit
        second = panel(
            f"Cost (limit {limit:g})",
            "cost per episode",
            of_all("iterate_cost"),
            limit=limit,
        )
    violating = of_all("iterate_violates", percentage)
    third = panel("Violations", "seeds that violate, %", violating, "percent")
    return [first, second, third]


def certificate_panels(runs: Sequence[RunCurves], style: Style) -> list[Panel]:
    """Certified bound and realised value of each constraint, and the share of the step kept.

    A realised value above its bound breaks the certificate; one above 0 violates the constraint.
    Empty for agents without a certificate.
    """
    constraints = next((run.constraints() for run in runs if run.constraints()), [])
    runs = [run for run in runs if run.constraints() == constraints]
    if not constraints:
        return []
    panels = []
    for name in constraints[:MAX_CONSTRAINTS]:
        bounds = stack([run.diagnostics[f"bound/{name}"] for run in runs])
        realised = stack([run.diagnostics[f"realised/{name}"] for run in runs])
        broken = realised > bounds
        at = np.flatnonzero(broken.any(axis=0))
        worst = np.where(broken, realised, -math.inf).max(axis=0)[at]
        series = [
            quartiles("certified bound", REFERENCE, list(bounds)),
            quartiles("realised", style, list(realised)),
            Series(
                "above the bound (worst seed)",
                BREACH,
                _rounded(at),
                _rounded(worst),
                kind="points",
            ),
        ]
        above = f"{broken.sum() or 'none'} of {(~np.isnan(realised)).sum()} above the bound"
        title = f"“{printable(name, 60)}”: {above}"
        panels.append(panel(title, "constraint value", series, "asinh", limit=0.0))
    return [*panels, _projection_panel(runs, style)]


def _projection_panel(runs: Sequence[RunCurves], style: Style) -> Panel:
    kept = []
    for run in runs:
        steps, proposals = run.diagnostics.get("step_norm"), run.diagnostics.get("proposal_norm")
        if steps is not None and proposals is not None:
            # A record may hold anything: no quotient of its numbers may overflow.
            known, unknown = proposals > 1e-9 * steps, np.full_like(steps, math.nan)
            kept.append(100 * np.divide(steps, proposals, out=unknown, where=known))
    title = "Step after projection"
    counts = stack([run.diagnostics["held"] for run in runs if "held" in run.diagnostics])
    if not np.isnan(counts).all():
        held = np.nanmean(np.fmax.reduce(counts, axis=1))
        title += f": {held:.3g} updates held per run"
    return panel(title, "% of the proposal", [quartiles("step kept", style, kept)])


def pareto_panel(rows: Sequence[Row], styles: Styles) -> Panel | None:
    """Score against violations, and the front of the agents that no other beats in both.

    rows: of the table, one task. None for fewer than two agents with a result.
    """
    limited = any(row["cost_limit"] > 0 for row in rows)
    measure, scale = ("cost_final", 1.0) if limited else ("violating_iterate_share", 100.0)
    kind = rows[0]["score_kind"]
    x_scale = 100.0 if kind == "gap closed" else 1.0
    points = {
        row["agent"]: (x_scale * row["score"], scale * row[measure])
        for row in sorted(rows, key=lambda row: list(styles).index(row["agent"]))
        if math.isfinite(row["score"]) and math.isfinite(row[measure])
    }
    if len(points) < 2:
        return None
    front = sorted(
        one
        for one in set(points.values())
        if not any(o != one and o[0] >= one[0] and o[1] <= one[1] for o in points.values())
    )
    series = [
        Series(printable(name), styles[name], _rounded(x), _rounded(y), kind="points")
        for name, (x, y) in points.items()
    ]
    x, y = zip(*front)
    series.append(Series("Pareto front", REFERENCE, _rounded(x), _rounded(y)))
    x_label = {"gap closed": "gap closed, %", "objective": "-objective loss"}.get(kind, "return")
    y_label = "final cost per episode" if limited else "iterates that violate, %"
    limit = max(row["cost_limit"] for row in rows) if limited else None
    return panel("Lower right is better", y_label, series, x_label=x_label, limit=limit)


def steps_panel(groups: Groups, styles: Styles) -> Panel:
    """Objective or return against all simulation steps until then, probes included."""
    series: dict[str, list[Series]] = {"objective": [], "return": []}
    for agent, runs in groups.items():
        totals = np.nanmedian(stack([run.series["total_steps"] for run in runs]), axis=0)
        for name, found in series.items():
            updates, *curves = band([run.series[f"iterate_{name}"] for run in runs])
            steps = totals[updates.astype(int)]
            drawn = [curve[steps > 0] for curve in (steps, *curves)]
            found.append(_line(agent, styles[agent], np.log10(drawn[0]), *drawn[1:]))
    better = "objective" if any(one.x for one in series["objective"]) else "return"
    title = {"objective": "Objective (lower is better)", "return": "Return (higher is better)"}
    return panel(title[better], better, series[better], x_label="all steps, log10")


def profile_panel(aggregates: Sequence[Aggregate], styles: Styles) -> Panel:
    """Which share of an agent's runs closes more than x of the gap, with its pointwise band."""
    drawn = profile_range(aggregates)
    series = []
    for a in sorted(aggregates, key=lambda a: list(styles).index(a.agent)):
        curves = (a.profile.thresholds, a.profile.low, a.profile.share, a.profile.high)
        series.append(_line(a.agent, styles[a.agent], *(100 * np.array(c[drawn]) for c in curves)))
    title = f"Performance profile over {max(a.tasks for a in aggregates)} tasks"
    return panel(title, "runs that close more, %", series, "percent", x_label="gap closed, %")


def runs_of(row: Row, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that a row of the leaderboard summarises."""
    same = [runs[name] == row[name] for name in ("suite", "task", "setup")]
    return runs[np.logical_and.reduce(same)].sort_values("seed")


class SuiteFigures(NamedTuple):
    runs: pd.DataFrame
    table: pd.DataFrame
    styles: Styles
    """Of every agent in the figures."""
    figures: list[Figure]


def suite_figures(
    results: Path,
    suite: str | None = None,
    planned: Sequence[Cell] | None = None,
    references: dict[str, dict[str, Any]] | None = None,
) -> SuiteFigures:
    """The figures of a suite, tasks in order, with the leaderboard that they belong to.

    The arguments are those of :func:`scpo_bench.leaderboard.tables.load`.
    """
    references = load_references() if references is None else references
    curves: dict[tuple[str, str], RunCurves] = {}

    def keep(record: Record) -> None:
        if record.updates and record.problem is None:
            run = RunCurves.of(record.run.cell, record.updates)
            curves[record.run.suite, record.run.key] = run

    runs = load(results, suite, planned, references, keep)
    table = leaderboard(runs)
    aggregates: dict[str, list[Aggregate]] = table.attrs["aggregates"]
    # Aggregates join the set-ups that the table tells apart.
    joined = [a.agent for found in aggregates.values() for a in found]
    styles = agent_styles([*table["agent"], *joined])
    figures = []
    for name, task, rows in tasks(table):
        groups: Groups = {}
        for row in sorted(rows, key=lambda row: list(styles).index(row["agent"])):
            keys = runs_of(row, runs)["key"]
            if found := [curves[name, key] for key in keys if (name, key) in curves]:
                groups[row["agent"]] = found
        figures += _figures_of_task(name, task, rows, groups, styles, references)
    for name, of_suite in aggregates.items():
        title = f"All tasks of {printable(name)} with committed constants"
        figures.append(Figure(name, "", "profile", title, [profile_panel(of_suite, styles)], 1))
    return SuiteFigures(runs, table, styles, figures)


def _figures_of_task(
    suite: str,
    task: str,
    rows: Sequence[Row],
    groups: Groups,
    styles: Styles,
    references: dict[str, dict[str, Any]],
) -> list[Figure]:
    if not groups:
        return []
    sizes = sorted({len(runs) for runs in groups.values()})
    seeds = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    seeds += " seeds" if sizes[-1] > 1 else " seed"
    title = f"{printable(task)}: median and quartiles over {seeds}"
    figures = [Figure(suite, task, task, title, task_panels(groups, styles, references))]
    for agent, runs in groups.items():
        if panels := certificate_panels(runs, styles[agent]):
            title = f"{printable(agent)} on {printable(task)}: certified bound and realised value"
            columns = 2 if len(panels) == 4 else min(3, len(panels))
            figures.append(
                Figure(suite, task, f"{task}-certificate-{agent}", title, panels, columns)
            )
    if (pareto := pareto_panel(rows, styles)) is not None:
        title = f"{printable(task)}: score against violations"
        figures.append(Figure(suite, task, f"{task}-pareto", title, [pareto], 1))
    title = f"{printable(task)}: against all simulation steps"
    figures.append(Figure(suite, task, f"{task}-steps", title, [steps_panel(groups, styles)], 1))
    return figures
