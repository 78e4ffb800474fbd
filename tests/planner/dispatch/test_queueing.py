"""Policies that follow events and keep calls waiting in the router."""

from collections.abc import Sequence

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFinished,
    Command,
    EndpointDown,
    EndpointUp,
    Event,
    Hold,
    RunStarted,
    Send,
    Tick,
)
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.base import Choice, Ready, Wait
from planner.dispatch.router import Router
from planner.dispatch.view import FleetView
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow

ROW = LatencyRow(
    prefill_base_ms=5,
    prefill_us_per_token=50,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=100,
    decode_ns_per_kv_token=0,
)
FLEET = Fleet(
    name="test",
    endpoints=(
        Endpoint(
            id=EndpointId("e"), model="m", gpu="G", latency=ROW, kv_blocks=100, max_num_seqs=4
        ),
    ),
)


class OneAtATime:
    """Sends the youngest run's call to an idle endpoint, or asks again a second later."""

    name = "one_at_a_time"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def observe(self, event: Event, fleet: FleetView) -> None:
        in_flight = sum(state.in_flight for state in fleet.states)
        self.seen.append(f"{type(event).__name__} {in_flight}")

    def order(self, held: Sequence[Call], fleet: FleetView, now_s: float) -> Sequence[Call]:
        return sorted(held, key=lambda call: -call.run_arrival_s)

    def choose(self, ready: Ready) -> Choice | Wait:
        for state in ready.candidates:
            if state.in_flight == 0:
                return Choice(state.index, "idle")
        return Wait("busy", until_s=ready.now_s + 1.0)


def bench() -> tuple[Router, OneAtATime]:
    policy = OneAtATime()
    return Router(FLEET, policy, Forecaster(EstimateTable())), policy


def arrive(router: Router, name: str, now_s: float) -> list[Command]:
    call = Call(call_id=name, prompt_tokens=10, run_arrival_s=now_s)
    return router.handle(CallArrived(call=call, now_s=now_s))


def test_a_call_that_must_wait_is_held_and_sent_in_the_policys_order() -> None:
    """`Wait` holds a call; the event that makes room sends the one the policy wants first."""
    router, _ = bench()
    assert isinstance(arrive(router, "a", 0.0)[0], Send)
    (hold,) = arrive(router, "b", 1.0)
    assert (hold, router.held) == (Hold(call_id="b", reason="busy", until_s=2.0), 1)
    arrive(router, "c", 2.0)
    commands = router.handle(CallFinished(call_id="a", now_s=3.0, output_tokens=1))
    assert [command.call_id for command in commands if isinstance(command, Send)] == ["c"]
    assert (router.in_flight, router.held) == (1, 1)


def test_a_tick_offers_held_calls_again() -> None:
    """Time alone makes the router ask again, and a hold that goes on says until when."""
    router, _ = bench()
    arrive(router, "a", 0.0)
    arrive(router, "b", 1.0)
    assert router.handle(Tick(now_s=2.0)) == [Hold(call_id="b", reason="busy", until_s=3.0)]


def test_a_held_call_may_leave() -> None:
    """Cancelling a waiting call forgets it."""
    router, _ = bench()
    arrive(router, "a", 0.0)
    arrive(router, "b", 1.0)
    router.handle(CallCancelled(call_id="b", now_s=1.5))
    assert router.handle(CallFinished(call_id="a", now_s=3.0, output_tokens=1)) == []
    assert (router.in_flight, router.held) == (0, 0)


def test_calls_that_no_endpoint_can_take_wait_beside_the_others() -> None:
    """With every endpoint down a queueing policy is not asked; its order holds afterwards."""
    router, _ = bench()
    router.handle(EndpointDown(endpoint=0, now_s=0.0))
    assert arrive(router, "a", 1.0) == [Hold(call_id="a", reason="no_endpoint")]
    arrive(router, "b", 2.0)
    sent = router.handle(EndpointUp(endpoint=0, now_s=3.0))
    assert [command.call_id for command in sent if isinstance(command, Send)] == ["b"]


def test_a_policy_is_told_each_event_after_its_effect() -> None:
    """The view that ``observe`` gets already counts what the event changed."""
    router, policy = bench()
    router.handle(RunStarted(run_id="r", workflow_hash="w", now_s=0.0))
    arrive(router, "a", 0.0)
    router.handle(CallFinished(call_id="a", now_s=1.0, output_tokens=1))
    assert policy.seen == ["RunStarted 0", "CallArrived 0", "CallFinished 0"]
