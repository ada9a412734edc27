"""Version 1 of the double integrator's imitation tasks: the paper's demonstrators and target.

The plant, its constraints and its start set are those of ``double_integrator``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from scpo_bench.contract import Array, Components
from scpo_bench.envs.batched import BatchedTaskEnv, BatchedTaskVectorEnv
from scpo_bench.envs.double_integrator import ImitationTask, start_set_points
from scpo_bench.envs.double_integrator_control import (
    backup,
    diverging_action,
    malicious_action,
    sensible_action,
)

# The backup acts alone within this share of its level set's value; outside of twice that share, a
# policy may add any action to it.
TARGET_SHARE = 0.02


class ImitationV1Task(ImitationTask):
    """Imitation with the backup acting alone near the target.

    starts: 0 for the whole start set, else the number of fixed initial states.
    """

    experts: ClassVar[dict[str, Callable[[Array, Array], Array]]] = {
        "malicious": malicious_action,
        "diverging": diverging_action,
        "lqr": sensible_action,
    }

    def __init__(
        self,
        horizon: int = 30,
        noise_std: float = 0.0,
        expert: str = "malicious",
        starts: int = 0,
    ) -> None:
        super().__init__(horizon, noise_std, expert)
        if not (isinstance(starts, int | np.integer) and starts >= 0):
            raise ValueError(f"starts: expected a whole number of states >= 0, got {starts!r}")
        self.starts = int(starts)
        self.convex_starts = self.starts == 0

    def _fixed(self) -> Components:
        """The fixed initial states, evenly spaced in angle on the boundary of the start set."""
        angle = 2 * np.pi * (np.arange(self.starts) + 0.5) / self.starts
        return start_set_points(np.ones(self.starts), angle)

    def sample_starts(self, n: int, rng: np.random.Generator) -> Components:
        if self.starts == 0:
            return super().sample_starts(n, rng)
        chosen = rng.integers(self.starts, size=n)
        return tuple(component[chosen] for component in self._fixed())

    def design_starts(self, n: int) -> Components:
        return super().design_starts(n) if self.starts == 0 else self._fixed()

    def held_out_starts(self, n: int) -> Components | None:
        if self.starts == 0:
            return None
        return tuple(np.resize(component, n) for component in self._fixed())

    def reference_states(self, n: int) -> Components:
        return super().design_starts(n)

    def backup_target(self) -> tuple[NDArray[np.float64], float]:
        return backup().P, TARGET_SHARE * backup().level


class DoubleIntegratorImitationV1Env(BatchedTaskEnv):
    """A double integrator that learns from a demonstrator, with a backup for the last metres.

    Description
        A point mass p'' = u with a safe but timid backup controller, and an expert to imitate as
        far as the constraints allow. After the double-integrator experiment of SCPO (Cao, Borrelli,
        Joa, arXiv 2512.13788).

        The paper's (as its public page shows it; the manuscript's constants are not public): a
        frozen backup plus a residual that starts at zero; near the target the backup acts alone; an
        unsafe demonstrator, a diverging proportional controller, and a safe one, an LQR; 3 initial
        states. Ours: every constant; a backup that is an LQR instead of a proportional controller,
        so that its level set is known; the malicious demonstrator, which is sensible in one half
        of the state space; the whole start set by default.

    Observation space: ``Box(2)``, unbounded, float32
        ===  ==============  =========  =====
        0    p, position     |p| <= 1   m      (constraint, not a limit of the simulation)
        1    v, velocity     |v| <= 1   m/s    (constraint, not a limit of the simulation)
        ===  ==============  =========  =====

    Action space: ``Box(-1, 1, (1,))``, float32
        0: acceleration u [m/s^2]; values outside are clipped.

    Dynamics
        Exact zero-order hold at 0.1 s: p' = p + 0.1 v + 0.005 u, v' = v + 0.1 u. ``noise_std`` adds
        an unmeasured, normally distributed acceleration to u.

    Policy
        An agent that starts at the backup acts by backup(x) + s(x) residual(x). With t = V(x) /
        (0.02 level) - 1 cut to [0, 1], s = 3 t^2 - 2 t^3: the backup is alone for V <= 0.02 level,
        and s = 1 from V = 0.04 level on (``backup_target``, ``policies.TargetBackup``).

    Reward
        -(u - u_E(x))^2, with u_E the expert's action at the state acted in.
        ``info["expert_action"]`` is the expert's action at the observation it comes with (``reset``
        included). ``info["objective_loss"]`` is the same squared distance, at the first step
        only: the imitation loss over the start states.

    Cost and constraints
        ``info["constraint_values"]`` = [|p| - 1, |v| - 1, V(x_T)/level - 1] after the step. The
        third is in force at the last step of the episode only (-1 before): the state must end where
        the backup can take over, in the invariant set {V(x) = x'Px <= level} of its LQR.
        ``info["cost"]`` = 1.0 if any value is > 0, else 0.0.

    Starting state
        Uniform over {V(x) <= 0.8 level}, from where the backup violates nothing, ever; or one of
        ``starts`` fixed states on its boundary, evenly spaced in angle.

    Episode end
        Truncated after ``horizon`` steps; never terminated.

    Arguments
        horizon: steps per episode (30). noise_std: standard deviation of the disturbance [m/s^2]
        (0). expert: "malicious" (regulates where p < 0, accelerates out of bounds where p > 0),
        "diverging" (u = 2 p, saturated: leaves the bounds), "lqr" (safe, faster than the backup) or
        "mpc" (safe, to the set-point of the regulation task; one QP per label: slow). starts: 0 for
        the whole start set (default), n >= 1 for n fixed initial states.

    Version history
        v1: further experts, fixed initial states, the backup alone near the target. v0:
        ``DoubleIntegratorImitationEnv``. ``scpo_bench/DoubleIntegratorDiverging-v1`` is this task
        with expert "diverging".
    """

    def __init__(self, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(ImitationV1Task(**arguments), render_mode)


class DoubleIntegratorImitationV1VectorEnv(BatchedTaskVectorEnv):
    """:class:`DoubleIntegratorImitationV1Env`, ``num_envs`` at a time."""

    def __init__(self, num_envs: int = 1, render_mode: None = None, **arguments: Any) -> None:
        super().__init__(ImitationV1Task(**arguments), num_envs, render_mode)
