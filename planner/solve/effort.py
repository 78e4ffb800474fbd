"""What a search outside the solver may spend: by the clock, or counted, hence reproducible."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Effort"]

_STEPS_PER_S = 1_300_000
"""Numpy calls on rows of a batch that take a second, about."""


class Effort:
    """What may be spent on a search: seconds by a timer, or what takes about as long without one.

    Parameters
    ----------
    limit_s
        Seconds, >= 0.
    timer
        Returns seconds. Without one numpy calls are counted, so that results are reproducible.
    """

    def __init__(self, limit_s: float, timer: Callable[[], float] | None = None) -> None:
        self._limit_s = limit_s
        self._timer = timer
        self._begin_s = timer() if timer else 0.0
        self._steps = 0

    def count(self, steps: int) -> None:
        """Count numpy calls, or what takes as long."""
        self._steps += steps

    def within(self, share: float) -> bool:
        """Whether less than this share of the limit is spent."""
        spent_s = self._timer() - self._begin_s if self._timer else self._steps / _STEPS_PER_S
        return spent_s < share * self._limit_s
