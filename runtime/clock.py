"""The one clock of a runtime process: seconds since it was made, times a dilation.

With dilation 4 a second on the wall counts as four. The mock fleet and the gateway in front of it
must be given the same dilation; then all times in traces and predictions are engine seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from planner.domain.errors import InvalidInput

__all__ = ["Clock"]


class Clock:
    """Monotonic time that starts at 0.

    Parameters
    ----------
    dilation
        Clock seconds per wall second, > 0.
    wall
        Monotonic source in seconds; replaced in tests.

    Raises
    ------
    InvalidInput
        If the dilation is not a positive number.
    """

    __slots__ = ("_start", "_wall", "dilation")

    def __init__(
        self, dilation: float = 1.0, *, wall: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 < dilation < float("inf"):
            raise InvalidInput(
                f"{dilation!r} is not a factor", where="dilation", remedy="use a number above 0"
            )
        self.dilation = dilation
        self._wall = wall
        self._start = wall()

    def now_s(self) -> float:
        """Return the clock seconds since the start."""
        return (self._wall() - self._start) * self.dilation

    def wall_s(self, seconds: float) -> float:
        """Return how many wall seconds a number of clock seconds last."""
        return seconds / self.dilation
