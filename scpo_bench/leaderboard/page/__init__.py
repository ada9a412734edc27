"""The leaderboard as one HTML file: no other file, no network, and nothing in it that a record
could make run.

What records say reaches the page only as JSON in a block that browsers do not execute, and the
script writes it into text nodes only. A content security policy allows exactly this page's own
style and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scpo_bench.leaderboard.curves import RunCurves, band, robust_range, share
from scpo_bench.leaderboard.page.assets import BODY, SCRIPT, STYLE
from scpo_bench.leaderboard.references import load_references
from scpo_bench.leaderboard.render import (
    headline,
    notes,
    plain_aggregates,
    plain_rows,
    printable,
    tasks,
)
from scpo_bench.leaderboard.tables import (
    COLUMNS,
    VERDICTS,
    Aggregate,
    Record,
    leaderboard,
    load,
    profile_range,
    reference_of,
    setup_of,
)
from scpo_bench.records.schema import Cell

MAX_POINTS = 400
"""Points per curve; longer ones are thinned, violations never away."""
_RUN_FIELDS = (
    *(
        "seed",
        "status",
        "error",
        "updates",
        "violating_iterates",
        "evaluated_iterates",
        "first_violating_update",
    ),
    *(
        "final_objective",
        "final_return",
        "final_cost",
        "worst_iterate_value",
        "interaction_steps",
        "probe_steps",
        "wall_time_s",
    ),
)
Groups = dict[str, list[RunCurves]]
Panel = dict[str, Any]


def render_page(
    results: Path,
    suite: str | None = None,
    planned: Sequence[Cell] | None = None,
    title: str = "",
    references: dict[str, dict[str, Any]] | None = None,
) -> str:
    """The page of a suite's records (or of all of them): table, curves per update, certificates,
    Pareto fronts, provenance.

    Arguments as for :func:`scpo_bench.leaderboard.tables.load`. The same records give the same
    text.
    """
    references = load_references() if references is None else references
    curves: dict[tuple[str, str], list[RunCurves]] = {}

    def keep(record: Record) -> None:
        if record.updates and record.problem is None:
            run = RunCurves.of(record.run.cell, record.run.status, record.updates)
            curves.setdefault((record.run.suite, record.run.cell.task), []).append(run)

    runs = load(results, suite, planned, references, keep)
    table = leaderboard(runs)
    content = {
        "title": title or suite or "leaderboard",
        "columns": COLUMNS,
        "verdicts": list(VERDICTS),
        "agents": sorted({str(a) for a in table["agent"]}, key=lambda name: (name != "scpo", name)),
        "rows": [
            {**row, **cells} for row, cells in zip(plain_rows(table), _row_details(table, runs))
        ],
        "figures": _figures(curves, table, references),
        "aggregates": plain_aggregates(table),
        "profiles": {suite: _profile(found) for suite, found in table.attrs["aggregates"].items()},
        "notes": notes(table),
    }
    return _assemble(str(content["title"]), content)


def _assemble(title: str, content: dict[str, Any]) -> str:
    policy = f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(printable(title))} · "
        f"scpo-bench</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{BODY}\n"
        f'<script type="application/json" id="data">{embedded_json(content)}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded_json(content: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element or open another.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Rows.


def _row_details(table: pd.DataFrame, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Per row of the table: its cells as the other formats show them, its runs, and where these
    were made.
    """
    details = []
    labels = dict(zip(runs.index, _labels(runs)))
    for _, _, rows in tasks(table):
        columns = headline(rows)
        for row in rows:
            own = runs[
                [labels[i] == (row["suite"], row["task"], row["agent"]) for i in runs.index]
            ].sort_values("seed")
            details.append(
                {
                    "headline": [[column.words, column.cell(row)] for column in columns],
                    "runs": [
                        {name: _plain(run[name]) for name in _RUN_FIELDS}
                        for run in own.to_dict("records")
                    ],
                    "provenance": _provenance(own),
                }
            )
    return details


def _labels(runs: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(suite, task, agent as the table names it) of each run."""
    if runs.empty:
        return []
    several = runs.groupby(["suite", "task", "agent"])["setup"].transform("nunique") > 1
    return [
        (suite, task, f"{agent} #{setup[:4]}" if many else agent)
        for suite, task, agent, setup, many in zip(
            runs["suite"], runs["task"], runs["agent"], runs["setup"], several
        )
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        return "never" if math.isinf(value) else _rounded(value)
    return int(value)


def _provenance(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """What the runs say about where they were made: one entry per distinct answer, with the seeds
    that gave it.
    """
    found: dict[str, dict[str, Any]] = {}
    for seed, status, provenance in zip(runs["seed"], runs["status"], runs["provenance"]):
        if status == "missing":
            continue
        items = _flat(provenance)
        entry = found.setdefault(json.dumps(items), {"seeds": [], "items": items})
        entry["seeds"].append(int(seed))
    return list(found.values())


def _flat(provenance: dict[str, Any]) -> list[list[str]]:
    """[name, value] pairs, as text; bounded, since anything may stand in a record."""
    items: list[list[str]] = []
    for name, value in list(provenance.items())[:40]:
        inner = list(value.items())[:40] if isinstance(value, dict) else [("", value)]
        for key, entry in inner:
            items.append(
                [
                    printable(f"{name} {key}".strip(), 80),
                    "–" if entry is None else printable(entry, 120),
                ]
            )
    return items


# Figures.


def _figures(
    curves: dict[tuple[str, str], list[RunCurves]],
    table: pd.DataFrame,
    references: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Per suite and task the panels to draw. curves: (suite, task) -> its runs."""
    figures = []
    for name, task, rows in tasks(table):
        runs = curves.get((name, task), [])
        groups = {
            row["agent"]: [run for run in runs if _belongs(run, row["agent"], rows)] for row in rows
        }
        groups = {agent: own for agent, own in groups.items() if own}
        panels = _panels(groups, references) if groups else []
        certificates = [
            entry
            for agent, own in groups.items()
            if (entry := _certificate(agent, own)) is not None
        ]
        pareto = _pareto(rows)
        figures.append(
            {
                "suite": name,
                "task": task,
                "panels": panels,
                "certificates": certificates,
                "pareto": pareto,
            }
        )
    return figures


def _belongs(run: RunCurves, label: str, rows: list[dict[str, Any]]) -> bool:
    several = all(row["agent"] != run.cell.agent for row in rows)
    return label == (f"{run.cell.agent} #{setup_of(run.cell)[:4]}" if several else run.cell.agent)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _list(values: np.ndarray) -> list[float | None]:
    return [_rounded(float(value)) for value in values]


def _band_line(name: str, curves: list[np.ndarray]) -> dict[str, Any] | None:
    updates, low, middle, high = band(curves)
    if not updates.size:
        return None
    kept = np.arange(0, updates.size, math.ceil(updates.size / MAX_POINTS))
    return {"name": name} | {
        key: _list(values[kept])
        for key, values in (("x", updates), ("low", low), ("y", middle), ("high", high))
    }


def _share_line(name: str, curves: list[np.ndarray]) -> dict[str, Any] | None:
    updates, shares = share(curves)
    if not updates.size:
        return None
    begins = np.arange(0, updates.size, math.ceil(updates.size / MAX_POINTS))
    # The largest of each stretch: thinning must not hide a violation.
    return {
        "name": name,
        "x": _list(updates[begins]),
        "y": _list(100 * np.maximum.reduceat(shares, begins)),
        "steps": True,
    }


def _panel(title: str, lines: list[dict[str, Any] | None], **more: Any) -> Panel:
    drawn = [line for line in lines if line is not None]
    always = [value for _, value in more.get("marks", [])]
    values = [
        np.array([v for v in line[key] if v is not None])
        for line in drawn
        for key in ("low", "y", "high")
        if key in line
    ]
    shown = robust_range(values, always)
    low, high, largest = shown if shown is not None else (0.0, 1.0, None)
    return {
        "title": title,
        "lines": drawn,
        "low": _rounded(low),
        "high": _rounded(high),
        "largest": largest,
        **more,
    }


def _profile(aggregates: list[Aggregate]) -> Panel:
    """The performance profile over all tasks of a suite, in percent."""
    drawn = profile_range(aggregates)
    lines = [
        {"name": a.agent}
        | {
            key: _list(100 * np.array(values[drawn]))
            for key, values in (
                ("x", a.profile.thresholds),
                ("y", a.profile.share),
                ("low", a.profile.low),
                ("high", a.profile.high),
            )
        }
        for a in aggregates
    ]
    title = "Performance profile: share of runs that close more of the gap, %"
    return {
        "title": title,
        "lines": lines,
        "low": 0.0,
        "high": 100.0,
        "x_title": "more than this % of the gap closed",
    }


def _panels(groups: Groups, references: dict[str, dict[str, Any]]) -> list[Panel]:
    cells = [run.cell for runs in groups.values() for run in runs]
    limit = max(cell.cost_limit for cell in cells)

    def measured(name: str) -> bool:
        return any(not np.isnan(run.series[name]).all() for runs in groups.values() for run in runs)

    def lines(name: str) -> list[dict[str, Any] | None]:
        return [
            _band_line(agent, [run.series[name] for run in runs]) for agent, runs in groups.items()
        ]

    panels = []
    if measured("iterate_objective"):
        reference = reference_of(cells[0], references)
        marks = (
            [[name, float(reference[name])] for name in ("backup", "oracle")]
            if reference is not None
            else []
        )
        panels.append(
            _panel(
                "Objective loss of the iterate (lower is better)",
                lines("iterate_objective"),
                marks=marks,
            )
        )
    else:
        panels.append(_panel("Return of the iterate (higher is better)", lines("iterate_return")))
    if measured("iterate_worst_constraint_value"):
        title, name, boundary = (
            "Worst constraint value of the iterate (violated above 0)",
            "iterate_worst_constraint_value",
            0.0,
        )
        panels.append(_panel(title, lines(name), marks=[["limit", boundary]], boundary=boundary))
    else:
        marks = [[f"limit {limit:g}", limit]]
        panels.append(
            _panel(
                "Cost per episode of the iterate",
                lines("iterate_cost"),
                marks=marks,
                boundary=limit,
            )
        )
    violating = [
        _share_line(agent, [r.series["iterate_violates"] for r in runs])
        for agent, runs in groups.items()
    ]
    panels.append(
        {
            **_panel("Share of seeds whose iterate violates, %", violating),
            "low": 0.0,
            "high": 100.0,
            "largest": None,
        }
    )
    return panels


def _certificate(agent: str, runs: list[RunCurves]) -> dict[str, Any] | None:
    """Bound and realised value per constraint, of an agent that records them."""
    constraints = next((run.constraints() for run in runs if run.constraints()), None)
    if constraints is None:
        return None
    runs = [run for run in runs if run.constraints() == constraints]
    panels = []
    for name in constraints[:12]:
        bounds = [run.diagnostics[f"bound/{name}"] for run in runs]
        realised = [run.diagnostics[f"realised/{name}"] for run in runs]
        breaches = sum(int((r > b).sum()) for r, b in zip(realised, bounds))
        lines = [_band_line("certified bound", bounds), _band_line("realised", realised)]
        title = f"Constraint “{printable(name, 60)}”: {breaches or 'none'} above the bound"
        panels.append(_panel(title, lines, marks=[["limit", 0.0]], boundary=0.0))
    return {"agent": agent, "seeds": len(runs), "panels": panels}


def _pareto(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Score against violation, kept apart as two axes; the front holds the agents that no other
    beats in both.
    """
    signed = all(row["cost_limit"] == 0 for row in rows)
    x_name = "violating_iterate_share" if signed else "cost_final"
    points = [row for row in rows if math.isfinite(row[x_name]) and math.isfinite(row["score"])]

    def beaten(row: dict[str, Any]) -> bool:
        return any(
            other[x_name] <= row[x_name]
            and other["score"] >= row["score"]
            and (other[x_name], other["score"]) != (row[x_name], row["score"])
            for other in points
        )

    scale = 100.0 if signed else 1.0
    kind = rows[0]["score_kind"]
    y_scale = 100.0 if kind == "gap closed" else 1.0
    y_titles = {"gap closed": "gap closed, %", "objective": "− objective loss", "return": "return"}
    return {
        "x_title": "iterates that violate, %" if signed else "final cost per episode",
        "y_title": y_titles.get(kind, "score"),
        "limit": None if signed else rows[0]["cost_limit"],
        "points": [
            {
                "name": row["agent"],
                "x": _rounded(scale * row[x_name]),
                "y": _rounded(y_scale * row["score"]),
                "low": _rounded(y_scale * row["score_low"]),
                "high": _rounded(y_scale * row["score_high"]),
                "front": not beaten(row),
            }
            for row in points
        ],
    }
