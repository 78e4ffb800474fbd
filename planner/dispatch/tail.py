"""Which runs are about to be among the slowest: what a tail objective weighs more.

The mean of the slowest 5 % of runs (CVaR at 0.95) grows by a second of delay only if the delayed
run is one of them, so the gain of a second is in proportion to the chance of that. The limit
between the slowest and the rest is followed as runs end; the chance is taken to grow with how far
a run's age and expected remainder reach towards it.

References
----------
Rockafellar and Uryasev, Optimization of conditional value-at-risk, Journal of Risk 2000: the
derivative of CVaR counts the outcomes beyond the quantile only.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    Event,
    RunEnded,
)

__all__ = ["Tail"]

_LEVEL = 0.95
_LEAST = 40
"""Ended runs before the limit is believed; two of them lie beyond it."""
_WINDOW = 400
"""Latest ended runs that count."""
_RUNS = 65_536
"""Runs followed at a time; a call that comes after its run was said to end may begin one that
nobody ends."""
_EVERY = 8
"""Ended runs between two looks at the quantile, which sorts the window."""
_STEEPNESS = 4
"""How sharply the chance rises: at 0.84 of the limit it is one half."""


class Tail:
    """Follows runs, and says how likely one is to be among the slowest.

    A run's end is the end of its last call, since its client may never say goodbye.

    Attributes
    ----------
    limit_s
        Run latency that the slowest twentieth exceeds, s, or None while too few runs have ended.
    """

    def __init__(self) -> None:
        self.limit_s: float | None = None
        # Run -> arrival, end of its last call.
        self._runs: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._calls: dict[str, Call] = {}
        self._latencies: deque[float] = deque(maxlen=_WINDOW)
        self._ended = 0

    def observe(self, event: Event) -> None:
        """Take note of an event; most kinds tell nothing here."""
        match event:
            case CallArrived():
                self._calls[event.call.call_id] = event.call
            case CallFinished():
                call = self._calls.pop(event.call_id, None)
                if call is not None and call.run_id:
                    self._runs[call.run_id] = call.run_arrival_s, event.now_s
                    if len(self._runs) > _RUNS:
                        self._runs.popitem(last=False)
            case RunEnded():
                self._end(event.run_id)
            case CallFailed() | CallCancelled():
                self._calls.pop(event.call_id, None)
            case _:
                pass

    def _end(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        arrival_s, end_s = run
        self._latencies.append(end_s - arrival_s)
        self._ended += 1
        count = len(self._latencies)
        if count >= _LEAST and self._ended % _EVERY == 0:
            self.limit_s = sorted(self._latencies)[min(count - 1, int(_LEVEL * count))]

    def chance(self, call: Call, remaining_s: float, now_s: float) -> float:
        """Return how likely the run of a call is to be among the slowest, [0, 1].

        ``remaining_s`` is expected from the call's start to the end of its run.
        """
        if not self.limit_s:
            return 0.0
        reach = (now_s - call.run_arrival_s + remaining_s) / self.limit_s
        return min(1.0, max(0.0, reach) ** _STEEPNESS)
