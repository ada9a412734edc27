"""The leaderboard as text: terminal table, Markdown, LaTeX, CSV and JSON.

Terminal, Markdown and LaTeX show one table per task, with the columns that have a heading, and one
of aggregates per suite. CSV and JSON hold the raw value of every column, and beside them the text
of the cells that tables show: in CSV as columns ``NAME_text``, in JSON under ``text`` of each row.
There, what was not measured is empty or null, and a time that was not reached is "never". Names and
messages come from records, which are untrusted: :mod:`scpo_bench.leaderboard.escaping` has one
function per format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from scpo_bench.errors import UserError, nearest, printable
from scpo_bench.leaderboard import escaping
from scpo_bench.leaderboard.aggregate import aggregate_cells
from scpo_bench.leaderboard.columns import COLUMNS, Row, cell_text, shown
from scpo_bench.leaderboard.ranking import VERDICTS
from scpo_bench.leaderboard.statistics import PRELIMINARY_BELOW
from scpo_bench.leaderboard.text import count, number

_LEFT_OUT = ("at the floor", "left out", "not comparable")
_STYLES = dict(zip(VERDICTS, ("green", "yellow", "yellow", "red", "dim")))


@dataclass(frozen=True)
class Section:
    """One table as plain text: the agents of a task, or the aggregates of a suite."""

    title: str
    caption: str
    headings: list[str]
    """May have several lines."""
    left: list[bool]
    """Which columns are aligned to the left."""
    cells: list[list[str]]


def sections(table: pd.DataFrame, title: str = "") -> list[Section]:
    """The tables of a leaderboard. Each names its suite where that is not the title of them all."""
    found = []
    for suite, task, rows in tasks(table):
        columns = shown(rows)
        caption = conditions(rows) + ("" if suite == title else f", suite {printable(suite)}")
        found.append(
            Section(
                printable(task),
                caption,
                [column.heading for column in columns],
                [column.left for column in columns],
                [[cell_text(column, row) for column in columns] for row in rows],
            )
        )
    for suite, aggregates in table.attrs.get("aggregates", {}).items():
        headings, cells = aggregate_cells(aggregates)
        name = f"All tasks with committed constants, suite {printable(suite)}"
        left = [True] + [False] * (len(headings) - 1)
        found.append(Section(name, "", headings, left, cells))
    return found


def tasks(table: pd.DataFrame) -> Iterator[tuple[str, str, list[Row]]]:
    """(suite, task, rows in order) of a leaderboard."""
    for (suite, task), group in table.groupby(["suite", "task"], sort=False):
        yield str(suite), str(task), _rows(group)


def _rows(table: pd.DataFrame) -> list[Row]:
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def conditions(rows: Sequence[Row]) -> str:
    """What counts as a violation in these rows of one task, and the budget of steps."""
    found = sorted({row["cost_limit"] for row in rows})
    limit = f"cost limit {', '.join(map(number, found))} per episode"
    if found == [0]:
        limit = "limit 0: any violated constraint value counts"
    budgets = dict.fromkeys((row["steps"], row["budget"]) for row in rows)
    steps = ", ".join(f"{count(steps)} {_BUDGETS[budget]}" for steps, budget in budgets)
    return f"{limit}; {steps} per run"


_BUDGETS = {"interaction": "interaction steps", "total": "interaction and probe steps"}


def notes(table: pd.DataFrame) -> list[str]:
    """What a reader must know besides the numbers, one line each, as plain text."""
    found = []
    if table["preliminary"].any():
        found.append(
            f"†: preliminary, fewer than {PRELIMINARY_BELOW} finished seeds; "
            "the intervals are too narrow"
        )
    if table["other_versions"].any():
        found.append(
            "‡: package versions that most runs of the table do not have, or a source tree with "
            "uncommitted changes"
        )
    if table["tied"].any():
        found.append("=: a tie, the 95 % intervals overlap")
    present = [verdict for verdict in VERDICTS if (table["verdict"] == verdict).any()]
    found += [f"{verdict}: {VERDICTS[verdict]}" for verdict in present]
    found += [f"at the floor: {line}" for line in table.attrs.get("unfinished", [])]
    found += list(table.attrs.get("problems", []))
    return [printable(line) for line in found]


def render(table: pd.DataFrame, format: str, title: str = "") -> str:
    """A leaderboard as "md", "latex", "csv" or "json" text, ending in a newline."""
    writers = {"md": _markdown, "latex": _latex, "csv": _csv, "json": _json}
    if format not in writers:
        raise UserError(f"format: unknown format {format!r}{nearest(format, writers)}")
    return writers[format](table, title)


# Terminal.


def print_table(table: pd.DataFrame, console: Console, title: str = "") -> None:
    """A leaderboard on a terminal, readable in 120 columns."""
    parts: list[Table | Text] = []
    # "safe / throughout †" on two lines leaves the numbers enough room to stand on one.
    verdict_width = 12 if table["preliminary"].any() else 10
    for section in sections(table, title):
        name = Text(section.title, "bold").append(f"  {section.caption}", "not bold dim")
        grid = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title=name, title_justify="left"
        )
        for heading, left in zip(section.headings, section.left):
            grid.add_column(
                Text(heading),
                justify="left" if left else "right",
                overflow="fold",
                max_width=verdict_width if heading == "verdict" else None,
            )
        for row in section.cells:
            grid.add_row(*(Text(cell, _STYLES.get(cell.removesuffix(" †"), "")) for cell in row))
        parts.append(grid)
    for note in notes(table):
        parts.append(Text(note, "red" if note.startswith(_LEFT_OUT) else "dim"))
    if title:
        console.rule(Text(printable(title), style="bold"), align="left")
    console.print(Group(*parts), highlight=False, markup=False)


# Markdown and LaTeX.


def markdown_table(headings: list[str], left: list[bool], cells: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(map(escaping.markdown, row))} |" for row in (headings, *cells)]
    return [lines[0], "|" + "|".join(":---" if one else "---:" for one in left) + "|", *lines[1:]]


def _markdown(table: pd.DataFrame, title: str) -> str:
    lines = [f"## {escaping.markdown(title)}", ""] if title else []
    for section in sections(table, title):
        lines += [f"### {escaping.markdown(section.title)}", ""]
        if section.caption:
            lines += [f"{escaping.markdown(section.caption.capitalize())}.", ""]
        lines += [*markdown_table(section.headings, section.left, section.cells), ""]
    lines += [f"- {escaping.markdown(note)}" for note in notes(table)]
    return "\n".join(lines).rstrip() + "\n"


def _latex(table: pd.DataFrame, title: str) -> str:
    """Tables for ``booktabs``; notes as comments, since what to say of them is up to the paper."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escaping.latex, cells)) + r" \\"

    lines = ["% needs \\usepackage{booktabs}"]
    for section in sections(table):
        caption = f"{section.title} ({section.caption})" if section.caption else section.title
        columns = "".join("l" if left else "r" for left in section.left)
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{escaping.latex(caption)}.}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(section.headings)]
        lines += [r"\midrule", *map(line, section.cells)]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    lines += [escaping.latex_comment(note) for note in notes(table)]
    return "\n".join(lines) + "\n"


# CSV and JSON.


def _plain(value: Any) -> Any:
    """JSON values: None for what was not measured, "never" for a time that was not reached."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return "never" if math.isinf(value) else None
    return value


def plain_rows(table: pd.DataFrame) -> list[Row]:
    """The rows of a leaderboard as JSON values, every column."""
    return [_plain(row) for row in _rows(table)]


def _texts(row: Row) -> dict[str, str]:
    return {column.name: cell_text(column, row) for column in COLUMNS if column.heading}


def _csv(table: pd.DataFrame, title: str) -> str:
    names = [c.name for c in COLUMNS] + [f"{c.name}_text" for c in COLUMNS if c.heading]
    # Only these can hold text from a record. Numbers may begin with a minus sign.
    escaped = {name for c in COLUMNS if c.left for name in (c.name, f"{c.name}_text")}
    rows = []
    for raw, row in zip(plain_rows(table), _rows(table)):
        cells = raw | {f"{name}_text": text for name, text in _texts(row).items()}
        rows.append({n: escaping.csv(cells[n]) if n in escaped else cells[n] for n in names})
    return str(pd.DataFrame(rows, columns=names, dtype=object).to_csv(index=False))


def _json(table: pd.DataFrame, title: str) -> str:
    content = {
        "title": title,
        "columns": {
            c.name: {"heading": c.words, "unit": c.unit, "meaning": c.meaning} for c in COLUMNS
        },
        "rows": [{**raw, "text": _texts(row)} for raw, row in zip(plain_rows(table), _rows(table))],
        "aggregates": {
            suite: [_plain(asdict(aggregate)) for aggregate in aggregates]
            for suite, aggregates in table.attrs.get("aggregates", {}).items()
        },
        "notes": notes(table),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
