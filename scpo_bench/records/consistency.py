"""What must hold between the numbers of one record.

Any violation means a damaged, altered or hand-written record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from operator import attrgetter
from pathlib import PurePath
from typing import Any, NamedTuple

from scpo_bench.records.files import file_name
from scpo_bench.records.schema import Run, Update, digest, violates

_RELATIVE = 1e-6
# run.json's times are whole seconds, so each is off by up to one.
_CLOCK_SLACK_S = 2.0
# Clocks of two machines differ, and so do their time zones where one is set wrongly.
_FUTURE = timedelta(days=1)
# Numbers above these are not measurements but attempts at an overflow; below them, sums and squares
# stay finite.
MAX_COUNT, MAX_MAGNITUDE, MAX_NAME = 2**53, 1e100, 200
_CUMULATIVE = ("interaction_steps", "probe_steps", "probe_violations", "wall_time_s")
_EPISODE_FIELDS = ("return_mean", "cost_mean", "cost_max")


class TaskLimits(NamedTuple):
    """What every record of a task keeps to, whatever the policy; by default nothing is known."""

    horizon: float = math.inf
    """Steps per episode, at most."""
    highest_return: float = math.inf
    """Of an episode."""
    highest_step_cost: float = math.inf
    lowest_objective: float = -math.inf


UNLIMITED = TaskLimits()


def misplaced(run: Run, place: PurePath) -> str | None:
    """Why a record at ``place``, relative to a results folder or one below, is not its cell's.

    None if it is: as far as ``place`` goes, it ends in SUITE/TASK/AGENT/seed-N.
    """
    cell = run.cell
    parts = (run.suite, file_name(cell.task), file_name(cell.agent), f"seed-{cell.seed}")
    if place.parts and (own := parts[-len(place.parts) :]) != place.parts[-len(parts) :]:
        return f"folder: expected {'/'.join(own)} from the cell, found {place.as_posix()}"
    return None


def _any_large(update: Update) -> bool:
    values = (*vars(update).values(), *update.diagnostics.values())
    return any(type(value) in (int, float) and abs(value) > MAX_COUNT for value in values)


def check_bounds(run: Run, updates: Sequence[Update]) -> str | None:
    """Why nothing should be computed from this record, or None. To be called before all else."""
    for name in ("suite", "key", "cell.agent", "cell.task"):
        text = attrgetter(name)(run)
        # Names in other alphabets may look like those of other agents.
        plain = text.isascii() and text.isprintable() and text == " ".join(text.split())
        if len(text) > MAX_NAME or not plain:
            problem = f"expected at most {MAX_NAME} printable ASCII characters"
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


def check_record(run: Run, updates: Sequence[Update], limits: TaskLimits = UNLIMITED) -> list[str]:
    """Every problem as "field: what was expected, what was found"; empty if there is none.

    limits: of the cell's task, for its own environment arguments.
    """
    problems = [*_check_run(run, updates)]
    if updates:
        first = updates[0]
        if first.episodes or first.violating_steps or first.cost_sum or first.interaction_steps:
            found = "found steps, episodes or cost"
            problems.append(f"update 0: the start policy has collected nothing, {found}")
    for before, after in pairwise(updates):
        problems += [f"update {after.update}: {p}" for p in _check_collection(before, after)]
    for update in updates:
        place = f"update {update.update}"
        problems += [f"{place}: {p}" for p in _check_update(run, update)]
        problems += [f"{place}: {p}" for p in _check_limits(update, limits)]
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
    yield from _check_end(run, updates)


def _check_end(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    """What a finished run's record holds."""
    if run.error is not None:
        yield f"error: a finished run has none, found {run.error[:80]}"
    if not isinstance(versions := run.provenance.get("versions"), dict) or not versions:
        yield f"provenance: expected the versions of packages, found {str(versions)[:80]}"
    yield from _check_told(run)
    recomputed = digest(updates)
    if run.digest != recomputed:
        yield f"digest: expected {recomputed} from the updates, found {str(run.digest)[:80]}"
    if not updates:
        yield "updates: a finished run has at least the start policy's, found none"
    else:
        yield from _check_budget(run, updates)
    yield from _check_clock(run, updates)


def _check_budget(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    """A run ends with the collection that uses up its budget."""

    def used(update: Update) -> int:
        probes = update.probe_steps if run.cell.budget == "total" else 0
        return update.interaction_steps + probes

    name = "interaction_steps" if run.cell.budget == "interaction" else "total steps"
    if (steps := used(updates[-1])) < run.cell.steps:
        yield f"{name}: a finished run uses all {run.cell.steps}, found {steps}"
    if run.cell.budget == "interaction" and len(updates) > 1:
        before = updates[-2]
        if (steps := used(before)) >= run.cell.steps:
            found = f"found {steps} at update {before.update} already"
            yield f"{name}: a run ends with the collection that reaches {run.cell.steps}, {found}"


def _check_told(run: Run) -> Iterator[str]:
    """Tables show the limit and the margin that the agent worked with: they are the cell's."""
    cell, resolved = run.cell, run.resolved_config
    told: dict[str, Any] = {"cost_limit": cell.cost_limit}
    if cell.margin:  # else an agent keeps its own
        told["margin"] = cell.margin
    for name, planned in told.items():
        expected = cell.config.get(name, planned)
        found = resolved.get(name, expected)
        if isinstance(found, int | float) and found != expected:
            yield f"resolved_config: {name}: expected {expected} from the cell, found {found}"


def _check_clock(run: Run, updates: Sequence[Update]) -> Iterator[str]:
    started, ended = run.started, run.ended or ""
    try:
        duration = (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
        in_future = datetime.fromisoformat(ended) > datetime.now(UTC) + _FUTURE
    except (ValueError, TypeError):
        found = f"found {started[:40]!r} and {ended[:40]!r}"
        yield f"started, ended: expected two ISO 8601 times with zones, {found}"
        return
    if in_future:
        yield f"ended: in the future, {ended[:40]}"
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
    if 0 <= collected < after.episodes:
        yield f"episodes: at most the {collected} steps of this collection, found {after.episodes}"


def _check_update(run: Run, update: Update) -> Iterator[str]:
    if update.cost_sum < 0:
        yield f"cost_sum: costs are not negative, found {update.cost_sum:g}"
    if (update.cost_sum > 0) != (update.violating_steps > 0):
        found = f"{update.violating_steps} with a cost sum of {update.cost_sum:g}"
        yield f"violating_steps: the steps with cost, found {found}"
    for name in ("cost_mean", "cost_max", "iterate_cost"):
        if (cost := getattr(update, name)) is not None and cost < 0:
            yield f"{name}: costs are not negative, found {cost:g}"
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


def _check_limits(update: Update, limits: TaskLimits) -> Iterator[str]:
    """What the task allows, up to rounding."""
    highest_cost = limits.horizon * limits.highest_step_cost
    for name, low, high in (
        ("return_mean", -math.inf, limits.highest_return),
        ("iterate_return", -math.inf, limits.highest_return),
        ("cost_max", 0.0, highest_cost),
        ("iterate_cost", 0.0, highest_cost),
        ("iterate_objective", limits.lowest_objective, math.inf),
    ):
        value = getattr(update, name)
        if value is not None and not low - _RELATIVE <= value <= high * (1 + _RELATIVE) + _RELATIVE:
            yield f"{name}: on this task between {low:g} and {high:g}, found {value:g}"
    if update.cost_sum > update.violating_steps * limits.highest_step_cost * (1 + _RELATIVE):
        most = f"at most {limits.highest_step_cost:g} per violating step"
        yield f"cost_sum: {most}, found {update.cost_sum:g} in {update.violating_steps}"
