"""Running recorded cells again, to see whether the record is reproduced."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scpo_bench.records.files import RecordError, read_run, run_folders
from scpo_bench.submissions.verify import compare


def reproduce(folder: Path, sample: int | None) -> Iterator[tuple[Path, list[str]]]:
    """(run folder, differences) for every finished run below ``folder``, or for ``sample`` of them;
    none: reproduced exactly.

    Runs the agents that the records name. RecordError if there is nothing to run, or ``folder`` is
    a packed bundle.
    """
    from scpo_bench.runs.harness import run_cell

    finished = [path for path in run_folders(folder) if read_run(path).status == "finished"]
    if not finished:
        raise RecordError(
            f"{folder}: no finished runs to run again (a packed bundle has to be unpacked first)"
        )
    if sample is not None and sample < len(finished):
        finished = sorted(random.sample(finished, sample))
    for path in finished:
        run = read_run(path)
        with tempfile.TemporaryDirectory() as scratch:
            again = Path(scratch) / "run"
            run_cell(run.cell, again, run.suite)
            yield path, compare(path, again)
