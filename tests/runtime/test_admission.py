"""Who goes on, who waits in which order, who is refused, and what is given back."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.domain.errors import InvalidInput
from runtime.admission import Admission, Asked, Throughput
from runtime.limits import Limits, Rate, Tenant
from runtime.wire import ApiError

A, B = Tenant(name="a"), Tenant(name="b")


class Door:
    """An admission on a hand-made clock, with callers that note their turn."""

    def __init__(self, **limits):
        self.now_s = 0.0
        self.refused = []
        self.door = Admission(
            Limits(**{"max_in_flight": 1, **limits}),
            now_s=lambda: self.now_s,
            refused=lambda reason, tenant: self.refused.append((reason, tenant)),
        )
        self.turns = []
        self.errors = {}
        self.tasks = []
        self._ends = {}

    async def call(self, name, tenant=A, **asked):
        """Let a call come; it stays until `end`."""
        end = self._ends[name] = asyncio.Event()

        async def live():
            try:
                with await self.door.enter(Asked(tenant=tenant, **asked)):
                    self.turns.append(name)
                    await end.wait()
            except ApiError as error:
                self.errors[name] = error

        self.tasks.append(asyncio.create_task(live(), name=name))
        await self.settle()

    async def settle(self):
        for _ in range(6):
            await asyncio.sleep(0)

    async def end(self, *names):
        for name in names:
            self._ends[name].set()
            await self.settle()

    async def drain(self):
        """Let all end, in the order in which their turns come."""
        done = 0
        while done < len(self.turns):
            await self.end(self.turns[done])
            done += 1
        await asyncio.gather(*self.tasks)
        assert (self.door.in_flight, self.door.waiting) == (0, 0)
        return self.turns


async def test_without_limits_nothing_waits():
    """Calls pass at once, and are counted while they are under way."""
    door = Door(max_in_flight=None)
    for number in range(50):
        await door.call(number)
    assert door.door.in_flight == 50
    assert len(await door.drain()) == 50


async def test_the_whole_gateway_may_be_limited():
    """No more than the limit are under way; the others follow as they end."""
    door = Door(max_in_flight=2)
    for number in range(5):
        await door.call(number)
    assert (door.door.in_flight, door.door.waiting) == (2, 3)
    await door.end(1)
    assert door.turns == [0, 1, 2]
    assert await door.drain() == [0, 1, 2, 3, 4]


async def test_a_tenant_at_its_limit_does_not_stop_others():
    """One tenant's calls wait for its own; another's pass by."""
    door = Door(max_in_flight=None)
    small = Tenant(name="small", max_in_flight=1)
    for number in range(3):
        await door.call(f"s{number}", small)
    await door.call("b", B)
    assert door.turns == ["s0", "b"]
    await door.drain()


async def test_started_work_goes_first():
    """Calls of runs that have begun pass those of new runs, whoever came first."""
    door = Door()
    await door.call("first")
    await door.call("new", begun=False, service_s=1.0)
    await door.call("begun", begun=True, service_s=9.0)
    assert await door.drain() == ["first", "begun", "new"]


async def test_urgent_classes_go_first():
    """A higher class passes a lower one, begun or not."""
    door = Door()
    await door.call("first")
    await door.call("low", begun=True, priority=-1)
    await door.call("high", priority=1)
    assert await door.drain() == ["first", "high", "low"]


async def test_nothing_starves():
    """A call that has waited beyond the ageing bound goes before every class."""
    door = Door(ageing_s=5.0)
    await door.call("first")
    await door.call("old", priority=-5)
    door.now_s = 6.0
    await door.call("urgent", priority=5)
    assert await door.drain() == ["first", "old", "urgent"]


async def test_service_is_shared_by_weight():
    """Two tenants with as much to do get service in proportion to their weights."""
    door = Door(queue_limit=10_000, ageing_s=1e6)
    heavy, light = Tenant(name="heavy", weight=3.0), Tenant(name="light")
    await door.call("first", Tenant(name="other"))
    for number in range(60):
        await door.call(("heavy", number), heavy, service_s=2.0)
        await door.call(("light", number), light, service_s=2.0)
    order = [name[0] for name in (await door.drain())[1:]]
    assert order[:40].count("heavy") == pytest.approx(30, abs=1)


async def test_long_calls_count_for_more():
    """Fairness is in seconds of service, not in calls: short calls get more turns."""
    door = Door(ageing_s=1e6)
    await door.call("first", Tenant(name="other"))
    for number in range(40):
        await door.call(("long", number), A, service_s=4.0)
        await door.call(("short", number), B, service_s=1.0)
    order = [name[0] for name in (await door.drain())[1:]]
    assert order[:40].count("short") == pytest.approx(32, abs=2)


async def test_a_newcomer_owes_nothing_and_is_owed_nothing():
    """A tenant that was away shares from now on: neither its absence nor its past counts."""
    door = Door(ageing_s=1e6)
    for number in range(30):
        await door.call(("a", number), A, service_s=1.0)
    for number in range(20):
        await door.end(("a", number))
    for number in range(10):
        await door.call(("b", number), B, service_s=1.0)
    order = [name[0] for name in (await door.drain())[21:]]
    assert order[:8].count("b") == pytest.approx(4, abs=1)


async def test_a_full_queue_refuses_with_the_time_by_the_measured_rate():
    """The one too many gets 429, its reason, and when the queue will have been served."""
    door = Door(queue_limit=4)
    for number in range(11):  # ten calls end in five seconds
        await door.call(("served", number))
        door.now_s += 0.5
        await door.end(("served", number))
    await door.call("under way")
    for number in range(4):
        await door.call(number)
    await door.call("too many")
    error = door.errors["too many"]
    assert (error.status, error.kind, error.reason) == (429, "RateLimitError", "queue_full")
    assert error.retry_after_s == pytest.approx(5 / (11 / 5.0), rel=0.1)
    assert door.refused == [("queue_full", "a")]
    await door.drain()


async def test_overload_sheds_the_least_urgent_and_says_so():
    """A full queue makes room for a more urgent call by refusing the latest of the lowest class."""
    door = Door(queue_limit=3)
    await door.call("first")
    await door.call("normal")
    await door.call("low begun", begun=True, priority=-1)
    await door.call("low new", priority=-1)
    await door.call("urgent", B, priority=1)
    assert door.errors["low new"].reason == "shed"
    await door.call("lowest", priority=-2)
    assert door.errors["lowest"].reason == "queue_full"
    assert door.refused == [("shed", "a"), ("queue_full", "a")]
    assert await door.drain() == ["first", "urgent", "normal", "low begun"]


async def test_a_call_waits_only_so_long(until):
    """After the time limit it is refused, and nobody waits for it."""
    door = Door(queue_timeout_s=0.001)
    await door.call("first")
    await door.call("late")
    await until(lambda: "late" in door.errors, 0.001)
    assert door.errors["late"].reason == "queue_timeout"
    assert await door.drain() == ["first"]


@pytest.mark.parametrize("turn_came", [False, True])
async def test_a_client_may_leave_while_it_waits(turn_came):
    """Cancelling a waiting call, also in the moment of its turn, takes nothing from anybody."""
    door = Door()
    await door.call("first")
    await door.call("leaves", B)
    await door.call("next", B)
    leaving = door.tasks[1]
    if turn_came:
        door._ends["first"].set()
        await asyncio.sleep(0)
        assert door.door.in_flight == 1
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await door.settle()
    await door.end("first")
    assert door.turns == ["first", "next"]
    assert door.door.to_json()["tenants"]["b"]["service_s"] == 0.0
    await door.end("next")
    assert (door.door.in_flight, door.door.waiting) == (0, 0)


async def test_rates_are_kept_by_refusing():
    """Requests beyond a tenant's rate get 429 and the seconds until the next one; others do not."""
    door = Door(max_in_flight=None)
    tenant = Tenant(name="t", requests_per_minute=2, tokens_per_minute=1000)
    await door.call(0, tenant, tokens=10)
    await door.call(1, tenant, tokens=10)
    await door.call(2, tenant, tokens=10)
    assert door.errors[2].reason == "rate_requests"
    assert door.errors[2].retry_after_s == pytest.approx(30.0)
    door.now_s = 30.0
    await door.call(3, tenant, tokens=985)
    await door.call(4, A)
    assert door.turns == [0, 1, 3, 4]
    door.now_s = 60.0
    await door.call(5, tenant, tokens=900)
    assert door.errors[5].reason == "rate_tokens"
    await door.drain()


async def test_tokens_are_settled_by_what_was_used():
    """A call that took less than forecast gives the rest back to its tenant."""
    door = Admission(Limits(), now_s=lambda: 0.0)
    tenant = Tenant(name="t", tokens_per_minute=1000)
    with await door.enter(Asked(tenant=tenant, tokens=900)) as admitted:
        admitted.used(100)
    with await door.enter(Asked(tenant=tenant, tokens=900)):
        pass
    with pytest.raises(ApiError, match="1000 tokens per minute"):
        await door.enter(Asked(tenant=tenant, tokens=100))


async def test_limits_may_change_while_calls_wait():
    """A wider limit lets those who wait go on at once."""
    door = Door()
    for number in range(4):
        await door.call(number)
    door.door.set_limits(Limits(max_in_flight=3), [A])
    await door.settle()
    assert door.turns == [0, 1, 2]
    await door.drain()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.booleans(),
            st.integers(-1, 1),
            st.floats(0.0, 5.0),
            st.sampled_from(["stay", "leave", "end first"]),
        ),
        max_size=25,
    ),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_everything_is_given_back(calls, most, queue):
    """Whatever comes, leaves or is shed, each call ends once and nothing is left."""

    async def story():
        door = Door(max_in_flight=most, queue_limit=queue)
        tenants = {"a": A, "b": Tenant(name="b", max_in_flight=1)}
        for number, (name, begun, priority, service_s, then) in enumerate(calls):
            await door.call(
                number, tenants[name], begun=begun, priority=priority, service_s=service_s
            )
            assert door.door.in_flight <= most
            assert door.door.waiting <= queue
            if then == "leave":
                door.tasks[number // 2].cancel()
            elif then == "end first" and door.turns:
                await door.end(door.turns[0])
            await door.settle()
        for number in range(len(calls)):
            await door.end(number)
        ends = await asyncio.gather(*door.tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
        facts = door.door.to_json()
        assert (facts["in_flight"], facts["waiting"]) == (0, 0)
        assert len(set(door.turns)) == len(door.turns)
        assert not set(door.turns) & set(door.errors)

    asyncio.run(story())


class TestThroughput:
    def test_the_rate_is_that_of_the_last_ends(self):
        """Two ends a second mean ten calls in five seconds; nothing known means a second."""
        rate = Throughput()
        assert rate.wait_s(10, 0.0) == 1.0
        for tick in range(20):
            rate.add(tick / 2)
        assert rate.per_s(10.0) == pytest.approx(2.0)
        assert rate.wait_s(10, 10.0) == pytest.approx(5.0)
        assert rate.wait_s(10**9, 10.0) == 600.0


class TestLimits:
    @pytest.mark.parametrize(
        ("kind", "values", "field"),
        [
            (Tenant, {"name": ""}, "name"),
            (Tenant, {"name": "t", "weight": 0.0}, "weight"),
            (Tenant, {"name": "t", "max_in_flight": 0}, "max_in_flight"),
            (Tenant, {"name": "t", "tokens_per_minute": float("inf")}, "tokens_per_minute"),
            (Limits, {"max_in_flight": 0}, "max_in_flight"),
            (Limits, {"queue_limit": -1}, "queue_limit"),
            (Limits, {"ageing_s": 0.0}, "ageing_s"),
        ],
    )
    def test_values_out_of_range_are_named(self, kind, values, field):
        """A value out of range is an input error that names its field."""
        with pytest.raises(InvalidInput, match=field):
            kind(**values)

    def test_a_bucket_fills_by_the_minute_and_may_owe(self):
        """A full bucket allows a minute's worth at once, even a larger amount, which is owed."""
        rate = Rate(60.0, 0.0)
        assert rate.wait_s(60.0, 0.0) == 0.0
        rate.take(90.0, 0.0)
        assert rate.wait_s(1.0, 0.0) == pytest.approx(31.0)
        assert rate.wait_s(1.0, 31.0) == pytest.approx(0.0)
