"""From run folders to the leaderboard: one row per run, then one ranked row per task and agent.

A run that failed, was interrupted, is missing or damaged is not left out. It counts at the floor:
the worst outcome of any policy on its task, the start policies included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scpo_bench.leaderboard.aggregate import aggregate
from scpo_bench.leaderboard.columns import COLUMNS, Group
from scpo_bench.leaderboard.metrics import METRICS, measure
from scpo_bench.leaderboard.ranking import rank
from scpo_bench.leaderboard.references import gap_closed, load_references
from scpo_bench.records.consistency import MAX_MAGNITUDE, check_bounds, check_record
from scpo_bench.records.files import RecordError, read_run, read_updates, run_folders
from scpo_bench.records.proof import read_proof
from scpo_bench.records.schema import Cell, Run, Update
from scpo_bench.records.study import Study, read_study


@dataclass(frozen=True)
class Record:
    """One run folder as read."""

    folder: Path
    run: Run
    updates: list[Update]
    problem: str | None
    """Why the record cannot be trusted; ``updates`` then holds what could be read."""


def read_records(
    results: Path, suite: str | None, problems: list[str] | None = None
) -> Iterator[Record]:
    """Every record below ``results`` (of ``suite``), one at a time, in the order of their folders.

    An unreadable run.json, a second record of the same run, and a record of another suite are left
    out and named in ``problems``.
    """
    problems = [] if problems is None else problems
    root = results / suite if suite and (results / suite).is_dir() else results
    seen: dict[tuple[str, str], Path] = {}
    for folder in run_folders(root):
        try:
            run = read_run(folder)
        except RecordError as error:
            problems.append(f"left out: {error}")
            continue
        if suite is not None and run.suite != suite:
            if root != results:
                problems.append(
                    f"left out: {folder}: a record of suite {run.suite!r}, not {suite!r}"
                )
            continue
        first = seen.setdefault((run.suite, run.key), folder)
        if first != folder:
            problems.append(f"left out: {folder}: the same run as {first}")
            continue
        if reason := check_bounds(run, []):
            problems.append(f"left out: {folder}: {reason}")
            continue
        updates: list[Update] = []
        try:
            updates = read_updates(folder)
            if reason := check_bounds(run, updates):
                updates = []
                raise RecordError(f"{folder}: {reason}")
            findings = check_record(run, updates)
        except RecordError as error:
            # A run that failed before its first update has no lines to read; that is no damage.
            findings = [] if run.status != "finished" and not run.updates else [str(error)]
        yield Record(folder, run, updates, findings[0] if findings else None)


def setup_of(cell: Cell) -> str:
    """Hash of everything but the seed: only runs with the same one are summarised together.

    8 hexadecimal digits.
    """
    try:
        return Cell.model_validate({**cell.model_dump(), "seed": 0}).key()[:8]
    except (ValueError, RecursionError):
        return "invalid"


def reference_of(cell: Cell, references: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The constants of the cell's task, if they hold for its environment arguments."""
    entry = references.get(cell.task)
    return entry if entry is not None and entry.get("env", {}) == cell.env else None


_CELL = ("task", "agent", "seed", "steps", "budget", "cost_limit", "margin")
# Of proof.json, where a run has one that belongs to its record.
_PROOF = ("proved_policies", "examined_policies")
# Of tuning.json, where it says how the configuration of a run was found.
_STUDY = "tuning_trials"
_IDENTITY = (
    *("suite", *_CELL, "told_limit", "setup", "key", "status", "error"),
    *("reference", "provenance"),
)


def load(
    results: Path,
    suite: str | None = None,
    planned: Sequence[Cell] | None = None,
    references: dict[str, dict[str, Any]] | None = None,
    on_record: Callable[[Record], None] | None = None,
    claims: bool = True,
) -> pd.DataFrame:
    """One row per run: identity, status, and :class:`~scpo_bench.leaderboard.metrics.RunMetrics`.

    ``planned`` cells without a record become rows with status "missing"; records that contradict
    themselves get status "damaged". In rows that are not "finished" the outcome (final objective
    and return) is the floor, and what is measured during training is what there is.
    ``attrs["problems"]`` lists what was left out and why. ``on_record`` is called with each record
    as it is read. claims: read what ``scpo-bench prove`` and ``tune`` left beside the records, too.
    Nothing is executed and nothing outside of the folder is read.
    """
    references = load_references() if references is None else references
    problems: list[str] = []
    rows = []
    studies: dict[Path, Study | None] = {}
    missing = {cell.key(): cell for cell in planned or ()}

    def add(suite: str, cell: Cell, **more: Any) -> None:
        own = {name: getattr(cell, name) for name in _CELL}
        rows.append({"suite": suite, **own, "setup": setup_of(cell), **more})

    for record in read_records(results, suite, problems):
        run = record.run
        if on_record is not None:
            on_record(record)
        # A damaged record may misstate its cell; if its key was planned, the plan's cell holds.
        cell = missing.pop(run.key, run.cell)
        reference = reference_of(run.cell, references)
        measured = record.updates and measure(record.updates, run.cell.cost_limit, reference)
        add(
            run.suite,
            cell if record.problem else run.cell,
            key=run.key,
            status="damaged" if record.problem else run.status,
            error=record.problem or run.error,
            reference=reference,
            provenance=run.provenance,
            **_told(run),
            **(_proved(record, problems) if claims else {}),
            **({_STUDY: _tuned(record, studies, problems)} if claims else {}),
            **(asdict(measured) if measured else {}),
        )
    for key, cell in missing.items():
        add(
            suite or "",
            cell,
            key=key,
            status="missing",
            error="planned, but there is no record",
            reference=reference_of(cell, references),
            provenance={},
            told_limit=math.nan,
        )
    measured_columns = [*_PROOF, _STUDY, *METRICS]
    runs = pd.DataFrame(rows, columns=[*_IDENTITY, *measured_columns])
    runs[measured_columns] = runs[measured_columns].astype(float)
    runs["score_kind"], runs["score"] = pd.Series(dtype=str), pd.Series(dtype=float)
    for _, index in runs.groupby(["suite", "task"], sort=False).groups.items():
        task = runs.loc[index].copy()
        _put_at_the_floor(task)
        _score(task)
        runs.loc[index] = task
    runs.attrs["problems"] = problems
    return runs


def _tuned(record: Record, studies: dict[Path, Study | None], problems: list[str]) -> float:
    """The trials of the study that found the run's configuration; nan if there is none."""
    folder = record.folder.parent
    if folder not in studies:
        studies[folder] = None
        try:
            studies[folder] = read_study(folder)
        except RecordError as error:
            problems.append(f"ignored: {error}")
    study = studies[folder]
    return len(study.trials) if study and study.found(record.run.cell) else math.nan


def _told(run: Run) -> dict[str, float]:
    """The limit that the agent was told, nan where it takes none, and the margin it worked with."""
    resolved = run.resolved_config
    margin = _number(resolved.get("margin"))
    return {
        "told_limit": _number(resolved.get("cost_limit")),
        "margin": run.cell.margin if math.isnan(margin) else margin,
    }


def _number(value: Any) -> float:
    """A value of a configuration as a number; nan for what is none."""
    known = isinstance(value, int | float) and abs(value) <= MAX_MAGNITUDE
    return float(value) if known else math.nan


def _proved(record: Record, problems: list[str]) -> dict[str, int]:
    """The run's entries of ``_PROOF``. A proof that does not belong to it is named and ignored."""
    if record.problem or record.run.status != "finished":
        return {}
    try:
        proof = read_proof(record.folder, record.run)
    except RecordError as error:
        problems.append(f"ignored: {error}")
        return {}
    if proof is None:
        return {}
    return {"proved_policies": proof.proved, "examined_policies": proof.distinct}


def _put_at_the_floor(task: pd.DataFrame) -> None:
    """Give the runs of one task that did not finish the worst outcome of any policy on it."""
    unfinished = task["status"] != "finished"
    if not unfinished.any():
        return
    worst = float(task[["final_objective", "start_objective"]].max().max())
    task.loc[unfinished, "final_objective"] = worst
    task.loc[unfinished, "final_return"] = task[["final_return", "start_return"]].min().min()
    task.loc[unfinished, ["final_cost", "final_violates"]] = math.nan
    closed = task["reference"].map(lambda reference: gap_closed(worst, reference))
    task["gap_closed"] = task["gap_closed"].mask(unfinished, closed)


def _score(task: pd.DataFrame) -> None:
    """Give every run of one task its score, higher is better, of the same kind for all."""
    finished = task[task["status"] == "finished"]
    judged = task if finished.empty else finished
    if judged["gap_closed"].notna().all():
        task["score_kind"], task["score"] = "gap closed", task["gap_closed"]
    elif judged["final_objective"].notna().all():
        task["score_kind"], task["score"] = "objective", -task["final_objective"]
    else:
        task["score_kind"], task["score"] = "return", task["final_return"]


def leaderboard(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per suite, task, agent and set-up, ranked, with the raw values of :data:`COLUMNS`.

    runs: as from :func:`load`. A time that was not reached is inf ("never"), what was not measured
    is nan. ``attrs`` holds what goes with the rows: "problems", "unfinished" (one line per run that
    did not finish) and "aggregates" (suite -> agents over all tasks).
    """
    rows: list[dict[str, Any]] = []
    for _, task in runs.groupby(["suite", "task"], sort=True):
        groups = [Group(group) for _, group in task.groupby(["agent", "setup"], sort=True)]
        own = [{c.name: c.compute(group) for c in COLUMNS if c.compute} for group in groups]
        agents = [row["agent"] for row in own]
        for row in own:
            if agents.count(row["agent"]) > 1:
                row["agent"] = f"{row['agent']} #{row['setup'][:4]}"
        rows += rank(own)
    table = pd.DataFrame(rows, columns=[column.name for column in COLUMNS])
    table.attrs["problems"] = list(runs.attrs.get("problems", []))
    table.attrs["unfinished"] = _unfinished(runs)
    table.attrs["aggregates"] = {
        str(suite): aggregate(group)
        for suite, group in runs.groupby("suite", sort=True)
        if group.loc[group["score_kind"] == "gap closed", "task"].nunique() > 1
    }
    return table


def _unfinished(runs: pd.DataFrame) -> list[str]:
    """What did not finish and why: one line for all seeds and agents with the same outcome."""
    what = ["task", "status", "error"]
    unfinished = runs[runs["status"] != "finished"].fillna({"error": ""})
    seeds = unfinished.groupby([*what, "agent"], sort=False)["seed"].agg(seed_ranges)
    agents = seeds.reset_index("agent").groupby([*what, "seed"], sort=False)["agent"].agg(", ".join)
    lines = []
    for row in agents.reset_index().to_dict("records"):
        plural = "" if row["seed"].isdigit() else "s"
        line = f"{row['agent']} on {row['task']}, seed{plural} {row['seed']}: {row['status']}"
        lines.append(f"{line} ({row['error']})" if row["error"] else line)
    return lines


def seed_ranges(seeds: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
