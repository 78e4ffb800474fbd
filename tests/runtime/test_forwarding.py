"""Attempts, relay and what is given back, with fakes on both sides."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from multidict import CIMultiDict

from planner.domain.fleet import Fleet
from planner.domain.trace import CallRecord, RunRecord, load_trace
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.desk import LocalDesk
from runtime.diagnostics import metrics_text
from runtime.forwarding import Forwarder
from runtime.links import ClientGone, EndpointBroken, EndpointUnreachable
from runtime.wire import DONE, ApiError, sse

PATH = "/v1/chat/completions"
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
TOKEN = sse({"choices": [{"delta": {"content": "hi"}}]})
USAGE_CHUNK = sse({"choices": [], "usage": USAGE})
GOOD_STREAM = (TOKEN, TOKEN, USAGE_CHUNK, DONE)
GOOD_BODY = json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": USAGE}).encode()
BROKEN = EndpointBroken("reset")
REFUSED = EndpointUnreachable("refused")


class FakeUpstream:
    """An answer from a list of chunks.

    An exception among them is raised, an event waited for, and "hang" never ends.
    """

    def __init__(self, status, chunks, *, stream):
        self.status = status
        self.headers = {"Content-Type": "text/event-stream" if stream else "application/json"}
        self._chunks = chunks
        self.closed = False

    async def read(self):
        return b"".join([chunk async for chunk in self.chunks()])

    async def chunks(self):
        for chunk in self._chunks:
            if chunk == "hang":
                await asyncio.Event().wait()
            if isinstance(chunk, Exception):
                raise chunk
            if isinstance(chunk, asyncio.Event):
                await chunk.wait()
                continue
            yield chunk

    async def __aenter__(self):
        return self

    async def __aexit__(self, *details):
        self.closed = True


class FakeLink:
    """Answers each request by the next item of a script; the last one repeats."""

    def __init__(self, script):
        self.script = list(script)
        self.sent = []
        self.answers = []

    async def send(self, path, body, headers):
        self.sent.append((path, json.loads(body), dict(headers)))
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if step == "hang":
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            raise step
        status, chunks, stream = step
        self.answers.append(FakeUpstream(status, chunks, stream=stream))
        return self.answers[-1]

    async def healthy(self):
        return True


class FakeClient:
    """Collects a streamed answer; leaves after ``writes`` writes."""

    def __init__(self, writes=1000):
        self.status = None
        self.headers = {}
        self.data = b""
        self._writes = writes

    async def start(self, status, headers):
        self.status, self.headers = status, headers

    async def write(self, data):
        if self._writes == 0:
            raise ClientGone
        self._writes -= 1
        self.data += data


def stream(*chunks):
    return 200, chunks, True


def whole(status, body):
    return status, (body,), False


class Bench:
    """A forwarder over scripted endpoints."""

    def __init__(self, fleet, *scripts, config=None, policy="round_robin"):
        self.control = Control(fleet, policy=policy, config=GatewayConfig(**(config or {})))
        self.links = [FakeLink(script) for script in scripts]
        self.forwarder = Forwarder(LocalDesk(self.control), self.links)
        self.client = FakeClient()

    async def ask(self, headers=None, **payload):
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **payload})
        headers = CIMultiDict({"x-request-id": "rid", **(headers or {})})
        return await self.forwarder.serve(PATH, body.encode(), headers, {"k": "v"}, self.client)

    @property
    def clean(self):
        router = self.control.router
        closed = all(answer.closed for link in self.links for answer in link.answers)
        return router.in_flight == 0 and router.held == 0 and closed

    @property
    def sent(self):
        return [len(link.sent) for link in self.links]


@pytest.fixture
def bench(fleet_of):
    return lambda *scripts, **options: Bench(fleet_of(len(scripts)), *scripts, **options)


async def test_a_whole_answer_is_passed_on(bench):
    """Body, status and headers come through, with the gateway's own headers added."""
    one = bench([whole(200, GOOD_BODY)])
    answer = await one.ask()
    assert (answer.status, answer.body) == (200, GOOD_BODY)
    assert answer.headers["x-request-id"] == "rid"
    assert answer.headers["x-almanac-endpoint"] == "e0"
    assert answer.headers["x-almanac-reason"] == "turn"
    assert answer.headers["x-almanac-attempts"] == "1"
    assert int(answer.headers["x-almanac-router-us"]) >= 0
    assert one.links[0].sent[0][2] == {"k": "v", "x-request-id": "rid"}
    assert one.clean


async def test_a_stream_is_passed_on_without_the_usage_nobody_asked_for(bench):
    """The gateway asks the engine for usage and keeps it from a client that did not."""
    one = bench([stream(*GOOD_STREAM)])
    assert await one.ask(stream=True) is None
    assert one.client.data == TOKEN + TOKEN + DONE
    assert one.client.headers["x-almanac-endpoint"] == "e0"
    assert one.links[0].sent[0][1]["stream_options"] == {"include_usage": True}
    assert one.clean


async def test_usage_that_was_asked_for_stays(bench):
    """A client that asks for usage gets its chunk, and its options are untouched."""
    one = bench([stream(*GOOD_STREAM)])
    options = {"include_usage": True, "continuous_usage_stats": False}
    await one.ask(stream=True, stream_options=options)
    assert one.client.data == b"".join(GOOD_STREAM)
    assert one.links[0].sent[0][1]["stream_options"] == options


@pytest.mark.parametrize("failure", [REFUSED, BROKEN, whole(500, b"{}"), whole(503, b"{}")])
@pytest.mark.parametrize("streamed", [False, True])
async def test_failures_before_the_first_byte_go_elsewhere(bench, failure, streamed):
    """A failed first attempt is repeated on the other endpoint; the client sees one answer."""
    good = stream(*GOOD_STREAM) if streamed else whole(200, GOOD_BODY)
    one = bench([failure], [good])
    answer = await one.ask(stream=streamed)
    headers = one.client.headers if streamed else answer.headers
    assert headers["x-almanac-attempts"] == "2"
    assert headers["x-almanac-endpoint"] == "e1"
    assert one.sent == [1, 1]
    assert one.clean


@pytest.mark.parametrize(
    "chunks", [(), (BROKEN,), (sse({"error": {"message": "dead"}}), DONE), (TOKEN[:5], BROKEN)]
)
async def test_a_stream_that_fails_before_its_first_event_goes_elsewhere(bench, chunks):
    """A 200 that then breaks, ends or reports an error before any event can be replaced."""
    one = bench([stream(*chunks)], [stream(*GOOD_STREAM)])
    await one.ask(stream=True)
    assert one.client.data == TOKEN + TOKEN + DONE
    assert one.clean


@pytest.mark.parametrize("end", [(), (BROKEN,), (sse({"error": {"message": "dead"}}), DONE)])
async def test_a_stream_that_breaks_later_ends_with_an_error_event(bench, end):
    """After the first event nothing is repeated: the client gets one error event and the end."""
    one = bench([stream(TOKEN, *end)], [stream(*GOOD_STREAM)])
    await one.ask(stream=True)
    events = one.client.data.split(b"\n\n")
    assert events[0] + b"\n\n" == TOKEN
    assert "error" in json.loads(events[1][6:])
    assert one.client.data.endswith(DONE)
    assert one.client.data.count(DONE) == 1
    assert one.sent == [1, 0]
    assert one.clean


IMPATIENT = {"first_byte_floor_s": 0.001, "timeout_multiple": 1.0}
"""A first byte is late at once; silence in an answer that has begun is not, unless a test says so,
for a machine that is busy may well halt between two chunks."""
STUCK = stream("hang")


def counted(one, name):
    """Return the lines of a metric that are not zero."""
    lines = metrics_text(one.control).splitlines()
    return [line for line in lines if line.startswith(name) and not line.endswith(" 0")]


@pytest.mark.parametrize("stuck", ["hang", STUCK, stream(b": keep-alive\n\n", "hang")])
async def test_a_late_first_byte_is_not_waited_for(bench, stuck):
    """An endpoint that sends nothing, or only comments, is left for another one, and let go."""
    one = bench([stuck], [stream(*GOOD_STREAM)], config=IMPATIENT)
    await one.ask(stream=True)
    assert one.client.data == TOKEN + TOKEN + DONE
    assert one.client.headers["x-almanac-attempts"] == "2"
    assert counted(one, "almanac_retries_total{") == [
        'almanac_retries_total{endpoint="e0",reason="late"} 1'
    ]
    assert one.clean


async def test_a_late_whole_answer_is_not_waited_for(bench):
    """Without a stream the limit is on the whole answer, by the length it allows itself."""
    one = bench([whole(200, "hang")], [whole(200, GOOD_BODY)], config=IMPATIENT)
    answer = await one.ask(max_tokens=2)
    assert answer.headers["x-almanac-endpoint"] == "e1"
    assert one.clean


async def test_late_is_better_than_never(bench, until):
    """Where nobody else could answer, a late endpoint is waited for."""
    come = asyncio.Event()
    one = bench([stream(come, *GOOD_STREAM)], config=IMPATIENT)
    task = asyncio.create_task(one.ask(stream=True))
    start_s = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > start_s + 0.1, 0.01)
    assert not task.done()
    come.set()
    await task
    assert one.client.data == TOKEN + TOKEN + DONE
    assert one.sent == [1]


async def test_the_last_attempt_is_waited_for(bench, until):
    """A call whose other attempts were all late is not given up once more."""
    come = asyncio.Event()
    one = bench([STUCK], [stream(come, *GOOD_STREAM)], [STUCK], config={**IMPATIENT, "retries": 1})
    task = asyncio.create_task(one.ask(stream=True))
    await until(lambda: one.sent == [1, 1, 0])
    start_s = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > start_s + 0.1, 0.01)
    come.set()
    await task
    assert one.client.headers["x-almanac-endpoint"] == "e1"
    assert one.clean


async def test_a_fleet_that_is_late_is_not_sent_everything_twice(bench, until):
    """While breakers are closed, only a share of the calls may be taken elsewhere for lateness."""
    one = bench([STUCK], [STUCK], config={**IMPATIENT, "breaker_failures": 10**6, "retries": 10**6})
    tasks = [asyncio.create_task(one.ask(stream=True)) for _ in range(40)]
    await until(lambda: sum(one.sent) > 40, 0.01)
    start_s = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > start_s + 0.3, 0.01)
    assert sum(one.sent) <= 40 + 10 + 0.2 * 50
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert one.clean


async def test_an_endpoint_that_falls_silent_is_given_up_with_an_error_event(bench):
    """In the middle of an answer there is no other way; it is counted, and the end is clean."""
    config = {**IMPATIENT, "stall_floor_s": 0.001}
    one = bench([stream(TOKEN, "hang")], [stream(*GOOD_STREAM)], config=config)
    await one.ask(stream=True)
    first, error, end, rest = one.client.data.split(b"\n\n")
    assert (first + b"\n\n", end + b"\n\n", rest) == (TOKEN, DONE, b"")
    assert json.loads(error[6:])["error"]["code"] == 502
    assert counted(one, "almanac_streams_cut_total{") == [
        'almanac_streams_cut_total{endpoint="e0",reason="silent"} 1'
    ]
    assert one.clean


async def test_one_stream_may_stand_still_while_others_move(bench):
    """A preempted request is silent for long: only an endpoint silent as a whole is given up."""
    come, start_s = asyncio.Event(), asyncio.get_running_loop().time()
    one = bench([stream(TOKEN, come, *GOOD_STREAM)], config={**IMPATIENT, "stall_floor_s": 0.1})
    task = asyncio.create_task(one.ask(stream=True))
    while asyncio.get_running_loop().time() < start_s + 0.3:
        one.control.guard.heard_s[0] = asyncio.get_running_loop().time()
        await asyncio.sleep(0.01)
    assert not task.done()
    come.set()
    await task
    assert one.client.data == TOKEN * 3 + DONE


async def test_a_client_that_reads_slowly_is_not_the_endpoint_s_fault(bench):
    """The limit on silence stands still while the client is what keeps the answer."""

    class Slow(FakeClient):
        async def write(self, data):
            await asyncio.sleep(0.05)
            await super().write(data)

    one = bench([stream(*GOOD_STREAM)], config={**IMPATIENT, "stall_floor_s": 0.01})
    one.client = Slow()
    await one.ask(stream=True)
    assert one.client.data == TOKEN + TOKEN + DONE


async def test_an_endpoint_over_its_rate_is_passed_by(bench):
    """429 of an endpoint goes elsewhere and opens nothing; from the only one it is passed on."""
    one = bench([whole(429, b"{}")], [whole(200, GOOD_BODY)], config={"breaker_failures": 1})
    for _ in range(4):
        assert (await one.ask()).status == 200
    assert not one.control.breakers[0].down
    alone = bench([whole(429, b"{}")])
    assert (await alone.ask()).status == 429


async def test_a_call_that_fails_everywhere_is_at_fault_itself(bench):
    """A poisoned request gets 500 from every endpoint and takes none of them out."""
    one = bench(*[[whole(500, b"{}")]] * 3, config={"breaker_failures": 1})
    for _ in range(5):
        assert (await one.ask()).status == 500
    assert not any(breaker.down for breaker in one.control.breakers)


async def test_without_retries_failures_count_at_once(bench):
    """Where a call is tried once only, an endpoint that fails fast does not attract load either."""
    one = bench(
        [whole(500, b"{}")], [whole(200, GOOD_BODY)], policy="least_load", config={"retries": 0}
    )
    statuses = [(await one.ask()).status for _ in range(20)]
    assert statuses == [500] * 3 + [200] * 17


async def test_a_call_that_fails_everywhere_counts_where_more_calls_fail_than_elsewhere(bench):
    """Two endpoints that fail every call, though never alone, are told from the one that does not.

    With one further attempt some calls meet both bad ones.
    """
    bad, good = [whole(500, b"{}")], [whole(200, GOOD_BODY)]
    one = bench(bad, bad, good, good, good, config={"retries": 1})
    statuses = [(await one.ask()).status for _ in range(60)]
    assert 500 in statuses
    assert statuses[-20:] == [200] * 20
    assert sum(breaker.down for breaker in one.control.breakers) == 2


async def test_hedging_is_off_unless_given_a_share(bench, until):
    """A late call is sent once only."""
    come = asyncio.Event()
    one = bench([stream(come, *GOOD_STREAM)], [stream(*GOOD_STREAM)])
    task = asyncio.create_task(one.ask(stream=True))
    start_s = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > start_s + 0.1, 0.01)
    assert one.sent == [1, 0]
    come.set()
    await task


@pytest.mark.parametrize("hedge_share", [0.0, 0.1])
async def test_a_call_is_counted_once_it_is_on_its_way(bench, until, hedge_share):
    """A request is passed on and written before its decision is counted, which needs no event."""
    come, written = asyncio.Event(), []
    one = bench([stream(come, *GOOD_STREAM)], config={"hedge_share": hedge_share})
    link, counted_there = one.links[0], one.control.router._view.states[0]
    send = link.send

    async def spied(*request):
        async def write():
            written.append(counted_there.in_flight)

        await asyncio.create_task(write())  # as the HTTP library does
        return await send(*request)

    link.send = spied
    task = asyncio.create_task(one.ask(stream=True))
    await until(lambda: counted_there.in_flight == 1)
    assert written == [0]
    come.set()
    await task
    assert one.clean


async def test_a_late_call_is_hedged_and_answered_once(bench):
    """The second endpoint answers first; the other attempt is cancelled, and nobody is blamed."""
    one = bench([STUCK], [stream(*GOOD_STREAM)], config={"hedge_share": 0.1})
    await one.ask(stream=True)
    assert one.client.data == TOKEN + TOKEN + DONE
    assert one.client.headers["x-almanac-endpoint"] == "e1"
    assert one.client.headers["x-almanac-attempts"] == "2"
    assert counted(one, "almanac_hedges_total{") == ['almanac_hedges_total{outcome="won"} 1']
    assert counted(one, "almanac_attempts_total{") == [
        'almanac_attempts_total{endpoint="e0",status="cancelled"} 1',
        'almanac_attempts_total{endpoint="e1",status="ok"} 1',
    ]
    assert not any(breaker.down for breaker in one.control.breakers)
    assert one.clean


async def test_the_first_attempt_may_still_win(bench, until):
    """A hedged call is answered by the first endpoint if that one comes first."""
    come = asyncio.Event()
    one = bench([stream(come, *GOOD_STREAM)], [STUCK], config={"hedge_share": 0.1})
    task = asyncio.create_task(one.ask(stream=True))
    await until(lambda: one.sent == [1, 1])
    come.set()
    await task
    assert one.client.data == TOKEN + TOKEN + DONE
    assert one.client.headers["x-almanac-endpoint"] == "e0"
    assert counted(one, "almanac_hedges_total{") == ['almanac_hedges_total{outcome="lost"} 1']
    assert one.clean


async def test_hedges_keep_to_their_budget(bench, until):
    """Beyond the first few, no more calls are sent twice than the share allows."""
    one = bench([STUCK], [STUCK], config={"hedge_share": 0.05})
    tasks = [asyncio.create_task(one.ask(stream=True, max_tokens=1)) for _ in range(16)]
    await until(lambda: sum(one.sent) >= 26)
    start_s = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > start_s + 0.1, 0.01)
    assert sum(one.sent) <= 16 + 10 + 0.05 * 30
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert one.clean


@pytest.mark.parametrize("second", [BROKEN, STUCK])
async def test_a_hedged_call_survives_failures_and_leaving_clients(bench, until, second):
    """Both attempts may fail, or the client may leave with both under way; nothing is left."""
    come = asyncio.Event()
    one = bench(
        [stream(come, BROKEN)], [second], [stream(*GOOD_STREAM)], config={"hedge_share": 0.1}
    )
    task = asyncio.create_task(one.ask(stream=True))
    await until(lambda: one.sent[1] == 1)
    if second is STUCK:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        come.set()
        await task
        assert one.client.data == TOKEN + TOKEN + DONE
        assert one.sent == [1, 1, 1]
    assert one.clean


async def test_overload_is_refused_with_reason_and_time(bench, until):
    """Beyond limit and queue a call gets 429; the reason is counted, and others go on."""
    come = asyncio.Event()
    one = bench([stream(come, *GOOD_STREAM)], config={"max_in_flight": 1, "queue_limit": 1})
    first, second = (asyncio.create_task(one.ask(stream=True)) for _ in range(2))
    await until(lambda: one.control.admission.waiting == 1)
    with pytest.raises(ApiError) as caught:
        await one.ask()
    error = caught.value
    assert (error.status, error.reason) == (429, "queue_full")
    assert error.retry_after_s > 0
    assert "almanac_queue_depth 1" in metrics_text(one.control)
    come.set()
    await asyncio.gather(first, second)
    assert counted(one, "almanac_rejections_total{") == [
        'almanac_rejections_total{reason="queue_full",tenant="default"} 1'
    ]
    assert (one.control.admission.in_flight, one.control.admission.waiting) == (0, 0)
    assert one.clean


async def test_client_errors_are_passed_on_and_count_against_nobody(bench):
    """A 4xx is not repeated, and never takes an endpoint down."""
    one = bench([whole(400, b'{"error": {}}')], config={"breaker_failures": 1})
    for _ in range(5):
        answer = await one.ask()
        assert answer.status == 400
    assert one.control.ready
    assert one.sent == [5]


async def test_attempts_are_bounded_and_the_last_answer_is_passed_on(bench):
    """With `retries` used up the client gets the endpoint's own error."""
    one = bench(*[[whole(500, b"{}")]] * 5, config={"retries": 2})
    answer = await one.ask()
    assert answer.status == 500
    assert sum(one.sent) == 3
    assert one.clean


async def test_broken_everywhere_is_a_bad_gateway(bench):
    """If no endpoint ever answers, the client gets a 502 that says how often it was tried."""
    one = bench([BROKEN], [BROKEN], config={"retries": 1})
    with pytest.raises(ApiError, match="2 attempts") as caught:
        await one.ask()
    assert caught.value.status == 502
    assert one.clean


async def test_a_refused_connect_takes_the_endpoint_down(bench):
    """After a refused connect no further call goes there until it is well again.

    Then two trials go there one after the other, and calls by turns as before.
    """
    one = bench([REFUSED, whole(200, GOOD_BODY)], [whole(200, GOOD_BODY)])
    for _ in range(4):
        assert (await one.ask()).status == 200
    assert one.sent == [1, 4]
    one.control.endpoint_recovered(0)
    for _ in range(4):
        await one.ask()
    assert one.sent == [4, 5]


async def test_fast_failures_do_not_attract_load(bench):
    """An endpoint that answers 500 at once is left alone after a few failures."""
    one = bench([whole(500, b"{}")], [whole(200, GOOD_BODY)], policy="least_load")
    for _ in range(20):
        assert (await one.ask()).status == 200
    assert one.sent[0] == 3


async def test_a_whole_fleet_down_means_waiting_then_503(bench):
    """With nothing up a call waits up to the limit and then gets 503 with Retry-After."""
    one = bench([REFUSED], config={"hold_timeout_s": 0.001})
    with pytest.raises(ApiError) as caught:
        await one.ask()
    assert caught.value.status == 503
    assert caught.value.retry_after_s > 0
    assert one.clean


@pytest.mark.parametrize(
    "script", [["hang"], [stream("hang")], [stream(TOKEN, "hang")], [(200, ("hang",), False)]]
)
async def test_a_client_that_leaves_gives_everything_back(bench, script, until):
    """Cancelling at any stage closes the upstream answer and settles the attempt."""
    one = bench(script)
    task = asyncio.create_task(one.ask(stream=True))
    await until(lambda: one.links[0].sent)
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one.clean


async def test_a_client_that_stops_reading_gives_everything_back(bench):
    """A failed write to the client ends the attempt as cancelled, and no one else is blamed."""
    one = bench([stream(*GOOD_STREAM)])
    one.client = FakeClient(writes=1)
    with pytest.raises(ClientGone):
        await one.ask(stream=True)
    assert one.clean
    assert 'endpoint="e0",status="cancelled"} 1' in metrics_text(one.control)


async def test_a_client_that_leaves_after_the_last_event_got_its_answer(bench, until):
    """Many close once they have read [DONE]: that call ended well, and its length is learned."""
    one = bench([stream(*GOOD_STREAM, "hang")])
    task = asyncio.create_task(one.ask(stream=True))
    await until(lambda: one.client.data.endswith(DONE))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one.clean
    assert 'endpoint="e0",status="ok"} 1' in metrics_text(one.control)


async def test_priority_goes_only_where_the_engine_reads_it(fleet_of):
    """The priority field is set for engines with the priority policy, and for no other."""
    for scheduling, expected in (("priority", True), ("fcfs", False)):
        fleet = fleet_of(1, scheduling=scheduling)
        one = Bench(fleet, [whole(200, GOOD_BODY)], policy="marginal_cost")
        await one.ask()
        assert ("priority" in one.links[0].sent[0][1]) is expected


async def test_bad_requests_never_reach_an_endpoint(bench):
    """Unknown models, broken JSON and non-objects are answered by the gateway."""
    one = bench([whole(200, GOOD_BODY)])
    with pytest.raises(ApiError) as caught:
        await one.ask(model="other")
    assert (caught.value.status, caught.value.param) == (404, "model")
    for body in (b"{", b"[1]", b"\xff"):
        with pytest.raises(ApiError) as caught:
            await one.forwarder.serve(PATH, body, CIMultiDict(), {}, one.client)
        assert caught.value.status == 400
    assert one.sent == [0]


async def test_traces_tell_the_story_without_any_text(bench, tmp_path):
    """Run and call records hold identity, choice and counts, and no word of the prompt."""
    one = bench([whole(500, b"{}")], [whole(200, GOOD_BODY)])
    one.control.set_trace(tmp_path / "t.jsonl")
    await one.ask(
        {"x-almanac-run-id": "r1", "x-almanac-node": "n", "x-almanac-visit": "3",
         "x-dynamo-session-final": "true"},
        messages=[{"role": "user", "content": "secret words"}], max_tokens=9,
    )  # fmt: skip
    records = load_trace(tmp_path / "t.jsonl")
    assert "secret" not in (tmp_path / "t.jsonl").read_text()
    failed, good = (record for record in records if isinstance(record, CallRecord))
    assert (failed.status, failed.endpoint, failed.attempt) == ("failed", "e0", 0)
    assert (good.status, good.endpoint, good.attempt) == ("ok", "e1", 1)
    assert (good.run_id, good.node, good.site, good.visit) == ("r1", "n", "n#0", 3)
    assert (good.prompt_tokens, good.output_tokens, good.cached_tokens) == (5, 2, 4)
    assert good.max_tokens == 9
    assert good.call_id != failed.call_id
    (run,) = (record for record in records if isinstance(record, RunRecord))
    assert (run.run_id, run.calls, run.status) == ("r1", 1, "ok")
    one.control.close()


async def test_what_seems_too_long_is_judged_by_an_endpoint(fleet_of):
    """A call that no endpoint can hold by our estimate is sent all the same, and as it is.

    The estimate may be wrong, so nothing is refused on its strength, and nothing waits for an
    endpoint that can never come. A long prompt goes where there is most room.
    """
    small, large = fleet_of(2).endpoints
    fleet = Fleet(name="f", endpoints=(replace(small, kv_blocks=50), large))
    refused = whole(400, b'{"error": "too long"}')
    one = Bench(fleet, [refused], [refused], policy="least_load")
    answer = await one.ask(messages=[{"role": "user", "content": "word " * 20_000}])
    assert (answer.status, answer.headers["x-almanac-endpoint"]) == (400, "e1")
    answer = await one.ask(max_tokens=10**6)
    assert (answer.status, answer.headers["x-almanac-endpoint"]) == (400, "e0")
    assert one.links[0].sent[0][1]["max_tokens"] == 10**6
    assert one.clean
