"""What a re-run says of a record: the tiers, and the comparison that decides between them.

The same cell on the same versions and the same type of CPU gives the same numbers, to the last bit.
On another type of CPU, sums are rounded otherwise. Some agents forget these differences, and others
amplify them until only the distribution over seeds is the same; docs/reproducing.md has the
measurements from which the constants below come.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from scpo_bench.errors import printable
from scpo_bench.records.schema import TIMING_FIELDS, Run, Update
from scpo_bench.suites.registry import CUSTOM_PREFIX

RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-3, 1e-6
"""Of two numbers, either is enough. Measured: up to 4e-6 before the first change of the policy, and
up to 1e-4 in the evaluations of agents that do not amplify differences.
"""
MIN_SEEDS = 5
CONFIDENCE = 0.999
"""Of the interval of each of four values: in a suite of hundreds of runs, few fail by chance."""
EVALUATED = tuple(name for name in Update.model_fields if name.startswith("iterate_"))
# What an agent reports about itself is not compared with a tolerance: differences of nearly equal
# numbers, for instance, may have no common digit.
MEASURED = tuple(Update.model_fields.keys() - TIMING_FIELDS - {"diagnostics"})
COLLECTED = tuple(name for name in MEASURED if not name.startswith(("iterate_", "probe_")))
# What decides how numbers are rounded. The commit is not among these: it may not change results.
MACHINE = frozenset({"versions", "python", "cpu", "instruction_set", "blas", "platform"})
_ABSENT = "(absent)"


class Tier(enum.StrEnum):
    """How well a re-run agrees with the record, the best first."""

    EXACT = "reproduced exactly"
    """Every number is the same, timing aside."""
    TOLERANCE = "reproduced within tolerance"
    """On another type of CPU or other versions: the start, and every evaluation."""
    INTERVAL = "reproduced within the interval"
    """There, too: the start within the tolerance, and the end within the interval in which one more
    seed of the recorded ones would lie.
    """
    DIFFERENT = "different"


class Comparison(NamedTuple):
    tier: Tier
    provenance: list[str]
    """How the two runs' versions and machines differ, a line per field."""
    differences: list[str]
    """The first update that differs, field by field, and what decided between the tiers."""


@dataclass(frozen=True)
class Ends:
    """Of one set-up's recorded seeds: the final evaluations, and the violating iterates."""

    values: Mapping[str, Sequence[float]]
    """Name -> one value per seed."""

    @classmethod
    def of(cls, seeds: Sequence[Sequence[Update]]) -> Ends:
        ends = [_end(updates) for updates in seeds]
        known = [name for name in _END if all(end[name] is not None for end in ends)]
        return cls({name: [float(end[name]) for end in ends] for name in known})

    def obstacles(self, updates: Sequence[Update]) -> list[str]:
        """Why a run's end is not one more draw from these; empty if it may be."""
        number = max(map(len, self.values.values()), default=0)
        if number < MIN_SEEDS:
            return [f"interval: needs {MIN_SEEDS} recorded seeds of this set-up, found {number}"]
        found, end = [], _end(updates)
        for name, values in self.values.items():
            low, high = prediction_interval(values)
            value = end[name]
            if value is None or not low <= value <= high:
                found.append(
                    f"{name}: {value} is outside of [{low:.4g}, {high:.4g}], from {number} seeds"
                )
        return found


_END = (
    "final iterate_objective",
    "final iterate_return",
    "final iterate_cost",
    "violating iterates",
)


def _end(updates: Sequence[Update]) -> dict[str, Any]:
    last = updates[-1]
    violating = sum(bool(update.iterate_violates) for update in updates)
    return dict(
        zip(_END, (last.iterate_objective, last.iterate_return, last.iterate_cost, violating))
    )


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one more value would lie, with Student's t: mean +- t s sqrt(1 + 1/n), n >= 2.

    Both ends are widened by the tolerance: values that are all the same leave no other room.
    """
    n, mean = len(values), float(np.mean(values))
    width = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * np.std(values, ddof=1))
    width = width * math.sqrt(1 + 1 / n) + max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * abs(mean))
    return mean - width, mean + width


def compare(
    recorded: tuple[Run, Sequence[Update]],
    rerun: tuple[Run, Sequence[Update]],
    ends: Ends | None = None,
) -> Comparison:
    """The tier of a re-run, and how it differs from the record, timing aside.

    ends: of the recorded seeds of the same set-up; without it no end is within an interval.
    """
    (a, updates_a), (b, updates_b) = recorded, rerun
    provenance = list(differences(a.provenance, b.provenance, "provenance."))
    whole = list(differences(_summary(a, updates_a), _summary(b, updates_b)))
    numbers = _first_difference(updates_a, updates_b)
    found = [*whole, *numbers] or list(differences({"digest": a.digest}, {"digest": b.digest}))
    if not found:
        return Comparison(Tier.EXACT, provenance, [])
    if whole or not numbers or not other_machine(a.provenance, b.provenance):
        return Comparison(Tier.DIFFERENT, provenance, found)
    if reason := _start_beyond_tolerance(a.cell.task, updates_a, updates_b):
        return Comparison(Tier.DIFFERENT, provenance, [*found, reason])
    later = _beyond_tolerance(updates_a, updates_b, EVALUATED)
    if later is None:
        return Comparison(Tier.TOLERANCE, provenance, found)
    obstacles = (ends or Ends({})).obstacles(updates_b)
    tier = Tier.DIFFERENT if obstacles else Tier.INTERVAL
    return Comparison(tier, provenance, [*found, later, *obstacles])


def other_machine(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two provenances name different versions, CPUs or kernels; what is absent differs."""
    return any(_kernels(a, name) != _kernels(b, name) for name in MACHINE - {"blas"}) or not (
        # Which of its libraries a process has loaded depends on what it has done before.
        _kernels(a, "blas") <= _kernels(b, "blas") or _kernels(b, "blas") <= _kernels(a, "blas")
    )


def _kernels(provenance: Mapping[str, Any], name: str) -> Any:
    value = provenance.get(name, _ABSENT)
    if name == "blas":
        return {str(one) for one in value} if isinstance(value, list) else {str(value)}
    return value


def _start_beyond_tolerance(
    task: str, one: Sequence[Update], other: Sequence[Update]
) -> str | None:
    """What differs too much before the policy first changes: its evaluation, or the collection.

    How far a single update amplifies a difference is a matter of its agent and its length. Tasks
    that are not this package's own may amplify it within the first episode.
    """
    reason = _beyond_tolerance(one[:1], other[:1], MEASURED)
    if reason is None and task.startswith(CUSTOM_PREFIX):
        reason = _beyond_tolerance(one[1:2], other[1:2], COLLECTED)
    return reason


def _beyond_tolerance(
    one: Sequence[Update], other: Sequence[Update], fields: Sequence[str]
) -> str | None:
    """The first number that differs by more than the tolerance, or None."""
    for a, b in zip(one, other):
        for name in sorted(fields):
            left, right = getattr(a, name), getattr(b, name)
            if not _close(left, right):
                values = f"{left} against {right}"
                return f"update {a.update}: {name} is beyond the tolerance: {values}"
    return None


def _close(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


def _first_difference(one: Sequence[Update], other: Sequence[Update]) -> list[str]:
    for a, b in zip(one, other):
        place = f"update {a.update}"
        if fields := list(differences(_untimed(a), _untimed(b), f"{place}: ")):
            return [*fields, f"{place} is the first of those that differ"]
    return []


def _summary(run: Run, updates: Sequence[Update]) -> dict[str, Any]:
    # Whether the agent's source has changed is said before it is run.
    cell = run.cell.model_dump(exclude={"agent_source"})
    return {
        "cell": cell,
        "status": run.status,
        "updates": len(updates),
        "error": run.error,
    }


def _untimed(update: Update) -> dict[str, Any]:
    return update.model_dump(exclude=set(TIMING_FIELDS))


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One line per entry that differs, in the order of the entries; dictionaries entry by entry."""
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name, _ABSENT), b.get(name, _ABSENT)
        place = f"{prefix}{printable(name, 60)}"
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{place}.")
        elif left != right:
            yield f"{place}: {printable(left, 120)} against {printable(right, 120)}"
