"""What a policy has seen of each run: waits, service, calls that ended; no more than the events.

Every policy that ranks runs keeps one `Runs` and shows it each event. A call without a run id is a
run of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    Event,
    RunEnded,
    RunStarted,
)
from planner.domain.records import record

__all__ = ["Ended", "RunProgress", "Runs", "first_attempt"]


def first_attempt(call_id: str) -> str:
    """Return the id by which later calls name this one as their parent."""
    return call_id.partition("#")[0]


@record(kw_only=False)
class Ended:
    """A call that is over.

    Parameters
    ----------
    call
        As it was revealed.
    finish_s
        When it ended.
    service_s
        Seconds from being sent to its end.
    output_tokens
        Tokens it wrote; 0 if it failed.
    """

    call: Call
    finish_s: float
    service_s: float
    output_tokens: int


@dataclass(slots=True)
class RunProgress:
    """One run so far.

    Parameters
    ----------
    arrival_s
        When it began.
    waited_s
        Waits of its calls in the router, of those sent, s.
    attained_s
        Service of its calls that are over, s, parallel ones added up.
    path_s
        Ended call -> service along the longest chain of calls up to its end, s.
    ended
        Its calls that ended well, by the id of their first attempt.
    open
        Its calls that are ready or sent -> when they were sent, or None.
    """

    run_id: str
    workflow_hash: str
    arrival_s: float
    tenant: str = "default"
    deadline_s: float | None = None
    waited_s: float = 0.0
    attained_s: float = 0.0
    path_s: dict[str, float] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    open: dict[str, tuple[Call, float | None]] = field(default_factory=dict)

    def parents(self, call: Call) -> list[Ended]:
        """Return the ended calls that made a call ready; all of them where it names none."""
        if call.parents:
            return [self.ended[name] for name in call.parents if name in self.ended]
        return [one for one in self.ended.values() if one.finish_s <= call.ready_s]

    def path_before(self, call: Call) -> float:
        """Return the service attained on the longest chain of calls that leads to a call, s."""
        names = [first_attempt(one.call.call_id) for one in self.parents(call)]
        return max((self.path_s[name] for name in names), default=0.0)


class Runs:
    """The runs under way, by id."""

    def __init__(self) -> None:
        self._runs: dict[str, RunProgress] = {}
        self._of_call: dict[str, RunProgress] = {}

    def of(self, call: Call) -> RunProgress:
        """Return the run of a call; one that was not announced begins with its first call."""
        key = call.run_id or call.call_id
        run = self._runs.get(key)
        if run is None:
            run = RunProgress(key, call.workflow_hash, call.run_arrival_s, call.tenant)
            self._runs[key] = run
        if call.deadline_s is not None:
            run.deadline_s = call.deadline_s
        return run

    def get(self, run_id: str) -> RunProgress | None:
        """Return a run that is under way, or None."""
        return self._runs.get(run_id)

    def all(self) -> list[RunProgress]:
        """Return the runs under way, in order of appearance."""
        return list(self._runs.values())

    def sent(self, call: Call, now_s: float) -> None:
        """Note that a call was sent; the policy says so, since commands are no events."""
        run = self.of(call)
        run.open[call.call_id] = call, now_s
        run.waited_s += now_s - call.ready_s

    def observe(self, event: Event) -> Ended | None:
        """Take note of an event; return the call that ended well by it, if one did."""
        if isinstance(event, CallArrived):
            run = self.of(event.call)
            run.open[event.call.call_id] = event.call, None
            self._of_call[event.call.call_id] = run
        elif isinstance(event, (CallFinished, CallFailed, CallCancelled)):
            return self._over(event)
        elif isinstance(event, RunStarted):
            self._runs.setdefault(
                event.run_id,
                RunProgress(event.run_id, event.workflow_hash, event.now_s, event.tenant),
            )
        elif isinstance(event, RunEnded):
            self._runs.pop(event.run_id, None)
        return None

    def _over(self, event: CallFinished | CallFailed | CallCancelled) -> Ended | None:
        run = self._of_call.pop(event.call_id, None)
        if run is None:
            return None
        call, sent_s = run.open.pop(event.call_id)
        service_s = 0.0 if sent_s is None else event.now_s - sent_s
        run.attained_s += service_s
        if not call.run_id:
            self._runs.pop(call.call_id, None)
        if not isinstance(event, CallFinished):
            return None
        before_s = run.path_before(call)
        ended = Ended(call, event.now_s, service_s, event.output_tokens)
        name = first_attempt(call.call_id)
        run.ended[name] = ended
        run.path_s[name] = before_s + service_s
        return ended
