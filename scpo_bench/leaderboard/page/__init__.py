"""The leaderboard as one HTML file that needs no other file and no network.

Texts from records are untrusted. They reach the page through Jinja's autoescaping, or as JSON in a
block that browsers do not execute, and the script writes them into text nodes only. A content
security policy allows exactly this page's own style and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from scpo_bench.errors import printable
from scpo_bench.leaderboard.aggregate import aggregate_cells
from scpo_bench.leaderboard.columns import COLUMNS, Column, Row, cell_text, shown
from scpo_bench.leaderboard.figures import Figure, runs_of, suite_figures
from scpo_bench.leaderboard.ranking import VERDICTS
from scpo_bench.leaderboard.render import conditions, notes, tasks
from scpo_bench.leaderboard.tables import seed_ranges
from scpo_bench.leaderboard.text import number
from scpo_bench.records.schema import Cell

TONES = dict(zip(VERDICTS, ("good", "middle", "middle", "bad", "bad")))
RUN_FIELDS = (
    *("seed", "status", "error", "updates", "violating_iterates", "evaluated_iterates"),
    *("first_violating_update", "final_objective", "final_return", "final_cost"),
    *("worst_iterate_value", "interaction_steps", "probe_steps", "wall_time_s"),
)
MAX_PROVENANCE = 4000
"""Characters: anything may stand in a record."""


def render_page(
    results: Path,
    suite: str | None = None,
    planned: Sequence[Cell] | None = None,
    title: str = "",
    references: dict[str, dict[str, Any]] | None = None,
) -> str:
    """The page of a suite's records, or of all of them: table, figures and details of each task.

    The arguments are those of :func:`scpo_bench.leaderboard.tables.load`. The same records give the
    same text.
    """
    runs, table, styles, figures = suite_figures(results, suite, planned, references)
    numbered = list(enumerate(figures))

    def figures_of(name: str, task: str) -> list[tuple[int, Figure]]:
        return [
            (i, figure) for i, figure in numbered if (figure.suite, figure.task) == (name, task)
        ]

    sections = [
        {
            "title": printable(task) if suite else f"{printable(task)}, suite {printable(name)}",
            "subtitle": conditions(rows),
            "columns": shown(rows),
            "rows": rows,
            "figures": figures_of(name, task),
        }
        for name, task, rows in tasks(table)
    ]
    overall = [
        (f"All tasks of {printable(name)}", *aggregate_cells(found), figures_of(name, ""))
        for name, found in table.attrs["aggregates"].items()
    ]
    return _assemble(
        title=printable(title or suite or "leaderboard"),
        styles=styles,
        sections=sections,
        overall=overall,
        figures=[asdict(figure) for figure in figures],
        notes=notes(table),
        details=lambda row: _details(runs_of(row, runs)),
    )


def sort_key(column: Column, row: Row) -> str:
    """The raw value that a cell is sorted by; empty where nothing was measured."""
    value = row[column.name]
    if column.name == "verdict":
        return str(list(VERDICTS).index(value))
    if isinstance(value, float):
        return "" if math.isnan(value) else "Infinity" if math.isinf(value) else repr(value)
    return printable(value)


def _details(runs: pd.DataFrame) -> tuple[list[list[str]], dict[str, str]]:
    """(the cells of :data:`RUN_FIELDS` per run, what was recorded -> seeds that recorded it)."""
    cells = [
        [printable(v) if isinstance(v, str) else number(math.nan if v is None else v) for v in run]
        for run in runs[list(RUN_FIELDS)].itertuples(index=False)
    ]
    recorded = runs[runs["status"] != "missing"]
    # Seeds that ran in the same place share one entry.
    provenance = recorded["provenance"].map(
        lambda found: json.dumps(found, indent=1, sort_keys=True)[:MAX_PROVENANCE]
    )
    seeds = recorded["seed"].groupby(provenance, sort=False)
    return cells, {str(text): seed_ranges(own.tolist()) for text, own in seeds}


def _assemble(**content: Any) -> str:
    folder = files(__name__)

    def text(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    style = text("vendor/uPlot.min.css") + text("page.css")
    licence = f"/* uPlot\n{text('vendor/LICENSE')}*/\n"
    script = licence + text("vendor/uPlot.iife.min.js") + text("page.js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals |= {
        **{"COLUMNS": COLUMNS, "RUN_FIELDS": RUN_FIELDS, "TONES": TONES},
        **{"cell_text": cell_text, "sort_key": sort_key, "printable": printable},
    }
    return environment.from_string(text("page.html.jinja")).render(
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}",
        style=Markup(style),
        script=Markup(script),
        **content,
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
