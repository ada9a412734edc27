"""The leaderboard as text: every format tells the same, nothing is hidden, nothing is executed."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table
from synthetic_records import (
    GOAL,
    IMITATION,
    REFERENCES,
    synthetic_cell,
    synthetic_updates,
    write_mixed_suite,
    write_record,
)

from scpo_bench.errors import UserError, printable
from scpo_bench.leaderboard.columns import COLUMNS, cell_text, command_of, shown
from scpo_bench.leaderboard.readme import column_table, current
from scpo_bench.leaderboard.render import print_table, render, tasks
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.leaderboard.text import count, interval, number, percent

NAMES = [column.name for column in COLUMNS]
FORMATS = ("md", "latex", "csv", "json")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Three tasks, three agents, three seeds; an sgd run failed, one is missing, cpo never ran."""
    results = tmp_path_factory.mktemp("results")
    planned = [*write_mixed_suite(results), synthetic_cell("cpo", IMITATION, 0, 30)]
    return leaderboard(load(results, "synthetic", planned, REFERENCES))


def text_table(table: pd.DataFrame, width: int = 120) -> str:
    file = io.StringIO()
    print_table(table, Console(file=file, width=width, force_terminal=False), title="synthetic")
    return file.getvalue()


def test_every_format_shows_every_row_and_what_is_missing(table):
    """A failed or missing seed, and too few seeds, are visible whatever the format."""
    texts = {format: render(table, format, "synthetic") for format in FORMATS}
    texts["table"] = text_table(table)
    for format, text in texts.items():
        for agent in ("scpo", "sgd", "ppo"):
            assert agent in text, format
        assert "never" in text, format
        assert "preliminary" in text, format
        assert "3/5" in text, format
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    failed = next(r for r in rows if r["task"] == IMITATION and r["agent"] == "sgd")
    assert (failed["seeds_failed"], failed["seeds_missing"], failed["preliminary"]) == (
        "1",
        "1",
        "True",
    )
    content = json.loads(texts["json"])
    assert any("seed 3: failed" in note for note in content["notes"])
    assert any("seed 4: missing" in note for note in content["notes"])


def test_terminal_table_fits_120_columns(table):
    """No line is wider, and no row needs more than the two lines of its verdict."""
    lines = text_table(table).splitlines()
    assert max(map(len, lines)) <= 120
    start = next(i for i, line in enumerate(lines) if " scpo " in line)
    assert "throughout †" in lines[start + 1]
    assert " ppo " in lines[start + 2]


def test_csv_and_json_hold_every_column(table):
    """The raw values, also of columns that tables do not show, must be in the files."""
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert list(rows[0])[: len(NAMES)] == NAMES
    content = json.loads(render(table, "json"))
    assert list(content["columns"]) == NAMES
    assert all(list(row) == [*NAMES, "text"] for row in content["rows"])
    assert content["rows"][0]["objective_final"] is None
    for row, raw in zip(rows, content["rows"], strict=True):
        assert row["gap_closed"] == ("" if raw["gap_closed"] is None else str(raw["gap_closed"]))
        assert row["seeds_that_violated"] == str(raw["seeds_that_violated"])


class Capture(Console):
    """A console that keeps the tables printed to it."""

    tables: list[Table]

    def print(self, *objects: Any, **options: Any) -> None:
        (group,) = objects
        self.tables = [part for part in group.renderables if isinstance(part, Table)]


def markdown_cells(text: str) -> list[list[list[str]]]:
    """Tables, rows and cells of a Markdown text, as a reader sees them."""
    return [
        [line[2:-2].split(" | ") for line in block.splitlines()[2:]]
        for block in html.unescape(text.replace("\\", "")).split("\n\n")
        if block.startswith("| ")
    ]


def test_a_cell_reads_the_same_everywhere(table):
    """A reader who compares README (Markdown), terminal, CSV and JSON finds one text per cell.

    README.md is this Markdown, as tests/test_documents.py checks.
    """
    console = Capture(file=io.StringIO())
    print_table(table, console)
    markdown = markdown_cells(render(table, "md"))
    files = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    texts = [row["text"] for row in json.loads(render(table, "json"))["rows"]]
    seen: list[list[str]] = []
    for (_, _, rows), in_markdown, in_terminal in zip(tasks(table), markdown, console.tables):
        columns = shown(rows)
        grid = zip(*([str(cell) for cell in column.cells] for column in in_terminal.columns))
        for row, printed, marked in zip(rows, grid, in_markdown, strict=True):
            cells = [cell_text(column, row) for column in columns]
            assert list(printed) == marked == cells
            assert [files[len(seen)][f"{column.name}_text"] for column in columns] == cells
            assert [texts[len(seen)][column.name] for column in columns] == cells
            seen.append(cells)
    assert len(seen) == len(table)
    # Cells of several kinds were among them.
    assert {"never", "3/5", "unsafe †", "–"} <= {cell for cells in seen for cell in cells}
    assert any("→" in cell and "[" in cell for cells in seen for cell in cells)


def test_tasks_show_what_they_are_ranked_by(table):
    """Tasks with an objective show it, the others return and cost; both in one table show all."""
    by_task = {task: rows for _, task, rows in tasks(table)}
    with_objective, with_return = by_task[IMITATION], by_task[GOAL]
    signed = {"objective_final", "gap_closed", "worst_iterate_value"}
    limited = {"return_final", "cost_final", "updates_over_limit_share"}

    def names(rows: list[dict[str, Any]]) -> set[str]:
        return {column.name for column in shown(rows)} & (signed | limited)

    assert names(with_objective) == signed
    assert names(with_return) == limited
    assert names([*with_objective, *with_return]) == signed | limited


def test_documented_columns_are_the_columns():
    """docs/leaderboard.md is generated: `make leaderboard` gives this text."""
    text = (Path(__file__).parent.parent / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert current(text, "columns") == column_table()
    assert all(column.meaning for column in COLUMNS)
    assert len(set(NAMES)) == len(NAMES)


def test_rendering_is_repeatable(table):
    """The committed leaderboard is compared with its records: same table, same text."""
    for format in FORMATS:
        assert render(table, format) == render(table.copy(), format)
    with pytest.raises(UserError, match="'markdwn'; known: md, latex"):
        render(table, "markdwn")


HOSTILE = "<script>alert(1)</script>|[red]&_$%#{}\\~^`*\x1b[31m\r\n=cmd()"


def test_text_from_records_is_escaped(tmp_path):
    """A name can neither break a row, nor style a terminal, nor run in a spreadsheet or browser."""
    name = HOSTILE.replace("\x1b", "").replace("\r\n", "")
    cell = synthetic_cell("=1+1", IMITATION, 0, 2)
    write_record(tmp_path, "s", cell, synthetic_updates(cell, 2))
    bad = synthetic_cell(name, IMITATION, 0, 2)
    write_record(tmp_path, "s", bad, synthetic_updates(bad, 2)[:1], status="failed", error=HOSTILE)
    table = leaderboard(load(tmp_path, "s", None, REFERENCES))
    markdown = render(table, "md")
    assert "<script" not in markdown
    body = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in body} == {14}
    latex = render(table, "latex")
    assert "\\$\\%\\#\\{\\}" in latex
    assert "alert(1)\\textless" in latex
    (row,) = (r for r in csv.DictReader(io.StringIO(render(table, "csv"))) if "1+1" in r["agent"])
    assert row["agent"] == row["agent_text"] == "'=1+1"
    assert row["return_final"].startswith("-")  # a number, not a formula
    assert row["return_final_text"].startswith("-")
    shown = text_table(table)
    assert "\x1b" not in shown
    assert "[red]" in shown


def read(format: Any, *values: float) -> list[str]:
    return [format(value) for value in values]


def test_numbers_read_well():
    """0 % means none and 100 % all; huge and tiny numbers stay short; rounding adds no digits."""
    assert read(percent, 0, 1e-9, 0.004, 0.5) == ["0", "<0.1", "0.4", "50"]
    assert read(percent, 0.9999, 1, 1.25, -0.5) == [">99.9", "100", "125", "-50"]
    assert read(percent, math.nan, -1e-9, 0.9951) == ["–", ">-0.1", "99.5"]
    assert read(number, 3.0, 0.12345, 1e-7, -2.5) == ["3", "0.123", "1e-07", "-2.5"]
    assert read(number, math.inf, math.nan) == ["never", "–"]
    assert read(number, 1056.4, 999.7, 1e6) == ["1056", "1000", "1e+06"]
    assert read(count, 0, 999, 1500, 2.5e6, 3e9) == ["0", "999", "1.5k", "2.5M", "3G"]
    assert read(count, 999_999, math.nan, math.inf) == ["1M", "–", "never"]
    assert interval(2.0, 1.5, 2.5) == "2 [1.5, 2.5]"
    assert interval(2.0, math.nan, math.nan) == "2"
    assert interval(math.nan, 1.0, 2.0) == "–"
    assert printable("a\x00b" + "c" * 700).startswith("a\N{REPLACEMENT CHARACTER}bcc")
    assert len(printable("c" * 700)) == 603


def test_commands_are_quoted(table):
    """The command of a row repeats its runs; text from a record cannot add a second command."""
    row = table[(table["task"] == IMITATION) & (table["agent"] == "sgd")].iloc[0]
    assert row["command"] == f"scpo-bench run synthetic --agents sgd --tasks {IMITATION} --seeds 5"
    hostile = command_of("s", "x; rm -rf ~", "t", 1, 1)
    assert hostile == "scpo-bench run s --agents 'x; rm -rf ~' --tasks t --seeds 1"
    compared = command_of("compare-t", "a", "t", 3, 70)
    assert compared == "scpo-bench compare a --task t --seeds 3 --steps 70"
