"""The contents of a record: the cell, the run, and one :class:`Update` per policy update."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
# Fields that cells got after the first records: at these values they are left out of the key, so
# that those records keep theirs.
_ADDED_FIELDS = {
    **{"margin": 0.0, "budget": "interaction", "evaluation_starts": "held-out"},
    "agent_source": None,
}
TIMING_FIELDS = frozenset({"wall_time_s", "steps_per_s"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def violates(cost: float, worst: float | None, limit: float) -> bool:
    """Whether a policy whose evaluation gave ``cost`` per episode and ``worst`` violates ``limit``.

    With limit 0 any signed constraint value > 0 counts, or any cost where the task has none.
    """
    if limit == 0 and worst is not None:
        return worst > 0
    return cost > limit


class Cell(_Strict):
    """What defines a run.

    Two cells with the same key give the same record on the same versions and machine type.
    """

    agent: str
    """Name in the registry, module:Class, or file.py:Class."""
    agent_source: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the file that defines an agent which is not this package's."""
    task: str
    """Gymnasium id."""
    seed: int = Field(ge=0)
    steps: int = Field(ge=1)
    """Budget of simulation steps."""
    budget: Literal["interaction", "total"] = "interaction"
    """What the budget counts: interaction steps alone, or also those of constraint evaluation."""
    start: Literal["backup", "zero", "random"] = "random"
    num_envs: int = Field(1, ge=1)
    evaluation_episodes: int = Field(10, ge=1)
    """Held-out episodes per deterministic evaluation."""
    evaluation_interval: int = Field(1, ge=1)
    """Evaluate after every this many updates (and after the last one)."""
    cost_limit: float = Field(ge=0)
    """d, in cost units per episode. 0: any violated constraint value counts."""
    margin: float = Field(default=0.0, ge=0)
    """Safety margin in training, in units of the constraint values, >= 0.

    A step costs the agent 1 if a constraint value exceeds -margin; policies are judged at 0.
    """
    evaluation_starts: Literal["held-out", "tuning"] = "held-out"
    """Where policies are evaluated: on the held-out starts, or on others kept for tuning."""
    normalize: bool = False
    """Normalise observations for the agent with running statistics (SB3's VecNormalize)."""
    env: dict[str, Any] = {}
    """Keyword arguments of the environment."""
    config: dict[str, Any] = {}
    """What the suite sets of the agent's configuration."""

    def key(self) -> str:
        """Hash of exactly the fields above and the schema version. 64 hexadecimal digits."""
        fields = self.model_dump(mode="json")
        for name, value in _ADDED_FIELDS.items():
            if fields[name] == value:
                del fields[name]
        return _sha256([canonical({"schema": SCHEMA_VERSION, **fields})])


class Update(_Strict):
    """One update of the policy. Update 0 is the start policy: evaluated, nothing collected yet.

    Counters are cumulative. ``None`` means not measured: no episode ended, no signed constraint
    values, no evaluation here.
    """

    update: int = Field(ge=0)
    interaction_steps: int = Field(ge=0)
    probe_steps: int = Field(ge=0)
    episodes: int = Field(ge=0)
    """Episodes that ended in this update's data collection; the next four describe them."""
    return_mean: float | None = None
    cost_mean: float | None = None
    cost_max: float | None = None
    cost_sum: float = 0.0
    """Cost of all steps of this update's data collection, finished episodes or not."""
    violating_episodes: int = Field(0, ge=0)
    """Of these episodes, those with cost > limit."""
    violating_steps: int = Field(0, ge=0)
    """Steps of this collection with cost > 0."""
    worst_constraint_value: float | None = None
    """Largest signed constraint value of this collection."""
    iterate_return: float | None = None
    """The new policy, evaluated deterministically on held-out starts: mean return ..."""
    iterate_cost: float | None = None
    """... mean cost per episode ..."""
    iterate_worst_constraint_value: float | None = None
    """... largest signed constraint value of any step ..."""
    iterate_objective: float | None = None
    """... mean of info["objective_loss"], where the task has an objective (lower is better) ..."""
    iterate_violates: bool | None = None
    """... and whether that violates the limit, by :func:`violates`."""
    probe_violations: int = Field(0, ge=0)
    """Candidate policies that violated while being evaluated, cumulative."""
    diagnostics: dict[str, float | None] = {}
    """The agent's own numbers."""
    wall_time_s: float = Field(0.0, ge=0)
    steps_per_s: float = Field(0.0, ge=0)


class Run(_Strict):
    """run.json: what was asked, where and when it ran, and how it ended."""

    schema_version: Literal[1] = 1
    suite: str
    key: str
    cell: Cell
    status: Literal["running", "finished", "failed", "interrupted"]
    error: str | None = None
    updates: int = 0
    digest: str | None = None
    """Of a finished run: hash of its updates, timing aside."""
    resolved_config: dict[str, Any] = {}
    """The agent's configuration with every default filled in; ``cell.config`` holds what the suite
    set. Informative, but for the limit and the margin, which are compared with the cell's.
    """
    provenance: dict[str, Any] = {}
    """Package versions, git commit, CPU, threads. Informative: as the author states them."""
    started: str = ""
    ended: str | None = None
    """Informative, like the time that the updates took: no number of a table depends on them."""


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        digest.update(b"\n")
    return digest.hexdigest()


def digest(updates: Iterable[Update]) -> str:
    """Hash of the updates without their timing fields."""
    return _sha256(
        canonical(u.model_dump(mode="json", exclude=set(TIMING_FIELDS))) for u in updates
    )
