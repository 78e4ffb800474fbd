"""The router: events in, commands out, no clock and no I/O of its own.

House rules
-----------
* A call moves along HELD -> SENT -> STREAMING and leaves with finished, failed or cancelled. The
  table below is complete: an event that a call's state does not list raises `IllegalEvent` and
  changes nothing.
* Each transition is synchronous and complete. The same events give the same commands, so a live
  run's log replayed here repeats its decisions.
* Whatever a call was counted for is given back on every way out.
* A call is held because no endpoint can take it, or because the policy wants it to wait. The
  former are offered again when an endpoint comes up, oldest run first; the latter after each
  event, in the policy's own order. If the fleet changes into one where the policy holds none,
  what it held is offered once more with the next event but an arrival, oldest run first.
* A decision is answered first and counted afterwards: `decide` leaves the last call it sent to
  `settle`, which comes before anything else that is asked of the router or its view. So nothing
  but a clock can tell `decide` from `handle`, which does both. `crowd` tells of one endpoint
  without counting, for those who must not wait for it.
* With prefill/decode pools a call is counted at both ends from the start; its prefill endpoint
  stops counting it when its part is done. Rows are not learned from such calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypedDict

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    Command,
    EndpointDown,
    EndpointUp,
    Event,
    FirstToken,
    Hold,
    PrefillFinished,
    Send,
)
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.learning import CorrectedForecaster, FleetLearner
from planner.dispatch.pairing import decode_s, pair, prefill_only
from planner.dispatch.policies.base import (
    Observing,
    Policy,
    Queueing,
    Ready,
    Selective,
    Wait,
    cost_of,
)
from planner.dispatch.view import Candidates, Crowd, EndpointState, FleetView, Resident
from planner.domain.errors import IllegalEvent
from planner.domain.fleet import Fleet

__all__ = ["TRANSITIONS", "CallState", "Elsewhere", "Router", "elsewhere"]

Order = Callable[[Sequence[Call], FleetView, float], Iterable[Call]]


class CallState(Enum):
    """Where a call is."""

    HELD = "held"
    SENT = "sent"
    STREAMING = "streaming"


TRANSITIONS: Mapping[tuple[CallState, type], CallState | None] = {
    (CallState.HELD, CallCancelled): None,
    (CallState.SENT, PrefillFinished): CallState.SENT,
    (CallState.SENT, FirstToken): CallState.STREAMING,
    (CallState.SENT, CallFinished): None,
    (CallState.SENT, CallFailed): None,
    (CallState.SENT, CallCancelled): None,
    (CallState.STREAMING, CallFinished): None,
    (CallState.STREAMING, CallFailed): None,
    (CallState.STREAMING, CallCancelled): None,
}
"""(state, event) -> next state; None means the call is gone."""


class Elsewhere(TypedDict, total=False):
    """The fields of a `CallRecord` that tell of the runner-up."""

    runner_up: str
    runner_up_finish_s: float
    runner_up_excess_s: float


def elsewhere(send: Send, fleet: Fleet) -> Elsewhere:
    """Return what a call's record says of the endpoint it nearly went to, if that is known."""
    other = None if send.ranking is None else send.ranking.runner_up()
    if other is None:
        return {}
    return {
        "runner_up": fleet.endpoints[other.endpoint].id,
        "runner_up_finish_s": send.predicted_finish_s + other.later_s,
        "runner_up_excess_s": other.excess_s,
    }


@dataclass(slots=True)
class _Sent:
    """A call that was sent and is not counted yet; ``decode`` is its other end, if it has one."""

    call: Call
    state: EndpointState
    decode: EndpointState | None
    forecast: Forecast
    cached_tokens: int
    now_s: float


def _residents(sent: _Sent) -> list[tuple[EndpointState, Resident]]:
    """Return what a call that was sent is counted as, and where."""
    uncached = float(sent.call.prompt_tokens - sent.cached_tokens)
    if sent.decode is None:
        return [(sent.state, _resident(sent, sent.forecast, uncached))]
    return [
        (sent.state, _resident(sent, prefill_only(sent.forecast), uncached)),
        (sent.decode, _resident(sent, sent.forecast, 0.0)),
    ]


def _resident(sent: _Sent, forecast: Forecast, uncached: float) -> Resident:
    return Resident(
        call_id=sent.call.call_id,
        run_id=sent.call.run_id,
        prompt_tokens=sent.call.prompt_tokens,
        uncached_tokens=uncached,
        output_tokens=forecast.output_tokens,
        criticality=forecast.criticality,
        sent_s=sent.now_s,
        least_left=forecast.least_left,
    )


class Router:
    """Applies a policy to events.

    Parameters
    ----------
    fleet
        The endpoints; indices in commands are positions in it.
    policy
        Chooses among healthy candidates.
    forecaster
        Forecasts for the policy. Its latency coefficients override those of the fleet file.
    online
        Whether latency rows and lengths follow what finished calls show, see
        `planner.dispatch.learning`. Each router starts from the forecasts as given.
    """

    def __init__(
        self, fleet: Fleet, policy: Policy, forecaster: Forecaster, *, online: bool = False
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.lengths = CorrectedForecaster(forecaster) if online else None
        self.forecaster = self.lengths or forecaster
        learned = forecaster.estimates.endpoints
        self._view = FleetView(
            [
                EndpointState(index, endpoint, learned.get(endpoint.id, endpoint.latency))
                for index, endpoint in enumerate(fleet.endpoints)
            ]
        )
        self.learner = FleetLearner(self._view.states) if online else None
        self._observe = policy.observe if isinstance(policy, Observing) else None
        self._order = self._order_here()
        self._left = False  # whether calls are held that the policy would not hold any more
        self._states: dict[str, CallState] = {}
        self._calls: dict[str, Call] = {}
        self._where: dict[str, EndpointState] = {}
        self._prefills: dict[str, EndpointState] = {}  # the other end, while it has work
        self._held: dict[str, CallArrived] = {}
        self._sent: _Sent | None = None

    @property
    def view(self) -> FleetView:
        """What is known of the endpoints, all that was sent counted."""
        self.settle()
        return self._view

    def refit(self, fleet: Fleet) -> None:
        """Take up a changed fleet: endpoints keep their index, new ones come at the end.

        Calls in flight, caches and what was learned stay; a changed latency row is taken anew.
        """
        states = list(self.view.states)
        pairs = zip(states, fleet.endpoints, strict=False)
        anew = {state.index for state, endpoint in pairs if state.refit(endpoint)}
        learned = self.forecaster.estimates.endpoints
        states.extend(
            EndpointState(index, endpoint, learned.get(endpoint.id, endpoint.latency))
            for index, endpoint in enumerate(fleet.endpoints)
            if index >= len(states)
        )
        self.view.states = tuple(states)
        if self.learner is not None:
            self.learner.refit(self.view.states, anew)
        queued = self._order is not None
        self._order = self._order_here()
        self._left = (self._left or queued) and self._order is None
        self.fleet = fleet

    def _order_here(self) -> Order | None:
        """Return the policy's order, or None where it does not queue."""
        policy = self.policy
        if not isinstance(policy, Queueing):
            return None
        if isinstance(policy, Selective) and not policy.holds(self._view):
            return None
        return policy.order

    def handle(self, event: Event) -> list[Command]:
        """Apply one event and return the commands it causes, in order.

        Raises
        ------
        IllegalEvent
            If the call is unknown or its state does not allow the event.
        """
        commands = self.decide(event)
        self.settle()
        return commands

    def decide(self, event: Event) -> list[Command]:
        """Do as `handle` does, but leave the counting of the last call sent to `settle`.

        For those who can use the answer at once and call `settle` right after.
        """
        if self._sent is not None:
            self.settle()
        commands: list[Command] = []
        match event:
            case CallArrived():
                if event.call.call_id in self._states:
                    raise IllegalEvent(
                        f"call {event.call.call_id!r} arrived twice; give each attempt its own id"
                    )
                if self._observe is not None:
                    self._observe(event, self._view)
                return self._arrive(event)
            case PrefillFinished() | FirstToken() | CallFinished() | CallFailed() | CallCancelled():
                self._advance(event)
            case EndpointDown():
                self._view.states[event.endpoint].healthy = False
            case EndpointUp():
                state = self._view.states[event.endpoint]
                state.healthy = True
                if event.cold:
                    state.prefix.clear()
                if self._order is None:
                    commands = self._release(self._stranded(), event.now_s)
            case _:  # runs, tools, branches and ticks concern policies only
                pass
        if self._observe is not None:
            self._observe(event, self._view)
        if self._order is not None and self._held:
            commands = self._release(self._offered(self._order, event.now_s), event.now_s)
        elif self._left:
            self._left = False
            commands += self._release(self._stranded(), event.now_s)
        return commands

    def _arrive(self, event: CallArrived) -> list[Command]:
        """Send or hold a new call; where others wait, it takes its place among them."""
        if self._order is None:
            command = self._place(event.call, event.now_s, *self._candidates(event))
            if isinstance(command, Hold):
                self._hold(event)
            return [command]
        call_id = event.call.call_id
        self._hold(event)
        offered = self._offered(self._order, event.now_s)
        commands = self._release(offered, event.now_s, arriving=call_id)
        if not any(command.call_id == call_id for command in commands):
            reason = "queued" if self._candidates(event)[1] else "no_endpoint"
            commands.append(Hold(call_id=call_id, reason=reason))
        return commands

    def _offered(self, order: Order, now_s: float) -> Iterable[Call]:
        return order([arrived.call for arrived in self._held.values()], self._view, now_s)

    def _hold(self, event: CallArrived) -> None:
        self._states[event.call.call_id] = CallState.HELD
        self._held[event.call.call_id] = event

    def _candidates(self, event: CallArrived) -> tuple[Candidates, Candidates]:
        """Return the endpoints that can serve a call, and those it can be sent to."""
        call = event.call
        serving = self._view.candidates(call.model, event.exclude, call.least_tokens)
        return serving, serving.entries if self._view.pooled else serving

    def _place(
        self, call: Call, now_s: float, serving: Candidates, candidates: Candidates
    ) -> Command:
        """Send a call to one of some endpoints, see `_candidates`, or say that it is held."""
        decoders = serving.decoders if self._view.pooled else ()
        choice = (
            self.policy.choose(
                Ready(call, candidates, self._view, self.forecaster, now_s, decoders)
            )
            if candidates
            else Wait("no_endpoint")
        )
        if isinstance(choice, Wait):
            return Hold(call_id=call.call_id, reason=choice.reason, until_s=choice.until_s)
        state = self._view.states[choice.endpoint]
        forecast = self.forecaster.of(call)
        cost = choice.cost or cost_of(call, forecast, state, now_s)
        decode: EndpointState | None = None
        finish_s = now_s + cost.own_s
        if state.endpoint.role == "prefill":
            decode = (
                pair(call, forecast, state, serving, now_s)
                if choice.decode_endpoint is None
                else self._view.states[choice.decode_endpoint]
            )
            finish_s += decode_s(call, forecast, state, decode, now_s)
        command = Send(
            call_id=call.call_id,
            endpoint=choice.endpoint,
            priority=choice.priority,
            reason=choice.reason,
            predicted_finish_s=finish_s,
            predicted_output_tokens=forecast.output_tokens,
            cached_tokens=cost.cached_tokens,
            in_flight=state.in_flight,
            decode_endpoint=None if decode is None else decode.index,
            ranking=choice.ranking if decode is None else None,
        )
        self._sent = _Sent(call, state, decode, forecast, cost.cached_tokens, now_s)
        return command

    def settle(self) -> None:
        """Count the call that was sent last, unless that is done."""
        sent = self._sent
        if sent is None:
            return
        self._sent = None
        call, state, decode = sent.call, sent.state, sent.decode
        for where, resident in _residents(sent):
            where.add(resident)
            where.prefix.record(call.prefix, call.prefix_tokens)
        if decode is None:
            self._where[call.call_id] = state
            if self.learner is not None:
                output_tokens = sent.forecast.output_tokens
                self.learner.sent(call, state, sent.cached_tokens, output_tokens, sent.now_s)
        else:
            self._prefills[call.call_id] = state
            self._where[call.call_id] = decode
        self._states[call.call_id] = CallState.SENT
        self._calls[call.call_id] = call

    def crowd(self, endpoint: int) -> Crowd:
        """Return what an endpoint has to do, all that was sent there in it; counts nothing.

        For those who have to know before there is time to count.
        """
        state, sent = self._view.states[endpoint], self._sent
        if sent is None:
            return Crowd(state)
        return Crowd(state, [resident for where, resident in _residents(sent) if where is state])

    def _advance(
        self, event: PrefillFinished | FirstToken | CallFinished | CallFailed | CallCancelled
    ) -> None:
        call_id = event.call_id
        state = self._states.get(call_id)
        if state is None or (state, type(event)) not in TRANSITIONS:
            found = "unknown" if state is None else state.value
            raise IllegalEvent(f"{type(event).__name__} for call {call_id!r}, which is {found}")
        after = TRANSITIONS[state, type(event)]
        prefill = self._prefills.pop(call_id, None)
        if prefill is not None:
            prefill.remove(call_id)
        if isinstance(event, PrefillFinished):
            return
        if after is not None:
            self._states[call_id] = after
            self._where[call_id].first_token(call_id, event.now_s)
            if self.learner is not None and isinstance(event, FirstToken):
                self.learner.first_token(call_id, event.now_s, seen=event.seen)
            return
        del self._states[call_id]
        self._held.pop(call_id, None)
        call = self._calls.pop(call_id, None)
        where = self._where.pop(call_id, None)
        if where is not None:
            where.remove(call_id)
        self._learn(event, call)

    def _learn(self, event: Event, call: Call | None) -> None:
        """Learn from a call that is over; ``call`` is None if it was never sent.

        An answer of no tokens is an embedding, or one whose length is unknown: nothing to learn.
        """
        if self.learner is None or self.lengths is None or call is None:
            return
        if isinstance(event, CallFinished) and event.output_tokens >= 1:
            self.learner.finished(event)
            self.lengths.observe(call, event.output_tokens)
        else:
            self.learner.gone(call.call_id, event.now_s)

    def _stranded(self) -> list[Call]:
        """Return the held calls, oldest run first."""
        calls = [arrived.call for arrived in self._held.values()]
        return sorted(calls, key=lambda call: (call.run_arrival_s, call.call_id))

    def _release(self, calls: Iterable[Call], now_s: float, *, arriving: str = "") -> list[Command]:
        """Offer held calls again; return what is sent, what asks to be woken, and ``arriving``."""
        commands: list[Command] = []
        for call in calls:
            held = self._held.get(call.call_id)
            if held is None:
                continue
            serving, candidates = self._candidates(held)
            if not candidates:
                continue
            command = self._place(call, now_s, serving, candidates)
            del self._held[call.call_id]
            if isinstance(command, Send):
                self.settle()  # the order may be a generator that looks at what was sent before
            else:
                self._held[call.call_id] = held  # behind those that were not offered
            if (
                isinstance(command, Send)
                or command.until_s is not None
                or command.call_id == arriving
            ):
                commands.append(command)
        return commands

    def servable(self, call: Call, exclude: frozenset[int] = frozenset()) -> bool:
        """Return whether an endpoint that is up could take a call."""
        return bool(self._candidates(CallArrived(call=call, now_s=0.0, exclude=exclude))[1])

    def on(self, call_id: str, endpoint: int) -> bool:
        """Return whether a call is under way on an endpoint."""
        return call_id in self.view.states[endpoint].residents

    @property
    def in_flight(self) -> int:
        """Calls sent and unfinished."""
        self.settle()
        return len(self._where)

    @property
    def held(self) -> int:
        """Calls waiting in the router."""
        return len(self._held)

    def __repr__(self) -> str:
        return f"<Router {self.policy.name} in_flight={self.in_flight} held={self.held}>"
