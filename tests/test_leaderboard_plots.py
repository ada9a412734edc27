"""Figures: the right files, the right curves, the same bytes, and no trouble with odd records."""

from __future__ import annotations

import sys

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

from scpo_bench.leaderboard import plots
from scpo_bench.leaderboard.curves import RunCurves, band, robust_range, share, stack
from scpo_bench.leaderboard.plots import (
    agent_style,
    certificate_figure,
    file_stem,
    plot_suite,
    task_figure,
)


def curves(agent: str, seeds: int, updates: int = 12, task: str = IMITATION) -> list[RunCurves]:
    cells = [synthetic_cell(agent, task, seed, updates) for seed in range(seeds)]
    return [RunCurves.of(cell, "finished", synthetic_updates(cell, updates)) for cell in cells]


def test_bands_by_hand():
    """Runs of different length, evaluated every second update: quartiles of what is there, at the
    updates where something is.
    """
    nan = np.nan
    low_high = [np.array([0.0, nan, 4.0, nan]), np.array([2.0, nan, 8.0]), np.array([4.0, nan])]
    updates, low, middle, high = band(low_high)
    assert updates.tolist() == [0, 2]
    assert middle.tolist() == [2.0, 6.0]
    assert (low.tolist(), high.tolist()) == ([1.0, 5.0], [3.0, 7.0])
    where, shares = share(
        [np.array([nan, 1.0, 0.0]), np.array([nan, 1.0]), np.array([nan, 0.0, 0.0])]
    )
    assert where.tolist() == [1, 2]
    assert shares.tolist() == pytest.approx([2 / 3, 0.0])
    assert stack([]).shape == (0, 0)
    assert band([])[0].size == share([])[0].size == 0


def test_range_leaves_far_outliers_out_and_says_so():
    """One diverging agent must not flatten the rest; an ordinary one must not be cut."""
    usual = np.linspace(0, 1, 100)
    assert robust_range([usual], [2.0]) == (0.0, 2.0, None)
    low, high, largest = robust_range([np.append(usual, 1e6)], [0.0])  # type: ignore[misc]
    assert (low, largest) == (0.0, 1e6)
    assert high <= 1.0
    assert robust_range([np.array([np.nan])]) is None


def test_figures_of_a_suite(tmp_path, monkeypatch):
    """One figure per task and one per certificate, in every format; a second run writes the same
    bytes.
    """
    write_suite(tmp_path, "s", (IMITATION,), ("scpo", "sgd"), seeds=2, updates=8)
    failed = synthetic_cell("ppo", IMITATION, 0, 8)
    write_record(
        tmp_path, "s", failed, synthetic_updates(failed, 8)[:3], status="failed", error="no"
    )
    monkeypatch.setattr(plots, "load_references", lambda: REFERENCES)
    formats = ("png", "svg", "pdf")
    paths = plot_suite(tmp_path, "s", tmp_path / "a", formats)
    stems = [
        "scpo_bench-DoubleIntegratorImitation-v0",
        "scpo_bench-DoubleIntegratorImitation-v0-certificate-scpo",
    ]
    assert [p.name for p in paths] == [f"{stem}.{format}" for stem in stems for format in formats]
    magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for path, again in zip(paths, plot_suite(tmp_path, "s", tmp_path / "b", formats)):
        assert path.read_bytes().startswith(magic[path.suffix])
        assert path.read_bytes() == again.read_bytes(), path.name
    with pytest.raises(ValueError, match="gif"):
        plot_suite(tmp_path, "s", tmp_path, ("gif",))
    assert plot_suite(tmp_path, "none", tmp_path / "c") == []


def test_what_the_task_figure_shows():
    """Objective with both reference lines, the limit at 0, and the share of violating seeds in
    percent, one line per agent.
    """
    groups = {"scpo": curves("scpo", 3), "sgd": curves("sgd", 3)}
    figure = task_figure(IMITATION, groups, agent_style(["scpo", "sgd"]), REFERENCES)
    objective, worst, violating = figure.axes
    level = {
        line.get_ydata()[0] for line in objective.get_lines() if len(set(line.get_ydata())) == 1
    }
    assert {0.5, 0.1} <= level
    assert any(set(line.get_ydata()) == {0.0} for line in worst.get_lines())
    by_label = {line.get_label(): line for line in objective.get_lines()}
    _, _, middle, _ = band([run.series["iterate_objective"] for run in groups["scpo"]])
    assert by_label["scpo"].get_ydata() == pytest.approx(middle)
    drawn = sorted((line.get_ydata().max(), line.get_color()) for line in violating.get_lines())
    styles = agent_style(["scpo", "sgd"])
    assert drawn == [(0.0, styles["scpo"]["color"]), (100.0, styles["sgd"]["color"])]
    for axes in figure.axes:
        assert axes.get_xlabel() == "policy update"
        assert axes.get_title()


def test_tasks_with_a_cost_limit_show_cost_against_it():
    """Without signed values the middle panel is the cost, with the limit drawn."""
    figure = task_figure(GOAL, {"sgd": curves("sgd", 2, task=GOAL)}, agent_style(["sgd"]), {})
    assert "Cost" in figure.axes[1].get_title()
    assert any(set(line.get_ydata()) == {25.0} for line in figure.axes[1].get_lines())


def test_performance_profile_of_a_suite(tmp_path, monkeypatch):
    """With several normalised tasks there is one more figure: a falling line and a band for each
    agent. A planned agent without records is in it, at the floor.
    """
    write_suite(tmp_path, "s", (IMITATION, REGRESSION), ("scpo", "sgd"), seeds=3, updates=6)
    monkeypatch.setattr(plots, "load_references", lambda: REFERENCES)
    planned = [
        synthetic_cell("ppo", task, seed, 6)
        for task in (IMITATION, REGRESSION)
        for seed in range(3)
    ]
    drawn = []
    original = plots.profile_figure
    monkeypatch.setattr(
        plots, "profile_figure", lambda *given: drawn.append(original(*given)) or drawn[0]
    )
    assert plot_suite(tmp_path, "s", tmp_path / "out", planned=planned)[-1].name == "profile.png"
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"scpo", "sgd", "ppo"}
    assert lines["scpo"].get_color() == plots.COLOURS[0]
    assert len(axes.collections) == 3
    for line in lines.values():
        assert (np.diff(line.get_ydata()) <= 0).all()
    assert lines["scpo"].get_ydata()[0] == 100
    assert lines["ppo"].get_ydata().sum() < lines["scpo"].get_ydata().sum()


def test_breaches_of_the_certificate_are_marked():
    """A realised value above its bound is the one thing this figure is for."""
    runs = curves("scpo", 2)
    runs[1].diagnostics["realised/position"][5] = 0.2
    figure = certificate_figure(IMITATION, "scpo", runs)
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert "1 above the bound" in labels
    assert not any("above" in str(line.get_label()) for line in figure.axes[1].get_lines())
    assert "breaches of the bound" in figure.axes[2].texts[0].get_text()


def test_colours_keep_to_the_agent():
    """The same agent has the same colour whichever others are there before it in the alphabet, and
    scpo always the first.
    """
    styles = agent_style(["cpo", "scpo", "ppo"])
    assert styles["scpo"]["color"] == plots.COLOURS[0]
    assert (
        len(
            {
                (s["color"], str(s["linestyle"]))
                for s in agent_style([f"a{i}" for i in range(20)]).values()
            }
        )
        == 20
    )


def test_names_become_safe_file_names(tmp_path):
    """Agents named alike but for forbidden characters must not overwrite one another, nor leave the
    folder.
    """
    assert file_stem("../../etc/x y") == "etc-x-y"
    assert file_stem("///") == "unnamed"
    for agent in ("a/b", "a:b"):
        cell = synthetic_cell("scpo", IMITATION, 0, 3).model_copy(update={"agent": agent})
        updates = synthetic_updates(synthetic_cell("scpo", IMITATION, 0, 3), 3)
        write_record(tmp_path / file_stem(agent) / agent[1].replace("/", "x"), "s", cell, updates)
    paths = plot_suite(tmp_path, "s", tmp_path / "out")
    assert len(paths) == len(set(paths)) == 3


def test_matplotlib_is_imported_late():
    """Listing agents must not wait for a plotting library."""
    import subprocess

    code = "import sys, scpo_bench.leaderboard.plots; print('matplotlib' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )
