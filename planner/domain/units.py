"""The only place that converts seconds to the solver's integer ticks.

Durations round up to the next tick, so that a plan never promises more than the forecast
allows; a positive duration is at least one tick.
"""

from __future__ import annotations

import math

__all__ = ["duration_to_ticks", "ticks_to_seconds"]


def duration_to_ticks(duration_s: float, tick_s: float) -> int:
    """Return the number of ticks (>= 0) that cover ``duration_s`` seconds, rounding up.

    Raises
    ------
    ValueError
        If the duration is negative or not finite, or the tick is not positive.
    """
    if not (tick_s > 0):
        raise ValueError(f"tick_s must be positive, got {tick_s!r}")
    if not (duration_s >= 0) or math.isinf(duration_s):
        raise ValueError(f"duration_s must be finite and >= 0, got {duration_s!r}")
    # The small slack keeps an exact multiple from rounding up through float error.
    return math.ceil(duration_s / tick_s - 1e-9)


def ticks_to_seconds(ticks: int, tick_s: float) -> float:
    """Return the seconds that ``ticks`` ticks of ``tick_s`` seconds last."""
    return ticks * tick_s
