"""Draws the figures of a suite with matplotlib, into files.

Matplotlib is imported when a figure is drawn, not before; no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpo_bench.errors import UserError, nearest
from scpo_bench.leaderboard.escaping import figure_text
from scpo_bench.leaderboard.figures import Figure, Panel, Series, suite_figures
from scpo_bench.leaderboard.styles import BREACH, REFERENCE
from scpo_bench.records.plain_files import write_atomically
from scpo_bench.records.schema import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

FORMATS = ("png", "svg", "pdf")
# No time stamps inside: the same records make the same file.
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelcolor": "#333333",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.dpi": 150,
    "svg.hashsalt": "scpo-bench",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    # Names come from records: they are shown, not typeset.
    "text.parse_math": False,
    "text.usetex": False,
}


def file_stem(name: str) -> str:
    """``name`` as part of a file name: no separators, nothing hidden, at most 100 characters."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)
    return kept.strip("-")[:100] or "unnamed"


def plot_suite(
    results: Path,
    suite: str,
    out_dir: Path,
    formats: Sequence[str] = ("png",),
    planned: Sequence[Cell] | None = None,
) -> list[Path]:
    """Draw every figure of a suite into ``out_dir``; the paths written, tasks in order.

    Per task ``<task>.<format>``: objective (or return), worst constraint value (or cost), and share
    of seeds whose iterate violates, per update, median and quartiles over seeds. For each agent
    that records a certificate also ``<task>-certificate-<agent>.<format>``, for several agents
    ``<task>-pareto.<format>``; the objective against all simulation steps in
    ``<task>-steps.<format>``. Over several tasks with committed constants ``profile.<format>``, in
    which ``planned`` cells without a record count at the floor.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"formats: unknown format {name!r}{nearest(name, FORMATS)}")
    import matplotlib

    written: dict[Path, None] = {}
    out_dir.mkdir(parents=True, exist_ok=True)
    for figure in suite_figures(results, suite, planned).figures:
        stem = file_stem(figure.name)
        # Two names may differ only in characters that file names cannot have.
        while out_dir / f"{stem}.{formats[0]}" in written:
            stem += "-"
        with matplotlib.rc_context(STYLE):
            canvas = draw(figure)
            for name in formats:
                path = out_dir / f"{stem}.{name}"
                drawn = io.BytesIO()
                canvas.savefig(drawn, format=name, metadata=METADATA.get(name, {}))
                write_atomically(path, drawn.getvalue())
                written[path] = None
    return list(written)


def draw(figure: Figure) -> Canvas:
    """The figure drawn, with one legend below all panels."""
    # The object-oriented interface: no global figure registry, no display, and whatever backend
    # the caller chose stays.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns, rows = figure.columns, -(-len(figure.panels) // figure.columns)
    width = {1: 6.6, 2: 4.8, 3: 3.7}[columns] * columns
    canvas = Canvas(figsize=(width, 2.7 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, figure.panels):
        draw_panel(axes, panel)
    for axes in grid[len(figure.panels) :]:
        axes.set_visible(False)
    canvas.suptitle(figure_text(figure.title), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    handles = {
        str(label): handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels())
    }
    canvas.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(max(4, 2 * columns), len(handles)) or 1,
        handlelength=3.2,
    )
    return canvas


def draw_panel(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = panel.bounds
    if panel.linear_width is not None:
        axes.set_yscale("asinh", linear_width=panel.linear_width)
    if panel.ticks:
        axes.set_yticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axes.minorticks_off()
    for i, series in enumerate(panel.series):
        _draw_series(axes, series, zorder=3 - 0.01 * i)  # the first one on top
    lines: list[tuple[str, float, str, Any]] = [
        (name, value, REFERENCE.color, (0, (2, 2))) for name, value in panel.marks.items()
    ]
    if panel.limit is not None:
        lines.append(("limit", panel.limit, BREACH.color, "-"))
        axes.axhspan(panel.limit, high, color=BREACH.color, alpha=0.06, linewidth=0)
    # The names stand right of the axes, where they cover no data.
    place: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "xytext": (3, 0),
        "textcoords": "offset points",
    }
    for name, value, color, dashes in lines:
        axes.axhline(value, color=color, linewidth=1.1, linestyle=dashes, zorder=2)
        axes.annotate(name, (1.0, value), color=color, va="center", fontsize=8, **place)
    axes.set(ylim=(low, high), xlim=panel.x_bounds, ylabel=panel.y_label, xlabel=panel.x_label)
    axes.set_title(figure_text(panel.title), loc="left")
    if panel.note:
        # Below the upper edge that it speaks of: beside a long title there is no room.
        inside: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
        axes.text(0.99, 0.98, panel.note, fontsize=8, color="#555555", **inside)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def _draw_series(axes: Axes, series: Series, zorder: float) -> None:
    given: dict[str, Any] = {
        "label": figure_text(series.name),
        "color": series.style.color,
        "zorder": zorder,
    }
    if series.kind == "points":
        given |= {"linestyle": "", "marker": "o", "markersize": 7}
        if series.style == BREACH:
            given |= {"marker": "x", "markersize": 4, "alpha": 0.6}
    else:
        given["linestyle"] = (0, series.style.dashes) if series.style.dashes else "-"
        given["marker"] = "." if len(series.x) == 1 else ""
        if series.kind == "steps":
            given |= {"drawstyle": "steps-post", "linewidth": 1.1}
    axes.plot(series.x, series.y, **given)
    if series.low:
        color = series.style.color
        axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, linewidth=0)
