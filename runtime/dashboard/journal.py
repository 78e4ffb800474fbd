"""What the latest runs did, call by call, and how the decisions turned out: for people who look.

Bounded in every direction: runs by number, what is kept of a run by number. No decision depends
on it, and no prompt text is in it. Times are clock seconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, TraceRecord
from runtime.dispatcher import Ticket

__all__ = ["Journal", "Regret", "RunLog"]

_RUNS = 512
"""Runs kept; those that were silent for longest go first."""
_RUN_RECORDS = 256
"""Latest records kept of a run."""
_REGRETS = 200


@dataclass(frozen=True, slots=True)
class Regret:
    """How a call turned out against the best other endpoint as forecast at its dispatch.

    Parameters
    ----------
    finish_s
        When it ended.
    regret_s
        Actual finish less the finish predicted for the runner-up; above 0 where the other endpoint
        would have been faster, had its forecast come true.
    """

    endpoint: str
    finish_s: float
    regret_s: float


@dataclass(slots=True, kw_only=True)
class RunLog:
    """What is kept of a run.

    Parameters
    ----------
    open
        Attempts under way, by call id.
    records
        Of what ended, oldest first.
    ended
        Its own record once it is over.
    done
        How often each node has finished, calls and tools alike.
    outcomes
        Branch -> outcomes taken, in order.
    changes
        Grows with everything that happens.
    """

    open: dict[str, Ticket] = field(default_factory=dict)
    records: deque[TraceRecord] = field(default_factory=lambda: deque(maxlen=_RUN_RECORDS))
    ended: RunRecord | None = None
    done: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, list[str]] = field(default_factory=dict)
    changes: int = 0


class Journal:
    """The latest runs, decisions by reason, and recent regret."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, RunLog] = OrderedDict()
        self.decisions: Counter[tuple[str, str]] = Counter()
        """Choices by (policy, reason) since the start."""
        self.regrets: deque[Regret] = deque(maxlen=_REGRETS)

    def find(self, run_id: str) -> RunLog | None:
        """Return what is kept of a run, or None."""
        return self._runs.get(run_id)

    def sent(self, ticket: Ticket, policy: str) -> None:
        """Note a decision."""
        self.decisions[policy, ticket.send.reason] += 1
        log = self._log(ticket.call.run_id)
        log.ended = None  # the id is used again, or the call overtook the end of its run
        log.open[ticket.call.call_id] = ticket
        log.changes += 1

    def add(self, record: TraceRecord) -> None:
        """Note the end of a call, tool or run, or an outcome."""
        log = self._log(record.run_id)
        log.changes += 1
        if isinstance(record, RunRecord):
            log.ended = record
            return
        log.records.append(record)
        if isinstance(record, BranchRecord):
            log.outcomes.setdefault(record.branch, []).append(record.outcome)
        elif isinstance(record, ToolRecord):
            log.done[record.node] += 1
        elif isinstance(record, CallRecord):
            log.open.pop(record.call_id, None)
            if record.status == "ok":
                log.done[record.node] += 1
                if record.runner_up_finish_s is not None and record.finish_s is not None:
                    regret_s = record.finish_s - record.runner_up_finish_s
                    self.regrets.append(Regret(record.endpoint, record.finish_s, regret_s))

    def _log(self, run_id: str) -> RunLog:
        log = self._runs.get(run_id)
        if log is None:
            log = self._runs[run_id] = RunLog()
            if len(self._runs) > _RUNS:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(run_id)
        return log
