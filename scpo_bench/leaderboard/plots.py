"""Figures per update, for eyes and papers: what each agent reaches, what it violates on the way,
and SCPO's certificate.

Matplotlib is imported when a figure is made, not before; no display is needed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scpo_bench.leaderboard.curves import RunCurves, band, robust_range, share, stack
from scpo_bench.leaderboard.references import load_references
from scpo_bench.leaderboard.render import printable
from scpo_bench.leaderboard.tables import (
    Aggregate,
    Record,
    leaderboard,
    load,
    profile_range,
    reference_of,
    setup_of,
)
from scpo_bench.records.schema import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with every common colour blindness; the line styles tell
# agents apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
)
FORMATS = ("png", "svg", "pdf")
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 150,
    "svg.hashsalt": "scpo-bench",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,
}
Groups = dict[str, list[RunCurves]]


def agent_style(agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """agent -> colour and line style, the same in every figure of a suite; "scpo" always comes
    first.
    """
    order = sorted(agents, key=lambda name: (name != "scpo", name))
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        for i, name in enumerate(order)
    }


def file_stem(name: str) -> str:
    """``name`` as part of a file name: no separators, nothing hidden, at most 100 characters."""
    return (
        "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name).strip("-")[
            :100
        ]
        or "unnamed"
    )


def plot_suite(
    results: Path,
    suite: str,
    out_dir: Path,
    formats: Sequence[str] = ("png",),
    planned: Sequence[Cell] | None = None,
) -> list[Path]:
    """Draw every task of a suite into ``out_dir``; the paths written, tasks in order.

    Per task ``<task>.<format>``: objective (or return), worst constraint value (or cost), and share
    of seeds whose iterate violates, per update, median and quartiles over seeds. For each agent
    that records a certificate also ``<task>-certificate-<agent>.<format>``. Over several tasks with
    committed constants ``profile.<format>``, in which ``planned`` cells without a record count at
    the floor. ValueError for a format other than png, svg and pdf.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats: expected some of {', '.join(FORMATS)}, got {unknown[0]!r}")
    by_task: dict[str, Groups] = defaultdict(lambda: defaultdict(list))
    references = load_references()

    def keep(record: Record) -> None:
        if record.updates and record.problem is None:
            cell = record.run.cell
            curves = RunCurves.of(cell, record.run.status, record.updates)
            by_task[cell.task][cell.agent].append(curves)

    aggregates = (
        leaderboard(load(results, suite, planned, references, keep))
        .attrs["aggregates"]
        .get(suite, [])
    )
    agents = {agent for groups in by_task.values() for agent in groups} | {
        a.agent for a in aggregates
    }
    styles = agent_style(sorted(agents))

    import matplotlib

    written: list[Path] = []
    taken: set[str] = set()
    out_dir.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for stem, figure in _figures(by_task, aggregates, styles, references):
            while (
                stem in taken
            ):  # two names may differ only in characters that file names cannot have
                stem += "-"
            taken.add(stem)
            for name in formats:
                path = out_dir / f"{stem}.{name}"
                # No time stamps inside: the same records make the same file.
                metadata: dict[str, Any] = {
                    "svg": {"Date": None},
                    "pdf": {"CreationDate": None},
                }.get(name, {})
                figure.savefig(path, metadata=metadata)
                written.append(path)
    return written


def _figures(
    by_task: dict[str, Groups],
    aggregates: list[Aggregate],
    styles: dict[str, dict[str, Any]],
    references: dict[str, dict[str, Any]],
) -> Iterator[tuple[str, Figure]]:
    """(stem of the file name, figure), one at a time: a large suite's figures together would fill
    the memory.
    """
    for task, groups in sorted(by_task.items()):
        groups = _by_setup(groups)
        yield file_stem(task), task_figure(task, groups, styles, references)
        for agent, runs in groups.items():
            if any(run.constraints() for run in runs):
                yield (
                    f"{file_stem(task)}-certificate-{file_stem(agent)}",
                    certificate_figure(task, agent, runs),
                )
    if aggregates:
        yield "profile", profile_figure(aggregates, styles)


def _by_setup(groups: Groups) -> Groups:
    """Runs of one agent with different settings are different lines."""
    found: Groups = {}
    for agent, runs in groups.items():
        setups = sorted({setup_of(run.cell) for run in runs})
        for setup in setups:
            name = agent if len(setups) == 1 else f"{agent} #{setup[:4]}"
            found[name] = [run for run in runs if setup_of(run.cell) == setup]
    return found


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    # The object-oriented interface: no global figure registry, no display, whatever backend the
    # caller chose stays.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _style_of(styles: dict[str, dict[str, Any]], agent: str, taken: int) -> dict[str, Any]:
    own = styles.get(agent)
    return own or {
        "color": COLOURS[taken % len(COLOURS)],
        "linestyle": DASHES[(taken + 2) % len(DASHES)],
    }


def _robust_limits(axes: Axes, values: Sequence[np.ndarray], always: Sequence[float]) -> None:
    """Leave far outliers out of the picture, and say so."""
    shown = robust_range(values, always)
    if shown is None or shown[2] is None:
        return
    low, high, largest = shown
    axes.set_ylim(low - 0.06 * (high - low), high + 0.15 * (high - low))
    axes.annotate(
        f"off the scale, up to {largest:.3g}",
        (0.02, 0.98),
        xycoords="axes fraction",
        va="top",
        fontsize=8,
        color="#555555",
    )


def _draw_bands(
    axes: Axes, groups: Groups, styles: dict[str, dict[str, Any]], name: str
) -> list[np.ndarray]:
    drawn = []
    for i, (agent, runs) in enumerate(sorted(groups.items(), key=lambda item: item[0] == "scpo")):
        curves = [run.series[name] for run in runs]
        updates, low, middle, high = band(curves)
        if not updates.size:
            continue
        style = _style_of(styles, agent, i)
        axes.fill_between(updates, low, high, color=style["color"], alpha=0.18, linewidth=0)
        # SCPO is drawn last, so on top.
        marker = "." if updates.size == 1 else None
        axes.plot(updates, middle, label=printable(agent), marker=marker, **style)
        drawn += [low, middle, high]
    return drawn


def _measured(groups: Groups, name: str) -> bool:
    return any(not np.isnan(run.series[name]).all() for runs in groups.values() for run in runs)


def task_figure(
    task: str,
    groups: Groups,
    styles: dict[str, dict[str, Any]],
    references: dict[str, dict[str, Any]],
) -> Figure:
    """Three panels over updates. groups: agent -> its runs."""
    figure, panels = _figure(1, 3, 10.5, 3.2)
    first, second, third = panels[0]
    cells = [run.cell for runs in groups.values() for run in runs]
    seeds = sorted({len(runs) for runs in groups.values()})
    limit = max(cell.cost_limit for cell in cells)

    always: list[float] = []
    if _measured(groups, "iterate_objective"):
        first.set_title("Objective loss of the iterate (lower is better)")
        drawn = _draw_bands(first, groups, styles, "iterate_objective")
        reference = reference_of(cells[0], references)
        for name, dashes in (("backup", (0, (1, 2))), ("oracle", (0, (4, 2)))):
            if reference is not None:
                value = float(reference[name])
                always.append(value)
                first.axhline(value, color="#555555", linewidth=1.0, linestyle=dashes, zorder=1)
                first.annotate(
                    name,
                    (1.0, value),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    fontsize=8,
                    ha="right",
                    color="#555555",
                    va="top" if name == "backup" else "bottom",
                    xytext=(-2, -2 if name == "backup" else 2),
                )
    else:
        first.set_title("Return of the iterate (higher is better)")
        drawn = _draw_bands(first, groups, styles, "iterate_return")
    _robust_limits(first, drawn, always)

    if _measured(groups, "iterate_worst_constraint_value"):
        second.set_title("Worst constraint value of the iterate")
        drawn = _draw_bands(second, groups, styles, "iterate_worst_constraint_value")
        boundary, meaning = 0.0, "violated above 0"
    else:
        second.set_title("Cost per episode of the iterate")
        drawn = _draw_bands(second, groups, styles, "iterate_cost")
        boundary, meaning = limit, f"limit {limit:g}"
    _robust_limits(second, drawn, [boundary])
    low, high = second.get_ylim()
    low, high = min(low, boundary - 0.05 * (high - low)), max(high, boundary + 0.08 * (high - low))
    second.set_ylim(low, high)
    second.axhspan(boundary, high, color="#b00020", alpha=0.06, linewidth=0)
    second.axhline(boundary, color="#b00020", linewidth=1.0, zorder=1)
    second.annotate(
        meaning,
        (1.0, boundary),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color="#b00020",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )

    third.set_title("Share of seeds whose iterate violates")
    for i, (agent, runs) in enumerate(sorted(groups.items(), key=lambda item: item[0] == "scpo")):
        updates, violating = share([run.series["iterate_violates"] for run in runs])
        style = _style_of(styles, agent, i)
        third.plot(
            updates, 100 * violating, drawstyle="steps-mid", clip_on=False, zorder=3, **style
        )
    third.set_ylim(-3, 103)
    third.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])

    for axes in (first, second, third):
        axes.set_xlabel("policy update")
        axes.margins(x=0.01)
        axes.xaxis.get_major_locator().set_params(integer=True)
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    title = (
        f"{printable(task)}: median and quartiles over {count} seed{'s' if seeds[-1] != 1 else ''}"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    handles, labels = first.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] != "scpo", labels[i]))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=max(1, min(6, len(labels))),
        handlelength=3.2,
    )
    return figure


def profile_figure(aggregates: Sequence[Aggregate], styles: dict[str, dict[str, Any]]) -> Figure:
    """Performance profile: which share of an agent's runs closes more than so much of the gap, with
    its pointwise band.
    """
    figure, panels = _figure(1, 1, 5.6, 3.6)
    axes, drawn = panels[0, 0], profile_range(aggregates)
    for i, a in enumerate(
        sorted(aggregates, key=lambda a: (a.agent == "scpo", a.agent))
    ):  # SCPO last, so on top
        style = _style_of(styles, a.agent, i)
        curves = (a.profile.thresholds, a.profile.share, a.profile.low, a.profile.high)
        closed, share, low, high = (100 * np.array(values[drawn]) for values in curves)
        axes.fill_between(closed, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(closed, share, label=printable(a.agent), **style)
    tasks = max(a.tasks for a in aggregates)
    axes.set_title(f"Performance profile over {tasks} tasks: runs that close more of the gap")
    axes.set_xlabel("more than this share of the gap closed")
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.margins(x=0.01)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] != "scpo", labels[i]))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=max(1, min(4, len(labels))),
        handlelength=3.2,
    )
    return figure


def certificate_figure(task: str, agent: str, runs: list[RunCurves]) -> Figure:
    """What the certificate promised against what was realised: one panel per constraint, and one on
    the projection's work.

    A realised value above its bound is a breach of the certificate; one above 0 is a violation of
    the constraint.
    """
    constraints = next(run.constraints() for run in runs if run.constraints())
    runs = [run for run in runs if run.constraints() == constraints]
    columns = 2 if len(constraints) == 3 else min(3, len(constraints) + 1)
    rows = math.ceil((len(constraints) + 1) / columns)
    figure, panels = _figure(
        rows, columns, (3.5 if columns > 2 else 4.5) * columns, 2.8 * rows + 0.4
    )
    flat = list(panels.ravel())
    for axes, name in zip(flat, constraints):
        _certificate_panel(axes, name, runs)
    _projection_panel(flat[len(constraints)], runs)
    for axes in flat[len(constraints) + 1 :]:
        axes.set_visible(False)
    for axes in flat[: len(constraints) + 1]:
        axes.set_xlabel("policy update")
        axes.margins(x=0.01)
        axes.xaxis.get_major_locator().set_params(integer=True)
    plural = "s" if len(runs) != 1 else ""
    title = f"{printable(agent)} on {printable(task)}: certificate against what was realised, {len(runs)} seed{plural}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    return figure


def _certificate_panel(axes: Axes, name: str, runs: list[RunCurves]) -> None:
    bounds = [run.diagnostics[f"bound/{name}"] for run in runs]
    realised = [run.diagnostics[f"realised/{name}"] for run in runs]
    for curves, colour, dashes, label in (
        (bounds, COLOURS[1], DASHES[1], "certified bound"),
        (realised, COLOURS[0], DASHES[0], "realised"),
    ):
        updates, low, middle, high = band(curves)
        axes.fill_between(updates, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(updates, middle, color=colour, linestyle=dashes, label=label)
    above = stack(realised) > stack(bounds)
    breaches = int(above.sum())
    if breaches:
        seed, update = np.nonzero(above)
        axes.plot(
            update,
            stack(realised)[seed, update],
            linestyle="",
            marker="x",
            color="#b00020",
            markersize=5 if breaches < 60 else 3,
            alpha=1.0 if breaches < 60 else 0.5,
            label=f"{breaches} above the bound",
        )
    axes.axhline(0.0, color="#b00020", linewidth=1.0, zorder=1)
    axes.set_title(f"Constraint “{printable(name)}” (violated above 0)")
    axes.legend(loc="best", frameon=True, framealpha=0.8, edgecolor="none")


def _projection_panel(axes: Axes, runs: list[RunCurves]) -> None:
    """How much of the proposal survived the projection, and how often the policy stayed."""
    ratios = []
    for run in runs:
        steps, proposals = run.diagnostics.get("step_norm"), run.diagnostics.get("proposal_norm")
        if steps is not None and proposals is not None:
            ratios.append(
                np.divide(steps, proposals, out=np.full_like(steps, math.nan), where=proposals > 0)
            )
    if ratios:
        updates, low, middle, high = band(ratios)
        axes.fill_between(updates, 100 * low, 100 * high, color=COLOURS[2], alpha=0.18, linewidth=0)
        axes.plot(updates, 100 * middle, color=COLOURS[2])
    axes.set_title("Step after projection, % of the proposal")
    totals = []
    for key, label in (("held", "held updates"), ("breaches", "breaches of the bound")):
        last = [
            run.diagnostics[key][~np.isnan(run.diagnostics[key])]
            for run in runs
            if key in run.diagnostics
        ]
        counts = [float(values[-1]) for values in last if values.size]
        if counts:
            totals.append(f"{label}: {np.mean(counts):.3g} per run")
    axes.text(
        0.98,
        0.97,
        "\n".join(totals),
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
    )
    axes.set_ylim(bottom=0)
