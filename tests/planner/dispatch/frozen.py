"""The scalar costs that `planner.dispatch.cost` replaced, frozen: the oracle of the rewrite.

For each endpoint a loop over its residents, each brought up to date for the very call that asks.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.dispatch.cost import Cost
from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecast
from planner.dispatch.view import EndpointState

__all__ = ["call_cost", "scalar_costs"]


def scalar_costs(
    call: Call, forecast: Forecast, states: Sequence[EndpointState], now_s: float
) -> list[Cost]:
    """Return the costs of a call on some endpoints, one after the other."""
    return [
        call_cost(call.prompt_tokens, call.prefix, call.prefix_tokens, forecast, state, now_s)
        for state in states
    ]


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
    row = state.latency
    endpoint = state.endpoint
    slots = endpoint.max_num_seqs
    cached = min(prompt_tokens - 1, int(state.prefix.match(prefix) * prefix_tokens))
    if prefilled:
        cached = prompt_tokens - 1
    cached = max(cached, 0)
    uncached = prompt_tokens - cached
    output = forecast.output_tokens
    n = state.in_flight
    # Where the KV pool holds fewer calls of the present size than there are slots, it is the limit.
    mean_context = (state.context_tokens + prompt_tokens + output) / (n + 1)
    if mean_context * slots > endpoint.kv_tokens:
        slots = max(1, int(endpoint.kv_tokens / mean_context))
    scale = row.scale
    slope_s = scale * row.decode_us_per_call * 1e-6
    kv_s = scale * row.decode_ns_per_kv_token * 1e-9
    context_each = state.context_tokens / n if n else 0.0
    own_context = prompt_tokens + output / 2
    step_s = row.decode_step_s(min(n + 1, slots), min(n, slots - 1) * context_each + own_context)
    prefill_s = row.prefill_marginal_s(uncached, cached)
    queue_s = row.prefill_marginal_s(state.prefill_tokens) if state.prefill_tokens > 0 else 0.0

    # Remaining decode of each resident: what was forecast less what must have come by now, but
    # at least a quarter of the forecast, since lengths are heavy-tailed and overdue calls go on.
    remaining: list[tuple[float, float]] = []
    for resident in state.residents.values():
        left = resident.output_tokens
        if resident.first_token_s is not None:
            left = max(left - (now_s - resident.first_token_s) / step_s, 0.25 * left)
        remaining.append((left, resident.criticality))

    slot_wait_s = 0.0
    if n >= slots:
        # The call gets the slot that frees after n - slots + 1 others have finished; beyond one
        # full turn of the slots, each further turn costs a mean service.
        lefts = sorted(left for left, _ in remaining)
        ahead = n - slots
        turns, position = divmod(ahead, slots)
        slot_wait_s = lefts[min(position, n - 1)] * step_s
        if turns:
            slot_wait_s += turns * (sum(lefts) / n) * step_s
    wait_s = max(slot_wait_s, queue_s)
    base_s = max(0.0, row.prefill_base_ms - row.decode_base_ms) * 1e-3 * scale if n == 0 else 0.0
    service_s = prefill_s + base_s + output * step_s

    drag_s = slope_s + kv_s * own_context
    imposed = 0.0
    if n:
        full = n >= slots
        for left, weight in remaining:
            # A call that waits for a slot delays the running ones only once it runs itself.
            shared = min(output, left if not full else 0.5 * left)
            imposed += weight * (prefill_s + shared * drag_s)
        if n + 1 > slots:
            # Everything that comes next waits about one slot turn of this call longer.
            imposed += service_s / slots * (n + 1 - slots)
    return Cost(
        own_s=wait_s + service_s,
        imposed_s=imposed,
        cached_tokens=cached,
        service_s=service_s,
    )
