"""Tickets and held calls."""

from __future__ import annotations

import asyncio

import pytest

from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.policies.base import Choice, Wait
from planner.dispatch.router import Router
from planner.domain.errors import NoEndpointAvailable
from planner.domain.estimates import EstimateTable
from runtime.clock import Clock
from runtime.dispatcher import Dispatcher, Moved


class Bench:
    """A dispatcher with its records."""

    def __init__(self, fleet, policy=None, **limits):
        self.records = []
        policy = policy or make_policy("least_load")
        self.router = Router(fleet, policy, Forecaster(EstimateTable()))
        self.dispatcher = Dispatcher(
            self.router, Clock(), self.records.append, table_version="v1", **limits
        )

    def place(self, call_id="c", exclude=frozenset()):
        call = Call(call_id=call_id, run_id="r", prompt_tokens=100, model="m")
        return self.dispatcher.place(call, exclude, attempt=0)


@pytest.fixture
def bench(fleet_of):
    return Bench(fleet_of(2))


async def settle_now():
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_finished_attempt_leaves_a_full_record(bench):
    """The record holds the engine's counts, the choice, the forecast and the instants."""
    with await bench.place() as ticket:
        assert bench.router.in_flight == 1
        ticket.first_token()
        ticket.first_token()
        ticket.finish(output_tokens=7, prompt_tokens=90, cached_tokens=16)
    (record,) = bench.records
    assert bench.router.in_flight == 0
    assert (record.status, record.endpoint, record.reason) == ("ok", "e0", "load")
    assert (record.output_tokens, record.prompt_tokens, record.cached_tokens) == (7, 90, 16)
    assert record.ready_s <= record.sent_s <= record.first_token_s <= record.finish_s
    assert record.predicted_finish_s > record.sent_s
    assert record.decision_us > 0
    assert (record.policy, record.table_version) == ("least_load", "v1")


async def test_a_ticket_is_settled_once(bench):
    """Whatever is said after the first ending changes nothing."""
    with await bench.place() as ticket:
        ticket.fail("http_500")
        ticket.finish(output_tokens=1, prompt_tokens=None, cached_tokens=None)
        ticket.first_token()
    assert [record.status for record in bench.records] == ["failed"]


async def test_an_unsettled_ticket_is_cancelled(bench):
    """Leaving without a word, also by an exception, gives the attempt back as cancelled."""
    ticket = await bench.place()
    with pytest.raises(RuntimeError), ticket:
        raise RuntimeError
    assert [record.status for record in bench.records] == ["cancelled"]
    assert bench.router.in_flight == 0


async def test_an_unseen_first_token_is_told_when_due(bench, until):
    """For an answer that is not streamed the router hears of decoding, the trace does not."""
    with await bench.place() as ticket:
        ticket.expect_first_token()
        state = bench.router.view.states[0]
        assert state.decoding == 0
        await until(lambda: state.decoding == 1)
        ticket.finish(output_tokens=1, prompt_tokens=None, cached_tokens=None)
    assert bench.records[0].first_token_s is None


async def test_a_held_call_is_sent_when_an_endpoint_comes_up(bench):
    """A call waits while nothing is up, and goes to the first endpoint that returns."""
    bench.dispatcher.endpoint_down(0)
    bench.dispatcher.endpoint_down(1)
    waiting = asyncio.create_task(bench.place())
    await settle_now()
    assert bench.router.held == 1
    bench.dispatcher.endpoint_up(1, cold=True)
    with await waiting as ticket:
        assert ticket.send.endpoint == 1
    assert (bench.router.held, bench.router.in_flight) == (0, 0)


async def test_a_held_call_waits_only_so_long(fleet_of):
    """After the time limit a held call is given up with an error."""
    bench = Bench(fleet_of(1), hold_timeout_s=0.001)
    bench.dispatcher.endpoint_down(0)
    with pytest.raises(NoEndpointAvailable, match=r"within 0\.001 s"):
        await bench.place()
    assert bench.router.held == 0


async def test_no_more_calls_wait_than_allowed(fleet_of):
    """Beyond the bound calls are refused at once, and the waiting ones stay."""
    bench = Bench(fleet_of(1), hold_limit=1)
    bench.dispatcher.endpoint_down(0)
    waiting = asyncio.create_task(bench.place("first"))
    await settle_now()
    with pytest.raises(NoEndpointAvailable, match="1 calls wait"):
        await bench.place("second")
    assert bench.router.held == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert bench.router.held == 0


@pytest.mark.parametrize("come_up_first", [False, True])
async def test_a_client_may_leave_while_held(bench, come_up_first):
    """Cancelling a held call leaves nothing behind, also in the turn in which it is sent."""
    bench.dispatcher.endpoint_down(0)
    bench.dispatcher.endpoint_down(1)
    waiting = asyncio.create_task(bench.place())
    await settle_now()
    if come_up_first:
        bench.dispatcher.endpoint_up(0, cold=False)
        assert bench.router.in_flight == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (bench.router.held, bench.router.in_flight) == (0, 0)
    bench.dispatcher.endpoint_up(1, cold=False)
    assert bench.router.in_flight == 0


async def test_held_calls_can_be_moved(bench):
    """When the policy changes, held calls leave to be placed anew."""
    bench.dispatcher.endpoint_down(0)
    bench.dispatcher.endpoint_down(1)
    waiting = asyncio.create_task(bench.place())
    await settle_now()
    bench.dispatcher.move_held()
    with pytest.raises(Moved):
        await waiting
    assert bench.router.held == 0


class Gate:
    """Lets calls through one at a time, or when it is opened."""

    name = "gate"

    def __init__(self):
        self.open = False

    def order(self, held, fleet, now_s):
        return held

    def choose(self, ready):
        if self.open or not ready.candidates[0].in_flight:
            return Choice(0, "gate")
        return Wait("shut", until_s=ready.now_s + 0.001)


async def test_a_call_waits_its_turn_until_another_ends(fleet_of):
    """A call held by the policy is sent by the event that lets it through, not by a time limit."""
    bench = Bench(fleet_of(1), Gate(), hold_timeout_s=0.001, hold_limit=0)
    first = await bench.place("a")
    waiting = asyncio.create_task(bench.place("b"))
    await settle_now()
    assert bench.router.held == 1
    first.finish(output_tokens=1, prompt_tokens=None, cached_tokens=None)
    with await waiting as ticket:
        assert ticket.call.call_id == "b"
    assert (bench.router.held, bench.router.in_flight) == (0, 0)


async def test_the_clock_wakes_a_policy_that_asks_for_it(fleet_of):
    """A hold with an instant is offered again at that instant, without any other event."""
    gate = Gate()
    bench = Bench(fleet_of(1), gate)
    with await bench.place("a"):
        waiting = asyncio.create_task(bench.place("b"))
        await settle_now()
        gate.open = True
        with await waiting as ticket:
            assert ticket.send.reason == "gate"
