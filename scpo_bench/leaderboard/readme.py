"""Keeps a leaderboard inside a Markdown file equal to what the records give.

``python -m scpo_bench.leaderboard.readme README.md results paper`` replaces the text between the
suite's two marker comments.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scpo_bench.leaderboard.render import render
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.records.files import write_atomically
from scpo_bench.suites.cells import cells, run_folder
from scpo_bench.suites.schema import PACKAGED_FILE, load_benchmarks


def markers(suite: str) -> tuple[str, str]:
    return (
        f"<!-- leaderboard {suite}: generated, do not edit -->",
        f"<!-- end of leaderboard {suite} -->",
    )


def generated(results: Path, suite: str) -> str:
    """The suite's leaderboard in Markdown, with its planned cells, as it should stand in the file.

    Tasks that nobody has run yet are named below the tables, instead of a table of missing runs
    each.
    """
    planned = cells(load_benchmarks(PACKAGED_FILE).suites[suite])
    begun = {
        cell.task for cell in planned if run_folder(results, suite, cell).parent.parent.is_dir()
    }
    table = render(
        leaderboard(load(results, suite, [cell for cell in planned if cell.task in begun])), "md"
    )
    # Headings below the file's own sections.
    lines = ["#" + line if line.startswith("##") else line for line in table.strip().splitlines()]
    left = [task for task in dict.fromkeys(cell.task for cell in planned) if task not in begun]
    return "\n".join([*lines, f"- no records yet: {', '.join(left)}"] if left else lines)


def current(text: str, suite: str) -> str:
    """What stands between the markers. ValueError if they are not there."""
    begin, end = markers(suite)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected the lines '{begin}' and '{end}' once each")
    return text.split(begin)[1].split(end)[0].strip()


def main() -> None:
    file, results, suite = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    text = file.read_text(encoding="utf-8")
    begin, end = markers(suite)
    old = current(text, suite)
    new = text.replace(
        f"{begin}\n\n{old}\n\n{end}" if old else f"{begin}\n{end}",
        f"{begin}\n\n{generated(results, suite)}\n\n{end}",
    )
    write_atomically(file, new.encode("utf-8"))


if __name__ == "__main__":
    main()
