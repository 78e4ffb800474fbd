"""Time limits: how they follow forecasts and errors, and how work is given up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from planner.dispatch.events import Call, CallArrived
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import Router
from planner.domain.estimates import EstimateTable
from runtime.hedging import Budget
from runtime.timeouts import LearnedLimit, Watch, first_byte_s, step_s, whole_s


def limit(**changes):
    return LearnedLimit(**{"multiple": 3.0, "floor_s": 0.1, "cap_s": 100.0, **changes})


class TestLearnedLimit:
    def test_a_multiple_of_the_forecast_between_floor_and_cap(self):
        """Before anything was seen a limit is a multiple of the forecast, within its bounds."""
        one = limit()
        assert one.of(2.0) == pytest.approx(6.0)
        assert one.of(0.0) == 0.1
        assert one.of(1e9) == 100.0
        assert one.seen == 0

    def test_it_follows_what_is_seen(self):
        """Where things take three times their forecast, the limit grows until it covers them."""
        one = limit()
        for _ in range(400):
            one.learn(1.0, 3.0)
        assert one.quantile_s(1.0) == pytest.approx(3.0, rel=0.15)
        assert one.of(1.0) > 3 * 2.5
        assert one.seen == 400


def placed(fleet, *, prompt_tokens=100, before=0, **changes):
    """Return call, send and crowd of a call sent after some others."""
    router = Router(fleet, make_policy("least_load"), Forecaster(EstimateTable()))
    for number in range(before + 1):
        call = Call(call_id=f"c{number}", prompt_tokens=prompt_tokens, model="m", **changes)
        (send,) = router.handle(CallArrived(call=call, now_s=0.0))
    return call, send, router.crowd(0)


class TestForecasts:
    def test_a_first_byte_waits_for_its_prefill(self, fleet_of):
        """On an idle endpoint it takes the prefill and a step or two; a longer prompt more."""
        short = first_byte_s(*placed(fleet_of(1)))
        long = first_byte_s(*placed(fleet_of(1), prompt_tokens=4000))
        row = fleet_of(1).endpoints[0].latency
        assert row.prefill_s(100) < short < row.prefill_s(100) + 0.02
        assert long > row.prefill_s(4000)

    def test_a_first_byte_waits_for_those_before_it(self, fleet_of):
        """Prompts queued before it count, and where the slots are taken whole answers do."""
        fleet = fleet_of(1)
        waits = [first_byte_s(*placed(fleet, before=before)) for before in (0, 2, 3, 4, 8)]
        assert waits == sorted(waits)
        # Four slots: the fifth call waits for an answer of a mean forecast length.
        assert waits[3] > 10 * waits[2]

    def test_a_whole_answer_may_be_as_long_as_it_allows_itself(self, fleet_of):
        """Its limit covers the declared length, and without one many times the forecast."""
        fleet = fleet_of(1)
        declared = placed(fleet, max_tokens=2000)
        assert whole_s(*declared) > 2000 * step_s(declared[2])
        call, send, crowd = placed(fleet)
        assert whole_s(call, send, crowd) > 10 * send.predicted_output_tokens * step_s(crowd)


class TestWatch:
    async def test_work_in_time_is_left_alone(self):
        """Nothing happens to what ends before its limit."""
        async with Watch(lambda: 1.0):
            await asyncio.sleep(0)

    async def test_overdue_work_is_given_up(self):
        """What is overdue is cancelled, and the limit's owner gets a TimeoutError."""
        undone = []

        async def work():
            try:
                await asyncio.Event().wait()
            finally:
                undone.append(True)

        with pytest.raises(TimeoutError):
            async with Watch(lambda: 0.0):
                await work()
        assert undone == [True]

    async def test_a_limit_may_move(self):
        """The limit is asked again when it was to pass; more time may have been given."""
        left = iter([0.001, 0.001, 0.0])
        asked = []

        def left_s():
            asked.append(next(left))
            return asked[-1]

        with pytest.raises(TimeoutError):
            async with Watch(left_s):
                await asyncio.Event().wait()
        assert asked == [0.001, 0.001, 0.0]

    async def test_nobody_is_blamed_while_this_process_stood_still(self, monkeypatch):
        """A look that comes late itself is no verdict: what has arrived is read first."""
        loop = asyncio.get_running_loop()
        now = [loop.time()]
        looks = []
        watch = Watch(lambda: looks.append(now[0]) or -1.0)
        fake = SimpleNamespace(
            time=lambda: now[0], call_later=lambda wait_s, _look: looks.append(("later", wait_s))
        )
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: fake)
        watch._due_s = now[0] - 5.0
        watch._look()
        assert looks == [("later", 1.0)]

    async def test_a_client_that_leaves_is_no_timeout(self):
        """Cancellation from outside stays what it is."""

        async def work():
            async with Watch(lambda: 10.0):
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class TestBudget:
    def test_a_share_of_all_calls(self):
        """Beyond the first burst, no more than the share is spent."""
        budget = Budget(0.1, burst=2.0)
        spent = 0
        for _ in range(100):
            budget.earn()
            spent += budget.spend()
        assert spent == pytest.approx(12, abs=1)
        assert budget.left < 1

    def test_without_a_share_nothing_is_spent(self):
        """A share of zero turns it off."""
        budget = Budget(0.0)
        budget.earn()
        assert not budget.spend()
