"""From run folders to the leaderboard: one row per run, then one ranked row per task and agent.

A run that failed, was interrupted, is missing or damaged is not left out. It counts at the floor:
the worst outcome of any policy on its task, the start policies included.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from scpo_bench.leaderboard.aggregate import aggregate
from scpo_bench.leaderboard.columns import COLUMNS, Group
from scpo_bench.leaderboard.metrics import METRICS, measure
from scpo_bench.leaderboard.ranking import rank
from scpo_bench.leaderboard.references import gap_closed, load_references
from scpo_bench.records.comparable import Plan
from scpo_bench.records.consistency import (
    MAX_MAGNITUDE,
    check_bounds,
    check_record,
    misplaced,
)
from scpo_bench.records.files import RecordError, read_run, read_updates, run_folders
from scpo_bench.records.proof import read_proof
from scpo_bench.records.schema import Cell, Run, Update
from scpo_bench.records.study import Study, read_study
from scpo_bench.suites.registry import limits_of


@dataclass(frozen=True)
class Record:
    """One run folder as read."""

    folder: Path
    run: Run
    updates: list[Update]
    problem: str | None
    """Why the record cannot be trusted; ``updates`` then holds what could be read."""


def read_runs(
    results: Path, suite: str | None, problems: list[str] | None = None
) -> list[tuple[Path, Run]]:
    """(folder, run.json) of every record below ``results`` (of ``suite``), sorted by folder.

    An unreadable run.json, a second record of the same run, one that lies in the folder of another
    cell, and one of another suite are left out and named in ``problems``.
    """
    problems = [] if problems is None else problems
    root = results / suite if suite and (results / suite).is_dir() else results
    seen: dict[tuple[str, str], Path] = {}
    found = []
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
        if reason := check_bounds(run, []) or misplaced(run, folder.relative_to(root)):
            problems.append(f"left out: {folder}: {reason}")
        elif (first := seen.setdefault((run.suite, run.key), folder)) != folder:
            problems.append(f"left out: {folder}: the same run as {first}")
        else:
            found.append((folder, run))
    return found


def read_record(folder: Path, run: Run) -> Record:
    """The record in a folder whose run.json was read."""
    updates: list[Update] = []
    try:
        updates = read_updates(folder)
        if reason := check_bounds(run, updates):
            updates = []
            raise RecordError(f"{folder}: {reason}")
        findings = check_record(run, updates, limits_of(run.cell))
    except RecordError as error:
        # A run that failed before its first update has no lines to read; that is no damage.
        findings = [] if run.status != "finished" and not run.updates else [str(error)]
    return Record(folder, run, updates, findings[0] if findings else None)


def _comparable(
    runs: list[tuple[Path, Run]], planned: Sequence[Cell] | None, problems: list[str]
) -> list[tuple[Path, Run]]:
    """The runs that a table may hold; the others are named in ``problems``."""
    keys = {cell.key() for cell in planned or ()}
    plans: dict[str, Plan] = {}
    excluded: dict[tuple[str, str, str], list[int]] = {}
    found = []
    for folder, run in runs:
        if run.suite not in plans:
            own = (other.cell for _, other in runs if other.suite == run.suite)
            plans[run.suite] = Plan.of(planned) if planned else Plan.most_common(own)
        # A damaged record may misstate its cell; if its key was planned, it counts as that one.
        if run.key in keys or (reason := plans[run.suite].difference(run.cell)) is None:
            found.append((folder, run))
        else:
            excluded.setdefault((run.cell.agent, run.cell.task, reason), []).append(run.cell.seed)
    for (agent, task, reason), seeds in excluded.items():
        plural = "s" if len(seeds) > 1 else ""
        place = f"{agent} on {task}, seed{plural} {seed_ranges(seeds)}"
        problems.append(f"not comparable: {place}: {reason}")
    return found


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


MODIFIED = " with uncommitted changes"
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

    Runs that differ from the others of their task in more than agent and seed are left out, see
    :mod:`scpo_bench.records.comparable`. ``planned`` cells without a record become rows with status
    "missing", and so do planned seeds of other configurations and agents; records that contradict
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
    found = _comparable(read_runs(results, suite, problems), planned, problems)
    missing = {cell.key(): cell for cell in _expected(planned or (), [run for _, run in found])}

    def add(suite: str, cell: Cell, **more: Any) -> None:
        own = {name: getattr(cell, name) for name in _CELL}
        rows.append({"suite": suite, **own, "setup": setup_of(cell), **more})

    # Two seeds never give the same numbers; two configurations may.
    first_with: dict[tuple[str, str, str], tuple[Path, int]] = {}
    for folder, run in found:
        record = read_record(folder, run)
        if record.problem is None and run.digest is not None:
            first, seed = first_with.setdefault(
                (run.suite, run.cell.task, run.digest), (folder, run.cell.seed)
            )
            if seed != run.cell.seed:
                record = replace(record, problem=f"{folder}: the same updates as {first}")
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


def _expected(planned: Sequence[Cell], recorded: Sequence[Run]) -> Iterator[Cell]:
    """The planned cells, and every planned seed of the other set-ups that have a record."""
    yield from planned
    seeds = Plan.of(planned).seeds or {}
    keys = {run.key for run in recorded}
    own = {(cell.task, cell.agent, setup_of(cell)) for cell in planned}
    planned_keys = {cell.key() for cell in planned}
    others = {
        (run.cell.task, run.cell.agent, setup_of(run.cell)): run.cell
        for run in recorded
        if run.key not in planned_keys
    }
    for (task, agent, setup), cell in others.items():
        if setup == "invalid" or (task, agent, setup) in own:
            continue
        for seed in sorted(seeds.get(task, ())):
            expected = cell.model_copy(update={"seed": seed})
            if expected.key() not in keys:
                yield expected


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
        versions = [set(group.finished["provenance"].map(_versions)) for group in groups]
        usual = Counter(task.loc[task["status"] == "finished", "provenance"].map(_versions))
        common = max(usual, key=lambda text: (usual[text], text), default="")
        for row, used in zip(own, versions):
            row["other_versions"] = bool(used - {common}) or any(MODIFIED in text for text in used)
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


def _versions(provenance: dict[str, Any]) -> str:
    """Versions of packages and Python, and whether the source tree had changes, as one text."""
    own = {name: provenance.get(name) for name in ("versions", "python")}
    changed = str(provenance.get("commit", "")).endswith("+")
    return json.dumps(own, sort_keys=True) + MODIFIED * changed


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
