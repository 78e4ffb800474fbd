"""Which decode endpoint takes over a call, where a fleet has prefill and decode pools.

A policy places the prefill as it places whole calls. If it names no decode endpoint, the one with
the least expected time from the end of the prefill to the last token is taken: the pull over the
slower of the two links, the wait for a slot, the decode.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.dispatch.cost import call_cost
from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecast
from planner.dispatch.view import EndpointState

__all__ = ["decode_s", "pair", "prefill_only", "pull_s", "transfer_s"]


def prefill_only(forecast: Forecast) -> Forecast:
    """Return the forecast of a call that stops after its first token."""
    return Forecast(  # faster than to replace
        output_tokens=1.0,
        criticality=forecast.criticality,
        remaining_s=forecast.remaining_s,
        delay=forecast.delay,
        least_left=forecast.least_left,
    )


def transfer_s(tokens: float, kv_bytes: float, link_gb_s: float, other_gb_s: float) -> float:
    """Return the seconds that ``tokens`` of ``kv_bytes`` each take over the slower of two links."""
    return max(0.0, tokens) * kv_bytes / (min(link_gb_s, other_gb_s) * 1e9)


def pull_s(tokens: float, prefill: EndpointState, decode: EndpointState) -> float:
    """Return the seconds that the KV of ``tokens`` is on its way, over the slower of two links."""
    return transfer_s(
        tokens,
        prefill.endpoint.kv_bytes_per_token or 0,
        prefill.endpoint.link_gb_s,
        decode.endpoint.link_gb_s,
    )


def decode_s(
    call: Call, forecast: Forecast, prefill: EndpointState, decode: EndpointState, now_s: float
) -> float:
    """Return the expected seconds from the end of the prefill to the last token."""
    missing = call.prompt_tokens - decode.prefix.match(call.prefix) * call.prefix_tokens
    cost = call_cost(
        call.prompt_tokens, call.prefix, call.prefix_tokens, forecast, decode, now_s,
        prefilled=True, imposed=False,
    )  # fmt: skip
    return pull_s(missing, prefill, decode) + cost.own_s


def pair(
    call: Call,
    forecast: Forecast,
    prefill: EndpointState,
    candidates: Sequence[EndpointState],
    now_s: float,
) -> EndpointState:
    """Return the decode endpoint of least expected time; the first one wins ties.

    ``candidates`` hold at least one decode endpoint of the prefill endpoint's model.
    """
    return min(
        (
            state
            for state in candidates
            if state.endpoint.role == "decode" and state.endpoint.model == prefill.endpoint.model
        ),
        key=lambda state: decode_s(call, forecast, prefill, state, now_s),
    )
