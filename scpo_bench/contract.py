"""What tasks, agents and the harness agree on, where they meet.

Tasks report ``info["cost"]`` >= 0 at every step and, where they have them, signed
``info["constraint_values"]`` (violated where > 0). Agents have the surface of a Stable-Baselines3
algorithm. The harness measures at the environment boundary; an agent reports nothing about its own
safety.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

Floats = NDArray[np.float64]
# A wrapper that only records.
MONITOR = "stable_baselines3.common.monitor:Monitor"
# A NumPy array or a torch tensor: both have the operators and the .clip() that the tasks use.
Array = Any
# One array per state, action or constraint component, all of one shape.
Components = tuple[Array, ...]


class Agent(Protocol):
    """The surface of a Stable-Baselines3 ``BaseAlgorithm`` that this package relies on.

    It is constructed as ``Agent(policy, env, seed=..., **config)``. Three attributes are optional:
    ``diagnostics`` (a dictionary of floats), numbers about its last update, which are recorded;
    ``Config``, the dataclass of its configuration, whose field ``cost_limit`` is set to the cell's;
    and ``config``, an instance of it, which is recorded.
    """

    num_timesteps: int

    def learn(
        self,
        total_timesteps: int,
        callback: BaseCallback | None = None,
        *,
        reset_num_timesteps: bool = True,
    ) -> object:
        """Train for ``total_timesteps`` interaction steps and call ``callback`` as SB3 does."""
        ...

    def predict(
        self, observation: NDArray[Any], *, deterministic: bool = False
    ) -> tuple[NDArray[Any], object]:
        """(actions [n, ...], state) for observations [n, ...]."""
        ...

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """The wrapper whose statistics normalise this agent's observations, if it has one."""
        ...

    def save(self, path: Path) -> None:
        """Write the agent to a file."""
        ...

    @classmethod
    def load(cls, path: Path) -> Self:
        """The agent that ``save`` wrote, ready to predict."""
        ...


@dataclass
class ProbeMeter:
    """What constraint evaluation has cost so far.

    steps: environment steps; violations: evaluated policies that violated a constraint.
    """

    steps: int = 0
    violations: int = 0


def task_of(env: VecEnv | None) -> BatchedTask | None:
    """The batched task of a vector environment; None where it has none.

    Its environments may be a native vector environment or be stepped one by one. In the latter case
    they must be registered, and no wrapper but SB3's Monitor may stand between them and the task.
    """
    if env is None:
        return None
    env = env.unwrapped
    if hasattr(env, "task"):
        return env.task
    if not env.has_attr("batched_task"):
        return None
    spec = env.get_attr("spec", 0)[0]
    if spec is None or any(w.entry_point != MONITOR for w in spec.additional_wrappers):
        return None
    return env.get_attr("batched_task", 0)[0]


def probe_meter_of(env: VecEnv | None) -> ProbeMeter:
    """The meter of the harness's recording wrapper; a new one outside of the harness."""
    while env is not None:
        meter = getattr(env, "probe_meter", None)
        if isinstance(meter, ProbeMeter):
            return meter
        env = getattr(env, "venv", None)
    return ProbeMeter()


class BatchedTask:
    """A task as pure functions.

    All arrays, arguments and results, have the shape of the batch, whatever that is.

    Attributes
    ----------
    observation_space, action_space:
        Box spaces with one entry per component.
    horizon:
        Steps per episode. The task's environments truncate there themselves, because a constraint
        may apply at the last step only.
    constraint_horizon:
        Steps from a start state after which its constraints are known; usually the horizon.
    constraint_names:
        One name per constraint; a value > 0 violates it.
    objective_name:
        What ``info["objective_loss"]`` measures (lower is better).
    convex_starts:
        Whether a state between two start states is one, too.
    """

    observation_space: gym.spaces.Box
    action_space: gym.spaces.Box
    horizon: int
    constraint_horizon: int
    constraint_names: tuple[str, ...]
    objective_name: str
    convex_starts: bool = True

    def sample_starts(self, n: int, rng: np.random.Generator) -> Components:
        """n start states from the task's start distribution. Each component: [n]."""
        raise NotImplementedError

    def design_starts(self, n: int) -> Components:
        """n start states that cover the start set and its boundary, to evaluate constraints.

        Each component: [n], or fewer where the start set has fewer states.
        """
        raise NotImplementedError

    def held_out_starts(self, n: int) -> Components | None:
        """n start states for evaluation, the same at every call. Each component: [n].

        None: they are drawn from the task's start distribution, by a seed that no run trains on.
        """
        return None

    def reference_states(self, n: int) -> Components:
        """At most n states over which actions of two policies are compared. Each component: [n].

        They cover what a policy visits, which may be more than where it starts.
        """
        return self.design_starts(n)

    def next_state(
        self, state: Components, action: Components, disturbance: Components | None = None
    ) -> Components:
        """The state after one step.

        The action is clipped to the action space here, as an actuator would clip it.
        """
        raise NotImplementedError

    def reward(self, state: Components, action: Components) -> Array:
        """Reward of taking ``action`` in ``state``."""
        raise NotImplementedError

    def constraint_values(
        self, state: Components, action: Components, next_state: Components, last: bool
    ) -> Components:
        """Signed constraint values of one step, violated where > 0.

        ``last``: this step ends the episode at the horizon.
        """
        raise NotImplementedError

    def bounds(
        self, state: Components, action: Components, next_state: Components, last: bool
    ) -> Iterator[tuple[int, Array]]:
        """Signed bounds that amount to the constraints: (index of the constraint's name, value).

        A task with two-sided constraints gives each side as a bound of its own, without the kink of
        an absolute value, and leaves out what is not in force at this step.
        """
        yield from enumerate(self.constraint_values(state, action, next_state, last))

    def objective_loss(
        self, state: Components, action: Components, step: int
    ) -> tuple[Array, Array]:
        """(loss, counts): the loss of this step, and whether the task's objective includes it."""
        raise NotImplementedError

    def label(self, state: Components) -> Components | None:
        """An expert's action, or a regression label, in ``state``; None where there is none."""
        return None

    def disturbance(self, n: int, rng: np.random.Generator) -> Components | None:
        """Process noise for one step; None where the task is deterministic. Each: [n]."""
        return None

    def backup_gain(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The safe backup controller u = gain @ x + offset.

        Returns (gain [action_dim, obs_dim], offset [action_dim]).
        """
        raise NotImplementedError

    def backup_target(self) -> tuple[NDArray[np.float64], float] | None:
        """(P [obs_dim, obs_dim], level): within {x'Px <= level} the backup acts alone.

        From 2 level on a policy may add any action to the backup's; in between, a share of it.
        None: the backup never acts alone.
        """
        return None

    def clip_action(self, action: Components) -> Components:
        """The action within the bounds of the action space."""
        low, high = self.action_space.low, self.action_space.high
        return tuple(a.clip(float(lo), float(hi)) for a, lo, hi in zip(action, low, high))


def read_costs(infos: Sequence[dict[str, Any]], cost_keys: Sequence[str]) -> NDArray[np.float64]:
    """Costs of one vectorised step. Returns [N, C]: environments x constraints.

    Raises KeyError naming the environment and the key where ``info`` lacks one.
    """
    try:
        return np.array([[info[key] for key in cost_keys] for info in infos], dtype=np.float64)
    except KeyError:
        env, key = next((i, k) for i, info in enumerate(infos) for k in cost_keys if k not in info)
        raise KeyError(
            f"environment {env}: info has no {key!r}; a constrained agent needs it at every step"
        ) from None


def check_finite(step: int, **fields: NDArray[Any]) -> None:
    """Raise FloatingPointError if any array holds NaN or infinity.

    It names step, environment and field. step: environment steps taken so far, all environments
    together. fields: name -> array [N, ...].
    """
    for name, values in fields.items():
        if not np.isfinite(values).all():
            rows = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            env = int(np.flatnonzero(~rows)[0])
            raise FloatingPointError(
                f"step {step}, environment {env}: {name} is not finite: {values[env]}"
            )


def check_transition(
    step: int,
    observations: NDArray[Any],
    rewards: NDArray[Any],
    costs: NDArray[Any],
    dones: NDArray[np.bool_],
    infos: Sequence[dict[str, Any]],
) -> None:
    """``check_finite`` on all that a vectorised step returned, with terminal observations."""
    check_finite(step, observation=observations, reward=rewards, cost=costs)
    for env in np.flatnonzero(dones):
        terminal = np.asarray(infos[env].get("terminal_observation", 0.0))
        if not np.isfinite(terminal).all():
            raise FloatingPointError(
                f"step {step}, environment {env}: terminal_observation is not finite: {terminal}"
            )
