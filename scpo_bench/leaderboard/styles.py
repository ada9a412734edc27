"""Colours and dashes of the figures, the same for an agent wherever it appears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, distinguishable with every common colour blindness; grey for its black,
# which a dark page would hide. The dashes tell agents apart without colour.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7A7A7A", "#8C6D1F")
DASHES: tuple[tuple[float, ...], ...] = (
    *((), ()),
    *((5, 1.5), (1, 1.2), (6, 1.5, 1, 1.5), (3, 1, 1, 1, 1, 1)),
)
KNOWN_AGENTS = ("scpo", "scpo-ppo", "cpo", "cvpo", "ppo", "ppo-lagrangian", "sgd")
"""These have the same colour in the figures of every suite; others take the colours after them."""


@dataclass(frozen=True)
class Style:
    color: str
    dashes: tuple[float, ...] = ()
    """Lengths of strokes and gaps in line widths; solid if empty."""


REFERENCE = Style("#7A7A7A", (4.0, 2.0))
BREACH = Style("#D01C3F")

Styles = dict[str, Style]


def agent_styles(agents: Sequence[str]) -> Styles:
    """Agent -> style, in the order of legends."""
    others = sorted(set(agents) - set(KNOWN_AGENTS))
    order = {name: i for i, name in enumerate([*KNOWN_AGENTS, *others])}
    return {
        name: Style(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)])
        for name, i in order.items()
        if name in set(agents)
    }
