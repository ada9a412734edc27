"""How long trajectories agree with the official stack (safety-gymnasium's own pins, mujoco 2.3.3).

Regenerate the page with

    python tests/safety_gymnasium_parity.py > docs/safety_gymnasium_parity.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from scpo_bench.envs.safety_gymnasium import register_safety_gymnasium
from scpo_bench.envs.safety_gymnasium.tasks import task_metadata

TOLERANCE = 1e-6
COMMAND = "python tests/safety_gymnasium_parity.py > docs/safety_gymnasium_parity.md"
RECORDING = Path(__file__).parent / "data" / "safety_gymnasium_trajectories"
PAGE = """\
# Safety-Gymnasium: agreement with the official stack

Generated; do not edit:

```
{command}
```

Recorded on safety-gymnasium {stack[safety_gymnasium]} with its own pins (Python {stack[python]},
gymnasium {stack[gymnasium]}, mujoco {stack[mujoco]}), seed {seed}, up to 40 steps; replayed here on
mujoco {mujoco} with the same seed and actions.

*Observations* and *rewards*: how many in a row agree to {tolerance:g}, counting the observation at
reset. *Layout*: every lidar reading at reset agrees and the spaces are equal. *First difference*:
the parts of the first observation that differs, and by how much.

| Task | Observations | Rewards | Costs equal | Layout, spaces | First difference | Size |
| --- | ---: | ---: | --- | --- | --- | ---: |
{rows}

## Why they differ

The tasks' own code is the same package, unmodified; layouts, costs and endings are equal on all
tasks. What differs is MuJoCo, version 2 against version 3:

- *Orientation* (AntVelocity, HumanoidVelocity): the reset adds noise to the root's quaternion.
  MuJoCo 2 normalised it in place, so the observation showed the unit quaternion; MuJoCo 3
  normalises where it uses it. Normalised, the observations at reset agree to rounding.
- *Accelerometer at reset* (Car, Racecar): the robot is placed with its wheels at distance zero from
  the floor, to rounding. Which of these contacts bear at that instant depends on the last digit,
  and with it whether the accelerometer reads free fall or support. The next steps settle it.
- *Contacts*: from the first contact with the floor (Hopper) or another body (Point, with a vase or
  the floor) the two versions' contact forces differ, at first in the sixth digit of the
  accelerometer, and tens of steps later visibly. From then on, trajectories are different samples
  of the same task: compare returns and costs as distributions, not step by step.

The fast path is not a reason: it equals the original code path to the last bit
(tests/test_safety_gymnasium_fast.py).
"""


@dataclass(frozen=True)
class Agreement:
    """One task's trajectory against its recording, same seed and actions."""

    env_id: str
    observations: int
    """Observations in a row, the reset's first, that agree to ``TOLERANCE`` in every entry."""
    observations_recorded: int
    rewards: int
    """Rewards in a row that agree to ``TOLERANCE``."""
    rewards_recorded: int
    costs_equal: bool
    """All costs equal, to the recording's end."""
    endings_equal: bool
    layout_equal: bool
    """All lidar readings at reset agree: every object is where the official stack puts it."""
    spaces_equal: bool
    cost_keys: tuple[str, ...]
    first_difference: tuple[str, ...]
    """Parts of the first observation that differs, in order of size of difference."""
    largest_difference: float
    """In that observation."""


def compare(
    env_id: str, recording: dict[str, np.ndarray], facts: dict[str, Any], seed: int
) -> Agreement:
    """Replay a recording.

    Args:
        env_id: the task.
        recording: actions [T, k], observations [T + 1, n], rewards [T], costs [T],
        terminated_truncated [T, 2].
        facts: obs_shape, action_high and cost_keys as recorded.
        seed: of the reset.
    """
    env: Any = gymnasium.make(env_id)
    observation, _ = env.reset(seed=seed)
    observations, rewards, costs, endings = [observation], [], [], []
    cost_keys: set[str] = set()
    for action in recording["actions"]:
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        rewards.append(reward)
        costs.append(info["cost"])
        endings.append((terminated, truncated))
        cost_keys |= {key for key in info if key.startswith("cost_")}
        if terminated or truncated:
            break
    length = min(len(rewards), len(recording["rewards"]))
    errors_TN = np.abs(
        np.array(observations[: length + 1]) - recording["observations"][: length + 1]
    )
    agreeing = _leading(errors_TN.max(axis=1) <= TOLERANCE)
    parts = list(_parts(env.unwrapped))
    largest = {}
    if agreeing < length + 1:
        largest = {name: float(errors_TN[agreeing, where].max()) for name, where in parts}
        largest = {name: error for name, error in largest.items() if error > TOLERANCE}
    lidars = [where for name, where in parts if name.endswith("_lidar")]
    result = Agreement(
        env_id=env_id,
        observations=agreeing,
        observations_recorded=len(recording["observations"]),
        rewards=_leading(
            np.abs(np.array(rewards[:length]) - recording["rewards"][:length]) <= TOLERANCE
        ),
        rewards_recorded=len(recording["rewards"]),
        costs_equal=np.array_equal(costs, recording["costs"]),
        endings_equal=np.array_equal(endings, recording["terminated_truncated"]),
        layout_equal=all((errors_TN[0, where] <= TOLERANCE).all() for where in lidars),
        spaces_equal=list(env.observation_space.shape) == facts["obs_shape"]
        and env.action_space.high.tolist() == facts["action_high"],
        cost_keys=tuple(sorted(cost_keys)),
        first_difference=tuple(sorted(largest, key=lambda name: -largest[name])),
        largest_difference=max(largest.values(), default=0.0),
    )
    env.close()
    return result


def _leading(agree: np.ndarray) -> int:
    """Entries before the first ``False``."""
    return len(agree) if agree.all() else int(np.argmin(agree))


def _parts(env: Any) -> Iterator[tuple[str, slice]]:
    """Named parts of the flat observation."""
    if task_metadata(env.spec.id).family == "velocity":
        size, velocities = env.observation_space.shape[0], env.model.nv
        sizes = {"positions": size - velocities, "velocities": velocities}
        if env.task_info.robot == "Ant":
            sizes = {"height": 1, "orientation": 4, "joint positions": 8, "velocities": 14}
        elif env.task_info.robot == "Humanoid":  # gymnasium's humanoid_v4: the world and 13 bodies
            sizes = {"height": 1, "orientation": 4, "joint positions": 17, "velocities": 23}
            sizes |= {"cinert": 140, "cvel": 84, "qfrc_actuator": 23, "cfrc_ext": 84}
    else:
        sizes = {
            name: int(np.prod(s.shape))
            for name, s in env.task.obs_info.obs_space_dict.spaces.items()
        }
    start = 0
    for name, size in sizes.items():
        yield name, slice(start, start + size)
        start += size


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The facts (``path``.json) and the trajectories (``path``.npz) by id."""
    facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".npz")) as arrays:
        trajectories: dict[str, dict[str, np.ndarray]] = {env_id: {} for env_id in facts["tasks"]}
        for key in arrays.files:
            env_id, _, name = key.rpartition("/")
            trajectories[env_id][name] = arrays[key]
    return facts, trajectories


def page(facts: dict[str, Any], agreements: list[Agreement]) -> str:
    """The parity page, in Markdown."""
    import mujoco

    rows = [
        f"| {a.env_id} | {a.observations} / {a.observations_recorded} "
        f"| {a.rewards} / {a.rewards_recorded} | {'all' if a.costs_equal else 'NO'} "
        f"| {'yes' if a.layout_equal and a.spaces_equal else 'NO'} "
        f"| {', '.join(a.first_difference) or '-'} "
        f"| {f'{a.largest_difference:.0e}' if a.first_difference else '-'} |"
        for a in agreements
    ]
    return PAGE.format(
        command=COMMAND,
        stack=facts["stack"],
        seed=facts["seed"],
        mujoco=mujoco.__version__,
        tolerance=TOLERANCE,
        rows="\n".join(rows),
    )


def main() -> None:
    """Print the page."""
    register_safety_gymnasium()
    facts, trajectories = load(RECORDING)
    agreements = [
        compare(env_id, trajectories[env_id], task_facts, facts["seed"])
        for env_id, task_facts in facts["tasks"].items()
    ]
    print(page(facts, agreements), end="")


if __name__ == "__main__":
    main()
