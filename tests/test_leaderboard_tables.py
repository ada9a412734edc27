"""From records to ranked tables: no run is lost, no result is flattered, nothing is executed."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from synthetic_records import (
    GOAL,
    IMITATION,
    REFERENCES,
    REGRESSION,
    folder_of,
    synthetic_cell,
    synthetic_updates,
    write_mixed_suite,
    write_record,
    write_suite,
)

from scpo_bench.leaderboard import ranking, tables
from scpo_bench.leaderboard.aggregate import aggregate
from scpo_bench.leaderboard.columns import COLUMNS, cell_text
from scpo_bench.leaderboard.metrics import METRICS, measure
from scpo_bench.leaderboard.render import print_table, render
from scpo_bench.leaderboard.statistics import iqm_interval
from scpo_bench.leaderboard.tables import leaderboard, load, read_record, read_runs, setup_of
from scpo_bench.records.files import UPDATES_FILE, read_run
from scpo_bench.records.schema import Cell, Update
from scpo_bench.records.study import STUDY_FILE, Study, Trial, write_study

NAMES = [column.name for column in COLUMNS]
ESTIMATES = ("score", "gap_closed", "return_final", "cost_final", "feasible_share")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """(results, planned): three tasks, three agents, three seeds, a failed and a missing run."""
    results = tmp_path_factory.mktemp("results")
    return results, write_mixed_suite(results)


@pytest.fixture(scope="module")
def runs(suite):
    results, planned = suite
    return load(results, "synthetic", planned, REFERENCES)


@pytest.fixture(scope="module")
def table(runs):
    return leaderboard(runs)


def row_of(table: pd.DataFrame, task: str, agent: str) -> pd.Series:
    return table[(table["task"] == task) & (table["agent"] == agent)].iloc[0]


def test_runs_are_the_metrics_of_their_records(suite, runs):
    """The table of runs computes nothing itself: each row is measure() of its updates."""
    assert len(runs) == 29
    for _, run in runs[runs["status"] == "finished"].iterrows():
        cell = synthetic_cell(run["agent"], run["task"], run["seed"], 30)
        expected = measure(synthetic_updates(cell, 30), cell.cost_limit, REFERENCES.get(cell.task))
        for name in METRICS:
            np.testing.assert_equal(run[name], float(getattr(expected, name)), err_msg=name)


def test_unfinished_runs_stay_at_the_floor(runs):
    """Failed and missing seeds get the worst outcome of their task and stay in every average."""
    of_task = runs[runs["task"] == IMITATION]
    worst = max(
        of_task["start_objective"].max(),
        of_task.loc[of_task["status"] == "finished", "final_objective"].max(),
    )
    of_finished = of_task.loc[of_task["status"] == "finished", "final_return"]
    for status in ("failed", "missing"):
        run = of_task[of_task["status"] == status].iloc[0]
        assert run["final_objective"] == worst
        assert run["final_return"] == min(of_task["start_return"].min(), of_finished.min())
        assert run["score"] == pytest.approx((0.5 - worst) / 0.4)
        assert math.isnan(run["final_violates"])
    failed = of_task[of_task["status"] == "failed"].iloc[0]
    assert failed["updates"] == 7  # what happened until then still counts


def test_a_failed_seed_lowers_the_score_and_the_share(suite, table):
    """If failures were dropped, an agent that crashes when it does badly would win."""
    row = row_of(table, IMITATION, "sgd")
    assert (
        row["seeds_planned"],
        row["seeds_finished"],
        row["seeds_failed"],
        row["seeds_missing"],
    ) == (5, 3, 1, 1)
    kept = leaderboard(load(suite[0], "synthetic", None, REFERENCES).query("status == 'finished'"))
    assert row["score"] < row_of(kept, IMITATION, "sgd")["score"]
    assert row["feasible_share"] == row["feasible_seeds"] / 5


def test_aggregated_counts_by_hand(runs, table):
    """Sums over seeds, shares of sums, earliest and worst of all seeds."""
    for _, row in table.iterrows():
        group = runs[(runs["task"] == row["task"]) & (runs["agent"] == row["agent"])]
        assert row["violating_iterates"] == group["violating_iterates"].sum()
        if row["evaluated_iterates"]:
            assert (
                row["violating_iterate_share"]
                == row["violating_iterates"] / row["evaluated_iterates"]
            )
        assert row["first_violating_update"] == group["first_violating_update"].min()
        assert row["seeds_that_violated"] == (group["violating_iterates"] > 0).sum()
        assert row["score"] == iqm_interval([group["score"]]).value
    scpo = row_of(table, IMITATION, "scpo")
    assert (
        scpo["violating_iterates"],
        scpo["evaluated_iterates"],
        scpo["first_violating_update"],
    ) == (0, 90, math.inf)


def test_feasibility_comes_before_the_score(table):
    """ppo and sgd reach a lower loss than scpo here and must rank below it: they violate."""
    for task in (IMITATION, REGRESSION):
        first = table[table["task"] == task].iloc[0]
        assert (first["agent"], first["verdict"], first["rank"]) == ("scpo", ranking.SAFE, 1)
        order = [
            list(ranking.VERDICTS).index(v) for v in table.loc[table["task"] == task, "verdict"]
        ]
        assert order == sorted(order)


def made_up(
    agent: str, scores: list[float], violates: float = 0.0, **fields: float
) -> pd.DataFrame:
    """Finished runs of one agent on one task with these scores, everything else the same."""
    cells = [synthetic_cell(agent, GOAL, seed, 1) for seed in range(len(scores))]
    fields = {"final_cost": 10.0, **fields}
    rows = []
    for cell, score in zip(cells, scores):
        metrics = measure(synthetic_updates(cell, 1), cell.cost_limit)
        more = {
            "score": score,
            "score_kind": "return",
            "final_violates": violates,
            "violating_iterates": violates,
            "proved_policies": math.nan,
            "examined_policies": math.nan,
            **fields,
        }
        rows.append(
            {
                **cell.model_dump(include={"task", "agent", "seed", "steps", "cost_limit"}),
                **{"budget": "interaction", "margin": 0.0, "told_limit": math.nan},
                **{"tuning_trials": math.nan, "provenance": {}},
                **{"suite": "s", "setup": setup_of(cell), "status": "finished", "error": None},
                **metrics.__dict__,
                "key": cell.key(),
                **more,
            }
        )
    return pd.DataFrame(rows)


def test_every_column_by_hand():
    """Each column is the statistic that its meaning states, of the metric that it names.

    Three seeds with limit 10, of which the last one failed.
    """
    never = math.inf
    runs = made_up("a", [1.0, 2.0, 6.0], cost_limit=10.0).assign(
        told_limit=8.0,
        margin=0.02,
        tuning_trials=12.0,
        status=["finished", "finished", "failed"],
        start_objective=[3.0, 1.0, 8.0],
        final_objective=[2.0, 5.0, 4.0],
        gap_closed=[0.1, 0.2, 0.6],
        start_return=[1.0, 2.0, 9.0],
        final_return=[1.0, 3.0, 8.0],
        final_training_return=[0.0, 5.0, 7.0],
        final_cost=[4.0, 8.0, math.nan],
        final_training_cost=[1.0, 3.0, 11.0],
        final_violates=[0.0, 1.0, math.nan],
        violating_iterates=[0.0, 2.0, 4.0],
        evaluated_iterates=[10.0, 10.0, 4.0],
        distinct_policies=[9.0, 5.0, 4.0],
        violating_policies=[0.0, 1.0, 4.0],
        held_updates=[1.0, 5.0, 0.0],
        held_early_share=[0.1, 0.3, 0.0],
        proved_policies=[3.0, 1.0, math.nan],
        examined_policies=[3.0, 4.0, math.nan],
        first_violating_update=[never, 7.0, 3.0],
        first_violating_step=[never, 70.0, 35.0],
        safe_from_update=[0.0, never, 9.0],
        longest_violating_run=[0.0, 2.0, 1.0],
        worst_iterate_value=[-1.0, 0.5, 0.2],
        worst_training_value=[0.1, 0.7, 0.3],
        updates_over_limit_share=[0.1, 0.2, 0.6],
        training_episodes=[10.0, 20.0, 10.0],
        violating_episodes=[1.0, 2.0, 5.0],
        violating_steps=[5.0, 10.0, 15.0],
        cumulative_excess=[1.0, 2.0, 9.0],
        probe_violations=[1.0, 0.0, 2.0],
        max_excess=[1.0, 2.0, 0.5],
        max_excess_ratio=[0.1, 0.2, 0.05],
        cvar95_cost_low=[1.0, 2.0, 6.0],
        cvar95_cost_high=[2.0, 4.0, 9.0],
        updates=[10.0, 10.0, 4.0],
        interaction_steps=[100.0, 100.0, 50.0],
        probe_steps=[7.0, 9.0, 1.0],
        total_steps=[107.0, 109.0, 51.0],
        wall_time_s=[3.0, 1.0, 2.0],
        steps_per_s=[5.0, 9.0, 6.0],
    )
    (row,) = leaderboard(runs).to_dict("records")
    half = 12.706205 * 2.0  # t(0.975, 1) times the standard error of 4 and 8
    expected = {
        **{"suite": "s", "task": GOAL, "agent": "a", "rank": 1, "tied": False},
        "other_versions": False,
        **{"seeds_planned": 3, "seeds_finished": 2, "seeds_failed": 1, "seeds_unfinished": 0},
        **{"seeds_missing": 0, "seeds_damaged": 0, "score_kind": "return", "score": 3.0},
        **{"objective_start": 3.0, "objective_final": 4.0, "gap_closed": 0.3},
        **{"gap_closed_median": 0.2, "return_start": 2.0, "return_final": 4.0},
        **{"return_training": 5.0, "cost_limit": 10.0, "cost_final": 6.0},
        **{"cost_final_low": 6 - half, "cost_final_high": 6 + half, "cost_final_ratio": 0.6},
        **{"cost_training": 3.0, "feasible_seeds": 1, "feasible_share": 1 / 3},
        **{"violating_iterates": 6, "evaluated_iterates": 24, "violating_iterate_share": 0.25},
        **{"distinct_policies": 18, "violating_policies": 5, "held_updates": 6},
        **{"held_share": 0.25, "held_early_share": 0.3},
        **{"proved_policies": 4.0, "examined_policies": 7.0, "seeds_with_proof": 2},
        **{"seeds_that_violated": 2, "first_violating_update": 3.0, "first_violating_step": 35.0},
        **{"first_violating_update_median": 7.0, "safe_from_update_median": 9.0},
        **{"longest_violating_run": 2.0, "worst_iterate_value": 0.5, "worst_training_value": 0.7},
        **{"updates_over_limit_share": 0.3, "training_episodes": 40, "violating_episodes": 8},
        **{"violating_episode_share": 0.2, "violating_step_share": 0.12},
        **{"cumulative_excess": 4.0, "max_excess": 2.0, "max_excess_ratio": 0.2},
        **{"cvar95_cost_low": 3.0, "cvar95_cost_high": 5.0, "probe_violations": 3},
        **{"updates": 10.0, "interaction_steps": 100.0, "probe_steps": 7.0, "wall_time_s": 2.0},
        **{"total_steps": 107.0, "steps": 100, "budget": "interaction"},
        **{"told_limit": 8.0, "margin": 0.02, "tuning_trials": 12.0},
        **{"steps_per_s": 6.0, "preliminary": True, "verdict": ranking.UNDECIDED},
        **{"verification": "consistent", "setup": runs["setup"].iloc[0]},
        "command": f"scpo-bench run s --agents a --tasks {GOAL} --seeds 3",
    }
    # The remaining intervals are those of tests/test_leaderboard_statistics.py.
    ends = {f"{name}_{end}" for name in ESTIMATES for end in ("low", "high")}
    assert set(row) == set(expected) | ends
    for name, value in expected.items():
        assert row[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    for name in ESTIMATES:
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
    by_name = {column.name: column for column in COLUMNS}
    assert cell_text(by_name["cost_final"], row) == "6 [0, 31.4]"  # costs are not negative
    assert cell_text(by_name["proved_policies"], row) == "4/7 (2 of 3 seeds)"


def test_overlapping_intervals_are_a_tie_but_not_a_chain():
    """a and b overlap, b and c overlap, a and c do not: c must not share the rank of a."""
    grid = np.linspace(-1, 1, 10)
    table = leaderboard(
        pd.concat(
            [made_up("a", 3 + grid), made_up("b", 2.4 + grid), made_up("c", 1.4 + grid)],
            ignore_index=True,
        )
    )
    assert table["agent"].tolist() == ["a", "b", "c"]
    assert table["rank"].tolist() == [1, 1, 3]
    assert table["tied"].tolist() == [True, True, False]


def test_agents_without_results_are_not_tied():
    """Agents of which nothing finished all stand at the floor; that is no tie between results."""
    runs = pd.concat([made_up("a", [1.0, 1.0]), made_up("b", [1.0, 1.0])], ignore_index=True)
    table = leaderboard(runs.assign(status="failed"))
    assert table["rank"].tolist() == [1, 2]
    assert table["tied"].tolist() == [False, False]


@pytest.mark.parametrize(
    ("costs", "violates", "verdict"),
    [
        ([10.0] * 10, 0.0, ranking.SAFE),
        ([10.0] * 10, 1.0, ranking.UNSAFE),  # every final iterate violates
        (
            [20.0, 21, 22, 23, 24, 25, 26, 27, 28, 29],
            0.0,
            ranking.UNDECIDED,
        ),  # mean 24.5, and 25 within the interval
        ([30.0, 31, 32, 33, 34, 35, 36, 37, 38, 39], 0.0, ranking.UNSAFE),
    ],
)
def test_safe_needs_the_upper_confidence_bound_within_the_limit(costs, violates, verdict):
    """A mean below the limit is not enough for "safe"."""
    runs = made_up("a", [1.0] * 10, violates)
    runs["final_cost"] = costs
    assert leaderboard(runs)["verdict"].tolist() == [verdict]


def test_violations_on_the_way_are_in_the_verdict(runs):
    """Feasible final iterates after violations are not "safe throughout"."""
    made = made_up("a", [1.0] * 10)
    made["violating_iterates"] = 1.0
    assert leaderboard(made)["verdict"].tolist() == [ranking.SAFE_AT_THE_END]


@pytest.mark.parametrize("status", ["missing", "failed", "interrupted", "running", "damaged"])
@pytest.mark.parametrize("limit", [0.0, 25.0])
def test_safe_needs_every_planned_seed(status, limit):
    """A seed that crashed or was never run might have violated: without it nothing is safe."""
    runs = made_up("a", [1.0] * 11, cost_limit=limit, final_cost=0.0)
    assert leaderboard(runs)["verdict"].tolist() == [ranking.SAFE]
    runs.loc[10, "status"] = status
    runs.loc[10, ["final_cost", "final_violates"]] = math.nan
    assert leaderboard(runs)["verdict"].tolist() == [ranking.UNDECIDED]


def test_preliminary_below_ten_seeds(table):
    """Ten finished seeds are no longer preliminary, nine are."""
    assert table["preliminary"].all()
    assert not leaderboard(made_up("a", list(range(10))))["preliminary"].any()
    assert leaderboard(made_up("a", list(range(9))))["preliminary"].all()


def test_two_setups_of_one_agent_are_two_rows(tmp_path):
    """Runs with different settings must not be averaged."""
    for seed in range(2):
        for rate in (0.5, 1.0):
            cell = synthetic_cell("sgd", IMITATION, seed, 5, config={"learning_rate": rate})
            write_record(tmp_path / str(rate), "s", cell, synthetic_updates(cell, 5))
    table = leaderboard(load(tmp_path, None, None, REFERENCES))
    assert len(table) == 2
    assert all(agent.startswith("sgd #") for agent in table["agent"])
    assert table["seeds_planned"].tolist() == [2, 2]


def test_references_apply_only_to_the_environment_they_were_made_for(tmp_path):
    """With other environment arguments the committed constants mean nothing."""
    cell = synthetic_cell("sgd", IMITATION, 0, 3, env={"horizon": 5})
    write_record(tmp_path, "s", cell, synthetic_updates(cell, 3))
    runs = load(tmp_path, "s", None, REFERENCES)
    assert math.isnan(runs["gap_closed"].iloc[0])
    assert runs["score_kind"].tolist() == ["objective"]
    assert runs["score"].tolist() == (-runs["final_objective"]).tolist()


def test_damage_is_shown_not_dropped(tmp_path):
    """An edited record counts as damaged; an unreadable run.json is named; a copy counts once."""
    cells = write_suite(tmp_path, "s", (IMITATION,), ("sgd",), seeds=3, updates=5)
    edited = folder_of(tmp_path, "s", cells[0])
    run_file = edited / "run.json"
    run_file.write_text(run_file.read_text().replace(f'"steps": {cells[0].steps}', '"steps": 400'))
    unreadable = folder_of(tmp_path, "s", cells[1])
    (unreadable / "run.json").write_text("{")
    copy = tmp_path / "s" / "copy"
    copy.mkdir()
    for path in folder_of(tmp_path, "s", cells[2]).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    runs = load(tmp_path, "s", cells, REFERENCES)
    table = leaderboard(runs)
    problems = "\n".join(runs.attrs["problems"])
    assert "copy: folder: expected seed-2 from the cell" in problems
    assert "Invalid JSON" in problems
    damaged = runs[runs["status"] == "damaged"]
    assert len(damaged) == 1
    assert "key" in damaged["error"].iloc[0]
    assert len(table) == 1
    row = table.iloc[0]
    assert (
        row["seeds_planned"],
        row["seeds_finished"],
        row["seeds_damaged"],
        row["seeds_missing"],
    ) == (3, 1, 1, 1)
    assert row["verification"] == "1 damaged"
    for format in ("md", "json", "latex"):
        assert "damaged" in render(table, format), format


def test_interrupted_and_running_runs_are_counted(tmp_path):
    """A killed run (status running, last line cut) neither breaks the table nor disappears."""
    for seed, status in enumerate(("running", "interrupted")):
        cell = synthetic_cell("sgd", IMITATION, seed, 10)
        folder = write_record(tmp_path, "s", cell, synthetic_updates(cell, 10)[:4], status=status)
        if status == "running":
            with open(folder / UPDATES_FILE, "ab") as file:
                file.write(b'{"update": 4, "inter')
    cell = synthetic_cell("sgd", IMITATION, 2, 10)
    folder = write_record(tmp_path, "s", cell, [], status="failed", error="no start")
    (folder / UPDATES_FILE).unlink()
    table = leaderboard(load(tmp_path, "s", None, REFERENCES))
    row = table.iloc[0]
    assert (row["verdict"], row["seeds_planned"], row["seeds_unfinished"], row["seeds_failed"]) == (
        ranking.NO_RESULT,
        3,
        2,
        1,
    )
    assert row["verification"] == "none"
    assert "0.5 → –" in render(table, "md")  # the floor is nobody's result


def test_unfinished_runs_are_summarised(tmp_path):
    """Seeds and agents with the same outcome share one line; different reasons do not."""
    assert tables.seed_ranges([5, 0, 2, 1]) == "0-2, 5"
    planned = [
        synthetic_cell(agent, IMITATION, seed, 3)
        for agent in ("sgd", "cpo", "ppo")
        for seed in range(20)
    ]
    write_record(
        tmp_path,
        "s",
        planned[7],
        synthetic_updates(planned[7], 3)[:2],
        status="failed",
        error="boom",
    )
    lines = leaderboard(load(tmp_path, "s", planned, REFERENCES)).attrs["unfinished"]
    assert lines == [
        f"sgd on {IMITATION}, seed 7: failed (boom)",
        f"sgd on {IMITATION}, seeds 0-6, 8-19: missing (planned, but there is no record)",
        f"cpo, ppo on {IMITATION}, seeds 0-19: missing (planned, but there is no record)",
    ]


def test_nothing_there(tmp_path):
    """No records give an empty table in every format, not an exception."""
    table = leaderboard(load(tmp_path / "none", "s"))
    assert table.empty
    assert list(table.columns) == list(NAMES)
    for format in ("md", "latex", "csv", "json"):
        assert render(table, format)
    print_table(table, Console(file=io.StringIO()))


def test_aggregates_over_tasks(runs, table):
    """Only tasks with constants count, and the chances of two agents add up to one."""
    aggregates = {a.agent: a for a in aggregate(runs)}
    assert {a.tasks for a in aggregates.values()} == {2}
    chance = aggregates["ppo"].improvement["sgd"].value + aggregates["sgd"].improvement["ppo"].value
    assert chance == pytest.approx(1.0)
    assert aggregates["scpo"].clean_runs.value == 1.0
    profile = aggregates["scpo"].profile
    assert profile.share == sorted(profile.share, reverse=True)
    assert all(
        low <= share <= high for low, share, high in zip(profile.low, profile.share, profile.high)
    )
    shown = json.loads(render(table, "json"))["aggregates"]["synthetic"]
    assert all(set(a["profile"]) == {"thresholds", "share", "low", "high"} for a in shown)
    assert "synthetic" in table.attrs["aggregates"]
    lost = runs.copy()
    lost.loc[(runs["agent"] == "scpo") & (runs["seed"] == 0), "status"] = "failed"
    clean = {a.agent: a.clean_runs.value for a in aggregate(lost)}
    assert clean["scpo"] == pytest.approx(4 / 6)  # without a violation, but not finished
    twice = pd.concat([runs, runs.assign(suite="other")])
    with pytest.raises(ValueError, match="one suite at a time"):
        aggregate(twice)


def test_control_characters_in_a_name_keep_a_record_out(tmp_path):
    """Names become headings, commands and file names: one with an escape code is refused."""
    cell = synthetic_cell("a\x1b[2J", IMITATION, 0, 2)
    folder = write_record(tmp_path, "s", cell, synthetic_updates(cell, 2))
    runs = load(tmp_path, "s", None, REFERENCES)
    assert runs.empty
    assert str(folder) in runs.attrs["problems"][0]


def test_tables_need_neither_torch_nor_matplotlib():
    """Leaderboards are also read where nothing is trained; importing torch would take seconds."""
    code = (
        "import sys; from scpo_bench.leaderboard import tables, render, plots, page;"
        "from scpo_bench.submissions import verify;"
        "unwanted = ('torch', 'stable_baselines3', 'matplotlib', 'mujoco');"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FUZZ_RECORDS = int(os.environ.get("SCPO_BENCH_FUZZ", "400"))
"""Mutated records that are read and tabulated; the full check takes 10000."""


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three edits: bytes replaced, pieces cut or repeated, and tokens hard to parse."""
    tokens = (
        b"NaN",
        b"Infinity",
        b"-1",
        b"1e999",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"9" * 400,
        b"[" * 300,
        b'"\\ud800"',
        b"\x00",
    )
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, len(data) + 1)), rng.integers(0, 5)
        length = int(rng.integers(1, 40))
        if kind == 0:
            data = data[:at] + bytes(rng.integers(0, 256, 1, dtype=np.uint8)) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == 3:
            # Replace a whole value, so that the result still parses more often than not.
            colon = data.find(b":", at)
            end = min(
                (i for i in (data.find(b",", colon), data.find(b"}", colon)) if i > 0), default=-1
            )
            if 0 < colon < end:
                data = data[: colon + 1] + tokens[rng.integers(len(tokens))] + data[end:]
        else:
            data = data[:at] + tokens[rng.integers(len(tokens))] + data[at:]
    return data


def test_mutated_records_never_end_in_a_traceback(tmp_path):
    """Whatever the files contain, the result is a table, or one line that names the problem."""
    from scpo_bench.records.files import RecordError
    from scpo_bench.submissions.verify import verify

    rng = np.random.default_rng(11)
    cell = synthetic_cell("scpo", IMITATION, 0, 4)
    folder = write_record(tmp_path, "s", cell, synthetic_updates(cell, 4), status="interrupted")
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    consistent, refusals = 0, []
    for i in range(FUZZ_RECORDS):
        for path, data in originals.items():
            path.write_bytes(mutate(data, rng) if rng.random() < 0.6 else data)
        for record in (read_record(*found) for found in read_runs(tmp_path, "s")):
            if record.updates:
                measure(record.updates, record.run.cell.cost_limit)
        if i % 10 == 0:  # tables are slow, and their metrics are computed above
            assert json.loads(render(leaderboard(load(tmp_path, "s", [cell], REFERENCES)), "json"))
        try:
            consistent += verify(tmp_path).ok
        except RecordError as error:
            refusals.append(str(error))
    assert not [line for line in refusals if "\n" in line]
    # Both outcomes must occur, or the mutations test nothing.
    assert 0 < consistent < FUZZ_RECORDS


def test_extreme_but_valid_numbers_do_not_overflow(tmp_path):
    """Counters of 400 digits and costs of 1e300 are valid JSON; nothing is computed from them."""
    cell = synthetic_cell("sgd", IMITATION, 0, 3)
    updates = synthetic_updates(cell, 3)
    huge = [
        updates[0],
        Update(**{**updates[1].model_dump(), "interaction_steps": 10**400}),
        *updates[2:],
    ]
    write_record(tmp_path / "a", "s", cell, huge, status="interrupted")
    large = synthetic_cell("sgd", IMITATION, 1, 3)
    costly = [updates[0], Update(**{**updates[1].model_dump(), "cost_sum": 1e300})]
    write_record(tmp_path / "b", "s", large, costly, status="interrupted")
    far = Cell(**{**cell.model_dump(), "steps": 10**400, "seed": 2})
    write_record(tmp_path / "c", "s", far, updates, status="interrupted")
    runs = load(tmp_path, "s", None, REFERENCES)
    assert runs["status"].tolist() == ["damaged", "damaged"]
    assert "10000" not in "".join(runs.attrs["problems"])
    assert "steps" in runs.attrs["problems"][0]
    leaderboard(runs)


def test_no_link_is_followed(tmp_path):
    """A link to a folder of records elsewhere is not part of these results."""
    write_suite(tmp_path / "elsewhere", "s", (IMITATION,), ("sgd",), seeds=1, updates=2)
    (tmp_path / "results" / "s").mkdir(parents=True)
    (tmp_path / "results" / "s" / "link").symlink_to(
        tmp_path / "elsewhere" / "s", target_is_directory=True
    )
    assert load(tmp_path / "results", "s").empty
    assert Path(tmp_path / "elsewhere").is_dir()


def test_trials_are_shown_where_the_study_found_the_configuration(tmp_path):
    """A study of another configuration, or a damaged one, must not vouch for a run."""
    write_suite(tmp_path, "s", (GOAL,), ("scpo", "sgd", "cpo"), seeds=1, updates=3)
    for agent, config in (("scpo", {}), ("sgd", {"learning_rate": 0.5}), ("cpo", None)):
        (folder,) = (tmp_path / "s").glob(f"*/{agent}")
        cell = read_run(folder / "seed-0").cell
        trials = [Trial(config={}, violating_share=0.5, loss=1.0)]
        trials += [Trial(config=config or {}, violating_share=0.0, loss=1.0)] * 3
        write_study(folder, Study(cell=cell, seeds=1, trials=trials, sampler="none"))
        if config is None:
            (folder / STUDY_FILE).write_text("{")
    runs = load(tmp_path, "s", None, {})
    trials = dict(zip(runs["agent"], runs["tuning_trials"]))
    assert trials["scpo"] == 4
    assert math.isnan(trials["sgd"])
    assert math.isnan(trials["cpo"])
    assert [line for line in runs.attrs["problems"] if "tuning.json" in line]
    assert load(tmp_path, "s", None, {}, claims=False)["tuning_trials"].isna().all()
