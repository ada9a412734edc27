"""Keeps the generated parts of Markdown files equal to what they are generated from.

``python -m scpo_bench.leaderboard.readme README.md results paper`` replaces the text between the
two marker comments of a suite by its leaderboard, with a task id behind it by that task's table
alone; ``python -m scpo_bench.leaderboard.readme docs/leaderboard.md`` writes the table of columns,
with ``docs/protocol.md agents`` that of the agents.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scpo_bench.leaderboard.columns import COLUMNS
from scpo_bench.leaderboard.render import markdown_table, render
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.records.files import write_atomically
from scpo_bench.suites import listing
from scpo_bench.suites.cells import cells, run_folder
from scpo_bench.suites.schema import PACKAGED_FILE, load_benchmarks


def markers(name: str) -> tuple[str, str]:
    return (
        f"<!-- leaderboard {name}: generated, do not edit -->",
        f"<!-- end of leaderboard {name} -->",
    )


def generated(results: Path, suite: str, task: str | None = None) -> str:
    """The leaderboard of a suite, or of one of its tasks, in Markdown, with its planned cells.

    Tasks without any record are named below the tables, instead of a table of missing runs each.
    """
    planned = cells(load_benchmarks(PACKAGED_FILE).suites[suite])
    begun = {
        cell.task for cell in planned if run_folder(results, suite, cell).parent.parent.is_dir()
    }
    runs = load(results, suite, [cell for cell in planned if cell.task in begun])
    if task:
        runs = runs[runs["task"] == task]
    table = render(leaderboard(runs), "md")
    # One level deeper: the headings belong to a section of the file.
    lines = ["#" + line if line.startswith("##") else line for line in table.strip().splitlines()]
    every = dict.fromkeys([task] if task else [cell.task for cell in planned])
    left = [task for task in every if task not in begun]
    return "\n".join([*lines, f"- no records yet: {', '.join(left)}"] if left else lines)


def column_table() -> str:
    """The columns of the leaderboard in Markdown."""
    rows = [[column.name, column.unit, column.words, column.meaning] for column in COLUMNS]
    return "\n".join(markdown_table(["Column", "Unit", "Heading", "Meaning"], [True] * 4, rows))


def agent_table() -> str:
    """The agents and what each of them sees of the constraints, in Markdown."""
    header, *rows = listing.agents()
    return "\n".join(markdown_table(list(header), [True] * len(header), list(map(list, rows))))


def current(text: str, name: str) -> str:
    """What stands between the markers. ValueError if they are not there."""
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected the lines '{begin}' and '{end}' once each")
    return text.split(begin)[1].split(end)[0].strip()


def main() -> None:
    file, *source = sys.argv[1:]
    name = " ".join(source[1:]) if source else "columns"
    if source == ["agents"]:
        name, new = "agents", agent_table()
    else:
        new = generated(Path(source[0]), *source[1:]) if source else column_table()
    text = Path(file).read_text(encoding="utf-8")
    begin, end = markers(name)
    current(text, name)
    before, after = text.split(begin)[0], text.split(end)[1]
    write_atomically(Path(file), f"{before}{begin}\n\n{new}\n\n{end}{after}".encode())


if __name__ == "__main__":
    main()
