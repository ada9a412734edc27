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

from scpo_bench.leaderboard.figures import Figure, agent_styles, suite_figures
from scpo_bench.leaderboard.render import (
    _AGGREGATE_TITLE,
    _aggregate_rows,
    _limit,
    headline,
    notes,
    number,
    percent,
    printable,
    tasks,
)
from scpo_bench.leaderboard.tables import COLUMNS, VERDICTS, seed_ranges
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
    runs, table, figures = suite_figures(results, suite, planned, references)
    styles = agent_styles([str(agent) for agent in table["agent"]])
    numbered = list(enumerate(figures))
    sections = []
    for name, task, rows in tasks(table):
        columns = headline(rows)
        sections.append(
            {
                "anchor": f"section-{len(sections)}",
                "title": printable(task) if suite else f"{printable(task)}, {printable(name)}",
                "subtitle": _limit(rows),
                "headings": [
                    {"words": c.words, "align": "left" if c.left else "", "meaning": ""}
                    for c in columns
                ],
                "rows": [],
                "figures": [(i, f) for i, f in numbered if (f.suite, f.task) == (name, task)],
            }
        )
        for row in rows:
            own = runs[(runs["suite"] == name) & (runs["task"] == task) & (runs["label"] == row["agent"])]
            sections[-1]["rows"].append(
                {
                    "agent": printable(row["agent"]),
                    "style": styles[row["agent"]],
                    "cells": [
                        {
                            "text": c.cell(row),
                            "key": "",
                            "tone": TONES[row["verdict"]] if c.heading == "verdict" else "",
                        }
                        for c in columns
                    ],
                    "details": _details(row, own),
                }
            )
    return _assemble(
        title=printable(title or suite or "leaderboard"),
        styles={printable(name): style for name, style in styles.items()},
        sections=sections,
        figures=[asdict(figure) for figure in figures],
        notes=notes(table),
    )


def _details(row: dict[str, Any], runs: pd.DataFrame) -> dict[str, Any]:
    """What a row shows when it is opened: every column, and its runs with their provenance."""
    runs = runs.sort_values("seed")
    provenance: dict[str, list[int]] = {}
    for seed, status, recorded in zip(runs["seed"], runs["status"], runs["provenance"]):
        if status != "missing":
            text = json.dumps(recorded, indent=1, sort_keys=True)[:MAX_PROVENANCE]
            provenance.setdefault(text, []).append(int(seed))
    return {
        "command": row["command"],
        "columns": [],
        "run_fields": RUN_FIELDS,
        "runs": [
            [printable(v) if isinstance(v, str) else number(float("nan" if v is None else v)) for v in run] for run in runs[list(RUN_FIELDS)].to_numpy().tolist()
        ],
        "provenance": [(seed_ranges(seeds), text) for text, seeds in provenance.items()],
    }


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
    return environment.from_string(text("page.html.jinja")).render(
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}",
        style=Markup(style),
        script=Markup(script),
        **content,
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
