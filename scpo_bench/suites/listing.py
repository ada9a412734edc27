"""The tables of `scpo-bench list`: a header, then one row of text per task, agent or suite."""

from __future__ import annotations

from collections.abc import Iterator

from scpo_bench.suites import registry
from scpo_bench.suites.schema import Benchmarks

Rows = Iterator[tuple[str, ...]]


def tasks() -> Rows:
    yield "family", "task", "horizon", "cost limit", ""
    family = ""
    for task in registry.tasks().values():
        shown, family = task.family if task.family != family else "", task.family
        yield shown, task.id, str(task.horizon), f"{task.cost_limit:g}", task.summary


def agents() -> Rows:
    yield "agent", "what it is", "sees of the constraints", "needs", "source"
    for agent in registry.agents().values():
        needs = ["labels"] * agent.needs_labels + ["batched task"] * agent.needs_batched
        yield agent.name, agent.summary, agent.sees, ", ".join(needs), agent.source


def suites(benchmarks: Benchmarks) -> Rows:
    yield "suite", "tasks", "agents", "seeds", "description"
    for name, suite in benchmarks.suites.items():
        agents = dict.fromkeys(agent for entry in suite.tasks for agent in entry.agents)
        counts = [entry.seeds for entry in suite.tasks]
        seeds = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
        yield name, str(len(suite.tasks)), " ".join(agents), seeds, suite.description
