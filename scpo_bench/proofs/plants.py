"""What a proof needs to know of a task: its dynamics, constraints and start set.

States are in coordinates y in which the set S, whose invariance makes a policy safe for ever, is
the unit ball: the double integrator's {V <= level}, the regression's interval of inputs. Start
states are {|y| <= start}.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import BatchedTask, Floats
from scpo_bench.envs.double_integrator import START_SHARE, DoubleIntegrator
from scpo_bench.envs.double_integrator_control import P_MAX_M, U_MAX_M_S2, V_MAX_M_S, A, B, backup
from scpo_bench.envs.harmful_regression import RegressionTask
from scpo_bench.errors import UserError
from scpo_bench.proofs.policy import RAMP_MARGIN, Policy, rounding_error


@dataclass(frozen=True)
class LinearPlant:
    """y' = A y + B clip(u), |clip(u)| <= u_max, with the constraints |H y| <= 1 and V = |y|^2.

    A: [2, 2]; B: [2]; H: [rows, 2]; names: of the rows, then of V(y_T) <= 1 at the horizon. M: the
    state is x = M y. start: radius of the start set.
    """

    task: BatchedTask
    M: Floats
    A: Floats
    B: Floats
    H: Floats
    names: tuple[str, ...]
    u_max: float
    horizon: int
    start: float

    @property
    def observed(self) -> Floats:
        """A bound [2] on the states that proofs speak of: those within the constraints."""
        return np.array([P_MAX_M, V_MAX_M_S])

    def safe_actions(self, y: Floats) -> tuple[Floats, Floats]:
        """(lo, hi) [N]: the actions u for which |A y + B u| <= 1, for y [N, 2].

        The roots of a quadratic in u, a u^2 + 2 (B . A y) u + |A y|^2 - 1 with a = |B|^2. Its
        discriminant is a - (B x A y)^2, so that hi is concave and lo convex in y. (inf, -inf)
        where there are none. Infinite bounds are for the caller: those beyond +-u_max are met by
        every action that is applied.
        """
        forward = y @ self.A.T
        a, along = self.B @ self.B, forward @ self.B
        across = self.B[0] * forward[:, 1] - self.B[1] * forward[:, 0]
        discriminant = a - across**2
        root = np.sqrt(np.maximum(discriminant, 0.0))
        none = discriminant < 0
        low, high = (-along - root) / a, (-along + root) / a
        return np.where(none, np.inf, low), np.where(none, -np.inf, high)


@dataclass(frozen=True)
class Regression:
    """Inputs x = M y, |y| <= 1, whose predictions have to stay within [-bound, bound]."""

    task: BatchedTask
    M: Floats
    bound: float
    u_max: float
    names: tuple[str, ...]
    start: float = 1.0

    @property
    def observed(self) -> Floats:
        return np.abs(self.M).sum(axis=1)

    def safe_actions(self, y: Floats) -> tuple[Floats, Floats]:
        """As :meth:`LinearPlant.safe_actions`."""
        bound = np.full(len(y), self.bound)
        return -bound, bound


Plant = LinearPlant | Regression


def plant_of(task: BatchedTask | None) -> Plant:
    """What a proof needs to know of ``task``. UserError where it is not covered."""
    if isinstance(task, RegressionTask):
        bound, u_max = task.bound, float(task.action_space.high[0])
        return Regression(task, np.array([[task.input_max]]), bound, u_max, task.constraint_names)
    if not isinstance(task, DoubleIntegrator):
        name = "a task without pure-function dynamics" if task is None else type(task).__name__
        raise UserError(
            f"proof: the double integrator and regression tasks can be proved, got {name}"
        )
    if task.noise_std > 0:
        raise UserError(
            f"proof: nothing holds for every normal disturbance; noise_std: expected 0, got "
            f"{task.noise_std}"
        )
    # V(x) = x'Px = level |y|^2 for x = M y.
    M = np.linalg.inv(np.linalg.cholesky(backup().P).T) * np.sqrt(backup().level)
    inverse = np.linalg.inv(M)
    return LinearPlant(
        task,
        M,
        inverse @ A @ M,
        inverse @ B[:, 0],
        M / np.array([[P_MAX_M], [V_MAX_M_S]]),
        task.constraint_names,
        U_MAX_M_S2,
        task.horizon,
        float(np.sqrt(START_SHARE)),
    )


@dataclass(frozen=True)
class Problem:
    """A plant and a policy for it in the coordinates y.

    error, ramp_error: of its float32 action, as from ``rounding_error``.
    """

    plant: Plant
    policy: Policy
    error: float
    ramp_error: float = 0.0

    def errors(self, centre: Floats, radius: Floats) -> Floats:
        """A bound [N] on the error of the float32 action over N boxes."""
        errors = np.full(len(centre), self.error)
        if self.policy.gate is not None:
            P, level = self.policy.gate
            value = np.einsum("ni,ij,nj->n", centre, P, centre)
            least = value - ((np.abs(2 * centre @ P) + radius @ np.abs(P)) * radius).sum(axis=1)
            errors[least < 2 * level * (1 + RAMP_MARGIN)] += self.ramp_error
        return errors


def problem(plant: Plant, policy: Policy) -> Problem:
    """policy: as a function of the state x."""
    return Problem(plant, policy.in_coordinates(plant.M), *rounding_error(policy, plant.observed))


def corners(n: int) -> NDArray[np.float64]:
    """[2^n, n], the corners of the unit box."""
    return np.stack(np.meshgrid(*[[-1.0, 1.0]] * n, indexing="ij"), axis=-1).reshape(-1, n)
