"""The figure of `scpo-bench falsify`: breach rate against the factor on L."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np

from scpo_bench.checks.falsify import DIRECTIONS, FACTORS, RADII, Report, Setting
from scpo_bench.records.plain_files import write_atomically

LINE_STYLES = {"all": "-", "remembered": "--", "random": ":"}


def draw(report: Report, path: Path) -> None:
    """One curve per probe radius and kind of directions; a level for each rule in training."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
    for i, radius in enumerate(RADII):
        for directions in ("all", *DIRECTIONS):
            settings = [Setting(factor=f, radius=radius, directions=directions) for f in FACTORS]
            counts = np.array([report.rates.get(setting, (0, 0)) for setting in settings], float)
            if not counts[:, 1].any():
                continue
            axes.plot(
                FACTORS,
                100 * counts[:, 0] / np.where(counts[:, 1] > 0, counts[:, 1], np.nan),
                color=f"C{i}",
                linestyle=LINE_STYLES[directions],
                marker="o",
                markersize=3,
                label=f"{directions} directions, probes {radius:g}",
            )
    for i, (rule, (breaches, updates)) in enumerate(report.rules.items()):
        rate = 100 * breaches / max(updates, 1)
        label = f"the agent, {rule} L: {rate:.1f} %"
        axes.axhline(rate, color=f"C{len(RADII) + i}", linestyle="-.", label=label)
    axes.axvline(1.0, color="#888888", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FACTORS, [f"{f:g}" if f >= 1 else f"1/{1 / f:g}" for f in FACTORS])
    axes.set_ylim(-2, 102)
    known = "the known L" if report.known else "L as sampled along the probes"
    axes.set_xlabel(f"factor on {known}")
    axes.set_ylabel("certified steps that breach, %")
    axes.set_title(f"{report.task}: breaches of the certificate")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, drawn.getvalue())
    plt.close(figure)
