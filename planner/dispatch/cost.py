"""Seconds a call will take on an endpoint, and seconds it costs the calls already there.

All policies predict with these functions, so they differ in what they do with a prediction, not in
how well they predict.

Own time: wait for a slot, wait for the prefill queue, own prefill, then decode at the batch size
the call will see. Imposed time: the call's prefill stalls every resident once, and its presence
slows each of their steps by the batch slope while both are there; where slots are full it also
keeps a slot from what comes next.

With P prompt tokens of which c are cached, O output tokens, x = P + O/2 context; n residents of
weight W on s slots, and the endpoint's b, c' (prefill), step, f (KV read per step), e (slope) and
Q (steps until a slot frees) as in `planner.dispatch.loads`:

    service = base + b (P - c) + c' (P^2 - c^2) + O (step + f x)
    own     = max(Q (step + f x), queue) + service
    imposed = W prefill + F(O) (e + f x) + (n + 1 - s)/s service     the last if n >= s

`call_cost` reckons it for one endpoint and `fleet_costs` for all; where the KV pool holds fewer
calls of the present size than there are slots, it sets s, call by call.

References
----------
Marginal cost rule: section "The rule to start from" of the planning notes behind this project;
step times: `planner.domain.latency`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.dispatch import loads as rows
from planner.dispatch.forecast import Forecast
from planner.dispatch.loads import Loads, knot
from planner.dispatch.view import EndpointState, FleetView

__all__ = ["Cost", "Costs", "call_cost", "fleet_costs"]

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Cost:
    """Seconds of one call on one endpoint.

    Changed by nobody; it is not frozen because that triples the time to make one.

    Parameters
    ----------
    own_s
        From now to the call's finish.
    imposed_s
        Sum over residents of criticality x delay.
    cached_tokens
        Prompt tokens expected in the cache.
    service_s
        Slot seconds the call will hold (prefill and decode, no waiting).
    """

    own_s: float
    imposed_s: float
    cached_tokens: int
    service_s: float


class Costs(Sequence[Cost]):
    """Costs of a call on each of some endpoints, as arrays; one by one as `Cost`.

    Parameters
    ----------
    times
        Own and imposed seconds, as in `Cost`; shape (2, endpoints).
    held
        Cached tokens and service seconds; shape (2, endpoints).
    """

    __slots__ = ("_held", "_times")

    def __init__(self, times: Floats, held: Floats) -> None:
        self._times, self._held = times, held

    @property
    def own_s(self) -> Floats:
        """From now to the call's finish."""
        own_s: Floats = self._times[0]
        return own_s

    @property
    def imposed_s(self) -> Floats:
        """Sum over residents of criticality x delay."""
        imposed_s: Floats = self._times[1]
        return imposed_s

    @property
    def service_s(self) -> Floats:
        """Slot seconds the call will hold."""
        service_s: Floats = self._held[1]
        return service_s

    def weighted(self, own: float, imposed: float | Floats) -> Floats:
        """Return own x own_s + imposed x imposed_s, a new array.

        ``imposed`` is one weight, or one for each endpoint.
        """
        scores: Floats = self._times[1] * imposed
        scores += self._times[0] * own
        return scores

    def __len__(self) -> int:
        return int(self._times.shape[1])

    def __getitem__(self, place: int) -> Cost:  # type: ignore[override]
        times, held = self._times.item, self._held.item
        return Cost(times(0, place), times(1, place), int(held(0, place)), held(1, place))

    def __iter__(self) -> Iterator[Cost]:
        return (self[place] for place in range(len(self)))

    def put(self, places: npt.NDArray[np.intp], other: Costs) -> None:
        """Take over the costs of the same endpoints at some places."""
        self._times[:, places] = other._times[:, places]
        self._held[:, places] = other._held[:, places]

    def take(self, places: npt.NDArray[np.intp]) -> Costs:
        """Return the costs at some places, in their order."""
        return Costs(self._times[:, places], self._held[:, places])


def call_cost(
    prompt_tokens: int,
    prefix: tuple[int, ...],
    prefix_tokens: float,
    forecast: Forecast,
    state: EndpointState,
    now_s: float,
    *,
    prefilled: bool = False,
) -> Cost:
    """Return the cost of sending a call to an endpoint now.

    ``prefilled`` says that its prompt was computed elsewhere; its KV comes along.
    """
    depth = 0 if prefilled else state.prefix.match(prefix)
    cached = _cached(prompt_tokens, depth, prefix_tokens, prefilled=prefilled)
    return _cost(prompt_tokens, cached, forecast.output_tokens, state, now_s)


def _cached(prompt_tokens: int, depth: int, prefix_tokens: float, *, prefilled: bool) -> int:
    """Return the cached tokens of a prompt; its last token is always computed."""
    cached = prompt_tokens - 1
    if not prefilled:
        cached = min(cached, int(depth * prefix_tokens))
    return max(cached, 0)


def _cost(prompt: int, cached: int, output: float, state: EndpointState, now_s: float) -> Cost:
    view = state.view
    view.loads.advance(now_s)
    row, endpoint, calls = state.latency, state.endpoint, state.in_flight
    slots = endpoint.max_num_seqs
    # Where the KV pool holds fewer calls of the present size than there are slots, it is the limit.
    mean_context = (state.context_tokens + prompt + output) / (calls + 1)
    if mean_context * slots > endpoint.kv_tokens:
        slots = max(1, int(endpoint.kv_tokens / mean_context))
    slope_s = row.scale * row.decode_us_per_call * 1e-6
    kv_s = row.scale * row.decode_ns_per_kv_token * 1e-9
    context_each = state.context_tokens / calls if calls else 0.0
    own_context = prompt + output / 2
    step_s = row.decode_step_s(
        min(calls + 1, slots), min(calls, slots - 1) * context_each + own_context
    )
    prefill_s = row.prefill_marginal_s(prompt - cached, cached)
    queue_s = row.prefill_marginal_s(state.prefill_tokens) if state.prefill_tokens > 0 else 0.0
    base_s = 0.0
    if not calls:
        base_s = max(0.0, row.prefill_base_ms - row.decode_base_ms) * 1e-3 * row.scale
    service_s = prefill_s + base_s + output * step_s
    wait_s, imposed_s = queue_s, 0.0
    if calls:
        drag_s = slope_s + kv_s * own_context
        imposed_s = state.criticality * prefill_s
        if calls >= slots:
            wait_s = max(queue_s, view.loads.turn_tokens(state, slots) * step_s)
            # It delays the running calls only once it runs itself: half of them are gone by then.
            imposed_s += 0.5 * view.loads.delay_tokens(state, 2.0 * output) * drag_s
            # Everything that comes next waits about one slot turn of this call longer.
            imposed_s += service_s / slots * (calls + 1 - slots)
        else:
            imposed_s += view.loads.delay_tokens(state, output) * drag_s
    return Cost(
        own_s=wait_s + service_s,
        imposed_s=imposed_s,
        cached_tokens=cached,
        service_s=service_s,
    )


_FEW = 6
"""Endpoints that are treated one by one rather than as an array."""


def fleet_costs(
    prompt_tokens: int,
    prefix: tuple[int, ...],
    prefix_tokens: float,
    forecast: Forecast,
    view: FleetView,
    now_s: float,
    *,
    prefilled: bool = False,
) -> Costs:
    """Return the costs of a call on all endpoints of a fleet, in fleet order.

    The same as `call_cost` for each, ``prefilled`` too, in a handful of array operations.
    """
    loads = view.loads
    loads.advance(now_s)
    output = forecast.output_tokens
    context = prompt_tokens + 0.5 * output
    most = max(0, prompt_tokens - 1)
    if prefilled:
        levels, prefix_tokens = [(most, view.everyone)], 1.0
    else:
        levels = view.matches(prefix)
        if not levels or levels[0][1] != view.everyone:
            levels.insert(0, (0, view.everyone))

    # One product reckons the call as those of each level see it.
    work = loads.workspace
    cells, start, count = work.cells, 0, min(len(levels), rows.LEVELS)
    for place in range(count):
        cached = min(most, int(levels[place][0] * prefix_tokens))
        tokens = prompt_tokens - cached
        cells[start + rows.TOKENS] = tokens
        cells[start + rows.SQUARE_TOKENS] = float(tokens) * (prompt_tokens + cached)
        cells[start + rows.OUTPUT] = output
        cells[start + rows.OUTPUT_CONTEXT] = output * context
        cells[start + rows.CONTEXT_TOKENS] = context
        cells[start + rows.HELD] = cached
        start += rows.FEATURES
    work.calls[count].dot(loads.by_feature, work.results[count])
    table = work.levels[0]
    for place in range(1, count):
        who, deeper = levels[place][1], work.levels[place]
        if who.bit_count() > _FEW:
            np.putmask(table, view.spread(who), deeper)
            continue
        while who:
            index = who.bit_length() - 1
            who ^= 1 << index
            table[:, index] = deeper[:, index]
    if len(levels) > rows.LEVELS:
        deepest = [(min(most, int(d * prefix_tokens)), who) for d, who in levels[rows.LEVELS :]]
        _save(table, loads, view, deepest)

    place, part = knot(output)
    work.part[0], work.part[1] = 1.0 - part, part
    own, drag = work.own, work.drag
    np.multiply(drag, work.parts.dot(loads.imposed[place : place + 2]), out=drag)
    np.maximum(own, loads.queue_s, out=own)
    times: Floats = np.add(work.ends, work.additions)  # own of service, imposed of drag
    held = work.held.copy()
    if prompt_tokens + output > loads.least_room_tokens:
        for index in np.flatnonzero(loads.room_tokens < prompt_tokens + output).tolist():
            cost = _cost(prompt_tokens, int(held[0, index]), output, view.states[index], now_s)
            times[:, index] = cost.own_s, cost.imposed_s
            held[1, index] = cost.service_s
    return Costs(times, held)


def _save(table: Floats, loads: Loads, view: FleetView, levels: Sequence[tuple[int, int]]) -> None:
    """Take off the prefill that is saved by endpoints that hold more than the table says.

    ``table`` has the imposed time, cached tokens and service time of each endpoint; ``levels`` are
    cached tokens, rising, and the endpoints that hold them.
    """
    imposed, before, service = table
    cached = before.copy()
    for tokens, who in levels:
        np.putmask(cached, view.spread(who)[0], float(tokens))
    saved = cached + before
    saved *= loads.coefficients[rows.SQUARE]
    saved += loads.coefficients[rows.PREFILL]
    saved *= cached - before
    before[:] = cached
    service -= saved
    saved *= loads.weight
    imposed -= saved
