"""Where a call may go, when it would finish there, and whether there is room for it now.

A route is an endpoint that serves the call whole, or a prefill endpoint with a decode endpoint.
Policies that hold calls in the router place them all by the same rule, `Placement`: the route of
least expected finish. If that route has no room, the call waits for it, and two things keep those
behind it honest within the same pass over the queue:

* its service is booked there, so that the next call sees the wait it would really have, and slower
  endpoints come into use once waiting for a fast one takes longer;
* nothing less urgent may slip in there, so that a large call is not starved by small ones.

There is room if a slot is free and the KV pool holds the call's prompt and expected answer beside
what its residents will need; an idle endpoint always has room. Prefixes shared between residents
are counted once for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.dispatch.cost import Cost, call_cost
from planner.dispatch.pairing import pull_s
from planner.dispatch.policies.base import Ready, cost_of
from planner.dispatch.view import EndpointState, FleetView

__all__ = ["Placement", "Route", "has_room", "routes", "service_s"]


@dataclass(frozen=True, slots=True)
class Route:
    """One way for a call through the fleet.

    Parameters
    ----------
    entry
        The endpoint it is sent to.
    decode
        The endpoint that takes over after the prefill, or None.
    own_s
        Seconds from now to the finish, waits included.
    cost
        Of the part on ``entry``.
    ends
        Endpoint and slot seconds there, for each of the one or two.
    """

    entry: EndpointState
    decode: EndpointState | None
    own_s: float
    cost: Cost
    ends: tuple[tuple[EndpointState, float], ...]


def routes(ready: Ready) -> list[Route]:
    """Return the routes of a ready call, in fleet order; never empty."""
    call, now_s = ready.call, ready.now_s
    forecast = ready.forecaster.of(call)
    found: list[Route] = []
    decodes: dict[int, Cost] = {}
    for state in ready.candidates:
        cost = cost_of(call, forecast, state, now_s)
        if state.endpoint.role != "prefill":
            found.append(Route(state, None, cost.own_s, cost, ((state, cost.service_s),)))
            continue
        for decode in ready.decoders:
            if decode.endpoint.model != state.endpoint.model:
                continue
            rest = decodes.get(decode.index)
            if rest is None:
                rest = decodes[decode.index] = call_cost(
                    call.prompt_tokens, call.prefix, call.prefix_tokens, forecast, decode, now_s,
                    prefilled=True,
                )  # fmt: skip
            missing = call.prompt_tokens - decode.prefix.match(call.prefix) * call.prefix_tokens
            own_s = cost.own_s + pull_s(missing, state, decode) + rest.own_s
            ends = ((state, cost.service_s), (decode, rest.service_s))
            found.append(Route(state, decode, own_s, cost, ends))
    return found


def service_s(
    prompt_tokens: float,
    output_tokens: float,
    fleet: Sequence[EndpointState],
    model: str | None = None,
) -> float:
    """Return the seconds of a call on an idle fleet: its best endpoint or pair, nothing cached.

    Endpoints that are down count, so that a run's yardstick does not change with its fleet. Where
    none serves the model it is 0 s.
    """
    whole: list[float] = []
    prefills: list[tuple[EndpointState, float]] = []
    decodes: list[tuple[EndpointState, float]] = []
    for state in fleet:
        endpoint, row = state.endpoint, state.latency
        if model is not None and endpoint.model != model:
            continue
        prefill = row.prefill_s(prompt_tokens)
        decode = output_tokens * row.decode_step_s(1, prompt_tokens + output_tokens / 2)
        if endpoint.role == "both":
            whole.append(prefill + decode)
        elif endpoint.role == "prefill":
            prefills.append((state, prefill))
        else:
            decodes.append((state, decode))
    whole += [
        prefill + pull_s(prompt_tokens, one, other) + decode
        for one, prefill in prefills
        for other, decode in decodes
        if one.endpoint.model == other.endpoint.model
    ]
    return min(whole, default=0.0)


def has_room(state: EndpointState, tokens: float = 0.0) -> bool:
    """Return whether an endpoint can take a call that needs ``tokens`` of KV at once."""
    if state.in_flight == 0:
        return True
    endpoint = state.endpoint
    if state.in_flight >= endpoint.max_num_seqs:
        return False
    return state.context_tokens + tokens < endpoint.kv_tokens


class Placement:
    """Earliest expected finish over all routes, with room kept for those that wait."""

    def __init__(self) -> None:
        self._booked_s: dict[int, float] = {}
        self._closed: set[int] = set()

    def begin(self, fleet: FleetView) -> None:  # noqa: ARG002 - for those that override it
        """Begin a pass over the queue."""
        self._booked_s.clear()
        self._closed.clear()

    def open(self, fleet: FleetView) -> bool:
        """Return whether anything could still be sent in this pass."""
        return any(
            state.healthy and state.endpoint.role != "decode" and self.admits(state)
            for state in fleet.states
        )

    def admits(self, state: EndpointState, tokens: float = 0.0) -> bool:
        """Return whether a call may be sent to an endpoint in this pass."""
        return state.index not in self._closed and has_room(state, tokens)

    def place(self, ready: Ready) -> Route | None:
        """Return the call's best route if it has room, else None, and keep its place there."""
        return self.settle(min(routes(ready), key=self.finish_s), ready)

    def finish_s(self, route: Route) -> float:
        """Return the seconds to the finish, what others have booked included."""
        booked = self._booked_s
        return route.own_s + sum(booked.get(state.index, 0.0) for state, _ in route.ends)

    def settle(self, route: Route, ready: Ready) -> Route | None:
        """Return a route if all its ends have room, else None, and keep the call's place there."""
        call = ready.call
        answer = ready.forecaster.of(call).output_tokens
        needs = [
            call.prompt_tokens + (1.0 if state.endpoint.role == "prefill" else answer)
            for state, _ in route.ends
        ]
        full = [
            state
            for (state, _), need in zip(route.ends, needs, strict=True)
            if not self.admits(state, need)
        ]
        if not full:
            return route
        self._closed.update(state.index for state in full)
        for (state, seconds), need in zip(route.ends, needs, strict=True):
            # Prefills follow one another; what holds slots shares them, or the KV pool.
            turns = 1.0
            if state.endpoint.role != "prefill":
                endpoint = state.endpoint
                turns = max(1.0, min(endpoint.max_num_seqs, endpoint.kv_tokens / need))
            self._booked_s[state.index] = self._booked_s.get(state.index, 0.0) + seconds / turns
        return None
