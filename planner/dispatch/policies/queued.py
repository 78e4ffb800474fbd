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
from typing import Any

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
from planner.dispatch.policies.placement import Placement, Route
from planner.dispatch.policies.progress import Ended, Runs
from planner.dispatch.policies.response import first_to_last
from planner.dispatch.view import FleetView

__all__ = ["Queue", "QueuedPolicy"]

_CHANGES = (
    CallArrived, CallCancelled, CallFailed, CallFinished, EndpointUp, PrefillFinished, Tick,
)  # fmt: skip
"""Events that bring work or room; after others an offer would be answered as the last one was."""


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
        return held if len(held) < 2 else first_to_last(held, lambda call: self.rank(call, now_s))

    def rank(self, call: Call, now_s: float) -> tuple[Any, str]:
        """Return the key with the call's name, so that the order of ties is fixed."""
        return self.key(call, now_s), call.call_id

    def waits(self, call: Call, fleet: FleetView, now_s: float) -> bool:  # noqa: ARG002
        """Return whether it is certain that a call, if it was offered, would have to wait.

        It then keeps its place in this pass. To offer it would change nothing, but take longer.
        """
        return False

    def _offers(self, ranked: Iterable[Call], fleet: FleetView, now_s: float) -> Iterator[Call]:
        for call in ranked:
            if not self.waits(call, fleet, now_s):
                yield call
            if not self.placement.open(fleet):
                return


class QueuedPolicy(Queue):
    """A policy that is such a queue in every fleet.

    Attributes
    ----------
    runs
        What has been seen of the runs under way.
    """

    name = "queued"

    def __init__(self) -> None:
        super().__init__(Placement())
        self.runs = Runs()
        self.fleet: FleetView | None = None
        self._choosy: set[str] = set()  # calls that may not go everywhere

    # -- what a policy of this kind says, besides its key ---------------------------------------

    def ended(self, ended: Ended, now_s: float) -> None:
        """Take note of a call that has ended well; most orders need nothing."""

    def place(self, ready: Ready) -> Route | None:
        """Return where a call goes now, or None if it waits."""
        return self.placement.place(ready)

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

    def waits(self, call: Call, fleet: FleetView, now_s: float) -> bool:
        """Return whether a call would have to wait, by the rule of all that do not say otherwise."""
        if self.forecaster is None or call.call_id in self._choosy:
            return False
        serving = fleet.candidates(call.model, tokens=call.least_tokens)
        candidates = serving.entries if fleet.pooled else serving
        if not candidates:
            return False
        decoders = serving.decoders if fleet.pooled else ()
        ready = Ready(call, candidates, fleet, self.forecaster, now_s, decoders)
        return self.place(ready) is None

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return where the offered call goes now."""
        self.forecaster = ready.forecaster
        route = self.place(ready)
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
