"""Times the leaderboard of many runs.

``python tests/performance/leaderboard_scale.py [--runs 200] [--updates 300]``.

Writes synthetic records into a temporary folder, then times each output in a fresh process, so that
imports and peak memory count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from synthetic_records import GOAL, IMITATION, REGRESSION, write_suite

STEPS = {
    "table, md, csv, json": """
from rich.console import Console
from scpo_bench.leaderboard.tables import leaderboard, load
from scpo_bench.leaderboard.render import print_table, render
table = leaderboard(load(Path(root), "s"))
print_table(table, Console(file=open("/dev/null", "w"), width=120), title="s")
size = sum(len(render(table, name)) for name in ("md", "latex", "csv", "json"))
""",
    "html": """
from scpo_bench.leaderboard.page import render_page
size = len(render_page(Path(root), "s"))
""",
    "verify": """
from scpo_bench.submissions.verify import verify
report = verify(Path(root))
assert report.ok, report
size = report.runs
""",
    "bundle": """
from scpo_bench.submissions.bundle import bundle
size = bundle(Path(root), "s", Path(root).parent / "b.tar.gz").stat().st_size
""",
    "plot": """
from scpo_bench.leaderboard.plots import plot_suite
size = len(plot_suite(Path(root), "s", Path(root).parent / "plots"))
""",
}
MEASURE = """
import resource, sys
from pathlib import Path
root = sys.argv[1]
{step}
usage = resource.getrusage(resource.RUSAGE_SELF)
print(size, usage.ru_maxrss // 1024, usage.ru_utime + usage.ru_stime)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--updates", type=int, default=300)
    arguments = parser.parse_args()
    tasks, agents = (IMITATION, REGRESSION, GOAL), ("scpo", "sgd", "ppo", "cpo", "cvpo")
    seeds = max(1, round(arguments.runs / (len(tasks) * len(agents))))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "results"
        cells = write_suite(root, "s", tasks, agents, seeds, arguments.updates)
        stored = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        print(f"{len(cells)} runs x {arguments.updates} updates, {stored / 1e6:.1f} MB on disk")
        for name, step in STEPS.items():
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", MEASURE.format(step=step), str(root)],
                check=True,
                capture_output=True,
                text=True,
            )
            size, memory_mb, cpu_s = done.stdout.split()
            wall_s = time.perf_counter() - began
            print(
                f"{name:22s} {wall_s:6.1f} s ({float(cpu_s):5.1f} s of it on a core)  "
                f"{memory_mb:>5s} MB peak  (size {size})"
            )


if __name__ == "__main__":
    main()
