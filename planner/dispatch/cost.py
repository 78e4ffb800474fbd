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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.dispatch.forecast import Forecast
from planner.dispatch.loads import RESULTS, SERVICE, WAIT, knot, pack_features
from planner.dispatch.view import EndpointState, FleetView

__all__ = ["Cost", "Costs", "cached_tokens", "call_cost", "fleet_costs", "waiting_costs"]

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
        Sum over residents of criticality x delay; nan where nobody asked for it.
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
    own_s, imposed_s, service_s, cached_tokens
        As in `Cost`; each of shape (endpoints,), ``imposed_s`` (0,) where nobody asked for it.
    """

    __slots__ = ("cached_tokens", "imposed_s", "own_s", "service_s")

    def __init__(
        self, own_s: Floats, imposed_s: Floats, service_s: Floats, cached_tokens: Floats
    ) -> None:
        self.own_s, self.imposed_s = own_s, imposed_s
        self.service_s, self.cached_tokens = service_s, cached_tokens

    def weighted(self, own: float, imposed: float | Floats) -> Floats:
        """Return own x own_s + imposed x imposed_s, a new array.

        ``imposed`` is one weight, or one for each endpoint.
        """
        scores = self.imposed_s * imposed
        scores += self.own_s * own
        return scores

    def __len__(self) -> int:
        return len(self.own_s)

    def __getitem__(self, place: int) -> Cost:  # type: ignore[override]
        return Cost(
            self.own_s.item(place),
            self.imposed_s.item(place) if self.imposed_s.size else math.nan,
            int(self.cached_tokens.item(place)),
            self.service_s.item(place),
        )

    def __iter__(self) -> Iterator[Cost]:
        return (self[place] for place in range(len(self)))

    def put(self, places: npt.NDArray[np.intp], other: Costs) -> None:
        """Take over the costs of the same endpoints at some places."""
        for name in self.__slots__:
            values, others = getattr(self, name), getattr(other, name)
            # What is cached may be the caller's own, and does not depend on the forecast.
            if values.size and values is not others:
                values[places] = others[places]

    def take(self, places: npt.NDArray[np.intp]) -> Costs:
        """Return the costs at some places, in their order."""
        return Costs(
            self.own_s[places],
            self.imposed_s[places] if self.imposed_s.size else self.imposed_s,
            self.service_s[places],
            self.cached_tokens[places],
        )


def call_cost(
    prompt_tokens: int,
    prefix: tuple[int, ...],
    prefix_tokens: float,
    forecast: Forecast,
    state: EndpointState,
    now_s: float,
    *,
    prefilled: bool = False,
    imposed: bool = True,
) -> Cost:
    """Return the cost of sending a call to an endpoint now.

    ``prefilled`` says that its prompt was computed elsewhere; its KV comes along. Without
    ``imposed`` the delay imposed on others is left out (NaN).
    """
    depth = 0 if prefilled else state.prefix.match(prefix)
    cached = _cached(prompt_tokens, depth, prefix_tokens, prefilled=prefilled)
    return _cost(prompt_tokens, cached, forecast.output_tokens, state, now_s, imposed=imposed)


def _cached(prompt_tokens: int, depth: int, prefix_tokens: float, *, prefilled: bool) -> int:
    """Return the cached tokens of a prompt; its last token is always computed."""
    cached = prompt_tokens - 1
    if not prefilled:
        cached = min(cached, int(depth * prefix_tokens))
    return max(cached, 0)


def _cost(
    prompt: int, cached: int, output: float, state: EndpointState, now_s: float, *, imposed: bool
) -> Cost:
    view = state.view
    view.loads.advance(now_s)
    row, endpoint, calls = state.latency, state.endpoint, state.in_flight
    slots = endpoint.max_num_seqs
    # Where the KV pool holds fewer calls of the present size than there are slots, it is the limit.
    mean_context = (state.context_tokens + prompt + output) / (calls + 1)
    if mean_context * slots > state.kv_tokens:
        slots = max(1, int(state.kv_tokens / mean_context))
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
    wait_s, imposed_s = queue_s, 0.0 if imposed else math.nan
    if calls >= slots:
        wait_s = max(queue_s, view.loads.turn_tokens(state, slots) * step_s)
    if calls and imposed:
        drag_s = slope_s + kv_s * own_context
        imposed_s = state.criticality * prefill_s
        if calls >= slots:
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
_NOT_ASKED: Floats = np.empty(0)


def cached_tokens(
    prompt_tokens: int, prefix: tuple[int, ...], prefix_tokens: float, view: FleetView
) -> Floats:
    """Return the tokens of a prompt that each endpoint is believed to hold; (endpoints,)."""
    most = max(0, prompt_tokens - 1)
    cached = np.zeros(len(view.states))
    for depth, who in view.matches(prefix):
        tokens = int(depth * prefix_tokens)
        if tokens > most:
            tokens = most
        if who.bit_count() > _FEW:
            cached[view.spread(who)] = tokens
            continue
        while who:
            index = who.bit_length() - 1
            who ^= 1 << index
            cached[index] = tokens
    return cached


def fleet_costs(
    prompt_tokens: int,
    prefix: tuple[int, ...],
    prefix_tokens: float,
    forecast: Forecast,
    view: FleetView,
    now_s: float,
    *,
    prefilled: bool = False,
    imposed: bool = True,
    cached: Floats | None = None,
) -> Costs:
    """Return the costs of a call on all endpoints of a fleet, in fleet order.

    The same as `call_cost` for each, ``prefilled`` too, in a handful of array operations. Without
    ``imposed`` the delay imposed on others is left out. ``cached`` is what `cached_tokens` says,
    from those who know it.
    """
    loads = view.loads
    loads.advance(now_s)
    output = forecast.output_tokens
    context = prompt_tokens + 0.5 * output
    work = loads.workspace
    if prefilled:
        cached = np.full(work.size, max(0.0, prompt_tokens - 1.0))
    elif cached is None:
        cached = cached_tokens(prompt_tokens, prefix, prefix_tokens, view)

    # One product reckons the call as if nothing were cached; what is saved is taken off.
    square = float(prompt_tokens) * prompt_tokens
    pack_features(work.cells, 0, 1.0, prompt_tokens, square, output, output * context, context)
    work.call.dot(loads.by_feature, work.results)
    saved = loads.per_square_s * cached
    saved += loads.per_token_s
    saved *= cached
    service = work.service - saved
    own: Floats = np.maximum(work.wait, loads.queue_s)
    own += service
    delay = _NOT_ASKED
    if imposed:
        place, part = knot(output)
        work.cell[0], work.cell[1] = 1.0 - part, part
        delay = work.drag * work.knots.dot(loads.imposed[place : place + 2])
        delay += work.imposed
        saved *= loads.weight
        delay -= saved
    if prompt_tokens + output > loads.least_room_tokens:
        for index in (loads.room_tokens < prompt_tokens + output).nonzero()[0].tolist():
            cost = _cost(
                prompt_tokens, int(cached[index]), output, view.states[index], now_s,
                imposed=imposed,
            )  # fmt: skip
            own[index], service[index] = cost.own_s, cost.service_s
            if imposed:
                delay[index] = cost.imposed_s
    return Costs(own, delay, service, cached)


def waiting_costs(
    sizes: Sequence[tuple[int, float]], cached: Floats | None, view: FleetView, now_s: float
) -> tuple[Floats, Floats]:
    """Return own and service seconds of several calls on all endpoints.

    To the last bit what `fleet_costs` says of each, in less time. The caller has advanced the
    loads to the present.

    Parameters
    ----------
    sizes
        Prompt tokens and expected output tokens of each.
    cached
        `cached_tokens` of each, shape (calls, endpoints), or None if all were prefilled elsewhere.

    Returns
    -------
    own_s, service_s
        Both of shape (calls, endpoints).
    """
    loads = view.loads
    features: list[tuple[float, ...]] = []
    for prompt, output in sizes:
        context = prompt + 0.5 * output
        square = float(prompt) * prompt
        features.append((1.0, prompt, square, output, output * context, context))
    # One vector after the other, as in `fleet_costs`: a product of two matrices sums otherwise.
    results = np.matmul(np.array(features)[:, None], loads.by_feature)
    parts = results.reshape(len(sizes), RESULTS, loads.workspace.size)
    if cached is None:
        cached = np.array([[max(0.0, prompt - 1.0)] for prompt, _ in sizes])
    saved = loads.per_square_s * cached
    saved += loads.per_token_s
    saved *= cached
    service: Floats = parts[:, SERVICE] - saved
    own: Floats = np.maximum(parts[:, WAIT], loads.queue_s)
    own += service
    whole = [prompt + output for prompt, output in sizes]
    if max(whole) > loads.least_room_tokens:
        short = (loads.room_tokens < np.array(whole)[:, None]).nonzero()
        for place, index in zip(short[0].tolist(), short[1].tolist(), strict=True):
            prompt, output = sizes[place]
            held = int(cached[place, min(index, cached.shape[1] - 1)])
            cost = _cost(prompt, held, output, view.states[index], now_s, imposed=False)
            own[place, index], service[place, index] = cost.own_s, cost.service_s
    return own, service
