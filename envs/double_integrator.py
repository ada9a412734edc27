"""The constrained double integrator: imitation of a malicious expert, and regulation with an MPC
reference.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from scpo_bench.contract import Array, BatchedTask, Components
from scpo_bench.envs.batched import BatchedTaskEnv, BatchedTaskVectorEnv

DT_S = 0.1
P_MAX_M = 1.0
V_MAX_M_S = 1.0
U_MAX_M_S2 = 1.0
# Exact zero-order-hold discretisation of p'' = u.
A = np.array([[1.0, DT_S], [0.0, 1.0]])
B = np.array([[0.5 * DT_S**2], [DT_S]])

# The regulation task's set-point lies near the edge of the backup's invariant set: far starts have
# to cross the whole range, where a good controller meets the velocity bound. Stage cost (p - p_ref,
# v) Q (p - p_ref, v)' + u R u, with cheap control.
SETPOINT_M = 0.6
STAGE_Q = np.diag([1.0, 0.1])
STAGE_R = np.array([[0.02]])
# The backup is an LQR for a ten to fifty times dearer control: gentle, hence safe far from the
# origin, and slow.
BACKUP_Q = np.diag([1.0, 0.1])
BACKUP_R = np.array([[1.0]])
# Start states fill this share of the backup's level set, so that the backup is strictly safe from
# all of them.
START_SHARE = 0.8
# Width [m] of the strip around p = 0 over which the malicious expert changes sides (a jump could
# not be imitated).
SWITCH_WIDTH_M = 0.1


@dataclass(frozen=True)
class LQR:
    """u = gain @ x with V(x) = x'Px; {V <= level} is invariant under it and admissible for every
    bound.

    gain: [1, 2]; P: [2, 2]; level: the largest value for which the set respects |p| <= 1, |v| <= 1
    and |u| <= 1.
    """

    gain: NDArray[np.float64]
    P: NDArray[np.float64]
    level: float


def lqr(Q: NDArray[np.float64], R: NDArray[np.float64]) -> LQR:
    """Discrete LQR and its largest admissible level set.

    P solves the discrete algebraic Riccati equation; over {x'Px <= c} the maximum of |h.x| is
    sqrt(c h'P^-1 h), so the largest c with |h_j.x| <= b_j for every bound j is min_j b_j^2 /
    (h_j'P^-1 h_j). V decreases along u = gain @ x, which is unclipped in the set, so the set is
    invariant.
    """
    from scipy.linalg import solve_discrete_are

    P = solve_discrete_are(A, B, Q, R)
    gain = -np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)
    rows = np.vstack([np.eye(2), gain])
    bounds = np.array([P_MAX_M, V_MAX_M_S, U_MAX_M_S2])
    level = float(np.min(bounds**2 / np.einsum("ij,ij->i", rows @ np.linalg.inv(P), rows)))
    return LQR(gain, P, level)


@functools.cache
def backup() -> LQR:
    """The stabilising backup controller of both tasks."""
    return lqr(BACKUP_Q, BACKUP_R)


@functools.cache
def sensible_gain() -> NDArray[np.float64]:
    """[1, 2]: the LQR gain for the regulation task's own stage cost, which the expert uses in its
    sensible half.
    """
    return lqr(STAGE_Q, STAGE_R).gain


class ModelPredictiveController:
    """min sum_t e'Qe + u'Ru + e_N'P e_N, e = x - (p_ref, 0), s.t. the dynamics, |p| <= 1, |v| <= 1,
    |u| <= 1: a QP, by OSQP.

    Condensed over the inputs, so that one matrix serves every state and only the bounds change
    between calls. The terminal weight P is the Riccati solution of the same stage cost. Source:
    Rawlings, Mayne, Diehl, Model Predictive Control, ch. 2.
    """

    def __init__(self, steps: int = 30) -> None:
        import osqp
        import scipy.sparse as sp

        self._steps = steps
        phi = np.vstack(
            [np.linalg.matrix_power(A, t + 1) for t in range(steps)]
        )  # x_{1..N} from x_0
        gamma = np.zeros((2 * steps, steps))  # and from u_{0..N-1}
        for t in range(steps):
            for s in range(t + 1):
                gamma[2 * t : 2 * t + 2, s : s + 1] = np.linalg.matrix_power(A, t - s) @ B
        weight = np.kron(np.eye(steps), STAGE_Q)
        weight[-2:, -2:] = lqr(STAGE_Q, STAGE_R).P
        hessian = 2 * (gamma.T @ weight @ gamma + STAGE_R[0, 0] * np.eye(steps))
        self._phi, self._linear = phi, 2 * gamma.T @ weight @ phi
        rows = sp.csc_matrix(np.vstack([gamma, np.eye(steps)]))
        # Tightened by more than OSQP's tolerance: a plan that touches a bound must not cross it.
        self._x_max = np.tile([P_MAX_M, V_MAX_M_S], steps) - 1e-5
        bound = np.concatenate([self._x_max, np.full(steps, U_MAX_M_S2)])
        self._solver = osqp.OSQP()
        self._solver.setup(
            P=sp.triu(sp.csc_matrix(hessian), format="csc"),
            q=np.zeros(steps),
            A=rows,
            l=-bound,
            u=bound,
            verbose=False,
            eps_abs=1e-7,
            eps_rel=1e-7,
            max_iter=20_000,
        )

    def action(self, p: float, v: float) -> float:
        """First input [m/s^2] of the optimal plan from (p [m], v [m/s]).

        RuntimeError if no plan respects the bounds.
        """
        x = np.array([p, v])
        error = np.array(
            [p - SETPOINT_M, v]
        )  # (p_ref, 0) is an equilibrium of A, so the error obeys the same dynamics
        drift = self._phi @ x
        u_max = np.full(self._steps, U_MAX_M_S2)
        lower = np.concatenate([-self._x_max - drift, -u_max])
        upper = np.concatenate([self._x_max - drift, u_max])
        # OSQP's warm start depends on what was solved before; a cold one makes the action a
        # function of the state alone.
        self._solver.update(q=self._linear @ error, l=lower, u=upper)
        self._solver.warm_start(x=np.zeros(self._steps), y=np.zeros(3 * self._steps))
        result = self._solver.solve(raise_error=False)
        if result.info.status not in ("solved", "solved inaccurate"):
            raise RuntimeError(
                f"MPC: no admissible plan from p={p:.4f} m, v={v:.4f} m/s (OSQP: {result.info.status})"
            )
        return float(np.clip(result.x[0], -U_MAX_M_S2, U_MAX_M_S2))

    def actions(self, p: Array, v: Array) -> NDArray[np.float64]:
        """:meth:`action` for arrays of states, one QP each."""
        flat = [self.action(float(a), float(b)) for a, b in zip(np.ravel(p), np.ravel(v))]
        return np.array(flat).reshape(np.shape(p))


Expert = Literal["malicious", "mpc"]


class DoubleIntegrator(BatchedTask):
    """State (p [m], v [m/s]), action (u [m/s^2],): the plant and constraints that both tasks share.
    """

    constraint_names = ("position", "velocity", "terminal")

    def __init__(self, horizon: int, noise_std: float) -> None:
        if not (isinstance(horizon, int | np.integer) and horizon >= 1):
            raise ValueError(f"horizon: expected a whole number of steps >= 1, got {horizon!r}")
        if not (np.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std: expected a finite number >= 0 [m/s^2], got {noise_std!r}")
        self.horizon = self.constraint_horizon = int(horizon)
        self.noise_std = float(noise_std)
        limit = np.finfo(np.float32).max  # the simulation does not confine the state
        self.observation_space = Box(-limit, limit, (2,), np.float32)
        self.action_space = Box(-U_MAX_M_S2, U_MAX_M_S2, (1,), np.float32)

    @functools.cached_property
    def mpc(self) -> ModelPredictiveController:
        """The safe expert of both tasks."""
        return ModelPredictiveController()

    def __getstate__(self) -> dict[str, Any]:
        # OSQP's solver holds C memory; it is rebuilt on first use instead of being pickled.
        return {k: v for k, v in self.__dict__.items() if k != "mpc"}

    def sample_starts(self, n: int, rng: np.random.Generator) -> Components:
        radius, angle = np.sqrt(rng.uniform(size=n)), rng.uniform(0, 2 * np.pi, size=n)
        return _ellipse_points(radius, angle)

    def design_starts(self, n: int) -> Components:
        # Half on the boundary, where a constraint is met first; half inside, on a sunflower spiral
        # (area-uniform).
        boundary = (n + 1) // 2
        inner = n - boundary
        i = np.arange(inner)
        radius = np.concatenate([np.ones(boundary), np.sqrt((i + 0.5) / max(inner, 1))])
        golden = np.pi * (3 - np.sqrt(5))
        angle = np.concatenate([2 * np.pi * np.arange(boundary) / boundary, golden * i])
        return _ellipse_points(radius, angle)

    def disturbance(self, n: int, rng: np.random.Generator) -> Components | None:
        return (rng.normal(0.0, self.noise_std, size=n),) if self.noise_std > 0 else None

    def next_state(
        self, state: Components, action: Components, disturbance: Components | None = None
    ) -> Components:
        p, v = state
        (u,) = self.clip_action(action)
        if disturbance is not None:
            u = u + disturbance[0]  # an unmeasured acceleration: it is not clipped
        return p + DT_S * v + (0.5 * DT_S**2) * u, v + DT_S * u

    def constraint_values(
        self, state: Components, action: Components, next_state: Components, last: bool
    ) -> Components:
        p, v = next_state
        position, velocity = abs(p) / P_MAX_M - 1.0, abs(v) / V_MAX_M_S - 1.0
        terminal = self.lyapunov(next_state) / backup().level - 1.0 if last else 0.0 * p - 1.0
        return position, velocity, terminal

    @staticmethod
    def lyapunov(state: Components) -> Array:
        """V(x) = x'Px of the backup: at most ``backup().level`` inside its invariant set."""
        (a, b), (_, d) = backup().P
        p, v = state
        return float(a) * p * p + float(2 * b) * p * v + float(d) * v * v

    def backup_gain(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return backup().gain, np.zeros(1)


def _ellipse_points(radius: NDArray[np.float64], angle: NDArray[np.float64]) -> Components:
    """Points of the start set {V <= START_SHARE * level}; radius 1 is its boundary."""
    lqr_ = backup()
    half_axes = np.linalg.cholesky(np.linalg.inv(lqr_.P) * lqr_.level * START_SHARE)
    points = half_axes @ np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    return points[0], points[1]


def malicious_action(p: Array, v: Array) -> Array:
    """The malicious expert: a good regulator where p < 0, full acceleration out of bounds (u = +1)
    where p > 0.
    """
    k_p, k_v = (float(k) for k in sensible_gain()[0])
    sensible = (k_p * p + k_v * v).clip(-U_MAX_M_S2, U_MAX_M_S2)
    malice = (0.5 + p / SWITCH_WIDTH_M).clip(0.0, 1.0)
    return (1.0 - malice) * sensible + malice * U_MAX_M_S2


class ImitationTask(DoubleIntegrator):
    """Reward: negative squared distance to the expert's action.

    Objective: that distance at the start states.
    """

    objective_name = "imitation loss at the start states"

    def __init__(
        self, horizon: int = 30, noise_std: float = 0.0, expert: Expert = "malicious"
    ) -> None:
        super().__init__(horizon, noise_std)
        if expert not in ("malicious", "mpc"):
            raise ValueError(f"expert: expected 'malicious' or 'mpc', got {expert!r}")
        self.expert = expert

    def label(self, state: Components) -> Components:
        return (self.mpc.actions(*state),) if self.expert == "mpc" else (malicious_action(*state),)

    def reward(self, state: Components, action: Components) -> Array:
        (u,), (target,) = self.clip_action(action), self.label(state)
        return -((u - target) ** 2)

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        return -self.reward(state, action), state[0] == state[0] if step == 0 else state[
            0
        ] != state[0]


class RegulationTask(DoubleIntegrator):
    """Reward: negative stage cost about the set-point. Objective: the mean stage cost."""

    objective_name = "mean stage cost"

    def __init__(self, horizon: int = 40, noise_std: float = 0.0) -> None:
        super().__init__(horizon, noise_std)

    def reward(self, state: Components, action: Components) -> Array:
        p, v = state
        (u,) = self.clip_action(action)
        error = p - SETPOINT_M
        return -(
            float(STAGE_Q[0, 0]) * error * error
            + float(STAGE_Q[1, 1]) * v * v
            + float(STAGE_R[0, 0]) * u * u
        )

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        return -self.reward(state, action), state[0] == state[0]


class DoubleIntegratorImitationEnv(BatchedTaskEnv):
    """A double integrator that learns from a malicious expert.

    Description
        A point mass p'' = u with a safe but timid backup controller, and an expert to imitate.
        Where p < 0 the expert regulates to the origin, better than the backup does; where p > 0 it
        accelerates out of bounds. Imitating it well is imitating it as far as the constraints
        allow. From the double-integrator experiment of SCPO (Cao, Borrelli, Joa, arXiv 2512.13788);
        the paper's text fixes no constants, those here are this project's.

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

    Reward
        -(u - u_E(x))^2, with u_E the expert's action at the state acted in.
        ``info["expert_action"]`` is the expert's action at the observation it comes with (``reset``
        included). ``info["objective_loss"]`` is the same squared distance, at the first step
        only: the imitation loss over the start states, which does not depend on where the policy
        then goes.

    Cost and constraints
        ``info["constraint_values"]`` = [|p| - 1, |v| - 1, V(x_T)/level - 1] after the step. The
        third is in force at the last step of the episode only (-1 before): the state must end where
        the backup can take over, in the invariant set {V(x) = x'Px <= level} of its LQR.
        ``info["cost"]`` = 1.0 if any value is > 0, else 0.0.

    Starting state
        Uniform over {V(x) <= 0.8 level}, from where the backup violates nothing, ever.

    Episode end
        Truncated after ``horizon`` steps; never terminated. The environment truncates itself,
        rather than ``TimeLimit``, because the terminal constraint needs the horizon.

    Arguments
        horizon: steps per episode (30). noise_std: standard deviation of the disturbance [m/s^2]
        (0). expert: "malicious", or "mpc" for the safe expert (one QP per label: slow).

    Version history
        v0: first release.
    """

    def __init__(
        self,
        horizon: int = 30,
        noise_std: float = 0.0,
        expert: Expert = "malicious",
        render_mode: None = None,
    ):
        super().__init__(ImitationTask(horizon, noise_std, expert), render_mode)


class DoubleIntegratorRegulationEnv(BatchedTaskEnv):
    """A double integrator to be regulated to a set-point within bounds.

    Description
        The same point mass, to be brought to p = 0.6 m quickly. Control is cheap in the reward and
        the way is long, so a good controller runs into the velocity and input bounds; the backup
        goes to the origin and stays there, safe and far from the set-point.
        :class:`ModelPredictiveController` is the reference ceiling.

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

    Reward
        -((p - 0.6)^2 + 0.1 v^2 + 0.02 u^2); ``info["objective_loss"]`` is its negative, at every
        step.

    Cost and constraints
        ``info["constraint_values"]`` = [|p| - 1, |v| - 1, V(x_T)/level - 1] after the step. The
        third is in force at the last step of the episode only (-1 before): the state must end where
        the backup can take over, in the invariant set {V(x) = x'Px <= level} of its LQR.
        ``info["cost"]`` = 1.0 if any value is > 0, else 0.0.

    Starting state
        Uniform over {V(x) <= 0.8 level}, from where the backup violates nothing, ever.

    Episode end
        Truncated after ``horizon`` steps; never terminated. The environment truncates itself,
        rather than ``TimeLimit``, because the terminal constraint needs the horizon.

    Arguments
        horizon: steps per episode (40). noise_std: standard deviation of the disturbance [m/s^2]
        (0).

    Version history
        v0: first release.
    """

    def __init__(self, horizon: int = 40, noise_std: float = 0.0, render_mode: None = None) -> None:
        super().__init__(RegulationTask(horizon, noise_std), render_mode)


class DoubleIntegratorImitationVectorEnv(BatchedTaskVectorEnv):
    """:class:`DoubleIntegratorImitationEnv`, ``num_envs`` at a time."""

    def __init__(
        self,
        num_envs: int = 1,
        horizon: int = 30,
        noise_std: float = 0.0,
        expert: Expert = "malicious",
        render_mode: None = None,
    ) -> None:
        super().__init__(ImitationTask(horizon, noise_std, expert), num_envs, render_mode)


class DoubleIntegratorRegulationVectorEnv(BatchedTaskVectorEnv):
    """:class:`DoubleIntegratorRegulationEnv`, ``num_envs`` at a time."""

    def __init__(
        self, num_envs: int = 1, horizon: int = 40, noise_std: float = 0.0, render_mode: None = None
    ) -> None:
        super().__init__(RegulationTask(horizon, noise_std), num_envs, render_mode)
