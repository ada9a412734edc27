"""How the cells of the leaderboard read that hold more than the value of their column."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from scpo_bench.errors import printable
from scpo_bench.leaderboard.ranking import NO_RESULT
from scpo_bench.leaderboard.text import UNKNOWN, interval, number, percent, share

Row = dict[str, Any]
"""One row of the leaderboard: the raw value of every column under its name."""


def has_objective(row: Row) -> bool:
    return bool(row["score_kind"] != "return")


def has_none(row: Row) -> bool:
    return not has_objective(row)


def final(row: Row, name: str) -> float:
    # Where nothing finished there is only the floor, which is no result of this agent.
    return math.nan if row["verdict"] == NO_RESULT else row[name]


def rank(row: Row) -> str:
    return UNKNOWN if row["verdict"] == NO_RESULT else f"{row['rank']}{'=' * row['tied']}"


def agent(row: Row) -> str:
    return printable(row["agent"]) + " ‡" * row["other_versions"]


def objective(row: Row) -> str:
    return f"{number(row['objective_start'])} → {number(final(row, 'objective_final'))}"


def gap_closed(row: Row) -> str:
    ends = row["gap_closed_low"], row["gap_closed_high"]
    return interval(final(row, "gap_closed"), *ends, percent)


def returns(row: Row) -> str:
    ends = row["return_final_low"], row["return_final_high"]
    return f"{number(row['return_start'])} → {interval(final(row, 'return_final'), *ends)}"


def cost(row: Row) -> str:
    low = row["cost_final_low"]  # Student's interval does not know that costs are not negative
    return interval(row["cost_final"], 0.0 if low < 0 else low, row["cost_final_high"])


def iterates(row: Row) -> str:
    if not row["evaluated_iterates"]:
        return UNKNOWN
    counts = f"{row['violating_iterates']}/{row['evaluated_iterates']}"
    return f"{counts} {share(row['violating_iterate_share'])}"


def policies(row: Row) -> str:
    if not row["distinct_policies"]:
        return UNKNOWN
    return f"{row['violating_policies']}/{row['distinct_policies']}"


def told_another_limit(row: Row) -> bool:
    return bool(abs(row["told_limit"] - row["cost_limit"]) > 0)  # not for nan


def has_proof(row: Row) -> bool:
    return not math.isnan(row["examined_policies"])


def proved(row: Row) -> str:
    if not has_proof(row):
        return UNKNOWN
    text = f"{number(row['proved_policies'])}/{number(row['examined_policies'])}"
    few = row["seeds_with_proof"] < row["seeds_planned"]
    return f"{text} ({row['seeds_with_proof']} of {row['seeds_planned']} seeds)" if few else text


def of_planned(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]}/{row['seeds_planned']}"
