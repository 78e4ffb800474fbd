"""Where the records of what happened go: to those who look, to the planner, to the trace file."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from planner.domain.trace import TraceRecord
from runtime.dashboard.journal import Journal
from runtime.recent import RecentWork
from runtime.traces import TraceWriter

__all__ = ["Ledger"]

_log = logging.getLogger(__name__)


class Ledger:
    """Takes every record, in order.

    Attributes
    ----------
    journal
        For people who look.
    recent
        Told of arrivals, decisions and records, if somebody plans by them; or None.
    """

    def __init__(self) -> None:
        self.journal = Journal()
        self.recent: RecentWork | None = None
        self._trace: TraceWriter | None = None

    @property
    def path(self) -> Path | None:
        """The trace in use, if any."""
        return self._trace.path if self._trace else None

    def set_trace(self, trace: TraceWriter | None) -> None:
        """Go on with another trace, or none; the one in use is closed."""
        old, self._trace = self._trace, trace
        if old is not None:
            old.close()

    def write(self, record: TraceRecord) -> None:
        """Take a record; a trace that cannot be written any more is given up."""
        self.journal.add(record)
        if self.recent is not None:
            self.recent.add(record)
        if self._trace is None:
            return
        try:
            self._trace.write(record)
        except OSError as error:
            # A full disk must not fail calls.
            _log.error("trace given up", extra={"path": str(self._trace.path), "error": str(error)})
            trace, self._trace = self._trace, None
            with contextlib.suppress(OSError):
                trace.close()
