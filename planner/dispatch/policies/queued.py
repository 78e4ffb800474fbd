"""The base of policies that keep calls in the router and release them in an order of their own.

Whenever something has happened and an endpoint has room, the waiting calls are offered, most
urgent first, until no room is left; `Placement` says where each goes. A policy of this kind thus
is a key and, if it wants, a placement of its own, and comparisons between them are about the
order alone.

What was sent stays sent: engines run what they have by their own rules, with the age of the run
as the priority, so that under KV pressure the youngest is preempted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    EndpointUp,
    Event,
    PrefillFinished,
    Tick,
)
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.base import Choice, Ready, Wait, age_priority
from planner.dispatch.policies.placement import Ahead, Placement, Route
from planner.dispatch.policies.progress import Ended, Runs
from planner.dispatch.view import FleetView

__all__ = ["Queue", "QueuedPolicy"]

_CHANGES = (
    CallArrived, CallCancelled, CallFailed, CallFinished, EndpointUp, PrefillFinished, Tick,
)  # fmt: skip
"""Events that bring work or room; after others an offer would be answered as the last one was."""


_LEAST_LOOKED_AT = 4
"""Fewer calls are sooner offered than looked at together."""


class Queue(ABC):
    """Calls wait in the order of `key`, and are offered while there is room.

    Parameters
    ----------
    placement
        Says where there is room.

    Attributes
    ----------
    forecaster
        Comes with the first offer; before it, nothing is ranked that would need it.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.forecaster: Forecaster | None = None
        self._changed = False

    @abstractmethod
    def key(self, call: Call, now_s: float) -> Any:
        """Return what waiting calls are sorted by, smallest first; ties by their names."""

    def note(self, event: Event) -> None:
        """Note whether an event brings work or room."""
        self._changed = self._changed or isinstance(event, _CHANGES)

    def order(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> Iterable[Call]:
        """Yield the waiting calls, most urgent first, while anything has room."""
        if not self._changed:
            return ()
        self._changed = False
        self.placement.begin(fleet)
        if not self.placement.open(fleet):
            return ()
        return self._offers(self.ranked(held, now_s), fleet, now_s)

    def ranked(self, held: Sequence[Call], now_s: float) -> Iterable[Call]:
        """Return the waiting calls, most urgent first."""
        if len(held) < 2:
            return held
        key = self.key
        # With their names, so that the order of ties is fixed.
        return [one[-1] for one in sorted([(key(one, now_s), one.call_id, one) for one in held])]

    def _offers(self, ranked: Iterable[Call], fleet: FleetView, now_s: float) -> Iterator[Call]:  # noqa: ARG002
        for call in ranked:
            yield call
            if not self.placement.open(fleet):
                return


class QueuedPolicy(Queue):
    """A policy that is such a queue in every fleet.

    Most calls that wait go on waiting, so it looks through the queue itself, several calls at once,
    and offers the router those that there is room for. The others keep their places, as they would
    if they were offered.

    Attributes
    ----------
    runs
        What has been seen of the runs under way.
    """

    name = "queued"
    looks_ahead: ClassVar[int] = 16
    """Calls that are looked at together; 0 offers each."""

    def __init__(self) -> None:
        super().__init__(Placement())
        self.runs = Runs()
        self.fleet: FleetView | None = None
        self._choosy: set[str] = set()  # calls that may not go everywhere
        self._found: Route | None = None  # of the call that is being offered

    # -- what a policy of this kind says, besides its key ---------------------------------------

    def ended(self, ended: Ended, now_s: float) -> None:
        """Take note of a call that has ended well; most orders need nothing."""

    def place(self, ready: Ready) -> Route | None:
        """Return where a call goes now, or None if it waits."""
        return self.placement.place(ready)

    def found(self, call: Call, ahead: Ahead) -> Route | None:
        """Return the same for a call that was looked at with others."""
        return self.placement.found(call, ahead)

    def unseen(self, call: Call) -> bool:
        """Return whether a call is to be offered without having been looked at."""
        return call.call_id in self._choosy

    # -- the router's side ----------------------------------------------------------------------

    def observe(self, event: Event, fleet: FleetView) -> None:
        """Follow the runs."""
        self.fleet = fleet
        self.note(event)
        if isinstance(event, CallArrived):
            if event.exclude:
                self._choosy.add(event.call.call_id)
        elif self._choosy and isinstance(event, (CallFinished, CallFailed, CallCancelled)):
            self._choosy.discard(event.call_id)
        ended = self.runs.observe(event)
        if ended is not None:
            self.ended(ended, event.now_s)

    def _offers(self, ranked: Iterable[Call], fleet: FleetView, now_s: float) -> Iterator[Call]:
        if not self.looks_ahead or self.forecaster is None:
            yield from super()._offers(ranked, fleet, now_s)
            return
        self._found = None
        queue, loads, placement = iter(ranked), fleet.loads, self.placement
        while calls := list(islice(queue, self.looks_ahead)):
            ahead: Ahead | None = None
            sent = -1
            for place, call in enumerate(calls):
                if len(calls) < _LEAST_LOOKED_AT or self.unseen(call):
                    yield call
                else:
                    if ahead is None or loads.total != sent:  # others wait longer for what was sent
                        loads.advance(now_s)
                        ahead = placement.look(calls[place:], fleet, self.forecaster, now_s)
                        sent = loads.total
                    if ahead is None or call.call_id not in ahead.rows:
                        yield call
                    else:
                        closed = len(placement.closed)
                        self._found = self.found(call, ahead)
                        if self._found is not None:
                            yield call
                            self._found = None
                        elif len(placement.closed) == closed:
                            continue  # as open as before
                if not placement.open(fleet):
                    return

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return where the offered call goes now."""
        self.forecaster = ready.forecaster
        route = self._found or self.place(ready)
        if route is None:
            return Wait("room")
        self.runs.sent(ready.call, ready.now_s)
        return Choice(
            route.entry.index,
            self.name,
            priority=age_priority(ready.call),
            cost=route.cost,
            decode_endpoint=None if route.decode is None else route.decode.index,
        )
