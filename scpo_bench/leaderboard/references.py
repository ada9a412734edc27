"""The committed constants that scores are normalised by.

They are, per task, the objective loss of the backup and of the oracle, as computed by ``python -m
scpo_bench.checks.oracle``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from scpo_bench.errors import UserError, first_problem

REFERENCES_FILE = Path(__file__).with_name("references.json")


class _Reference(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    backup: FiniteFloat
    oracle: FiniteFloat


class _File(BaseModel):
    tasks: dict[str, _Reference]


def load_references(path: Path = REFERENCES_FILE) -> dict[str, dict[str, Any]]:
    """task id -> {"backup": loss, "oracle": loss, ...}; empty where the file does not exist.

    Raises UserError naming the file and the field if the file does not hold that.
    """
    try:
        content = _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    return content.model_dump()["tasks"]


def gap_closed(objective: float, reference: dict[str, Any] | None) -> float:
    """(backup - objective) / (backup - oracle): 0 at the backup, 1 at the oracle.

    Losses, so lower is better, and negative means worse than the backup. nan without a reference,
    or where the oracle is not better than the backup (no gap to close).
    """
    if reference is None:
        return math.nan
    gap = reference["backup"] - reference["oracle"]
    return (reference["backup"] - objective) / gap if gap > 0 else math.nan
