"""A certified update that exceeded its bound, and everything needed to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scpo_bench.contract import Floats
from scpo_bench.errors import UserError, first_problem
from scpo_bench.records.plain_files import read_file, write_atomically
from scpo_bench.scpo.projection import Certificate, project
from scpo_bench.scpo.smoothness import curvatures

MAX_COUNTEREXAMPLE_BYTES = 16 << 20
# Realised values this far above their bound are not called a breach: g itself is computed in
# floating point.
ROUNDING = 1e-9

Evaluate = Callable[[Floats], Floats]  # w [M, d] -> g [M, k]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Step(NamedTuple):
    """A certified step. z: [m]; L, bound, realised: [k]."""

    z: Floats
    L: Floats
    bound: Floats
    realised: Floats

    @property
    def breached(self) -> bool:
        return bool((self.realised > self.bound + ROUNDING).any())


def certify(
    evaluate: Evaluate,
    w: Floats,
    basis: Floats,
    proposal: Floats,
    radius: float,
    trust_radius: float,
    constants: Callable[[Floats], Sequence[Floats]],
) -> list[Step]:
    """The certified step for each L [k] that ``constants`` makes of the second differences [k].

    Empty if w [d] is unsafe: then nothing is certified.
    """
    values = evaluate(np.concatenate([w[None], w + radius * basis.T, w - radius * basis.T]))
    g, (plus, minus) = values[0], np.split(values[1:], 2)
    if (g > 0).any():
        return []
    slopes = (plus - minus).T / (2 * radius)
    m = basis.shape[1]
    lengths = np.full(m, radius)
    length = float(np.linalg.norm(proposal))
    target = basis.T @ (proposal * min(1.0, trust_radius / max(length, 1e-300)))
    Ls = constants(curvatures(g, plus, minus, lengths).max(axis=1))
    certificates = [Certificate(g, slopes, L[:, None] * (0.5 * lengths), L, np.eye(m)) for L in Ls]
    steps = [project(certificate, target).z for certificate in certificates]
    realised = evaluate(w + np.stack(steps) @ basis.T)
    return [
        Step(z, L, certificate.bound(z), row)
        for z, L, certificate, row in zip(steps, Ls, certificates, realised)
    ]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Setting(_Strict):
    """How an update was certified.

    factor: on L, which is the known one, or what second differences along the probes show.
    """

    factor: NotNegative
    radius: Positive
    directions: str


class Counterexample(_Strict):
    """Everything that repeats a breach.

    Certify at w [d] along ``basis`` [d, m], project ``proposal`` [d], evaluate: bound [k] and
    realised [k].
    """

    format: Literal[1] = 1
    task: str
    seed: Annotated[int, Field(ge=0)]
    update: int
    setting: Setting
    w: list[float]
    basis: list[list[float]]
    proposal: list[float]
    L: list[NotNegative]
    trust_radius: NotNegative
    step_norm: float
    bound: list[float]
    realised: list[float]

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        d, m = len(self.w), len(self.basis[0]) if self.basis else 0
        vectors_fit = len(self.basis) == len(self.proposal) == d
        matrix_fits = m > 0 and all(len(row) == m for row in self.basis)
        if not (vectors_fit and matrix_fits and len(self.L) == len(self.bound)):
            raise ValueError("the lengths of w, basis, proposal, L and bound do not fit together")
        if len(self.realised) != len(self.bound):
            raise ValueError("realised and bound have different lengths")
        return self

    @property
    def excess(self) -> float:
        return float(np.max(np.subtract(self.realised, self.bound)))

    def repeat(self, evaluate: Evaluate, proposal: Floats) -> Step:
        """Its update, with another proposal."""
        w, basis, L = np.array(self.w), np.array(self.basis), np.array(self.L)
        steps = certify(
            evaluate, w, basis, proposal, self.setting.radius, self.trust_radius, lambda _: [L]
        )
        if not steps:
            raise UserError("counterexample: w is unsafe, nothing is certified there")
        return steps[0]


def smallest(found: Counterexample, evaluate: Evaluate) -> Counterexample:
    """``found`` with its proposal halved for as long as it still breaches."""
    for _ in range(20):
        proposal = np.array(found.proposal) / 2
        step = found.repeat(evaluate, proposal)
        if not step.breached:
            break
        changes = {
            "proposal": proposal.tolist(),
            "step_norm": float(np.linalg.norm(step.z)),
            "bound": step.bound.tolist(),
            "realised": step.realised.tolist(),
        }
        found = found.model_copy(update=changes)
    return found


def save(found: Counterexample, path: Path) -> None:
    """As JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, found.model_dump_json().encode())


def load(path: Path) -> Counterexample:
    """A saved counterexample, checked. Raises UserError if the file is not one."""
    try:
        content = read_file(path, MAX_COUNTEREXAMPLE_BYTES, follow=True)
        found = Counterexample.model_validate_json(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise UserError(
            f"{path}: not a counterexample of `scpo-bench falsify`: {first_problem(error)}"
        ) from None
    return found
