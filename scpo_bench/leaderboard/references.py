"""The committed constants that scores are normalised by: per task the objective loss of the backup
and of the oracle.

A light module (no torch, no Gymnasium), so that leaderboards can be made wherever records can be
read. The constants themselves are computed by ``python -m scpo_bench.checks.oracle``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

REFERENCES_FILE = Path(__file__).with_name("references.json")


def load_references(path: Path = REFERENCES_FILE) -> dict[str, dict[str, Any]]:
    """task id -> {"objective": name, "backup": loss, "oracle": loss, ...}; empty where the file
    does not exist (yet).

    Raises ValueError naming the file and the field if it exists and does not hold that.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict):
        raise ValueError(
            f"{path}: tasks: expected an object of task ids, got {type(tasks).__name__}"
        )
    for task, entry in tasks.items():
        for field in ("backup", "oracle"):
            value = entry.get(field) if isinstance(entry, dict) else None
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                raise ValueError(
                    f"{path}: tasks.{task}.{field}: expected a finite number, got {value!r}"
                )
    return tasks


def gap_closed(objective: float, reference: dict[str, Any] | None) -> float:
    """(backup - objective) / (backup - oracle): 0 at the backup, 1 at the oracle, negative below
    the backup. Lower losses are better.

    nan without a reference, or where the oracle is not better than the backup (no gap to close).
    """
    if reference is None:
        return math.nan
    gap = float(reference["backup"]) - float(reference["oracle"])
    return (float(reference["backup"]) - objective) / gap if gap > 0 else math.nan
