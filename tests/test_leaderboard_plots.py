"""Figures: what they show, computed by hand for tiny records, and that the drawing shows that."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from synthetic_records import (
    GOAL,
    IMITATION,
    REFERENCES,
    REGRESSION,
    synthetic_cell,
    synthetic_updates,
    write_record,
    write_suite,
)

from scpo_bench.leaderboard import figures, plots
from scpo_bench.leaderboard.curves import RunCurves, band, robust_range, share, stack
from scpo_bench.leaderboard.figures import (
    MAX_POINTS,
    Panel,
    Series,
    SuiteFigures,
    asinh_ticks,
    certificate_panels,
    panel,
    pareto_panel,
    steps_panel,
    suite_figures,
    task_panels,
)
from scpo_bench.leaderboard.plots import draw, draw_panel, file_stem, plot_suite
from scpo_bench.leaderboard.styles import COLOURS, Style, agent_styles
from scpo_bench.records.schema import Update

NAN = math.nan
PLAIN = Style("#000000")


def runs_with(task: str = IMITATION, **columns: list[list[float]]) -> list[RunCurves]:
    """One run per inner list; the values of a column at updates 0, 1, ..."""
    seeds = range(len(next(iter(columns.values()))))
    return [
        RunCurves.of(
            synthetic_cell("scpo", task, seed, 3),
            [
                Update(
                    update=k,
                    interaction_steps=k,
                    probe_steps=0,
                    episodes=0,
                    **{name: values[seed][k] for name, values in columns.items()},
                )
                for k in range(len(next(iter(columns.values()))[seed]))
            ],
        )
        for seed in seeds
    ]


def curves(agent: str, seeds: int, updates: int = 12, task: str = IMITATION) -> list[RunCurves]:
    cells = [synthetic_cell(agent, task, seed, updates) for seed in range(seeds)]
    return [RunCurves.of(cell, synthetic_updates(cell, updates)) for cell in cells]


# Statistics over runs.


def test_bands_by_hand():
    """Quartiles of runs that end early or are evaluated at every second update only."""
    given = [np.array([0.0, NAN, 4.0, NAN]), np.array([2.0, NAN, 8.0]), np.array([4.0, NAN])]
    updates, low, middle, high = band(given)
    assert updates.tolist() == [0, 2]
    assert middle.tolist() == [2.0, 6.0]
    assert (low.tolist(), high.tolist()) == ([1.0, 5.0], [3.0, 7.0])
    where, shares = share([np.array([NAN, 1, 0]), np.array([NAN, 1]), np.array([NAN, 0, 0])])
    assert where.tolist() == [1, 2]
    assert shares.tolist() == pytest.approx([2 / 3, 0.0])
    assert stack([]).shape == (0, 0)
    assert band([])[0].size == share([])[0].size == 0


def test_range_leaves_far_outliers_out_and_says_so():
    """One diverging agent must not flatten the rest; an ordinary one must not be cut."""
    usual = np.linspace(0, 1, 100)
    assert robust_range(usual, [2.0]) == (0.0, 2.0, None)
    assert robust_range(np.append(usual, 2.9)) == (0.0, 2.9, None)
    low, high, largest = robust_range(np.append(usual, 1e6), [-1.0])
    assert (low, largest) == (-1.0, 1e6)
    assert high <= 1.0
    assert robust_range(np.append(usual, 4.0))[2] == 4.0
    shown = panel("", "", [Series("a", PLAIN, [0.0] * 101, [*usual, 1e6])])
    assert shown.bounds[1] < 1.1
    assert shown.note == "off the scale, up to 1e+06"


def test_thinning_keeps_every_violation():
    """Of thousands of updates only some are drawn; one violation among them must still show."""
    run = np.zeros(3001)
    run[1234] = 1.0
    line = figures.percentage("a", PLAIN, [run, run, run, np.zeros(3001)])
    assert len(line.x) == len(line.y) <= MAX_POINTS
    assert max(line.y) == 75
    drawn = line.x[line.y.index(75)]
    assert 0 <= 1234 - drawn < line.x[1] - line.x[0]
    thinned = figures.quartiles("a", PLAIN, [np.arange(3001.0)])
    assert thinned.x == thinned.y == thinned.low == line.x


# Panels.


def test_task_panels_by_hand():
    """Median (not mean) with the quartiles as band, and the share of seeds that violate."""
    groups = {
        "scpo": runs_with(
            iterate_objective=[[1, 2], [2, 3], [9, 4], [10, 21], [11, 30]],
            iterate_worst_constraint_value=[[-1, -0.02], [-3, -0.04], [-2, 170], [-2, 1], [-2, 2]],
            iterate_violates=[[0, 0], [0, 0], [0, 1], [0, 1], [0, 1]],
        )
    }
    styles = agent_styles(["scpo"])
    objective, worst, violating = task_panels(groups, styles, REFERENCES)
    (line,) = objective.series
    assert (line.name, line.style, line.kind) == ("scpo", styles["scpo"], "line")
    assert (line.x, line.y, line.low, line.high) == ([0, 1], [9, 4], [2, 3], [10, 21])
    assert objective.marks == {"backup": 0.5, "oracle": 0.1}
    assert objective.limit is None
    assert objective.linear_width is None
    (line,) = worst.series
    assert (line.y, line.low, line.high) == ([-2, 1], [-2, -0.02], [-2, 2])
    assert (worst.limit, worst.linear_width) == (0.0, figures.LINEAR_WIDTH)
    (steps,) = violating.series
    assert (steps.kind, steps.x, steps.y, steps.low) == ("steps", [0, 1], [0, 60], [])
    assert (violating.bounds, violating.limit) == ((-3, 103), None)


def test_tasks_with_a_cost_limit_show_cost_against_it():
    """Without signed constraint values the middle panel is the cost, with the limit drawn."""
    groups = {"sgd": runs_with(GOAL, iterate_return=[[1.0], [3.0]], iterate_cost=[[20.0], [30.0]])}
    first, cost, violating = task_panels(groups, agent_styles(["sgd"]), {})
    assert (first.series[0].y, first.marks) == ([2.0], {})
    assert "Return" in first.title
    assert (cost.series[0].y, cost.series[0].low, cost.limit) == ([25.0], [22.5], 25.0)
    assert cost.linear_width is None
    assert violating.series == []


def test_small_and_large_constraint_values_are_both_readable():
    """-0.02 stands apart from the limit although 170 is on the same axis; both lie inside."""
    line = Series("a", PLAIN, [0.0, 1.0], [-0.02, 170.0])
    shown = panel("", "", [line], "asinh", limit=0.0)
    low, high = shown.bounds
    assert low < -0.02
    assert high > 170
    height = np.ptp(np.arcsinh(np.array(shown.bounds) / shown.linear_width))
    assert np.arcsinh(0.02 / shown.linear_width) / height > 0.05
    assert list(shown.ticks) == [-0.02, 0, 0.1, 1, 10, 100]
    below = panel("", "", [Series("a", PLAIN, [0.0], [-0.5])], "asinh", limit=0.0)
    assert below.bounds[1] > 0  # the limit is inside although every value is below it
    assert asinh_ticks(-0.3, 0.06) == [-0.2, -0.1, -0.05, -0.02, 0, 0.02, 0.05]
    assert len(asinh_ticks(-1e9, 1e9)) <= 12


def test_breaches_of_the_certificate_are_counted_and_marked():
    """A realised value above its bound is what this figure is for; of several seeds the worst."""
    first, second, third = curves("scpo", 3)
    first.diagnostics["realised/position"][5] = 0.2
    second.diagnostics["realised/position"][5] = 0.3
    position, velocity, step = certificate_panels([first, second, third], Style("#123456"))
    assert "2 of 36 above the bound" in position.title
    assert "none of 36 above the bound" in velocity.title
    bound, realised, above = position.series
    assert (above.kind, above.x, above.y) == ("points", [5], [0.3])
    assert [one.kind for one in velocity.series] == ["line", "line"]
    at = [run.diagnostics["bound/position"][7] for run in (first, second, third)]
    assert bound.y[6] == pytest.approx(np.median(at), rel=1e-4)
    at = [run.diagnostics["realised/position"][7] for run in (first, second, third)]
    assert realised.y[6] == pytest.approx(np.median(at), rel=1e-4)
    assert (position.limit, realised.style.color) == (0.0, "#123456")
    assert step.series[0].y[2] == pytest.approx(100 * (1 - 3 / 12))
    assert step.title == "Step after projection: 0 updates held per run"
    second.diagnostics["held"][:] = [*range(12), NAN]
    third.diagnostics["held"][:] = NAN
    step = certificate_panels([first, second, third], PLAIN)[-1]
    assert step.title == "Step after projection: 5.5 updates held per run"
    assert certificate_panels([third], PLAIN)[-1].title == "Step after projection"
    del third.diagnostics["realised/velocity"]
    assert len(certificate_panels([third], PLAIN)) == 2
    assert certificate_panels(curves("sgd", 2), PLAIN) == []


def test_pareto_front_by_hand():
    """The front holds the agents that no other beats in score and violations together."""

    def row(agent: str, score: float, violating: float, **more: Any) -> dict[str, Any]:
        common = {"cost_limit": 0.0, "score_kind": "gap closed", "cost_final": NAN}
        return common | {
            "agent": agent,
            "score": score,
            "violating_iterate_share": violating,
            **more,
        }

    rows = [row("a", 0.9, 0.0), row("b", 0.8, 0.1), row("c", 1.0, 0.5), row("d", NAN, 0.0)]
    styles = agent_styles(["a", "b", "c", "d"])
    shown = pareto_panel(rows, styles)
    assert shown is not None
    points = {one.name: (one.x, one.y, one.kind) for one in shown.series}
    assert points == {
        "a": ([90.0], [0.0], "points"),
        "b": ([80.0], [10.0], "points"),
        "c": ([100.0], [50.0], "points"),
        "Pareto front": ([90.0, 100.0], [0.0, 50.0], "line"),
    }
    assert shown.limit is None
    limited = {"cost_limit": 25.0, "score_kind": "return"}
    rows = [
        row("a", 5.0, 0.0, cost_final=20.0, **limited),
        row("b", 7.0, 0.0, cost_final=30.0, **limited),
    ]
    shown = pareto_panel(rows, styles)
    assert shown is not None
    assert (shown.series[0].x, shown.series[0].y, shown.limit) == ([5.0], [20.0], 25.0)
    assert pareto_panel(rows[:1], styles) is None
    equal = [row("a", 0.9, 0.1), row("b", 0.8, 0.1), row("c", 0.9, 0.2), row("d", 0.9, 0.1)]
    shown = pareto_panel(equal, styles)
    assert shown is not None
    assert (shown.series[-1].x, shown.series[-1].y) == ([90.0], [10.0])


def test_objective_against_all_steps_counts_probes():
    """An agent that probes must stand further to the right than one that does not.

    The synthetic runs take 100 interaction steps per update; "scpo" 50 probe steps besides.
    """
    groups = {agent: curves(agent, 2) for agent in ("scpo", "sgd")}
    shown = steps_panel(groups, agent_styles(["scpo", "sgd"]))
    x = {one.name: one.x for one in shown.series}
    first = groups["scpo"][0]
    updates = len(first.series["total_steps"]) - 1  # update 0 has taken none
    assert x["scpo"] == pytest.approx([math.log10(150 * n) for n in range(1, updates + 1)], 1e-4)
    assert x["sgd"] == pytest.approx([math.log10(100 * n) for n in range(1, updates + 1)], 1e-4)
    assert shown.series[0].y == pytest.approx(first.series["iterate_objective"][1:], rel=0.5)
    for run in groups["scpo"]:
        run.series["iterate_objective"][:] = NAN
    for run in groups["sgd"]:
        run.series["iterate_objective"][:] = NAN
    assert steps_panel(groups, agent_styles(["scpo", "sgd"])).y_label == "return"


def test_colours_keep_to_the_agent():
    """A known agent has its colour in every suite, whichever others are there."""
    many = agent_styles(["cpo", "scpo", "ppo", "aaa"])
    assert many["scpo"] == agent_styles(["scpo"])["scpo"] == Style(COLOURS[0])
    assert many["ppo"] == agent_styles(["ppo", "zzz"])["ppo"]
    assert list(many) == ["scpo", "cpo", "ppo", "aaa"]
    assert len({*agent_styles([f"a{i}" for i in range(20)]).values()}) == 20


# Figures of a suite.


def test_figures_of_a_suite(tmp_path):
    """Per task the curves, each certificate, and the Pareto front; one profile for the suite. An
    agent that is planned but has no record is in the profile only, at the floor.
    """
    write_suite(tmp_path, "s", (IMITATION, REGRESSION), ("scpo", "sgd"), seeds=3, updates=6)
    tasks = (IMITATION, REGRESSION)
    planned = [synthetic_cell("ppo", task, seed, 6) for task in tasks for seed in range(3)]
    found = suite_figures(tmp_path, "s", planned, REFERENCES).figures
    assert [figure.name for figure in found] == [
        *(f"{IMITATION}{end}" for end in ("", "-certificate-scpo", "-pareto", "-steps")),
        *(f"{REGRESSION}{end}" for end in ("", "-certificate-scpo", "-pareto", "-steps")),
        "profile",
    ]
    assert [one.name for one in found[0].panels[0].series] == ["scpo", "sgd"]
    assert "over 3 seeds" in found[0].title
    (profile,) = found[-1].panels
    lines = {one.name: one for one in profile.series}
    assert set(lines) == {"scpo", "sgd", "ppo"}
    for line in lines.values():
        assert (np.diff(line.y) <= 0).all()
        assert (np.array(line.low) <= line.y).all()
        assert (np.array(line.high) >= line.y).all()
    assert lines["scpo"].y[0] == 100
    assert sum(lines["ppo"].y) < sum(lines["scpo"].y)


def test_two_setups_of_one_agent_are_two_lines(tmp_path):
    """Runs with different settings must not be merged into one median."""
    for seed in range(2):
        for config in ({}, {"learning_rate": 1.0}):
            cell = synthetic_cell("sgd", IMITATION, seed, 4, config=config)
            write_record(tmp_path / str(len(config)), "s", cell, synthetic_updates(cell, 4))
    _, table, _, found = suite_figures(tmp_path, None, None, REFERENCES)
    names = [one.name for one in found[0].panels[0].series]
    assert len(names) == 2
    assert sorted(names) == sorted(table["agent"])
    assert all(name.startswith("sgd #") for name in names)


def test_a_profile_joins_set_ups_and_needs_no_band(tmp_path):
    """Aggregates know agents, not set-ups; with one seed per task there is no interval to draw."""
    for task in (IMITATION, REGRESSION):
        for i, config in enumerate(({}, {"a": 1})):
            cell = synthetic_cell("mine", task, i, 4, config=config)
            write_record(tmp_path, "s", cell, synthetic_updates(cell, 4))
        cell = synthetic_cell("sgd", task, 0, 4)
        write_record(tmp_path, "s", cell, synthetic_updates(cell, 4))
    found = suite_figures(tmp_path, "s", None, REFERENCES)
    mine, sgd = sorted(found.figures[-1].panels[0].series, key=lambda one: one.name)
    assert (mine.name, sgd.name) == ("mine", "sgd")
    assert (sgd.low, sgd.high) == ([], [])
    assert len(mine.low) == len(mine.y) > 0
    assert sum(name.startswith("mine #") for name in found.styles) == 4


def test_the_title_says_how_many_seeds(tmp_path):
    """Agents with different numbers of seeds: from the fewest to the most."""
    for agent, seeds in (("sgd", 8), ("scpo", 3)):
        for seed in range(seeds):
            cell = synthetic_cell(agent, IMITATION, seed, 2)
            write_record(tmp_path, "s", cell, synthetic_updates(cell, 2))
    found = suite_figures(tmp_path, "s", None, REFERENCES)
    assert found.figures[0].title.endswith("over 3 to 8 seeds")


def test_the_largest_allowed_numbers_do_not_overflow(tmp_path):
    """Records may hold any number up to 1e100; each panel must keep finite bounds and values."""
    cell = synthetic_cell("scpo", IMITATION, 0, 3)
    updates = synthetic_updates(cell, 3)
    extreme = {
        "iterate_objective": 1e100,
        "iterate_worst_constraint_value": 1e100,
        "iterate_violates": True,
        "diagnostics": {
            **{"bound/a": 1e100, "realised/a": -1e100},
            **{"step_norm": 1e100, "proposal_norm": 1e-300, "held": None},
        },
    }
    updates[2] = updates[2].model_copy(update=extreme)
    write_record(tmp_path, "s", cell, updates)
    found = suite_figures(tmp_path, "s", None, REFERENCES)
    assert len(found.figures) == 3
    json.dumps([asdict(figure) for figure in found.figures], allow_nan=False)
    for figure in found.figures:
        draw(figure)


def test_a_damaged_record_is_not_drawn(tmp_path):
    """A record that contradicts itself is in the table, at the floor, but draws no line."""
    write_suite(tmp_path, "s", (IMITATION,), ("sgd", "ppo"), seeds=2, updates=4)
    cell = synthetic_cell("scpo", IMITATION, 0, 4)
    write_record(tmp_path, "s", cell, synthetic_updates(cell, 4), digest="0" * 64)
    _, table, _, found = suite_figures(tmp_path, "s", None, REFERENCES)
    assert "scpo" in set(table["agent"])
    assert [one.name for one in found[0].panels[0].series] == ["ppo", "sgd"]


# Drawing.


def test_matplotlib_draws_what_is_specified():
    """The values, bounds, scale, limit and labels of a panel, and nothing computed anew."""
    from matplotlib.figure import Figure as Canvas

    line = Series("a", Style("#123456", (5, 2)), [0.0, 1, 2], [1, 2, 4], [0, 1, 3], [2, 3, 5])
    steps = Series("b", PLAIN, [0.0, 1], [0, 1], kind="steps")
    points = Series("c", PLAIN, [1.0], [2], kind="points")
    shown = Panel(
        *("title", "y", [line, steps, points], (-2, 6), (0, 2), "x"),
        limit=1.5,
        marks={"oracle": 0.5},
        linear_width=0.1,
        ticks=[0, 1],
    )
    axes = Canvas().subplots()
    draw_panel(axes, shown)
    drawn = {str(one.get_label()): one for one in axes.get_lines()}
    assert drawn["a"].get_xydata().tolist() == [[0, 1], [1, 2], [2, 4]]
    assert (drawn["a"].get_color(), drawn["a"].get_zorder() > drawn["b"].get_zorder()) == (
        "#123456",
        True,
    )
    assert drawn["b"].get_drawstyle() == "steps-post"
    assert (drawn["c"].get_linestyle(), drawn["c"].get_marker()) == ("None", "o")
    corners = axes.collections[0].get_paths()[0].vertices.tolist()
    assert {(0, 0), (0, 2), (2, 3), (2, 5)} <= {tuple(corner) for corner in corners}
    levels = [one.get_ydata()[0] for one in axes.get_lines() if len(set(one.get_ydata())) == 1]
    assert {1.5, 0.5} <= set(levels)
    assert {text.get_text() for text in axes.texts} == {"limit", "oracle"}
    assert (axes.get_yscale(), axes.get_ylim(), axes.get_xlim()) == ("asinh", (-2, 6), (0, 2))
    assert axes.yaxis.get_transform().transform([0.3])[0] == pytest.approx(0.1 * np.arcsinh(3.0))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    assert (axes.get_title("left"), axes.get_ylabel(), axes.get_xlabel()) == ("title", "y", "x")


def test_one_legend_names_every_series_once():
    """Panels share their agents; the legend below them must not repeat a name."""
    groups = {"scpo": curves("scpo", 2), "sgd": curves("sgd", 2)}
    panels = task_panels(groups, agent_styles(list(groups)), REFERENCES)
    canvas = draw(figures.Figure("s", IMITATION, "name", "title", panels))
    (legend,) = canvas.legends
    assert [text.get_text() for text in legend.get_texts()] == ["scpo", "sgd"]


def test_files_of_a_suite(tmp_path, monkeypatch):
    """Every figure in every format; a second run writes the same bytes."""
    write_suite(tmp_path, "s", (IMITATION,), ("scpo", "sgd"), seeds=2, updates=8)
    failed = synthetic_cell("ppo", IMITATION, 0, 8)
    updates = synthetic_updates(failed, 8)[:3]
    write_record(tmp_path, "s", failed, updates, status="failed", error="no")
    monkeypatch.setattr(figures, "load_references", lambda: REFERENCES)
    formats = ("png", "svg", "pdf")
    paths = plot_suite(tmp_path, "s", tmp_path / "a", formats)
    stem = "scpo_bench-DoubleIntegratorImitation-v0"
    stems = [stem, f"{stem}-certificate-scpo", f"{stem}-pareto", f"{stem}-steps"]
    assert [p.name for p in paths] == [f"{stem}.{format}" for stem in stems for format in formats]
    magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for path, again in zip(paths, plot_suite(tmp_path, "s", tmp_path / "b", formats)):
        assert path.read_bytes().startswith(magic[path.suffix])
        assert path.read_bytes() == again.read_bytes(), path.name
    with pytest.raises(ValueError, match="gif"):
        plot_suite(tmp_path, "s", tmp_path, ("gif",))
    assert plot_suite(tmp_path, "none", tmp_path / "c") == []


def test_names_become_safe_file_names(tmp_path, monkeypatch):
    """Names that differ only in forbidden characters must not overwrite one another's files, nor
    leave the folder.
    """
    assert file_stem("../../etc/x y") == "etc-x-y"
    assert file_stem("///") == "unnamed"
    named = [figures.Figure("s", "", name, "", [panel("", "", [])], 1) for name in ("a/b", "a:b")]
    monkeypatch.setattr(plots, "suite_figures", lambda *given: SuiteFigures(*3 * [None], named))
    paths = plot_suite(tmp_path, "s", tmp_path / "out", ("png", "svg"))
    assert [path.name for path in paths] == ["a-b.png", "a-b.svg", "a-b-.png", "a-b-.svg"]


def test_matplotlib_is_imported_late():
    """Listing agents must not wait for a plotting library."""
    code = "import sys, scpo_bench.leaderboard.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
