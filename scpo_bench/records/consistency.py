"""What must hold between the numbers of one record.

Any violation means a damaged, altered or hand-written record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from scpo_bench.records.schema import Run, Update, digest

_RELATIVE = 1e-6
# run.json's times are whole seconds, so each is off by up to one.
_CLOCK_SLACK_S = 2.0
# Above these, numbers are no measurements but attempts at an overflow; below, sums and squares stay
# finite.
MAX_COUNT, MAX_MAGNITUDE, MAX_NAME = 2**53, 1e100, 200
_CUMULATIVE = ("interaction_steps", "probe_steps", "probe_violations", "wall_time_s")
_EPISODE_FIELDS = ("return_mean", "cost_mean", "cost_max")
_EVALUATION_FIELDS = ("iterate_return", "iterate_cost", "iterate_violates")


def _any_large(update: Update) -> bool:
    values = (*vars(update).values(), *update.diagnostics.values())
    return any(type(value) in (int, float) and abs(value) > MAX_COUNT for value in values)


def check_bounds(run: Run, updates: Sequence[Update]) -> str | None:
    """Why nothing should be computed from this record, or None.

    To be asked before anything else is.
    """
    for name in ("suite", "key", "cell.agent", "cell.task"):
        text = (
            getattr(run.cell, name.removeprefix("cell."))
            if name.startswith("cell.")
            else getattr(run, name)
        )
        if len(text) > MAX_NAME or not text.isprintable():
            return (
                f"{name}: expected at most {MAX_NAME} printable characters, found {text[:40]!r}..."
            )
    models: list[tuple[str, Any]] = [("cell", run.cell), ("run", run)]
    # Nearly always nothing is large; which field it is matters only when something is.
    models += [(f"update {u.update}", u) for u in updates if _any_large(u)]
    for place, model in models:
        for name, value in [*vars(model).items(), *getattr(model, "diagnostics", {}).items()]:
            if isinstance(value, int) and value > MAX_COUNT:
                return f"{place}: {name}: expected at most {MAX_COUNT}, found more"
            if isinstance(value, float) and abs(value) > MAX_MAGNITUDE:
                return f"{place}: {name}: expected at most {MAX_MAGNITUDE:g} in magnitude, found {value:g}"
    return None


def check_record(run: Run, updates: Sequence[Update]) -> list[str]:
    """Every finding as "field: what was expected, what was found"; empty if the record is
    consistent.
    """
    return [*_check_run(run, updates), *_check_updates(run, updates)]


def _check_run(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    try:
        key: str | None = run.cell.key()
    except (ValueError, RecursionError) as error:  # the free-form fields may hold what JSON cannot
        key = None
        yield f"cell: no key can be computed ({error})"
    if key is not None and run.key != key:
        yield f"key: expected {key} from the cell's fields, found {run.key[:80]}"
    if run.status != "running" and run.updates != len(updates):
        yield f"updates: run.json counts {run.updates}, the file holds {len(updates)}"
    if run.status != "finished":
        if run.digest is not None:
            yield f"digest: a run that is {run.status} has none, found {run.digest[:80]}"
        return
    recomputed = digest(updates)
    if run.digest != recomputed:
        yield f"digest: expected {recomputed} from the updates, found {str(run.digest)[:80]}"
    if not updates:
        yield "updates: a finished run has at least the start policy's, found none"
    elif updates[-1].interaction_steps < run.cell.steps:
        yield (
            f"interaction_steps: a finished run spends its budget of {run.cell.steps}, found {updates[-1].interaction_steps}"
        )
    yield from _check_clock(run, updates)


def _check_clock(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    try:
        duration = (
            datetime.fromisoformat(run.ended or "") - datetime.fromisoformat(run.started)
        ).total_seconds()
    except (ValueError, TypeError):
        yield f"started, ended: expected two ISO 8601 times, found {run.started[:40]!r} and {str(run.ended)[:40]!r}"
        return
    if duration < 0:
        yield f"ended: before started, by {-duration:g} s"
    elif updates and updates[-1].wall_time_s > duration + _CLOCK_SLACK_S:
        yield f"wall_time_s: at most the {duration:g} s from start to end, found {updates[-1].wall_time_s:g}"


def _check_updates(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    previous: Update | None = None
    for number, update in enumerate(updates):
        for finding in _check_update(run, update, previous):
            yield f"update {number}: {finding}"
        previous = update


def _violates(update: Update, limit: float) -> bool:
    """As the harness decides it: with limit 0 any constraint value > 0, or any cost where the task
    has no signed values.
    """
    if limit == 0 and update.iterate_worst_constraint_value is not None:
        return update.iterate_worst_constraint_value > 0
    return update.iterate_cost is not None and update.iterate_cost > limit


def _check_update(run: Run, update: Update, previous: Update | None) -> Iterator[str]:
    limit = run.cell.cost_limit
    if previous is None:
        if update.episodes or update.violating_steps or update.cost_sum:
            yield "the start policy has collected nothing, found episodes, violating steps or cost"
    else:
        for name in _CUMULATIVE:
            now, before = getattr(update, name), getattr(previous, name)
            if now < before:
                yield f"{name}: cumulative, but falls from {before:g} to {now:g}"
        collected = update.interaction_steps - previous.interaction_steps
        if 0 <= collected < update.violating_steps:
            yield f"violating_steps: at most the {collected} steps of this collection, found {update.violating_steps}"

    if update.cost_sum < 0:
        yield f"cost_sum: costs are not negative, found {update.cost_sum:g}"
    if (update.cost_sum > 0) != (update.violating_steps > 0):
        yield (
            f"violating_steps: {update.violating_steps} steps with cost and a cost sum of {update.cost_sum:g} exclude each other"
        )
    yield from _check_episodes(update, limit)

    present = [getattr(update, name) is not None for name in _EVALUATION_FIELDS]
    if any(present) and not all(present):
        yield f"{', '.join(_EVALUATION_FIELDS)}: measured together or not at all"
    elif not any(present):
        if update.update % run.cell.evaluation_interval == 0:
            yield f"iterate_violates: every {run.cell.evaluation_interval}th update is evaluated, found none"
    elif update.iterate_violates != _violates(update, limit):
        yield (
            f"iterate_violates: {not update.iterate_violates} follows from the evaluation, found {update.iterate_violates}"
        )
    if update.wall_time_s > 0:
        rate = update.interaction_steps / update.wall_time_s
        if not math.isclose(rate, update.steps_per_s, rel_tol=_RELATIVE, abs_tol=_RELATIVE):
            yield f"steps_per_s: {rate:g} follows from steps and wall time, found {update.steps_per_s:g}"


def _check_episodes(update: Update, limit: float) -> Iterator[str]:
    for name in _EPISODE_FIELDS:
        if (getattr(update, name) is not None) != (update.episodes > 0):
            yield (
                f"{name}: measured if and only if an episode finished, found {getattr(update, name)} with {update.episodes}"
            )
    if update.violating_episodes > update.episodes:
        yield f"violating_episodes: at most {update.episodes} episodes finished, found {update.violating_episodes}"
    if update.cost_mean is None or update.cost_max is None:
        return
    slack = _RELATIVE * max(1.0, abs(update.cost_max))
    if not -slack <= update.cost_mean <= update.cost_max + slack:
        yield f"cost_mean: between 0 and the largest, {update.cost_max:g}, found {update.cost_mean:g}"
    if (update.violating_episodes > 0) != (update.cost_max > limit):
        yield (
            f"violating_episodes: {update.violating_episodes} with a largest cost of {update.cost_max:g} and limit {limit:g}"
        )
