"""Every agent gets the same information, margin and budget, and is judged alike."""

from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv
from test_harness import CELL, SCPO_CELL, Fives, Scripted

import scpo_bench.runs.agents as agents
from scpo_bench.errors import UserError
from scpo_bench.records.files import read_updates
from scpo_bench.records.schema import Cell
from scpo_bench.runs.environments import make_training_env
from scpo_bench.runs.evaluation import Evaluator
from scpo_bench.runs.harness import run_cell
from scpo_bench.runs.recorder import RecordingVecEnv

IMITATION = "scpo_bench/DoubleIntegratorImitation-v0"
CPO_CELL = CELL.model_copy(update={"agent": "cpo", "config": {"steps_per_update": 20}})


def test_margin_is_in_the_training_cost_and_not_in_the_record():
    """The agent pays from -margin on; what is recorded, and judged, is the task's own cost.

    The script's constraint values are -0.15, -0.05, 0.05, 0.15, 0.25: margin 0.1 adds the second.
    """
    env = RecordingVecEnv(DummyVecEnv([Scripted]), margin=0.1)
    env.reset()
    paid = [env.step(np.zeros((1, 1)))[3][0]["cost"] for _ in range(5)]
    assert paid == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert env.take().cost_sum == 2.0  # the task's: steps 2 and 4


def test_value_at_the_margin_itself_costs_nothing():
    """A value that is exactly -margin keeps to it, as 0 keeps to the limit."""
    env = RecordingVecEnv(DummyVecEnv([Scripted]), margin=0.25 - 2 / 10)
    env.reset()
    assert [env.step(np.zeros((1, 1)))[3][0]["cost"] for _ in range(3)] == [0.0, 0.0, 1.0]


def test_no_margin_hands_on_the_costs_of_the_task():
    """Without a margin the agent sees what the task reports, whatever its constraint values."""
    env = RecordingVecEnv(DummyVecEnv([Scripted]))
    env.reset()
    assert [env.step(np.zeros((1, 1)))[3][0]["cost"] for _ in range(3)] == [0.0, 1.0, 0.0]


def test_margin_needs_constraint_values():
    """Where a task has costs alone a margin would be dropped in silence."""
    env = RecordingVecEnv(DummyVecEnv([Fives]), margin=0.1)
    env.reset()
    with pytest.raises(UserError, match=r"margin: 0\.1 is in units of info\['constraint_values'\]"):
        env.step(np.zeros((1, 1)))


def test_cell_hands_its_margin_to_the_environment_and_to_agents_that_take_one(tmp_path):
    """SCPO's own margin is the suite's; its own setting wins; an agent without the field has none.

    Without that, the table would compare agents with different margins under one heading.
    """
    cell = SCPO_CELL.model_copy(update={"margin": 0.03})
    assert run_cell(cell, tmp_path / "a", "s").resolved_config["margin"] == 0.03
    own = cell.model_copy(update={"config": cell.config | {"margin": 0.05}})
    assert run_cell(own, tmp_path / "b", "s").resolved_config["margin"] == 0.05
    record = run_cell(CPO_CELL.model_copy(update={"margin": 0.03}), tmp_path / "c", "s")
    assert "margin" not in record.resolved_config


def test_margin_reaches_a_baseline_through_its_costs(tmp_path):
    """With a margin that no policy keeps to, every training step costs the agent 1.

    Its estimate of an episode's cost is then the episode's length; the record's is not.
    """
    run_cell(CPO_CELL.model_copy(update={"margin": 100.0}), tmp_path, "s")
    update = read_updates(tmp_path)[1]
    assert update.diagnostics["episodic_cost"] == 10.0
    assert update.cost_mean < 10.0


@pytest.mark.parametrize("agent", ["ppo-lagrangian", "ppo-pid", "focops", "p3o", "cpo", "cvpo"])
def test_agents_are_told_the_limit_they_are_judged_by(agent):
    """One limit per cell: an agent with another target than its judge's is compared unfairly."""
    cell = CELL.model_copy(update={"agent": agent, "cost_limit": 3.0, "config": {}})
    agent = agents.make_agent(cell, make_training_env(cell))
    assert agent.config.cost_limit == 3.0


def test_total_budget_counts_probes(tmp_path):
    """`budget: total` ends a run when interaction and probe steps together reach ``steps``."""
    free = read_updates(_run(SCPO_CELL, tmp_path / "a"))
    steps = free[1].interaction_steps + free[1].probe_steps + 1
    cell = SCPO_CELL.model_copy(update={"budget": "total", "steps": steps})
    counted = read_updates(_run(cell, tmp_path / "b"))
    assert len(counted) < len(free)
    # The budget was reached by the last update, and not before it.
    totals = [u.interaction_steps + u.probe_steps for u in counted]
    assert totals[-2] < steps


def test_total_budget_of_an_agent_without_probes_is_its_interaction(tmp_path):
    """An agent that probes nothing has the same run under both budgets."""
    a = _run(CPO_CELL, tmp_path / "a")
    b = _run(CPO_CELL.model_copy(update={"budget": "total"}), tmp_path / "b")
    assert [u.interaction_steps for u in read_updates(a)] == [
        u.interaction_steps for u in read_updates(b)
    ]


def test_tuning_starts_are_not_the_held_out_ones():
    """Whoever tunes on the starts that the table is computed from has seen the answer."""

    def first_observations(starts):
        seen = []
        evaluator = Evaluator(IMITATION, {}, 20, native=True, starts=starts)
        evaluator(lambda observations: (seen.append(observations), observations[:, :1])[1])
        return seen[0]

    held_out, tuning = map(first_observations, ("held-out", "tuning"))
    assert not np.isin(held_out, tuning).any()


def test_added_fields_at_their_defaults_leave_keys_as_they_were():
    """Records from before the fields margin, budget and evaluation_starts keep their keys."""
    key = "d7625c1c65ffffe8"  # computed before they were added
    cell = Cell(agent="cpo", task="T", seed=0, steps=1, cost_limit=0.0)
    assert cell.key().startswith(key)
    for field, value in (("margin", 0.1), ("budget", "total"), ("evaluation_starts", "tuning")):
        assert cell.model_copy(update={field: value}).key() != cell.key()


def _run(cell, folder):
    assert run_cell(cell, folder, "s").status == "finished"
    return folder
