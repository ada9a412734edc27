"""Agreement with trajectories recorded on the official stack (safety-gymnasium's own pins)."""

from __future__ import annotations

from pathlib import Path

import pytest
from safety_gymnasium_parity import RECORDING, Agreement, compare, load, page

import scpo_bench  # noqa: F401 - registers the ids

mujoco = pytest.importorskip("mujoco")

ROOT = Path(__file__).parents[1]
FACTS, TRAJECTORIES = load(RECORDING)

# Observations (the reset's included) and rewards that agree to 1e-6 in a row, measured on mujoco
# 3.10.0
MEASURED = {
    "SafetyPointGoal1-v0": (27, 30),
    "SafetyPointGoal2-v0": (27, 30),
    "SafetyPointButton1-v0": (27, 31),
    "SafetyPointPush1-v0": (27, 30),
    "SafetyPointCircle1-v0": (27, 30),
    "SafetyPointRun0-v0": (27, 28),
    "SafetyCarGoal1-v0": (0, 0),
    "SafetyCarCircle1-v0": (41, 40),
    "SafetyCarRun0-v0": (0, 0),
    "SafetyRacecarGoal1-v0": (0, 0),
    "SafetyDoggoGoal1-v0": (41, 40),
    "SafetyAntGoal1-v0": (14, 13),
    "SafetyHalfCheetahVelocity-v1": (41, 40),
    "SafetyHopperVelocity-v1": (10, 9),
    "SafetySwimmerVelocity-v1": (41, 40),
    "SafetyWalker2dVelocity-v1": (13, 12),
    "SafetyAntVelocity-v1": (0, 3),
    "SafetyHumanoidVelocity-v1": (0, 16),
}


@pytest.fixture(scope="module")
def agreements() -> dict[str, Agreement]:
    """Every task, replayed once for both tests."""
    return {
        env_id: compare(env_id, TRAJECTORIES[env_id], facts, FACTS["seed"])
        for env_id, facts in FACTS["tasks"].items()
    }


@pytest.mark.parametrize("env_id", FACTS["tasks"])
def test_trajectories_agree_as_long_as_measured(
    env_id: str, agreements: dict[str, Agreement]
) -> None:
    """Published results are comparable: layout, costs, spaces, and no earlier divergence."""
    agreement = agreements[env_id]
    assert agreement.spaces_equal
    assert agreement.cost_keys == tuple(FACTS["tasks"][env_id]["cost_keys"])
    assert agreement.layout_equal
    assert agreement.costs_equal
    assert agreement.endings_equal
    observations, rewards = MEASURED[env_id]
    assert agreement.observations >= observations
    assert agreement.rewards >= rewards


def test_the_page_is_the_generated_one(agreements: dict[str, Agreement]) -> None:
    """The published table says what is measured."""
    written = (ROOT / "docs" / "safety_gymnasium_parity.md").read_text(encoding="utf-8")
    if f"mujoco {mujoco.__version__} " not in written:
        pytest.skip("the page was generated with another mujoco")
    generated = page(FACTS, list(agreements.values()))
    assert [row(line) for line in written.splitlines()] == [
        row(line) for line in generated.splitlines()
    ]


def row(line: str) -> str:
    """A line without its last column, a rounded error that may differ between machines."""
    return line.rpartition("|")[0].rpartition("|")[0] if line.startswith("| Safety") else line
