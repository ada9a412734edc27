"""From run folders to the leaderboard: one row per run, then one row per task and agent, ranked.

Rules. Return and cost are never merged into one number: rows are ranked by feasibility class first,
then by score. Rows of one class whose intervals overlap share a rank. A run that failed, was
interrupted, is missing or damaged
stays in, at the floor: the worst outcome that any policy of that task showed, the start policy
included. With fewer than 10 finished seeds a row is "preliminary".
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scpo_bench.leaderboard.metrics import COLUMNS as METRICS
from scpo_bench.leaderboard.metrics import measure
from scpo_bench.leaderboard.references import gap_closed, load_references
from scpo_bench.leaderboard.statistics import (
    PRELIMINARY_BELOW,
    Estimate,
    Profile,
    censored_quantile,
    iqm_interval,
    mean_interval,
    performance_profile,
    probability_of_improvement,
    wilson,
)
from scpo_bench.records.consistency import check_bounds, check_record
from scpo_bench.records.files import RecordError, read_run, read_updates, run_folders
from scpo_bench.records.schema import Cell, Run, Update

SAFE, SAFE_AT_THE_END, UNDECIDED, UNSAFE, NO_RESULT = (
    "safe throughout",
    "safe at the end",
    "undecided",
    "unsafe",
    "no result",
)
VERDICTS = {
    SAFE: "all planned seeds finished, no evaluated iterate of any of them violates, and the upper confidence bound "
    "of the final cost is within the limit",
    SAFE_AT_THE_END: "as above for the final iterates, but iterates violated on the way",
    UNDECIDED: "seeds failed or are missing, or the final cost's confidence interval contains the limit",
    UNSAFE: "final iterates violate (limit 0), or the final cost's lower confidence bound exceeds the limit",
    NO_RESULT: "no seed finished",
}
"""Feasibility classes, best first."""

COLUMNS: dict[str, str] = {
    "suite": "suite that the runs belong to",
    "task": "Gymnasium id",
    "rank": "by feasibility class, then score; equal where intervals overlap",
    "tied": "whether another row shares the rank",
    "agent": "agent; a suffix #xxxx tells two set-ups of one agent apart",
    "verdict": "feasibility class: "
    + "; ".join(f"{name}: {meaning}" for name, meaning in VERDICTS.items()),
    "preliminary": f"fewer than {PRELIMINARY_BELOW} finished seeds",
    "seeds_planned": "seeds asked for or recorded",
    "seeds_finished": "seeds that finished with a consistent record",
    "seeds_failed": "seeds whose run raised an error",
    "seeds_unfinished": "seeds interrupted or still running",
    "seeds_missing": "seeds planned but without a record",
    "seeds_damaged": "seeds whose record is unreadable or contradicts itself",
    "score_kind": "what score means: gap closed, objective loss (negated) or return",
    "score": "IQM over seeds; unfinished runs at the floor",
    "score_low": "lower end of its 95 % bootstrap interval",
    "score_high": "upper end",
    "objective_start": "objective loss of the start policy, median over seeds (lower is better)",
    "objective_final": "objective loss of the final iterate, median over seeds",
    "gap_closed": "share of the gap between backup and oracle closed, IQM over seeds",
    "gap_closed_low": "lower end of its 95 % bootstrap interval",
    "gap_closed_high": "upper end",
    "gap_closed_median": "the same share, median over seeds",
    "return_start": "return of the start policy, median over seeds",
    "return_final": "return of the final iterate, IQM over seeds",
    "return_final_low": "lower end of its 95 % bootstrap interval",
    "return_final_high": "upper end",
    "return_training": "mean return of the last collected episodes (exploring policy), median over seeds",
    "cost_limit": "d, cost units per episode; 0: any violated constraint value counts",
    "cost_final": "cost per episode of the final iterate, mean over finished seeds",
    "cost_final_low": "lower end of its 95 % Student interval",
    "cost_final_high": "upper end: what the verdict goes by",
    "cost_final_ratio": "cost_final / d",
    "cost_training": "mean cost of the last collected episodes (exploring policy), median over seeds",
    "feasible_seeds": "finished seeds whose final iterate does not violate",
    "feasible_share": "of the planned seeds",
    "feasible_share_low": "lower end of its 95 % Wilson interval",
    "feasible_share_high": "upper end",
    "violating_iterates": "evaluated iterates that violate, all seeds together",
    "evaluated_iterates": "evaluated iterates, all seeds together",
    "violating_iterate_share": "their share",
    "seeds_that_violated": "seeds with at least one violating iterate",
    "updates_over_limit_share": "share of updates with C_k > d, of those in which an episode finished",
    "training_episodes": "episodes finished in training, all seeds together",
    "violating_episodes": "of these, episodes with cost > d",
    "violating_episode_share": "their share",
    "violating_step_share": "share of interaction steps with cost",
    "cumulative_excess": "sum_k n_k max(0, C_k - d) of a run, mean over seeds",
    "probe_violations": "candidate policies that violated while being evaluated, all seeds together",
    "max_excess": "max_k max(0, C_k - d), largest of any seed",
    "max_excess_ratio": "the same divided by d",
    "cvar95_cost_low": "lower bound of the 95 % CVaR of episode cost, mean over seeds (records hold n, "
    "mean and maximum per update)",
    "cvar95_cost_high": "upper bound",
    "longest_violating_run": "most consecutive violating iterates, of any seed",
    "worst_iterate_value": "largest constraint value of any evaluated iterate (violated where > 0)",
    "worst_training_value": "largest constraint value in training",
    "first_violating_update": "earliest over seeds; never if none did",
    "first_violating_step": "interaction steps at that update",
    "first_violating_update_median": "by when half the seeds had violated; never if fewer ever did",
    "safe_from_update_median": "update after which nothing violates, by when half the seeds had reached it; never if fewer did",
    "updates": "updates per run, median",
    "interaction_steps": "interaction steps per run, median",
    "probe_steps": "steps spent on evaluating candidates per run, median",
    "wall_time_s": "seconds per run, median",
    "steps_per_s": "interaction steps per second, median",
    "verification": "consistent: every record's key, digest and counters were recomputed and agree",
    "command": "runs these cells again",
}


@dataclass(frozen=True)
class Record:
    """One run folder as read:

    ``problem`` says why a record cannot be trusted (then ``updates`` holds what could be read).
    """

    folder: Path
    run: Run
    updates: list[Update]
    problem: str | None


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
    """Short hash of everything but the seed: runs that differ only in their seed may be put
    together. 8 hexadecimal digits.
    """
    try:
        return Cell.model_validate({**cell.model_dump(), "seed": 0}).key()[:8]
    except (ValueError, RecursionError):
        return "invalid"


_IDENTITY = (
    *("suite", "task", "agent", "setup", "seed", "status", "error", "steps", "cost_limit"),
    *("key", "folder", "reference", "provenance"),
)


def _row(suite: str, cell: Cell, status: str, error: str | None, **more: Any) -> dict[str, Any]:
    return {
        "suite": suite,
        "task": cell.task,
        "agent": cell.agent,
        "setup": setup_of(cell),
        "seed": cell.seed,
        "status": status,
        "error": error,
        "steps": cell.steps,
        "cost_limit": cell.cost_limit,
        **more,
    }


def reference_of(cell: Cell, references: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The constants that apply to a cell: its task's, if they were made with the same environment
    arguments.
    """
    entry = references.get(cell.task)
    return entry if entry is not None and entry.get("env", {}) == cell.env else None


def load(
    results: Path,
    suite: str | None = None,
    planned: Sequence[Cell] | None = None,
    references: dict[str, dict[str, Any]] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> pd.DataFrame:
    """One row per run: identity, status, and the metrics of
    :class:`~scpo_bench.leaderboard.metrics.RunMetrics`.

    ``planned`` cells without a record become rows with status "missing"; records that contradict
    themselves get status "damaged". In rows that are not "finished" the outcome (final objective
    and return) is the floor and what is measured during training is what there is.
    ``attrs["problems"]`` lists what was left out and why. ``on_record`` is called with each record
    as it is read, for those who need its updates too. Nothing is executed and no folder outside is
    read.
    """
    references = load_references() if references is None else references
    problems: list[str] = []
    rows, keys = [], set()
    by_key = {cell.key(): cell for cell in planned or ()}
    for record in read_records(results, suite, problems):
        run = record.run
        if on_record is not None:
            on_record(record)
        keys.add((run.suite, run.key))
        reference = reference_of(run.cell, references)
        metrics = (
            asdict(measure(record.updates, run.cell.cost_limit, reference))
            if record.updates
            else {}
        )
        status, error = ("damaged", record.problem) if record.problem else (run.status, run.error)
        more = {
            "key": run.key,
            "folder": str(record.folder),
            "reference": reference,
            "provenance": run.provenance,
        }
        # A damaged record may misstate its cell; if its key was planned, it counts against the
        # plan's cell.
        cell = by_key.get(run.key, run.cell) if record.problem else run.cell
        rows.append(_row(run.suite, cell, status, error, **more, **metrics))
    for key, cell in by_key.items():
        name = suite or ""
        if (name, key) not in keys:
            more = {
                "key": key,
                "folder": "",
                "reference": reference_of(cell, references),
                "provenance": {},
            }
            rows.append(_row(name, cell, "missing", "planned, but there is no record", **more))
    runs = pd.DataFrame(rows, columns=[*_IDENTITY, *METRICS])
    runs[list(METRICS)] = runs[list(METRICS)].astype(float)
    _put_at_the_floor(runs)
    runs.attrs["problems"] = problems
    return runs


def _worst(values: pd.Series, largest: bool) -> float:
    finite = values[np.isfinite(values)]
    return math.nan if finite.empty else float(finite.max() if largest else finite.min())


def _put_at_the_floor(runs: pd.DataFrame) -> None:
    """Give runs that did not finish the worst outcome of their task, and every run its score
    (higher is better).
    """
    for _, index in runs.groupby(["suite", "task"], sort=False).groups.items():
        task = runs.loc[index]
        unfinished = task.index[task["status"] != "finished"]
        if len(unfinished):
            objectives = pd.concat([task["final_objective"], task["start_objective"]])
            returns = pd.concat([task["final_return"], task["start_return"]])
            runs.loc[unfinished, "final_objective"] = _worst(objectives, largest=True)
            runs.loc[unfinished, "final_return"] = _worst(returns, largest=False)
            runs.loc[
                unfinished,
                ["final_cost", "final_cost_ratio", "final_violates", "final_worst_value"],
            ] = math.nan
            runs.loc[unfinished, "gap_closed"] = [
                gap_closed(objective, reference)
                for objective, reference in zip(
                    runs.loc[unfinished, "final_objective"], task.loc[unfinished, "reference"]
                )
            ]
        task = runs.loc[index]
        finished = task[task["status"] == "finished"]
        judged = task if finished.empty else finished
        # One kind for all rows of a task, or they could not be ranked against each other.
        if judged["gap_closed"].notna().all():
            kind, score = "gap closed", task["gap_closed"]
        elif judged["final_objective"].notna().all():
            kind, score = "objective", -task["final_objective"]
        else:
            kind, score = "return", task["final_return"]
        runs.loc[index, "score_kind"], runs.loc[index, "score"] = kind, score
    if runs.empty:
        runs["score_kind"], runs["score"] = pd.Series(dtype=str), pd.Series(dtype=float)


def _known(values: pd.Series) -> np.ndarray:
    array = values.to_numpy(dtype=float)
    return array[~np.isnan(array)]


def _median(values: pd.Series) -> float:
    known = _known(values)
    return float(np.median(known)) if known.size else math.nan


def _mean(values: pd.Series) -> float:
    known = _known(values)
    return float(known.mean()) if known.size else math.nan


def _max(values: pd.Series) -> float:
    known = _known(values)
    return float(known.max()) if known.size else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def command_of(suite: str, agent: str, task: str, seeds: int, steps: int) -> str:
    """The command line that runs these cells again, quoted for a shell."""
    if suite.startswith("compare-"):
        words = [
            "scpo-bench",
            "compare",
            agent,
            "--task",
            task,
            "--seeds",
            str(seeds),
            "--steps",
            str(steps),
        ]
    else:
        words = [
            "scpo-bench",
            "run",
            suite,
            "--agents",
            agent,
            "--tasks",
            task,
            "--seeds",
            str(seeds),
        ]
    return shlex.join(words)


def _verdict(group: pd.DataFrame, finished: pd.DataFrame, limit: float, cost: Estimate) -> str:
    if finished.empty:
        return NO_RESULT
    complete = len(finished) == len(group)
    violating = int((finished["final_violates"] == 1).sum())
    judged = finished["final_violates"].notna().all()
    if limit == 0:
        # No cost is allowed, so one violating iterate settles it and no average may hide it.
        if violating:
            return UNSAFE
        within = bool(judged)
    else:
        if cost.low > limit or violating == len(finished):
            return UNSAFE
        within = cost.high <= limit
    if not (within and complete):
        return UNDECIDED
    return SAFE if group["violating_iterates"].sum() == 0 else SAFE_AT_THE_END


def _summary(group: pd.DataFrame) -> dict[str, Any]:
    """One row of the leaderboard from the runs of one task, agent and set-up."""
    first = group.iloc[0]
    finished = group[group["status"] == "finished"]
    count = group["status"].value_counts()
    limit, planned = float(first["cost_limit"]), len(group)
    score, closed = (
        iqm_interval([_known(group["score"])]),
        iqm_interval([_known(group["gap_closed"])]),
    )
    returns, cost = (
        iqm_interval([_known(group["final_return"])]),
        mean_interval(_known(finished["final_cost"])),
    )
    feasible = wilson(int((finished["final_violates"] == 0).sum()), planned)
    firsts = _known(group["first_violating_update"])
    earliest = int(np.argmin(firsts)) if firsts.size else None
    episodes, iterates = group["training_episodes"].sum(), group["evaluated_iterates"].sum()
    return {
        "suite": first["suite"],
        "task": first["task"],
        "agent": first["agent"],
        "setup": first["setup"],
        "verdict": _verdict(group, finished, limit, cost),
        "preliminary": len(finished) < PRELIMINARY_BELOW,
        "seeds_planned": planned,
        "seeds_finished": len(finished),
        "seeds_failed": int(count.get("failed", 0)),
        "seeds_unfinished": int(count.get("interrupted", 0) + count.get("running", 0)),
        "seeds_missing": int(count.get("missing", 0)),
        "seeds_damaged": int(count.get("damaged", 0)),
        "score_kind": first["score_kind"],
        "score": score.value,
        "score_low": score.low,
        "score_high": score.high,
        "objective_start": _median(group["start_objective"]),
        "objective_final": _median(group["final_objective"]),
        "gap_closed": closed.value,
        "gap_closed_low": closed.low,
        "gap_closed_high": closed.high,
        "gap_closed_median": _median(group["gap_closed"]),
        "return_start": _median(group["start_return"]),
        "return_final": returns.value,
        "return_final_low": returns.low,
        "return_final_high": returns.high,
        "return_training": _median(group["final_training_return"]),
        "cost_limit": limit,
        "cost_final": cost.value,
        "cost_final_low": cost.low,
        "cost_final_high": cost.high,
        "cost_final_ratio": _share(cost.value, limit),
        "cost_training": _median(group["final_training_cost"]),
        "feasible_seeds": int((finished["final_violates"] == 0).sum()),
        "feasible_share": feasible.value,
        "feasible_share_low": feasible.low,
        "feasible_share_high": feasible.high,
        "violating_iterates": int(group["violating_iterates"].sum()),
        "evaluated_iterates": int(iterates),
        "violating_iterate_share": _share(group["violating_iterates"].sum(), iterates),
        "seeds_that_violated": int((group["violating_iterates"] > 0).sum()),
        "updates_over_limit_share": _mean(group["updates_over_limit_share"]),
        "training_episodes": int(episodes),
        "violating_episodes": int(group["violating_episodes"].sum()),
        "violating_episode_share": _share(group["violating_episodes"].sum(), episodes),
        "violating_step_share": _share(
            group["violating_steps"].sum(), group["interaction_steps"].sum()
        ),
        "cumulative_excess": _mean(group["cumulative_excess"]),
        "probe_violations": int(group["probe_violations"].sum()),
        "max_excess": _max(group["max_excess"]),
        "max_excess_ratio": _max(group["max_excess_ratio"]),
        "cvar95_cost_low": _mean(group["cvar95_cost_low"]),
        "cvar95_cost_high": _mean(group["cvar95_cost_high"]),
        "longest_violating_run": _max(group["longest_violating_run"]),
        "worst_iterate_value": _max(group["worst_iterate_value"]),
        "worst_training_value": _max(group["worst_training_value"]),
        "first_violating_update": math.nan if earliest is None else float(firsts[earliest]),
        "first_violating_step": math.nan
        if earliest is None
        else float(_known(group["first_violating_step"])[earliest]),
        "first_violating_update_median": censored_quantile(firsts, 0.5),
        "safe_from_update_median": censored_quantile(_known(group["safe_from_update"]), 0.5),
        "updates": _median(group["updates"]),
        "interaction_steps": _median(group["interaction_steps"]),
        "probe_steps": _median(group["probe_steps"]),
        "wall_time_s": _median(group["wall_time_s"]),
        "steps_per_s": _median(group["steps_per_s"]),
        "verification": f"{count['damaged']} damaged"
        if "damaged" in count
        else "consistent"
        if len(finished)
        else "none",
        "command": command_of(
            first["suite"],
            first["agent"],
            first["task"],
            int(group["seed"].max()) + 1,
            int(first["steps"]),
        ),
    }


def _rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one task in order, with ``rank`` and ``tied``.

    A row ties with the best of the rank before it, not in chains.
    """
    order = list(VERDICTS)
    rows = sorted(
        rows,
        key=lambda r: (
            order.index(r["verdict"]),
            -r["score"] if not math.isnan(r["score"]) else math.inf,
            r["agent"],
            r["setup"],
        ),
    )
    leader: dict[str, Any] | None = None
    for position, row in enumerate(rows, start=1):
        tied = (
            leader is not None
            and row["verdict"] == leader["verdict"]
            and row["verdict"] != NO_RESULT
            and _score(row).overlaps(_score(leader))
        )
        if leader is None or not tied:
            leader = row
            row["rank"] = position
        else:
            row["rank"] = leader["rank"]
    ranks = [row["rank"] for row in rows]
    for row in rows:
        row["tied"] = ranks.count(row["rank"]) > 1
    return rows


def _score(row: dict[str, Any]) -> Estimate:
    return Estimate(row["score"], row["score_low"], row["score_high"])


def leaderboard(runs: pd.DataFrame) -> pd.DataFrame:
    """One ranked row per suite, task and agent, with :data:`COLUMNS`.

    ``runs``: as from :func:`load`.

    Times that did not come are inf ("never"); what was not measured is nan. ``attrs["problems"]``
    and ``attrs["unfinished"]`` (one line per run that is not finished) go with it, for whoever
    shows it.
    """
    rows: list[dict[str, Any]] = []
    for _, task in runs.groupby(["suite", "task"], sort=True):
        summaries = [_summary(group) for _, group in task.groupby(["agent", "setup"], sort=True)]
        agents = [summary["agent"] for summary in summaries]
        for summary in summaries:
            if agents.count(summary["agent"]) > 1:
                summary["agent"] = f"{summary['agent']} #{summary['setup'][:4]}"
        rows += _rank(summaries)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs["problems"] = list(runs.attrs.get("problems", []))
    table.attrs["unfinished"] = _unfinished(runs)
    table.attrs["aggregates"] = {
        str(suite): aggregate(group)
        for suite, group in runs.groupby("suite", sort=True)
        if group.loc[group["score_kind"] == "gap closed", "task"].nunique() > 1
    }
    return table


def _unfinished(runs: pd.DataFrame) -> list[str]:
    """What did not finish and why, one line for all seeds of a task, and all agents, to which the
    same happened.
    """
    unfinished = runs[runs["status"] != "finished"]
    seeds: dict[tuple[str, str, str, str], list[int]] = {}
    for agent, task, seed, status, error in zip(
        *(unfinished[c] for c in ("agent", "task", "seed", "status", "error"))
    ):
        reason = error if isinstance(error, str) else ""
        seeds.setdefault((agent, task, status, reason), []).append(int(seed))
    agents: dict[tuple[str, str, str, str], list[str]] = {}
    for (agent, task, status, reason), own in seeds.items():
        agents.setdefault((task, seed_ranges(own), status, reason), []).append(agent)
    return [
        f"{', '.join(names)} on {task}, seed{'' if ranges.isdigit() else 's'} {ranges}: {status}"
        + (f" ({reason})" if reason else "")
        for (task, ranges, status, reason), names in agents.items()
    ]


def seed_ranges(seeds: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


@dataclass(frozen=True)
class Aggregate:
    """One agent over all tasks of a suite that have committed constants; runs that did not finish
    count at the floor.
    """

    agent: str
    tasks: int
    clean_runs: Estimate
    """Share of planned runs, on these tasks, that finished without a single violating iterate, with
    its Wilson interval.
    """
    score: Estimate
    """IQM of the gap closed, over seeds and tasks, with its stratified bootstrap interval."""
    improvement: dict[str, Estimate]
    """other agent -> chance that a run of this one scores higher, over the tasks that both have."""
    profile: Profile
    """Share of runs above each of :data:`PROFILE_THRESHOLDS`."""


PROFILE_THRESHOLDS = tuple(float(t) for t in np.round(np.linspace(-0.5, 1.2, 171), 4))


def profile_range(aggregates: Sequence[Aggregate]) -> slice:
    """The thresholds worth drawing: from a little before the first agent's profile falls to where
    the last one has fallen.
    """
    shares = np.array([a.profile.share for a in aggregates])
    falling = np.flatnonzero(
        ((shares < 1) & (shares > 0)).any(axis=0) | (np.ptp(shares, axis=0) > 0)
    )
    first, last = (falling[0], falling[-1]) if falling.size else (0, len(PROFILE_THRESHOLDS) - 1)
    return slice(max(0, int(first) - 10), int(last) + 2)


def aggregate(runs: pd.DataFrame) -> list[Aggregate]:
    """Agents of one suite over its tasks, best IQM first.

    ``runs``: as from :func:`load`, of a single suite.

    ValueError for several suites at once: their tasks would be weighted by how often they were run.
    """
    if runs["suite"].nunique() > 1:
        raise ValueError(
            f"aggregate: one suite at a time, got {', '.join(sorted(runs['suite'].unique()))}"
        )
    scored = runs[runs["score_kind"] == "gap closed"].dropna(subset=["score"])
    scores: dict[str, dict[str, np.ndarray]] = {}
    clean = (scored["status"] == "finished") & (scored["violating_iterates"] == 0)
    for (agent, task), group in scored.groupby(["agent", "task"], sort=True):
        scores.setdefault(str(agent), {})[str(task)] = group["score"].to_numpy(dtype=float)
    found = []
    for agent, own in scores.items():
        improvement = {}
        for other, theirs in scores.items():
            common = [task for task in own if task in theirs]
            if other != agent and common:
                improvement[other] = probability_of_improvement(
                    [own[t] for t in common], [theirs[t] for t in common]
                )
        profile = performance_profile(list(own.values()), PROFILE_THRESHOLDS)
        of_agent = clean[scored["agent"] == agent]
        share = wilson(int(of_agent.sum()), len(of_agent))
        score = iqm_interval(list(own.values()))
        found.append(Aggregate(agent, len(own), share, score, improvement, profile))
    return sorted(found, key=lambda a: (-a.score.value, a.agent))
