"""A record as text: a summary of the run, or one of its updates with the reason for its verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scpo_bench.errors import UserError, nearest, printable
from scpo_bench.records.files import RUN_FILE, read_run, read_updates, run_folders, updates_file
from scpo_bench.records.schema import Run, Update, violates

FIRST_VIOLATIONS = 8  # of a summary
_LABEL_WIDTH, _TEXT_WIDTH, _MAX_TEXT = 14, 86, 2000
_CERTIFICATE = ("bound", "realised", "L")  # diagnostics "bound/NAME", ..., one of each a constraint


def show(folder: Path, number: int | None = None) -> str:
    """The run in ``folder``, or update ``number`` of it, as text.

    UserError if there is no such run or update.
    """
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"no run in '{folder}'{_hint(folder)}")
    run = read_run(folder)
    updates = read_updates(folder) if updates_file(folder).exists() else []
    if number is None:
        rows = _summary(run, updates)
    elif 0 <= number < len(updates):
        rows = _update(run, updates, number)
    else:
        known = f"0 to {len(updates) - 1}" if updates else "none"
        raise UserError(f"--update: no update {number} in '{folder}'; recorded: {known}")
    lines = [printable(f"{folder}: {run.cell.agent} on {run.cell.task}, seed {run.cell.seed}"), ""]
    for label, text in rows:
        # A record may be someone else's: its text must not control the terminal.
        wrapped = textwrap.wrap(printable(text, _MAX_TEXT), _TEXT_WIDTH)
        for i, line in enumerate(wrapped):
            lines.append(f"{'' if i else label:{_LABEL_WIDTH}}{line}")
    return "\n".join(lines)


def _hint(folder: Path) -> str:
    runs = run_folders(folder)
    if runs:
        return f"; {len(runs)} below it, such as {runs[0]}"
    parent = next((p for p in folder.parents if p.is_dir()), Path())
    missing = folder.relative_to(parent).parts[:1]
    found = [p.name for p in parent.iterdir() if not p.name.startswith(".")]
    return nearest(missing[0], found) if missing else ""


Rows = Iterator[tuple[str, str]]


def _summary(run: Run, updates: list[Update]) -> Rows:
    cell = run.cell
    yield "asked", f"suite {run.suite}: {cell.steps} steps in {cell.num_envs} environments"
    limit = f"cost limit: {cell.cost_limit:g}, margin: {cell.margin:g}"
    yield "", f"start: {cell.start}, normalize: {cell.normalize}, {limit}"
    often = "every update" if cell.evaluation_interval == 1 else f"1 in {cell.evaluation_interval}"
    yield "", f"evaluated: {often}, on {cell.evaluation_episodes} held-out episodes"
    for name, settings in (("env", cell.env), ("config", cell.config)):
        if settings:
            yield name, _listed(settings, "=")
    yield "key", run.key
    error = f": {run.error}" if run.error else ""
    yield "ended", f"{run.status}{error}, from {run.started} to {run.ended or '(not ended)'}"
    if run.digest:
        yield "digest", run.digest
    if not updates:
        yield "updates", "none"
        return
    last = updates[-1]
    yield "updates", f"{last.update}, {_spent(last)}"
    for label, update in (("start policy", updates[0]), ("final policy", last)):
        yield label, f"update {update.update}: {_evaluation(update)}"
        yield "", verdict(update, cell.cost_limit)
    evaluated = [u for u in updates[1:] if u.iterate_cost is not None]
    unsafe = [u.update for u in evaluated if u.iterate_violates]
    yield "violations", f"{len(unsafe)} of {len(evaluated)} evaluated updates"
    if unsafe:
        more = ", ..." if len(unsafe) > FIRST_VIOLATIONS else ""
        yield "", f"updates {', '.join(map(str, unsafe[:FIRST_VIOLATIONS]))}{more}"
        yield "", f"`--update {unsafe[0]}` shows the first of them"


def _update(run: Run, updates: list[Update], number: int) -> Rows:
    update, limit = updates[number], run.cell.cost_limit
    yield "update", f"{number} of {len(updates) - 1}, {_spent(update)}"
    if number == 0:
        yield "collected", "nothing yet: this is the start policy"
    else:
        steps = update.interaction_steps - updates[number - 1].interaction_steps
        yield "collected", f"{steps} steps by the policy of update {number - 1}"
        worst = {"worst constraint value": update.worst_constraint_value}
        costs = _listed({"total cost": update.cost_sum, **worst})
        yield "", f"{update.violating_steps} steps with cost; {costs}"
        unsafe = f"{update.violating_episodes} with cost > {limit:g}"
        means = {"mean return": update.return_mean, "mean cost": update.cost_mean}
        means["largest cost"] = update.cost_max
        yield "", f"{update.episodes} episodes ended, {unsafe}; {_listed(means)}"
    yield "evaluated", _evaluation(update)
    if update.iterate_cost is not None:
        yield "", f"deterministically, on {run.cell.evaluation_episodes} held-out episodes"
    yield "verdict", verdict(update, limit)
    yield from _certificate(update.diagnostics)
    rest = {
        name: "not finite" if value is None else value
        for name, value in update.diagnostics.items()
        if name.split("/")[0] not in _CERTIFICATE
    }
    multipliers = {name: rest.pop(name) for name in sorted(rest) if "multiplier" in name}
    for label, values in (("multipliers", multipliers), ("diagnostics", rest)):
        if values:
            yield label, _listed(values, "=")


def verdict(update: Update, limit: float) -> str:
    """Whether the policy of ``update`` violates ``limit``, and by which rule."""
    cost, worst = update.iterate_cost, update.iterate_worst_constraint_value
    if cost is None:
        return "unknown: this update was not evaluated"
    measured, rule = f"mean cost {cost:.6g}", "the mean cost per episode counts"
    if limit == 0:
        rule = "no constraint values are given, so any cost counts"
        if worst is not None:
            measured = f"worst constraint value {worst:.6g}"
            rule = "any violated constraint value counts"
    unsafe = violates(cost, worst, limit)
    answer = f"violates: {measured} >" if unsafe else f"does not violate: {measured} <="
    if update.iterate_violates != unsafe:
        rule += "), BUT THE RECORD SAYS OTHERWISE (run `scpo-bench verify`"
    return f"{answer} {limit:g} (limit {limit:g}: {rule})"


def _certificate(diagnostics: Mapping[str, float | None]) -> Rows:
    """SCPO's bound on each constraint value, the value realised, and the smoothness constant L."""
    names = [key.partition("/")[2] for key in diagnostics if key.startswith("bound/")]
    width = max(map(len, names), default=0)
    for i, name in enumerate(names):
        bound, realised, L = (diagnostics.get(f"{kind}/{name}") for kind in _CERTIFICATE)
        breach = bound is not None and realised is not None and realised > bound
        yield (
            "" if i else "certificate",
            f"{name:{width}}  bound {_number(bound)}  realised {_number(realised)}  L {_number(L)}"
            f"{'  above its bound' if breach else ''}",
        )


def _spent(update: Update) -> str:
    probes = f"{update.probe_steps} probe steps, {update.probe_violations} violating probes"
    return f"{update.interaction_steps} steps, {probes} so far, in {update.wall_time_s:.1f} s"


def _evaluation(update: Update) -> str:
    if update.iterate_cost is None:
        return "not evaluated"
    measured = {
        "return": update.iterate_return,
        "cost": update.iterate_cost,
        "worst constraint value": update.iterate_worst_constraint_value,
        "objective": update.iterate_objective,
    }
    return _listed(measured)


def _listed(values: Mapping[str, Any], equals: str = " ") -> str:
    known = {name: _number(value).strip() for name, value in values.items() if value is not None}
    return ", ".join(f"{name}{equals}{value}" for name, value in known.items())


def _number(value: Any) -> str:
    return f"{value:<12.6g}" if isinstance(value, float) else str(value)
