"""tuning.json beside an agent's runs: how the configuration that a suite gives it was found.

It is no part of a record. Whoever reads it compares it with the cell that it is said to belong to.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from scpo_bench.records.files import read_claim, write_atomically
from scpo_bench.records.schema import Cell

STUDY_FILE = "tuning.json"
MAX_STUDY_BYTES = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Trial(_Strict):
    """One configuration, tried with every seed of the study."""

    config: dict[str, JsonValue]
    """The fields that the study set; none in trial 0, the suite's configuration as it was."""
    violating_share: float | None = Field(default=None, ge=0, le=1)
    """Of the evaluated iterates of all seeds; None where a run failed."""
    loss: float | None = None
    """Mean over seeds of the final iterate's objective or, where the task has none, negated return;
    None where a run failed.
    """

    def merit(self) -> tuple[float, float]:
        """Smaller is better: first the share of violating iterates, then the loss."""
        if self.violating_share is None or self.loss is None:
            return (2.0, 0.0)
        return (self.violating_share, self.loss)


class Study(_Strict):
    """The trials of one agent on one task."""

    study_version: Literal[1] = 1
    cell: Cell
    """Of trial 0, with the first seed."""
    seeds: int = Field(ge=1, le=1000)
    trials: list[Trial] = Field(min_length=1, max_length=10_000)
    sampler: str = Field(max_length=100)
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _begins_with_the_suite(self) -> Self:
        if self.trials[0].config:
            raise ValueError("trial 0 is the suite's own configuration, and sets nothing")
        return self

    def best(self) -> Trial:
        """The trial with the smallest merit, the earliest of equal ones."""
        return min(self.trials, key=Trial.merit)

    def found(self, cell: Cell) -> bool:
        """Whether ``cell`` is configured as the best trial was: same agent, task and settings.

        Numbers are compared in three digits, as many as ``tune`` prints for the suites file.
        """
        own = (self.cell.agent, self.cell.task, self.cell.env, self.cell.margin)
        best = {**self.cell.config, **self.best().config}
        return (
            own == (cell.agent, cell.task, cell.env, cell.margin)
            and best.keys() == cell.config.keys()
            and all(_equal(value, cell.config[name]) for name, value in best.items())
        )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=6e-3)
    return bool(a == b)


def write_study(folder: Path, study: Study) -> None:
    text = json.dumps(study.model_dump(mode="json"), indent=1, allow_nan=False)
    write_atomically(folder / STUDY_FILE, text.encode() + b"\n")


def read_study(folder: Path) -> Study | None:
    """The study in ``folder``; None if there is none. Raises RecordError naming what is wrong."""
    return read_claim(folder / STUDY_FILE, Study, MAX_STUDY_BYTES)
