"""Sending a late call a second time, under a budget; off unless a share is given.

A call is late once its first byte is overdue by the quantile of its forecast. It then goes to the
next best endpoint, too; the first to answer is passed on and the other cancelled.

References
----------
Dean and Barroso, The Tail at Scale (2013), "hedged requests": late ones only, a few percent.
"""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """A share of all calls that may be spent on something extra.

    Parameters
    ----------
    share
        Earned by each call, [0, 1]; 0 allows nothing.
    burst
        Most that is kept, >= 1; the start.
    """

    __slots__ = ("_burst", "_left", "share")

    def __init__(self, share: float, *, burst: float = 10.0) -> None:
        self.share = share
        self._burst = burst
        self._left = burst if share else 0.0

    @property
    def left(self) -> float:
        """What may be spent now."""
        return self._left

    def earn(self) -> None:
        """Count a call."""
        self._left = min(self._burst, self._left + self.share)

    def spend(self) -> bool:
        """Take one, if there is one; return whether there was."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
