"""Small fleets, calls and routers for the tests of policies."""

from collections.abc import Sequence
from typing import Any

from planner.dispatch.events import Call, CallArrived, CallFinished, Command, RunStarted, Send
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.base import Policy, Ready
from planner.dispatch.router import Router
from planner.dispatch.view import EndpointState, FleetView, Resident
from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow

ANSWER = 100
"""Tokens forecast for every call; at 10 ms a step, 1 s on an endpoint of speed 1."""


def row(speed: float = 1.0) -> LatencyRow:
    """1 ms per 10 prompt tokens and 10 ms per answer token at speed 1; batches cost nothing."""
    return LatencyRow(
        prefill_base_ms=0,
        prefill_us_per_token=100 / speed,
        prefill_ns_per_token_sq=0,
        decode_base_ms=10 / speed,
        decode_us_per_call=0,
        decode_ns_per_kv_token=0,
    )


def endpoint(name: str, *, speed: float = 1.0, slots: int = 1, **more: Any) -> Endpoint:
    values = {"model": "m", "gpu": "G", "kv_blocks": 1000, "max_num_seqs": slots, **more}
    return Endpoint(id=EndpointId(name), latency=row(speed), **values)


def fleet(*endpoints: Endpoint) -> Fleet:
    return Fleet(name="bench", endpoints=endpoints or (endpoint("e0"),))


def forecaster() -> Forecaster:
    return Forecaster(
        EstimateTable(
            default_site=SiteEstimate(
                output_tokens=Quantiles.constant(ANSWER), prompt_tokens=Quantiles.constant(100)
            )
        )
    )


def call(name: str, **more: Any) -> Call:
    """Return a call of the run named before the last dot: ``a.0`` and ``a.1`` belong to ``a``."""
    values = {"run_id": name.rpartition(".")[0] or name, "prompt_tokens": 100, **more}
    return Call(call_id=name, **values)


def router(policy: Policy, *endpoints: Endpoint) -> Router:
    return Router(fleet(*endpoints), policy, forecaster())


def start(router: Router, run_id: str, now_s: float, tenant: str = "default") -> None:
    router.handle(RunStarted(run_id=run_id, workflow_hash="w", now_s=now_s, tenant=tenant))


def arrive(router: Router, name: str, now_s: float, **more: Any) -> list[str]:
    """Let a call arrive; return the calls sent by it, with their endpoint."""
    one = call(name, **{"ready_s": now_s, "run_arrival_s": now_s, **more})
    return sends(router.handle(CallArrived(call=one, now_s=now_s)))


def finish(router: Router, name: str, now_s: float, output: int = ANSWER) -> list[str]:
    return sends(router.handle(CallFinished(call_id=name, now_s=now_s, output_tokens=output)))


def sends(commands: Sequence[Command]) -> list[str]:
    return [f"{one.call_id}@{one.endpoint}" for one in commands if isinstance(one, Send)]


def states(*endpoints: Endpoint) -> list[EndpointState]:
    found = fleet(*endpoints).endpoints
    return [EndpointState(index, one, one.latency) for index, one in enumerate(found)]


def busy(state: EndpointState, calls: int, *, prompt: int = 100, uncached: float = 0.0) -> None:
    for number in range(calls):
        state.add(
            Resident(
                call_id=f"{state.index}-{number}",
                run_id="other",
                prompt_tokens=prompt,
                uncached_tokens=uncached,
                output_tokens=float(ANSWER),
                criticality=1.0,
                sent_s=0.0,
            )
        )


def ready(states: Sequence[EndpointState], view: FleetView | None = None, **more: Any) -> Ready:
    values = {"prompt_tokens": 320, "prefix": tuple(range(20)), **more}
    return Ready(call("c", **values), list(states), view or FleetView(states), forecaster(), 0.0)
