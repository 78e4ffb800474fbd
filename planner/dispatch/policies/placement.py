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
are counted once for each of them. A policy may give each endpoint more than it can run, so that
what comes next is at hand when a slot gets free.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from operator import add
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from planner.dispatch.cost import Cost, Costs, cached_tokens, fleet_costs, waiting_costs
from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecaster
from planner.dispatch.pairing import pull_s, transfer_s
from planner.dispatch.policies.base import Ready, costs_of
from planner.dispatch.prefixes import News, concerns
from planner.dispatch.view import Candidates, EndpointState, FleetView
from planner.domain.records import record

__all__ = ["Alone", "Ends", "Pairs", "Placement", "Route", "Routes", "has_room", "service_s"]

_MOST_PAIRS = 256
"""Sets of endpoints whose ways are kept."""
_MOST_LISTED = 16
"""Ways that are sooner gone through in a list than as an array."""
_MOST_ALONE = 16_384
"""Shapes of calls whose time alone is kept."""
_MOST_TEXTS = 4096
"""Calls of which it is kept what endpoints hold of their prompts."""

Floats: TypeAlias = npt.NDArray[np.float64]

Ends: TypeAlias = tuple[tuple[EndpointState, float], ...]
"""Endpoints of a way with the slot seconds there."""


@record(kw_only=False)
class Route:
    """One way for a call through the fleet.

    Parameters
    ----------
    entry
        The endpoint it is sent to.
    decode
        The endpoint that takes over after the prefill, or None.
    cost
        Of the part on ``entry``.
    ends
        Endpoint and slot seconds there, for each of the one or two.
    """

    entry: EndpointState
    decode: EndpointState | None
    cost: Cost
    ends: Ends


class Pairs:
    """The ways through some endpoints, whatever the call: each whole one, each pair of a model.

    Parameters
    ----------
    entries
        Endpoints that calls are sent to.
    decoders
        Decode endpoints; empty without pools.

    Attributes
    ----------
    indices
        Fleet indices of the endpoint each way enters and of the one it decodes on, -1 if the same.
    entry, decode
        Their places among ``entries`` and ``decoders``, 0 for no decoder; shape (ways,).
    ends
        ``indices`` as an array; shape (2, ways).
    split
        Whether a way has a decoder, 0 or 1; shape (ways,).
    decoders
        Fleet indices of the decode endpoints.
    pull_s
        Seconds per token of KV that a way moves; shape (ways,).
    places
        The place of each way, by its ``indices``.
    """

    __slots__ = (
        "_kept", "decode", "decoders", "ends", "entry", "indices", "places", "pull_s", "split",
    )  # fmt: skip

    def __init__(self, entries: Sequence[EndpointState], decoders: Sequence[EndpointState]) -> None:
        ways = [
            (place, other)
            for place, state in enumerate(entries)
            for other in _decoders(state, decoders)
        ]
        self._kept = [state.endpoint for state in (*entries, *decoders)]
        self.indices = [
            (entries[place].index, -1 if other is None else decoders[other].index)
            for place, other in ways
        ]
        self.places = {ends: way for way, ends in enumerate(self.indices)}
        self.ends = np.array(self.indices, dtype=np.intp).T
        self.entry = np.array([place for place, _ in ways])
        self.decode = np.array([other or 0 for _, other in ways])
        self.split = np.array([float(other is not None) for _, other in ways])
        self.decoders = np.array([state.index for state in decoders], dtype=np.intp)
        self.pull_s = np.array(
            [
                0.0 if other is None else pull_s(1.0, entries[place], decoders[other])
                for place, other in ways
            ]
        )


def _decoders(state: EndpointState, decoders: Sequence[EndpointState]) -> list[int | None]:
    if state.endpoint.role != "prefill":
        return [None]
    model = state.endpoint.model
    return [other for other, one in enumerate(decoders) if one.endpoint.model == model]


class Text:
    """What endpoints are believed to hold of a prompt.

    Attributes
    ----------
    version
        Of what they hold, see `planner.dispatch.view.FleetView`.
    states
        The endpoints; another fleet needs another text.
    cached
        See `planner.dispatch.cost.cached_tokens`.
    missing
        Tokens that would have to be moved there, if nothing else was computed; (endpoints,), or
        (0,) without pools.
    """

    __slots__ = ("cached", "missing", "states", "version")

    def __init__(self, call: Call, fleet: FleetView) -> None:
        self.version, self.states = fleet.text_version, fleet.states
        self.cached = cached_tokens(call.prompt_tokens, call.prefix, call.prefix_tokens, fleet)
        self.missing: Floats = np.empty(0)
        if fleet.pooled:
            self.missing = np.full(len(fleet.states), float(call.prompt_tokens))
            for depth, who in fleet.matches(call.prefix):
                self.missing[fleet.spread(who)] = call.prompt_tokens - depth * call.prefix_tokens
            np.maximum(self.missing, 0.0, out=self.missing)

    def refresh(
        self, call: Call, fleet: FleetView, changed: Sequence[tuple[EndpointState, News]]
    ) -> None:
        """Bring it up to date, given what has changed since its version."""
        prompt, most = call.prompt_tokens, max(0, call.prompt_tokens - 1)
        for state, news in changed:
            if not concerns(news, call.prefix):
                continue
            held = state.prefix.match(call.prefix) * call.prefix_tokens
            self.cached[state.index] = min(int(held), most)
            if fleet.pooled:
                self.missing[state.index] = max(prompt - held, 0.0)
        self.version = fleet.text_version


class Routes:
    """All ways of a ready call; never none.

    Parameters
    ----------
    ready
        The call.
    pairs
        The ways.
    text
        What endpoints hold of its prompt.
    imposed
        Whether `imposed_s` is asked for.

    Attributes
    ----------
    pairs
        The ways.
    own_s
        Seconds from now to the finish on each way, waits included; shape (ways,).
    """

    __slots__ = ("_costs", "_ready", "_rest", "own_s", "pairs")

    def __init__(self, ready: Ready, pairs: Pairs, text: Text, *, imposed: bool) -> None:
        self._ready = ready
        self._costs = costs_of(ready, imposed=imposed, cached=text.cached)
        self._rest: Costs | None = None
        self.pairs = pairs
        self.own_s = self._costs.own_s
        if not ready.decoders:
            return
        call = ready.call
        forecast = ready.forecaster.of(call)
        self._rest = fleet_costs(
            call.prompt_tokens, call.prefix, call.prefix_tokens, forecast, ready.fleet,
            ready.now_s, prefilled=True, imposed=False,
        ).take(pairs.decoders)  # fmt: skip
        self.own_s = self.own_s[pairs.entry] + text.missing[pairs.ends[1]] * pairs.pull_s
        self.own_s += self._rest.own_s[pairs.decode] * pairs.split

    @property
    def imposed_s(self) -> Floats:
        """Delay imposed on the residents of the endpoint that each way enters; shape (ways,)."""
        imposed_s: Floats = self._costs.imposed_s[self.pairs.entry]
        return imposed_s

    def ends(self, way: int) -> Ends:
        """Return the one or two endpoints of a way, with the slot seconds there."""
        place = self.pairs.entry.item(way)
        first = self._ready.candidates[place], self._costs.service_s.item(place)
        if self._rest is None or self.pairs.indices[way][1] < 0:
            return (first,)
        other = self.pairs.decode.item(way)
        return first, (self._ready.decoders[other], self._rest.service_s.item(other))

    def route(self, way: int) -> Route:
        """Return one way in full."""
        ends = self.ends(way)
        cost = self._costs[self.pairs.entry.item(way)]
        return Route(ends[0][0], None if len(ends) == 1 else ends[1][0], cost, ends)


class Ahead:
    """The ways of several waiting calls, reckoned together: what `Routes` says of each.

    Parameters
    ----------
    calls
        Calls with the same candidates.
    texts
        What endpoints hold of their prompts.
    candidates, decoders
        As in `planner.dispatch.policies.base.Ready`.
    pairs
        The ways.

    Attributes
    ----------
    rows
        The place of each call, by its id.
    answers
        Expected output of each, tokens.
    candidates
        Endpoints they may be sent to.
    pairs
        The ways.
    own_s
        Seconds from now to the finish on each way; shape (calls, ways).
    listed_s
        The same as lists where ways are few, without pools; else empty.
    """

    __slots__ = (
        "_cached", "_decoders", "_enter_s", "_first", "_rest", "answers", "candidates", "listed_s",
        "own_s", "pairs", "rows",
    )  # fmt: skip

    def __init__(
        self,
        calls: Sequence[Call],
        texts: Sequence[Text],
        candidates: Candidates,
        decoders: Sequence[EndpointState],
        pairs: Pairs,
        fleet: FleetView,
        forecaster: Forecaster,
        now_s: float,
    ) -> None:
        self.candidates, self._decoders, self.pairs = candidates, decoders, pairs
        self.rows = {call.call_id: row for row, call in enumerate(calls)}
        self.answers = [forecaster.of(call).output_tokens for call in calls]
        whole = [
            (call.prompt_tokens, answer) for call, answer in zip(calls, self.answers, strict=True)
        ]
        sizes = [(prompt, 1.0) for prompt, _ in whole] if candidates.prefill.size else whole
        cached = np.array([text.cached for text in texts])
        own_s, first_s = waiting_costs(sizes, cached, fleet, now_s)
        if not candidates.whole:
            own_s, first_s = own_s[:, candidates.indices], first_s[:, candidates.indices]
            cached = cached[:, candidates.indices]
        self.own_s, self._first = own_s, first_s
        self._enter_s, self._cached = own_s, cached
        self._rest: Floats | None = None
        self.listed_s: list[list[float]] = []
        if len(pairs.indices) <= _MOST_LISTED and not decoders:
            self.listed_s = own_s.tolist()
        if decoders:
            rest_s, self._rest = waiting_costs(whole, None, fleet, now_s)
            missing = np.array([text.missing for text in texts])
            self.own_s = own_s[:, pairs.entry] + missing[:, pairs.ends[1]] * pairs.pull_s
            self.own_s += rest_s[:, pairs.decoders[pairs.decode]] * pairs.split

    def ends(self, row: int, way: int) -> Ends:
        """Return the one or two endpoints of a way, with the slot seconds of a call there."""
        place = self.pairs.entry.item(way)
        first = self.candidates[place], self._first.item(row, place)
        if self._rest is None or self.pairs.indices[way][1] < 0:
            return (first,)
        state = self._decoders[self.pairs.decode.item(way)]
        return first, (state, self._rest.item(row, state.index))

    def route(self, row: int, way: int, ends: Ends) -> Route:
        """Return one way of a call in full."""
        place = self.pairs.entry.item(way)
        cost = Cost(
            self._enter_s.item(row, place),
            math.nan,
            int(self._cached.item(row, place)),
            self._first.item(row, place),
        )
        return Route(ends[0][0], None if len(ends) == 1 else ends[1][0], cost, ends)


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
    # Endpoints alike are one: pools have many of them, and pairs are a product.
    prefills: set[tuple[float, float, float, str]] = set()
    decodes: set[tuple[float, float, str]] = set()
    for state in fleet:
        endpoint, row = state.endpoint, state.latency
        if model is not None and endpoint.model != model:
            continue
        prefill = row.prefill_s(prompt_tokens) if endpoint.role != "decode" else 0.0
        decode = 0.0
        if endpoint.role != "prefill":
            decode = output_tokens * row.decode_step_s(1, prompt_tokens + output_tokens / 2)
        if endpoint.role == "both":
            whole.append(prefill + decode)
        elif endpoint.role == "prefill":
            kv_bytes = float(endpoint.kv_bytes_per_token or 0)
            prefills.add((prefill, kv_bytes, endpoint.link_gb_s, endpoint.model))
        else:
            decodes.add((decode, endpoint.link_gb_s, endpoint.model))
    whole += [
        prefill + transfer_s(prompt_tokens, kv_bytes, link_gb_s, other_gb_s) + decode
        for prefill, kv_bytes, link_gb_s, one in prefills
        for decode, other_gb_s, other in decodes
        if one == other
    ]
    return min(whole, default=0.0)


class Alone:
    """`service_s` for those who rank waiting calls by it, again and again."""

    def __init__(self) -> None:
        self._of: tuple[FleetView, int] | None = None
        self._known: dict[tuple[float, float, str | None], float] = {}

    def service_s(
        self, prompt_tokens: float, output_tokens: float, fleet: FleetView, model: str | None
    ) -> float:
        """Return what `service_s` does; kept until an endpoint changes, or its latency row."""
        of = self._of
        if (
            of is None
            or of[0] is not fleet
            or of[1] != fleet.revision
            or len(self._known) > _MOST_ALONE
        ):
            self._of = fleet, fleet.revision
            self._known.clear()
        key = prompt_tokens, output_tokens, model
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = service_s(prompt_tokens, output_tokens, fleet.states, model)
        return found


def has_room(state: EndpointState, tokens: float = 0.0, depth: float = 1.0) -> bool:
    """Return whether an endpoint can take a call that needs ``tokens`` of KV at once.

    ``depth`` says how many times what it can run it may have.
    """
    if state.in_flight == 0:
        return True
    if state.in_flight >= depth * state.endpoint.max_num_seqs:
        return False
    return state.context_tokens + tokens < depth * state.kv_tokens


class Placement:
    """Earliest expected finish over all routes, with room kept for those that wait.

    Parameters
    ----------
    depth
        How many times what it can run an endpoint may have, >= 1.

    Attributes
    ----------
    closed
        Indices of the endpoints that nothing more goes to in this pass.
    """

    def __init__(self, *, depth: float = 1.0) -> None:
        self._depth = depth
        self._pairs: dict[tuple[int, ...], Pairs] = {}
        # A view offers the same candidates until its fleet changes.
        self._last: tuple[Sequence[EndpointState], Sequence[EndpointState], Pairs] | None = None
        self._fleet: FleetView | None = None
        self._texts: dict[str, Text] = {}
        self._booked_s = array("d", bytes(8))
        self.closed: set[int] = set()
        self._able: tuple[EndpointState, ...] = ()

    def begin(self, fleet: FleetView) -> None:
        """Begin a pass over the queue."""
        if fleet is not self._fleet:
            self._fleet = fleet
            self._texts.clear()
        # One place more than endpoints: that of no decoder, at -1.
        self._booked_s = array("d", bytes(8 * (len(fleet.states) + 1)))
        self.closed.clear()
        self._able = ()

    def open(self, fleet: FleetView) -> bool:
        """Return whether anything could still be sent in this pass."""
        # Those that had room a call ago mostly have room now.
        for state in self._able:
            if not (state.healthy and self.admits(state)):
                break
        else:
            if self._able:
                return True
        able: dict[str, dict[str, EndpointState]] = {}  # model -> role -> one with room
        for state in fleet.states:
            if state.healthy and self.admits(state):
                endpoint = state.endpoint
                if endpoint.role == "both":
                    self._able = (state,)
                    return True
                roles = able.setdefault(endpoint.model, {})
                roles[endpoint.role] = state
                if len(roles) == 2:
                    self._able = tuple(roles.values())
                    return True
        return False

    def admits(self, state: EndpointState, tokens: float = 0.0) -> bool:
        """Return whether a call may be sent to an endpoint in this pass."""
        return state.index not in self.closed and has_room(state, tokens, self._depth)

    def routes(self, ready: Ready, *, imposed: bool = True) -> Routes:
        """Return a call's ways through the fleet; see `Routes`."""
        pairs = self._ways(ready.candidates, ready.decoders)
        return Routes(ready, pairs, self._text(ready.call, ready.fleet, {}), imposed=imposed)

    def _ways(
        self, candidates: Sequence[EndpointState], decoders: Sequence[EndpointState]
    ) -> Pairs:
        last = self._last
        if last is not None and last[0] is candidates and last[1] is decoders:
            return last[2]
        # By identity: endpoints are as good as constant, and slow to hash.
        key = (
            *[id(state.endpoint) for state in candidates],
            *[-id(state.endpoint) for state in decoders],
        )
        pairs = self._pairs.get(key)
        if pairs is None:
            if len(self._pairs) >= _MOST_PAIRS:
                self._pairs.clear()
            pairs = self._pairs[key] = Pairs(candidates, decoders)
        self._last = candidates, decoders, pairs
        return pairs

    def _text(
        self, call: Call, fleet: FleetView, changed: dict[int, list[tuple[EndpointState, News]]]
    ) -> Text:
        """Return what is held of a prompt; while its call waits, that mostly stays the same.

        ``changed`` is kept for calls asked about together: the news since the versions they know.
        """
        text = self._texts.get(call.call_id)
        if text is None or text.states is not fleet.states:
            if len(self._texts) >= _MOST_TEXTS:
                self._texts.clear()
            text = self._texts[call.call_id] = Text(call, fleet)
        elif text.version != fleet.text_version:
            since = changed.get(text.version)
            if since is None:
                since = changed[text.version] = fleet.news(text.version)
            text.refresh(call, fleet, since)
        return text

    def place(self, ready: Ready) -> Route | None:
        """Return the call's best route if it has room, else None, and keep its place there."""
        # Most calls that wait are offered many times before they are sent.
        routes = self.routes(ready, imposed=False)
        return self.settle(routes, int(self.finish_s(routes).argmin()), ready)

    def full(self, ready: Ready, state: EndpointState) -> bool:
        """Return whether the only endpoint that a call may go to has no room for it.

        No call after it goes there in this pass. Most that wait are asked for many times before
        they are sent, and there is no need to know when they would end.
        """
        ready.fleet.loads.advance(ready.now_s)
        answer = ready.forecaster.of(ready.call).output_tokens
        if self.admits(state, _need(ready.call, answer, state)):
            return False
        self.closed.add(state.index)
        return True

    def look(
        self, calls: Sequence[Call], fleet: FleetView, forecaster: Forecaster, now_s: float
    ) -> Ahead | None:
        """Return the ways of waiting calls, as long as nothing is sent.

        Of those that can go where the first one can; None if that is nowhere, or to endpoints of
        which some serve calls whole and others only prefill.
        """
        serving = [fleet.candidates(call.model, tokens=call.least_tokens) for call in calls]
        alike = [call for call, one in zip(calls, serving, strict=True) if one is serving[0]]
        candidates = serving[0].entries if fleet.pooled else serving[0]
        if not candidates or 0 < candidates.prefill.size < len(candidates):
            return None
        decoders = serving[0].decoders if fleet.pooled else ()
        changed: dict[int, list[tuple[EndpointState, News]]] = {}
        texts = [self._text(call, fleet, changed) for call in alike]
        pairs = self._ways(candidates, decoders)
        return Ahead(alike, texts, candidates, decoders, pairs, fleet, forecaster, now_s)

    def found(self, call: Call, ahead: Ahead, way: int | None = None) -> Route | None:
        """Do as `place` for one of the calls; it may be told the way."""
        row = ahead.rows[call.call_id]
        if way is None and ahead.listed_s:
            waits_s = ahead.listed_s[row]
            if self.closed:
                booked_s: Sequence[float] = self._booked_s
                if not ahead.candidates.whole:
                    booked_s = [booked_s[entry] for entry, _ in ahead.pairs.indices]
                waits_s = list(map(add, waits_s, booked_s))
            way = waits_s.index(min(waits_s))
        elif way is None:
            way = int(self._behind_s(ahead.own_s[row], ahead.pairs).argmin())
        ends = ahead.ends(row, way)
        return (
            ahead.route(row, way, ends) if self._admitted(ends, call, ahead.answers[row]) else None
        )

    def finish_s(self, routes: Routes) -> Floats:
        """Return the seconds from now to the finish on each way, behind those that wait for it."""
        return self._behind_s(routes.own_s, routes.pairs)

    def _behind_s(self, own_s: Floats, pairs: Pairs) -> Floats:
        if not self.closed:
            return own_s
        booked_s: Floats = np.frombuffer(self._booked_s)
        waits_s: Floats = booked_s[pairs.ends[0]]
        if pairs.decoders.size:
            waits_s += booked_s[pairs.ends[1]]
        waits_s += own_s
        return waits_s

    def settle(self, routes: Routes, way: int, ready: Ready) -> Route | None:
        """Return a way if all its ends have room, else None, and keep the call's place there."""
        answer = ready.forecaster.of(ready.call).output_tokens
        return routes.route(way) if self._admitted(routes.ends(way), ready.call, answer) else None

    def _admitted(self, ends: Ends, call: Call, answer: float) -> bool:
        """Return whether all ends have room for a call; if not, keep its place there."""
        closed, full = self.closed, False
        for state, _ in ends:
            if state.index in closed:
                full = True
            elif not has_room(state, _need(call, answer, state), self._depth):
                closed.add(state.index)
                full = True
        if not full:
            return True
        for state, seconds in ends:
            # Prefills follow one another; what holds slots shares them, or the KV pool.
            turns = 1.0
            if state.endpoint.role != "prefill":
                need = _need(call, answer, state)
                most = min(state.endpoint.max_num_seqs, state.kv_tokens / need)
                turns = max(1.0, most)
            self._booked_s[state.index] += seconds / turns
        return False


def _need(call: Call, answer_tokens: float, state: EndpointState) -> float:
    """Return the KV tokens that a call needs on one end of a way."""
    return call.prompt_tokens + (1.0 if state.endpoint.role == "prefill" else answer_tokens)
