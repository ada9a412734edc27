"""proof.json of a run folder: what ``scpo-bench prove`` found out about the run's policies.

It is no part of the record: it says to which record it belongs, and whoever reads it compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scpo_bench.errors import printable
from scpo_bench.records.files import RecordError, read_claim, write_atomically
from scpo_bench.records.schema import Run

PROOF_FILE = "proof.json"
MAX_PROOF_BYTES = 20_000
_DIGEST = Field(pattern="^[0-9a-f]{64}$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ViolatingStart(_Strict):
    """A start state from which the policy of an update violates a constraint."""

    update: int = Field(ge=0)
    """The first update that deployed this policy; 0 is the start policy."""
    state: list[float] = Field(max_length=100)
    constraint: str = Field(max_length=100)
    value: float = Field(gt=0)


class Proof(_Strict):
    """How many of a run's distinct policies are proved safe from every start state."""

    proof_version: Literal[1] = 1
    key: str = _DIGEST
    """Of the record ..."""
    digest: str = _DIGEST
    """... that it belongs to."""
    scpo_bench: str = Field(max_length=100)
    """Version of this package that proved it."""
    distinct: int = Field(ge=1, le=1_000_000)
    """Policies of updates 1 and later; one that is deployed again counts once."""
    proved: int = Field(ge=0)
    violating: int = Field(ge=0)
    undecided: int = Field(ge=0)
    counterexample: ViolatingStart | None = None
    """Of the first violating policy."""
    cells: int = Field(ge=0)
    seconds: float = Field(ge=0)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.proved + self.violating + self.undecided != self.distinct:
            raise ValueError("proved + violating + undecided is not distinct")
        if (self.violating > 0) != (self.counterexample is not None):
            raise ValueError("a counterexample belongs to violating policies, and to these only")
        return self


def proof_lines(proof: Proof) -> list[str]:
    """The result for people: one line, and one more for a counterexample."""
    lines = [
        f"{proof.proved} of {proof.distinct} distinct policies proved safe from every start state, "
        f"{proof.violating} violating, {proof.undecided} undecided "
        f"({proof.cells:,} cells, {proof.seconds:.0f} s)"
    ]
    if (found := proof.counterexample) is not None:
        state = ", ".join(f"{value:.6g}" for value in found.state)
        worst = f"constraint '{printable(found.constraint)}' has value {found.value:.4g}"
        lines.append(f"update {found.update} violates from start state ({state}): {worst}")
    return lines


def write_proof(folder: Path, proof: Proof) -> None:
    text = json.dumps(proof.model_dump(mode="json"), indent=1, allow_nan=False)
    write_atomically(folder / PROOF_FILE, text.encode() + b"\n")


def read_proof(folder: Path, run: Run) -> Proof | None:
    """The proof that belongs to a run; None if there is none.

    Raises RecordError naming what is wrong with it, or that it belongs to another record.
    """
    path = folder / PROOF_FILE
    proof = read_claim(path, Proof, MAX_PROOF_BYTES)
    if proof is None:
        return None
    if (proof.key, proof.digest) != (run.key, run.digest):
        raise RecordError(f"{path}: belongs to another record")
    return proof
