"""Which runs a table may compare: those of one task that differ in agent and seed alone.

The one rule for tables, pages, bundles and submissions. A suite plans the conditions of a task, and
its seeds; the agent and its configuration are free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scpo_bench.errors import printable
from scpo_bench.records.schema import Cell, canonical

FREE = frozenset({"agent", "agent_source", "config", "seed", "task"})
"""Fields of a cell in which runs of one table differ; all others are its conditions."""
CONDITIONS = tuple(name for name in Cell.model_fields if name not in FREE)


def conditions(cell: Cell) -> dict[str, Any]:
    """The fields of a cell that all runs of a task's table share."""
    return {name: getattr(cell, name) for name in CONDITIONS}


@dataclass(frozen=True)
class Plan:
    """What the tables of a suite hold: per task, the conditions, and the seeds if it fixes them."""

    tasks: Mapping[str, dict[str, Any]]
    seeds: Mapping[str, frozenset[int]] | None = None

    @classmethod
    def of(cls, planned: Iterable[Cell]) -> Plan:
        """Of the cells that a suite file plans."""
        tasks: dict[str, dict[str, Any]] = {}
        seeds: dict[str, set[int]] = {}
        for cell in planned:
            tasks.setdefault(cell.task, conditions(cell))
            seeds.setdefault(cell.task, set()).add(cell.seed)
        return cls(tasks, {task: frozenset(own) for task, own in seeds.items()})

    @classmethod
    def most_common(cls, recorded: Iterable[Cell]) -> Plan:
        """Of a suite that no file plans: per task, what most of its runs have in common."""
        found: dict[str, Counter[bytes]] = {}
        first: dict[bytes, dict[str, Any]] = {}
        for cell in recorded:
            own = conditions(cell)
            text = canonical(own)
            first.setdefault(text, own)
            found.setdefault(cell.task, Counter())[text] += 1
        # Of equally many, the same ones whatever the order of the folders.
        chosen = {
            task: max(counts, key=lambda text: (counts[text], text))
            for task, counts in found.items()
        }
        return cls({task: first[text] for task, text in chosen.items()})

    def difference(self, cell: Cell) -> str | None:
        """Why the cell's run cannot stand in the table of its task; None if it can."""
        planned = self.tasks.get(cell.task)
        if planned is None:
            return "task: the suite does not have it"
        for name, value in planned.items():
            if (own := getattr(cell, name)) != value:
                return f"{name}: {printable(own, 60)}, planned is {printable(value, 60)}"
        if self.seeds is not None and cell.seed not in self.seeds[cell.task]:
            return "seed: not among the planned ones"
        return None
