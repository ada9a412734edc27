"""How numbers and names read in a leaderboard: the only place where they become text.

The text is plain Unicode; :mod:`scpo_bench.leaderboard.escaping` fits it to a format.
"""

from __future__ import annotations

import math
from collections.abc import Callable

UNKNOWN = "–"
"""Not measured."""


def number(value: float) -> str:
    """Three significant digits, all digits of larger integers; "never" for inf, "–" for nan."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "never"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if abs(float(f"{value:.3g}")) >= 1e3 and abs(value) < 1e6:
        return f"{value:.0f}"  # 1056 is easier to read than 1.06e+03
    return f"{value:.3g}"


def percent(share: float) -> str:
    """A share in per cent, without the sign; it reads 0 only for none and 100 only for all."""
    if math.isnan(share):
        return UNKNOWN
    shown = 100 * share
    if 0 < abs(shown) < 0.1:
        return "<0.1" if shown > 0 else ">-0.1"
    if 99.9 < shown < 100:
        return ">99.9"
    return f"{shown:.1f}" if 0 < abs(shown) < 10 or 99 < shown < 100 else f"{shown:.0f}"


def share(value: float) -> str:
    """A share in per cent, with the sign."""
    return UNKNOWN if math.isnan(value) else f"{percent(value)}%"


def count(value: float) -> str:
    """A large count in three digits: 1.25M."""
    if not math.isfinite(value):
        return number(value)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # what rounds to 1000 of a unit is 1 of the next
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def interval(value: float, low: float, high: float, show: Callable[[float], str] = number) -> str:
    """ "value [low, high]", or the value alone where it or its interval is unknown."""
    if math.isnan(value) or math.isnan(low) or math.isnan(high):
        return show(value)
    return f"{show(value)} [{show(low)}, {show(high)}]"
