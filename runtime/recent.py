"""What happened of late, as the planner wants to know it: arrivals, runs, and calls without a row.

Bounded in every direction: ended runs by number, runs in progress by number, a run's records by
number. Times are clock seconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

from planner.dispatch.replan import RateMeter
from planner.domain.trace import RunRecord, TraceRecord

__all__ = ["RecentWork"]

_OPEN_RUNS = 4096
_RUN_RECORDS = 1000
_MEMORY = 0.02
"""Weight of the latest call in the share of calls without a row: the last fifty or so count."""


class RecentWork:
    """Recent arrivals, ended runs with their records, and how well the table covers the calls.

    Parameters
    ----------
    window_s
        Time constant of the arrival rates, > 0.
    start_s
        The clock now.
    runs
        Ended runs to keep, >= 1.
    """

    def __init__(self, window_s: float, start_s: float, runs: int = 200) -> None:
        self.rates = RateMeter(window_s, start_s)
        self.uncovered = 0.0
        """Share of recent calls that the table had no row for."""
        self._ended: deque[list[TraceRecord]] = deque(maxlen=runs)
        self._open: OrderedDict[str, tuple[str, list[TraceRecord]]] = OrderedDict()

    def arrived(self, run_id: str, workflow_hash: str, now_s: float) -> None:
        """Note the start of a run."""
        self.rates.observe(workflow_hash, now_s)
        self._open[run_id] = (workflow_hash, [])
        if len(self._open) > _OPEN_RUNS:
            self._open.popitem(last=False)

    def decided(self, *, covered: bool) -> None:
        """Note a decision on a call of a known workflow: whether the table had a row for it."""
        self.uncovered += _MEMORY * (float(not covered) - self.uncovered)

    def add(self, record: TraceRecord) -> None:
        """Note what happened; records of runs whose start was not seen are left out."""
        found = self._open.get(record.run_id)
        if found is None:
            return
        records = found[1]
        if isinstance(record, RunRecord):
            del self._open[record.run_id]
            self._ended.append([*records, record])
        elif len(records) < _RUN_RECORDS:
            records.append(record)

    def active(self) -> Counter[str]:
        """Return the runs in progress by workflow hash."""
        return Counter(workflow_hash for workflow_hash, _ in self._open.values())

    def records(self) -> list[TraceRecord]:
        """Return the records of the ended runs that are kept, in order of their ends."""
        return [record for run in self._ended for record in run]
