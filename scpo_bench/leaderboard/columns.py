"""The columns of the leaderboard, each one entry of :data:`COLUMNS`.

An entry says what a column is called and means, how it is computed from the runs of one task, agent
and set-up, and how it is shown. Every format, the page and docs/leaderboard.md are loops over these
entries; the text of a cell comes from :func:`cell_text` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from scpo_bench.errors import printable
from scpo_bench.leaderboard import cells, escaping
from scpo_bench.leaderboard.cells import Row
from scpo_bench.leaderboard.ranking import VERDICTS, verdict_of
from scpo_bench.leaderboard.statistics import (
    PRELIMINARY_BELOW,
    censored_quantile,
    iqm_interval,
    mean_interval,
    wilson,
)
from scpo_bench.leaderboard.text import count, number, share


class Group:
    """The runs of one task, agent and set-up, one per planned seed, and estimates from them."""

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = runs
        self.first = runs.iloc[0]
        self.finished = runs[runs["status"] == "finished"]
        self.limit = float(self.first["cost_limit"])
        self.score = iqm_interval([runs["score"].dropna()])
        self.gap_closed = iqm_interval([runs["gap_closed"].dropna()])
        self.return_final = iqm_interval([runs["final_return"].dropna()])
        self.cost_final = mean_interval(self.finished["final_cost"].dropna())
        self.feasible_seeds = int((self.finished["final_violates"] == 0).sum())
        self.feasible_share = wilson(self.feasible_seeds, len(runs))


@dataclass(frozen=True)
class Column:
    """One column of the leaderboard."""

    name: str
    unit: str
    """Of the raw value. It decides how the value reads where ``show`` does not."""
    meaning: str
    compute: Callable[[Group], Any] | None
    """None: filled in by the ranking, which needs all rows of a task."""
    heading: str = ""
    """May have several lines. Empty: tables do not show the column."""
    show: Callable[[Row], str] | None = None
    when: Callable[[Row], bool] | None = None
    """A table shows the column if this holds for one of its rows."""

    @property
    def words(self) -> str:
        """The heading on one line."""
        return self.heading.replace("\n", " ")

    @property
    def left(self) -> bool:
        """Whether the column is aligned to the left, as text is."""
        return self.unit == "text"

    def headed(
        self,
        heading: str,
        show: Callable[[Row], str] | None = None,
        when: Callable[[Row], bool] | None = None,
    ) -> Column:
        """This column, shown in tables under ``heading``."""
        return replace(self, heading=heading, show=show, when=when)


_READS: dict[str, Callable[[Any], str]] = {
    "text": printable,
    "yes or no": lambda value: "yes" if value else "no",
    "share": share,
    "steps": count,
}


def cell_text(column: Column, row: Row) -> str:
    """A cell as plain text: the same in every format, which only escapes it."""
    if column.show is not None:
        return column.show(row)
    return _READS.get(column.unit, number)(row[column.name])


def shown(rows: Sequence[Row]) -> list[Column]:
    """The columns that a table of these rows shows, in order.

    Tasks with an objective show it and the worst constraint value, the others return and cost.
    """
    return [
        column
        for column in COLUMNS
        if column.heading and (column.when is None or any(map(column.when, rows)))
    ]


# How columns are computed.


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _field(name: str, unit: str, meaning: str) -> Column:
    return Column(name, unit, meaning, lambda group: group.first[name])


def _with_status(name: str, meaning: str, *statuses: str) -> Column:
    def seeds(group: Group) -> int:
        return int(group.runs["status"].isin(statuses).sum())

    return Column(name, "seeds", meaning, seeds)


def _over_seeds(words: str, statistic: Callable[[pd.Series], Any]) -> Callable[..., Column]:
    """A kind of column: a statistic over seeds of the metric of its name, or of ``metric``."""

    def column(name: str, unit: str, meaning: str, metric: str = "") -> Column:
        described = words.format(meaning)
        return Column(name, unit, described, lambda group: statistic(group.runs[metric or name]))

    return column


_median = _over_seeds("{}, median over seeds", lambda values: float(values.median()))
_mean = _over_seeds("{}, mean over seeds", lambda values: float(values.mean()))
_largest = _over_seeds("largest of all seeds: {}", lambda values: float(values.max()))
_earliest = _over_seeds("earliest of all seeds: {}", lambda values: float(values.min()))
_half_by = _over_seeds("{}", lambda values: censored_quantile(values, 0.5))
_known = _over_seeds("{}, all seeds together", lambda values: float(values.sum(min_count=1)))
_total = _over_seeds("{}, all seeds together", lambda values: int(values.sum()))


def _share(name: str, part: str, whole: str) -> Column:
    def compute(group: Group) -> float:
        return _ratio(float(group.runs[part].sum()), float(group.runs[whole].sum()))

    return Column(name, "share", f"{part} / {whole}, all seeds together".replace("_", " "), compute)


def _estimate(name: str, unit: str, meaning: str) -> Column:
    return Column(name, unit, meaning, lambda group: getattr(group, name).value)


def _ends(name: str, unit: str, kind: str) -> tuple[Column, Column]:
    low, high = f"lower end of its 95 % {kind} interval", "upper end"
    return (
        Column(f"{name}_low", unit, low, lambda group: getattr(group, name).low),
        Column(f"{name}_high", unit, high, lambda group: getattr(group, name).high),
    )


def _seeds_that_violated(group: Group) -> int:
    return int((group.runs["violating_iterates"] > 0).sum())


def _first_violating_step(group: Group) -> float:
    earliest = group.runs.sort_values("first_violating_update", kind="stable").iloc[0]
    return float(earliest["first_violating_step"])


def _few(group: Group) -> bool:
    return len(group.finished) < PRELIMINARY_BELOW


def _verdict(group: Group) -> str:
    return verdict_of(group.runs, group.limit, group.cost_final)


def _verification(group: Group) -> str:
    damaged = int((group.runs["status"] == "damaged").sum())
    return f"{damaged} damaged" if damaged else "none" if group.finished.empty else "consistent"


def command_of(suite: str, agent: str, task: str, seeds: int, steps: int) -> str:
    """The command that runs these cells again, quoted for a shell."""
    if suite.startswith("compare-"):
        options = {"task": task, "seeds": str(seeds), "steps": str(steps)}
        return escaping.shell_command(["compare", agent], options)
    options = {"agents": agent, "tasks": task, "seeds": str(seeds)}
    return escaping.shell_command(["run", suite], options)


def _command(group: Group) -> str:
    suite, agent, task, steps = group.first[["suite", "agent", "task", "steps"]]
    return command_of(suite, agent, task, int(group.runs["seed"].max()) + 1, int(steps))


COLUMNS: tuple[Column, ...] = (
    _field("suite", "text", "suite that the runs belong to"),
    _field("task", "text", "Gymnasium id"),
    Column("rank", "", "by verdict, then by score; equal where intervals overlap", None).headed(
        "#", cells.rank
    ),
    Column("tied", "yes or no", "another row has the same rank", None),
    _field("agent", "text", "agent; #xxxx tells two set-ups of one agent apart").headed(
        "agent", cells.agent
    ),
    Column(
        "other_versions",
        "yes or no",
        "package versions that most runs of the table do not have, or uncommitted changes (‡)",
        None,
    ),
    _field("setup", "text", "hash of everything but the seed"),
    Column("seeds_planned", "seeds", "seeds planned or recorded", lambda g: len(g.runs)),
    _with_status(
        "seeds_finished", "seeds that finished with a consistent record", "finished"
    ).headed("seeds", cells.of_planned("seeds_finished")),
    _with_status("seeds_failed", "seeds whose run raised an error", "failed"),
    _with_status(
        "seeds_unfinished", "seeds interrupted or still running", "interrupted", "running"
    ),
    _with_status("seeds_missing", "seeds planned, but without a record", "missing"),
    _with_status(
        "seeds_damaged", "seeds whose record is unreadable or contradicts itself", "damaged"
    ),
    _field("score_kind", "text", "what the score is: gap closed, objective (negated) or return"),
    _estimate("score", "", "IQM over seeds; unfinished runs count at the floor"),
    *_ends("score", "", "bootstrap"),
    _median("objective_start", "", "objective loss of the start policy", "start_objective"),
    _median("objective_final", "", "objective loss of the final iterate", "final_objective").headed(
        "objective\nstart → final", cells.objective, cells.has_objective
    ),
    _estimate(
        "gap_closed",
        "share",
        "share of the gap from backup to oracle that is closed, IQM over seeds",
    ).headed("% of gap\nclosed", cells.gap_closed, cells.has_objective),
    *_ends("gap_closed", "share", "bootstrap"),
    _median("gap_closed_median", "share", "share of the gap closed", "gap_closed"),
    _median("return_start", "", "return of the start policy", "start_return"),
    _estimate("return_final", "", "return of the final iterate, IQM over seeds").headed(
        "return\nstart → final", cells.returns, cells.has_none
    ),
    *_ends("return_final", "", "bootstrap"),
    _median(
        "return_training", "", "return of the last collected episodes", "final_training_return"
    ),
    Column(
        "cost_limit",
        "cost",
        "d per episode; 0: any violated constraint value counts",
        lambda g: g.limit,
    ),
    _field("told_limit", "cost", "d as the agent is told it; unknown where it takes none").headed(
        "told\nlimit", when=cells.told_another_limit
    ),
    _field("margin", "", "of safety in training, in units of the constraint values").headed(
        "margin", when=lambda row: row["margin"] > 0
    ),
    _field("tuning_trials", "trials", "configurations that `tune` tried to find this one").headed(
        "trials", when=lambda row: not math.isnan(row["tuning_trials"])
    ),
    _estimate(
        "cost_final", "cost", "cost per episode of the final iterate, mean over finished seeds"
    ).headed("final cost", cells.cost, cells.has_none),
    *_ends("cost_final", "cost", "Student"),
    Column("cost_final_ratio", "", "cost_final / d", lambda g: _ratio(g.cost_final.value, g.limit)),
    _median("cost_training", "cost", "cost of the last collected episodes", "final_training_cost"),
    Column(
        "feasible_seeds",
        "seeds",
        "finished seeds whose final iterate does not violate",
        lambda g: g.feasible_seeds,
    ),
    _estimate("feasible_share", "share", "feasible seeds / planned seeds"),
    *_ends("feasible_share", "share", "Wilson"),
    _total("violating_iterates", "iterates", "evaluated iterates that violate").headed(
        "violating\niterates", cells.iterates
    ),
    _total("evaluated_iterates", "iterates", "evaluated iterates"),
    _share("violating_iterate_share", "violating_iterates", "evaluated_iterates"),
    _total("violating_policies", "policies", "evaluated iterates that violate and differ").headed(
        "violating\npolicies", cells.policies
    ),
    _total("distinct_policies", "policies", "evaluated iterates that differ in their evaluation"),
    _total("held_updates", "updates", "updates after which the evaluation is the same as before"),
    _share("held_share", "held_updates", "evaluated_iterates").headed("held\nupdates"),
    _largest(
        "held_early_share", "share", "share held until the objective is within 1 % of its end"
    ),
    _known("proved_policies", "policies", "of these, proved safe from every start").headed(
        "proved safe\n(all starts)", cells.proved, cells.has_proof
    ),
    _known("examined_policies", "policies", "distinct policies of runs that `prove` examined"),
    Column(
        "seeds_with_proof",
        "seeds",
        "seeds whose policies `prove` examined",
        lambda group: int(group.runs["examined_policies"].notna().sum()) or math.nan,
    ),
    Column("seeds_that_violated", "seeds", "seeds with a violating iterate", _seeds_that_violated),
    _earliest(
        "first_violating_update", "update", "first update that violates; never if none does"
    ).headed("first\nat\nupdate"),
    Column(
        "first_violating_step", "steps", "interaction steps taken until then", _first_violating_step
    ),
    _half_by(
        "first_violating_update_median",
        "update",
        "update by which half the seeds had violated; never if fewer did",
        "first_violating_update",
    ),
    _half_by(
        "safe_from_update_median",
        "update",
        "update by which half the seeds violate no more",
        "safe_from_update",
    ),
    _largest("longest_violating_run", "iterates", "consecutive violating iterates"),
    _largest("worst_iterate_value", "", "constraint value of an evaluated iterate").headed(
        "worst\nvalue", when=cells.has_objective
    ),
    _largest("worst_training_value", "", "constraint value in training"),
    _mean(
        "updates_over_limit_share", "share", "updates with C_k > d, of those with finished episodes"
    ).headed("updates\nover\nlimit", when=cells.has_none),
    _total("training_episodes", "episodes", "episodes finished in training"),
    _total("violating_episodes", "episodes", "of these, episodes with cost > d"),
    _share("violating_episode_share", "violating_episodes", "training_episodes").headed(
        "episodes\nviolating"
    ),
    _share("violating_step_share", "violating_steps", "interaction_steps"),
    _mean("cumulative_excess", "cost", "sum_k n_k max(0, C_k - d), n_k episodes of update k"),
    _largest("max_excess", "cost", "max_k max(0, C_k - d)"),
    _largest("max_excess_ratio", "", "max_k max(0, C_k - d) / d"),
    _mean("cvar95_cost_low", "cost", "lower bound of the 95 % CVaR of episode cost"),
    _mean("cvar95_cost_high", "cost", "upper bound of the 95 % CVaR of episode cost"),
    _total("probe_violations", "policies", "candidates that violated while being evaluated"),
    _median("updates", "updates", "updates per run"),
    _median("interaction_steps", "steps", "interaction steps per run"),
    _median("probe_steps", "steps", "steps spent on evaluating candidates per run"),
    _median("total_steps", "steps", "interaction and probe steps per run").headed("total\nsteps"),
    _field("steps", "steps", "budget per run"),
    _field("budget", "text", "the steps that the budget counts: interaction or total"),
    _median("wall_time_s", "s", "wall-clock time per run"),
    _median("steps_per_s", "steps/s", "interaction steps per second"),
    Column("preliminary", "yes or no", f"fewer than {PRELIMINARY_BELOW} finished seeds (†)", _few),
    Column("verdict", "text", f"best first: {', '.join(VERDICTS)}", _verdict).headed(
        "verdict", lambda row: f"{row['verdict']}{' †' * row['preliminary']}"
    ),
    Column("verification", "text", "consistent: key, digest, counters recomputed", _verification),
    Column("command", "text", "runs these cells again", _command),
)
