"""What must hold between the numbers of one record.

Any violation means a damaged, altered or hand-written record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from operator import attrgetter
from typing import Any

from scpo_bench.records.schema import Run, Update, digest, violates

_RELATIVE = 1e-6
# run.json's times are whole seconds, so each is off by up to one.
_CLOCK_SLACK_S = 2.0
# Numbers above these are not measurements but attempts at an overflow; below them, sums and squares
# stay finite.
MAX_COUNT, MAX_MAGNITUDE, MAX_NAME = 2**53, 1e100, 200
_CUMULATIVE = ("interaction_steps", "probe_steps", "probe_violations", "wall_time_s")
_EPISODE_FIELDS = ("return_mean", "cost_mean", "cost_max")


def _any_large(update: Update) -> bool:
    values = (*vars(update).values(), *update.diagnostics.values())
    return any(type(value) in (int, float) and abs(value) > MAX_COUNT for value in values)


def check_bounds(run: Run, updates: Sequence[Update]) -> str | None:
    """Why nothing should be computed from this record, or None. To be called before all else."""
    for name in ("suite", "key", "cell.agent", "cell.task"):
        text = attrgetter(name)(run)
        if len(text) > MAX_NAME or not text.isprintable():
            problem = f"expected at most {MAX_NAME} printable characters"
            return f"{name}: {problem}, found {text[:40]!r}..."
    models: list[tuple[str, Any]] = [("cell", run.cell), ("run", run)]
    # Nearly always nothing is large; which field it is matters only when something is.
    models += [(f"update {u.update}", u) for u in updates if _any_large(u)]
    for place, model in models:
        for name, value in [*vars(model).items(), *getattr(model, "diagnostics", {}).items()]:
            where = f"{place}: {name}: expected at most"
            if isinstance(value, int) and value > MAX_COUNT:
                return f"{where} {MAX_COUNT}, found more"
            if isinstance(value, float) and abs(value) > MAX_MAGNITUDE:
                return f"{where} {MAX_MAGNITUDE:g} in magnitude, found {value:g}"
    return None


def check_record(run: Run, updates: Sequence[Update]) -> list[str]:
    """Every problem as "field: what was expected, what was found"; empty if there is none."""
    problems = [*_check_run(run, updates)]
    if updates:
        first = updates[0]
        if first.episodes or first.violating_steps or first.cost_sum:
            found = "found episodes, violating steps or cost"
            problems.append(f"update 0: the start policy has collected nothing, {found}")
    for before, after in pairwise(updates):
        problems += [f"update {after.update}: {p}" for p in _check_collection(before, after)]
    for update in updates:
        problems += [f"update {update.update}: {p}" for p in _check_update(run, update)]
    return problems


def _check_run(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    try:
        key = run.cell.key()
    except (ValueError, RecursionError) as error:  # the free-form fields may hold what JSON cannot
        yield f"cell: no key can be computed ({error})"
    else:
        if run.key != key:
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
    elif (steps := updates[-1].interaction_steps) < run.cell.steps:
        yield f"interaction_steps: a finished run uses all {run.cell.steps}, found {steps}"
    yield from _check_clock(run, updates)


def _check_clock(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    started, ended = run.started, run.ended or ""
    try:
        duration = (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
    except (ValueError, TypeError):
        found = f"found {started[:40]!r} and {ended[:40]!r}"
        yield f"started, ended: expected two ISO 8601 times, {found}"
        return
    used = updates[-1].wall_time_s if updates else 0.0
    if duration < 0:
        yield f"ended: before started, by {-duration:g} s"
    elif used > duration + _CLOCK_SLACK_S:
        yield f"wall_time_s: at most the {duration:g} s from start to end, found {used:g}"


def _check_collection(before: Update, after: Update) -> Iterator[str]:
    """Counters do not fall, and a step violates once at most."""
    for name in _CUMULATIVE:
        was, is_ = getattr(before, name), getattr(after, name)
        if is_ < was:
            yield f"{name}: cumulative, but falls from {was:g} to {is_:g}"
    collected, unsafe = after.interaction_steps - before.interaction_steps, after.violating_steps
    if 0 <= collected < unsafe:
        yield f"violating_steps: at most the {collected} steps of this collection, found {unsafe}"


def _check_update(run: Run, update: Update) -> Iterator[str]:
    if update.cost_sum < 0:
        yield f"cost_sum: costs are not negative, found {update.cost_sum:g}"
    if (update.cost_sum > 0) != (update.violating_steps > 0):
        found = f"{update.violating_steps} with a cost sum of {update.cost_sum:g}"
        yield f"violating_steps: the steps with cost, found {found}"
    yield from _check_episodes(update, run.cell.cost_limit)
    yield from _check_evaluation(run, update)
    if update.wall_time_s > 0:
        rate, found_rate = update.interaction_steps / update.wall_time_s, update.steps_per_s
        if not math.isclose(rate, found_rate, rel_tol=_RELATIVE, abs_tol=_RELATIVE):
            yield f"steps_per_s: {rate:g} follows from steps and time, found {found_rate:g}"


def _check_evaluation(run: Run, update: Update) -> Iterator[str]:
    cost, found, interval = (
        update.iterate_cost,
        update.iterate_violates,
        run.cell.evaluation_interval,
    )
    missing = [value is None for value in (update.iterate_return, cost, found)]
    if any(missing) and not all(missing):
        yield "iterate_return, iterate_cost, iterate_violates: measured together or not at all"
    elif cost is None:
        if update.update % interval == 0:
            yield f"iterate_violates: every {interval}th update is evaluated, found none"
    elif found != violates(cost, update.iterate_worst_constraint_value, run.cell.cost_limit):
        yield f"iterate_violates: {not found} follows from the evaluation, found {found}"


def _check_episodes(update: Update, limit: float) -> Iterator[str]:
    finished, unsafe = update.episodes, update.violating_episodes
    for name in _EPISODE_FIELDS:
        value = getattr(update, name)
        if (value is not None) != (finished > 0):
            yield f"{name}: measured if an episode finished, found {value} with {finished} episodes"
    if unsafe > finished:
        yield f"violating_episodes: at most the {finished} that finished, found {unsafe}"
    if update.cost_mean is None or update.cost_max is None:
        return
    slack = _RELATIVE * max(1.0, abs(update.cost_max))
    if not -slack <= update.cost_mean <= update.cost_max + slack:
        yield f"cost_mean: between 0 and {update.cost_max:g}, found {update.cost_mean:g}"
    if (unsafe > 0) != (update.cost_max > limit):
        found = f"{unsafe} with a largest cost of {update.cost_max:g}"
        yield f"violating_episodes: those with a cost above {limit:g}, found {found}"
