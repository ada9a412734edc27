"""Shows a leaderboard: as a terminal table, Markdown, LaTeX, CSV or JSON.

Terminal, Markdown and LaTeX show the headline columns, one table per task; CSV and JSON hold every
column. What was not measured is "–" (empty in CSV, null in JSON); a time that did not come is
"never" everywhere. Names and messages come
from records, which are untrusted: every format escapes them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from scpo_bench.leaderboard.statistics import PRELIMINARY_BELOW, Estimate
from scpo_bench.leaderboard.tables import (
    COLUMNS,
    NO_RESULT,
    SAFE,
    SAFE_AT_THE_END,
    UNDECIDED,
    UNSAFE,
    VERDICTS,
    Aggregate,
)

Row = dict[str, Any]
NEVER_COLUMNS = frozenset(
    name for name in COLUMNS if name.startswith(("first_violating_", "safe_from_"))
)
_UNKNOWN = "–"
_STYLES = {
    SAFE: "green",
    SAFE_AT_THE_END: "yellow",
    UNDECIDED: "yellow",
    UNSAFE: "red",
    NO_RESULT: "dim",
}


def printable(text: object, limit: int = 600) -> str:
    """``text`` on one line, without control characters: a record's text must not steer a terminal
    or break a row.
    """
    shown = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[:limit]
    )
    return shown + "..." * (len(str(text)) > limit)


def number(value: float, digits: int = 3) -> str:
    """Few significant digits; "never" for inf, "–" for nan."""
    if math.isnan(value):
        return _UNKNOWN
    if math.isinf(value):
        return "never"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if 10.0**digits <= abs(value) < 1e6:
        return f"{value:.0f}"  # 1056 is easier to read than 1.06e+03
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share as a percentage that says 0 only for none and 100 only for all."""
    if math.isnan(share):
        return _UNKNOWN
    shown = 100 * share
    if 0 < shown < 0.1:
        return "<0.1"
    if 99.9 < shown < 100:
        return ">99.9"
    return f"{shown:.1f}" if 0 < abs(shown) < 10 or 99 < shown < 100 else f"{shown:.0f}"


def count(value: float) -> str:
    """A large count in three digits: 1.25M."""
    if math.isnan(value):
        return _UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _interval(text: str, low: float, high: float, show: Callable[[float], str]) -> str:
    return text if math.isnan(low) or math.isnan(high) else f"{text} [{show(low)}, {show(high)}]"


def _rank(row: Row) -> str:
    return _UNKNOWN if row["verdict"] == NO_RESULT else f"{row['rank']}{'=' if row['tied'] else ''}"


def _seeds(row: Row) -> str:
    return f"{row['seeds_finished']}/{row['seeds_planned']}"


def _from_to(row: Row, name: str) -> str:
    # Where nothing finished there is only the floor, which is no result of this agent's.
    final = math.nan if row["verdict"] == NO_RESULT else row[f"{name}_final"]
    return f"{number(row[f'{name}_start'])} → {number(final)}"


def _objective(row: Row) -> str:
    return _from_to(row, "objective")


def _gap(row: Row) -> str:
    shown = percent(math.nan if row["verdict"] == NO_RESULT else row["gap_closed"])
    return (
        _interval(shown, row["gap_closed_low"], row["gap_closed_high"], percent)
        if shown != _UNKNOWN
        else shown
    )


def _short_return(row: Row) -> str:
    return _from_to(row, "return")


def _return(row: Row) -> str:
    if row["verdict"] == NO_RESULT:
        return _short_return(row)
    return _interval(_short_return(row), row["return_final_low"], row["return_final_high"], number)


def _cost(row: Row) -> str:
    # Costs are not negative, Student's interval does not know.
    return _interval(
        number(row["cost_final"]), max(0.0, row["cost_final_low"]), row["cost_final_high"], number
    )


def _percent(share: float) -> str:
    return _UNKNOWN if math.isnan(share) else f"{percent(share)}%"


def _iterates(row: Row) -> str:
    total = row["evaluated_iterates"]
    return (
        f"{row['violating_iterates']}/{total} {_percent(row['violating_iterate_share'])}"
        if total
        else _UNKNOWN
    )


def _verdict(row: Row) -> str:
    return f"{row['verdict']}{' (preliminary)' if row['preliminary'] else ''}"


def _short_verdict(row: Row) -> str:
    """On two lines where it has two words; † for preliminary."""
    first, _, rest = str(row["verdict"]).partition(" ")
    return f"{first}{chr(10) if rest else ''}{rest}{' †' if row['preliminary'] else ''}"


@dataclass(frozen=True)
class Headline:
    """One shown column: its heading (in lines), how a row's cell reads, and how it reads where
    there is little room.
    """

    heading: str
    cell: Callable[[Row], str]
    left: bool = False
    short: Callable[[Row], str] | None = None

    @property
    def words(self) -> str:
        return self.heading.replace("\n", " ")


_FIRST = (
    Headline("#", _rank),
    Headline("agent", lambda r: printable(r["agent"]), left=True),
    Headline("seeds", _seeds),
)
_VIOLATIONS = (
    Headline("violating\niterates", _iterates),
    Headline("seeds\nthat\nviolate", lambda r: f"{r['seeds_that_violated']}/{r['seeds_planned']}"),
    Headline("first\nat\nupdate", lambda r: number(r["first_violating_update"])),
)
_LAST = (
    Headline("episodes\nviolating", lambda r: _percent(r["violating_episode_share"])),
    Headline("probe\nsteps", lambda r: count(r["probe_steps"])),
    Headline("verdict", _verdict, left=True, short=_short_verdict),
)
_SIGNED = (
    *_FIRST,
    Headline("objective\nstart → final", _objective),
    Headline("% of gap\nclosed", _gap),
    *_VIOLATIONS,
    Headline("worst\nvalue", lambda r: number(r["worst_iterate_value"])),
    *_LAST,
)
_LIMITED = (
    *_FIRST,
    Headline("return\nstart → final", _return, short=_short_return),
    Headline("final cost", _cost),
    *_VIOLATIONS,
    Headline("updates\nover\nlimit", lambda r: _percent(r["updates_over_limit_share"])),
    *_LAST,
)


def headline(rows: list[Row]) -> tuple[Headline, ...]:
    """The columns to show for a task: by objective and constraint value where it has them, else by
    return and cost.
    """
    measured = any(not math.isnan(row["objective_final"]) for row in rows)
    return _SIGNED if measured else _LIMITED


def tasks(table: pd.DataFrame) -> Iterator[tuple[str, str, list[Row]]]:
    """(suite, task, rows in order) of a leaderboard."""
    for (suite, task), group in table.groupby(["suite", "task"], sort=False):
        yield (
            str(suite),
            str(task),
            [{str(k): v for k, v in row.items()} for row in group.to_dict("records")],
        )


def _limit(rows: list[Row]) -> str:
    limits = sorted({row["cost_limit"] for row in rows})
    if limits == [0]:
        return "limit 0: any violated constraint value counts"
    return f"cost limit {', '.join(number(limit) for limit in limits)} per episode"


def notes(table: pd.DataFrame) -> list[str]:
    """What a reader must know beside the numbers, one line each, as plain text."""
    found = []
    if table["preliminary"].any():
        found.append(
            f"preliminary: fewer than {PRELIMINARY_BELOW} finished seeds; intervals are too narrow"
        )
    if table["tied"].any():
        found.append("=: a tie, the 95 % intervals overlap")
    present = [verdict for verdict in VERDICTS if (table["verdict"] == verdict).any()]
    found += [f"{verdict}: {VERDICTS[verdict]}" for verdict in present]
    found += [f"at the floor: {line}" for line in table.attrs.get("unfinished", [])]
    found += list(table.attrs.get("problems", []))
    return [printable(line) for line in found]


def _aggregate_rows(aggregates: list[Aggregate]) -> tuple[list[str], list[list[str]]]:
    """(headings, cells): score over all tasks, and the chance to beat each other agent."""

    def estimate(e: Estimate) -> str:
        return (
            _interval(percent(e.value), e.low, e.high, percent)
            if not math.isnan(e.value)
            else _UNKNOWN
        )

    names = [a.agent for a in aggregates]
    headings = ["agent", "tasks", "% runs without\nviolation", "% of gap closed\n(IQM)"]
    headings += [f"% chance to beat\n{printable(name)}" for name in names]
    rows = [
        [printable(a.agent), str(a.tasks), estimate(a.clean_runs), estimate(a.score)]
        + [estimate(a.improvement[name]) if name in a.improvement else _UNKNOWN for name in names]
        for a in aggregates
    ]
    return headings, rows


_AGGREGATE_TITLE = "All tasks with committed constants"


def render(table: pd.DataFrame, format: str, title: str = "") -> str:
    """A leaderboard as "md", "latex", "csv" or "json" text, ending in a newline.

    ValueError for another format.
    """
    writers = {"md": _markdown, "latex": _latex, "csv": _csv, "json": _json}
    if format not in writers:
        raise ValueError(f"format: expected one of {', '.join(writers)}, got {format!r}")
    return writers[format](table, title)


def _terminal_table(title: Text, headings: list[tuple[str, bool]], rows: list[list[Text]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title=title, title_justify="left")
    for heading, left in headings:
        shown.add_column(
            Text(heading), justify="left" if left else "right", vertical="top", overflow="fold"
        )
    for row in rows:
        shown.add_row(*row)
    return shown


def print_table(table: pd.DataFrame, console: Console, title: str = "") -> None:
    """A leaderboard on a terminal, headline columns only; readable in 120 columns."""
    parts: list[Any] = []
    for suite, task, rows in tasks(table):
        columns = headline(rows)
        name = Text(printable(task), style="bold").append(f"  {_limit(rows)}", style="not bold dim")
        if title != suite:
            name.append(f"  suite {printable(suite)}", style="not bold dim")
        cells = [[Text((column.short or column.cell)(row)) for column in columns] for row in rows]
        for row, line in zip(rows, cells):
            line[-1].stylize(_STYLES[row["verdict"]])
        parts.append(_terminal_table(name, [(c.heading, c.left) for c in columns], cells))
    for suite, aggregates in table.attrs.get("aggregates", {}).items():
        headings, lines = _aggregate_rows(aggregates)
        name = Text(_AGGREGATE_TITLE, style="bold").append(
            f"  suite {printable(suite)}", style="not bold dim"
        )
        numbered = [(heading, i == 0) for i, heading in enumerate(headings)]
        parts.append(
            _terminal_table(name, numbered, [[Text(cell) for cell in line] for line in lines])
        )
    for note in notes(table):
        text = Text(f"† {note}" if note.startswith("preliminary") else note)
        text.stylize("red" if note.startswith(("at the floor", "left out")) else "dim")
        parts.append(text)
    if title:
        console.rule(Text(printable(title), style="bold"), align="left")
    console.print(Group(*parts), highlight=False, markup=False)


def _markdown_text(text: str) -> str:
    """Text that Markdown and the HTML in it leave alone."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#~!" else c for c in text)


def _markdown_table(headings: list[str], lefts: list[bool], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_markdown_text, headings)) + " |"]
    lines.append("|" + "|".join(":---" if left else "---:" for left in lefts) + "|")
    return lines + ["| " + " | ".join(map(_markdown_text, row)) + " |" for row in rows]


def _markdown(table: pd.DataFrame, title: str) -> str:
    lines = [f"## {_markdown_text(printable(title))}", ""] if title else []
    for suite, task, rows in tasks(table):
        columns = headline(rows)
        where = "" if suite == title else f", suite {_markdown_text(printable(suite))}"
        lines += [
            f"### {_markdown_text(printable(task))}",
            "",
            f"{_limit(rows).capitalize()}{where}.",
            "",
        ]
        cells = [[column.cell(row) for column in columns] for row in rows]
        lines += [
            *_markdown_table([c.words for c in columns], [c.left for c in columns], cells),
            "",
        ]
    for suite, aggregates in table.attrs.get("aggregates", {}).items():
        headings, cells = _aggregate_rows(aggregates)
        lines += [f"### {_AGGREGATE_TITLE}, suite {_markdown_text(printable(suite))}", ""]
        headings = [heading.replace("\n", " ") for heading in headings]
        lines += [*_markdown_table(headings, [i == 0 for i in range(len(headings))], cells), ""]
    lines += [f"- {_markdown_text(note)}" for note in notes(table)]
    return "\n".join(lines).rstrip() + "\n"


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "→": r"$\to$",
        "–": "--",
        "†": r"\textdagger{}",
        "[": "{[}",
        "]": "{]}",
    },
}


def _latex_text(text: str) -> str:
    """Escaped; a hyphen before a number, not within a word, becomes a minus sign."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", "".join(_LATEX.get(c, c) for c in text))


def _latex_heading(text: str) -> str:
    lines = [_latex_text(line) for line in text.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack{" + r" \\ ".join(lines) + "}"


def _latex_table(
    caption: str, headings: list[str], lefts: list[bool], rows: list[list[str]]
) -> list[str]:
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex_text(caption)}}}"]
    lines += [
        rf"\begin{{tabular}}{{{''.join('l' if left else 'r' for left in lefts)}}}",
        r"\toprule",
    ]
    lines += [" & ".join(map(_latex_heading, headings)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_latex_text, row)) + r" \\" for row in rows]
    return [*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]


def _latex(table: pd.DataFrame, title: str) -> str:
    """Tables for ``booktabs``; notes as comments, since what to say of them is the paper's
    business.
    """
    lines = ["% needs \\usepackage{booktabs}"]
    for suite, task, rows in tasks(table):
        columns = headline(rows)
        caption = f"{printable(task)} (suite {printable(suite)}; {_limit(rows)})."
        cells = [[column.cell(row) for column in columns] for row in rows]
        lines += _latex_table(
            caption, [c.heading for c in columns], [c.left for c in columns], cells
        )
    for suite, aggregates in table.attrs.get("aggregates", {}).items():
        headings, cells = _aggregate_rows(aggregates)
        caption = f"{_AGGREGATE_TITLE} (suite {printable(suite)})."
        lines += _latex_table(caption, headings, [i == 0 for i in range(len(headings))], cells)
    lines += [f"% {note}" for note in notes(table)]
    return "\n".join(lines) + "\n"


def _plain(name: str, value: Any) -> Any:
    """A JSON value: None for what was not measured, "never" for a time that did not come."""
    if isinstance(value, float) or (hasattr(value, "dtype") and value.dtype.kind == "f"):
        value = float(value)
        if math.isnan(value):
            return None
        if math.isinf(value):
            return "never" if name in NEVER_COLUMNS else None
        return value
    return value.item() if hasattr(value, "item") else value


def plain_rows(table: pd.DataFrame) -> list[Row]:
    """The rows of a leaderboard as JSON values, every column."""
    return [{str(k): _plain(str(k), v) for k, v in row.items()} for row in table.to_dict("records")]


def _csv_cell(value: Any) -> Any:
    # A spreadsheet would run a text that begins like a formula.
    if isinstance(value, str):
        value = printable(value)
        return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value
    return "" if value is None else value


def _csv(table: pd.DataFrame, title: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in plain_rows(table):
        writer.writerow([_csv_cell(row[name]) for name in COLUMNS])
    return file.getvalue()


def _plain_estimate(e: Estimate) -> dict[str, float | None]:
    return {
        name: _plain("", value)
        for name, value in (("value", e.value), ("low", e.low), ("high", e.high))
    }


def plain_aggregates(table: pd.DataFrame) -> dict[str, list[Row]]:
    """suite -> aggregates as JSON values."""
    return {
        suite: [
            {
                "agent": a.agent,
                "tasks": a.tasks,
                "clean_runs": _plain_estimate(a.clean_runs),
                "score": _plain_estimate(a.score),
                "improvement": {other: _plain_estimate(e) for other, e in a.improvement.items()},
                "profile": {
                    name: [_plain("", value) for value in values]
                    for name, values in asdict(a.profile).items()
                },
            }
            for a in aggregates
        ]
        for suite, aggregates in table.attrs.get("aggregates", {}).items()
    }


def _json(table: pd.DataFrame, title: str) -> str:
    content = {
        "title": title,
        "columns": COLUMNS,
        "rows": plain_rows(table),
        "aggregates": plain_aggregates(table),
        "notes": notes(table),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
