"""Faults of mock endpoints, from the client's point of view."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from planner.domain.errors import InvalidInput
from planner.domain.faults import read_fault
from planner.domain.ids import EndpointId

LONG = 5000


def user(text):
    return [{"role": "user", "content": text}]


def xargs(tokens):
    return {"vllm_xargs": {"mock_output_tokens": tokens}}


def ask_json(tokens=3, **more):
    return {"model": "m", "messages": user("a b c"), **xargs(tokens), **more}


async def begin(http, kind, **settings):
    """Switch a fault on over the admin route."""
    answer = await http.post("/mock/faults", json={"kind": kind, **settings})
    assert answer.status_code == 200, answer.text
    return answer.json()["faults"][0]


async def end(http, kind=None):
    """Switch faults off over the admin route; return how many there were."""
    answer = await http.delete("/mock/faults", params={"kind": kind} if kind else {})
    return answer.json()["ended"]


def connect(mock, index=0):
    return httpx.AsyncClient(base_url=mock.addresses[index], timeout=5)


async def stream_one(ask, tokens=LONG):
    """Return a stream of which the first chunks have come."""
    stream = await ask.chat.completions.create(
        model="m", messages=user("a"), stream=True, extra_body=xargs(tokens)
    )
    events = aiter(stream)
    await anext(events)
    return events


async def works(http):
    answer = await http.post("/v1/chat/completions", json=ask_json())
    return answer.status_code == 200


async def comes_back(http, until):
    """Wait until an endpoint answers again."""
    async with asyncio.timeout(5):
        while True:
            try:
                if (await http.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.005)


async def test_a_crash_tears_streams_and_comes_back_cold(mock_of, client_of, until):
    """Streams break off without an end, connects are refused, and a cold process returns."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        body = ask_json(messages=user("word " * 200))
        for _ in range(2):
            answer = (await http.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
        events = await stream_one(ask)
        await begin(http, "crash", for_s=20)
        with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
            async for _ in events:
                pass
        with pytest.raises(httpx.ConnectError):
            async with connect(mock) as fresh:
                await fresh.get("/metrics")
        await comes_back(http, until)
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert (
            'generation_tokens_total{model_name="m",engine="0"} 3'
            in (await http.get("/metrics")).text
        )


async def test_a_crash_is_a_connection_error_to_the_real_client(mock_of, client_of, until):
    """A request under way fails with the client's connection error."""
    async with mock_of() as mock, client_of(mock) as ask:
        waiting = asyncio.create_task(
            ask.chat.completions.create(model="m", messages=user("a"), extra_body=xargs(LONG))
        )
        await until(lambda: mock.endpoints[0].paced.live == 1)
        mock.endpoints[0].inject(read_fault({"kind": "crash", "for_s": None}, "test"))
        with pytest.raises(openai.APIConnectionError):
            await waiting


async def test_a_dead_engine_answers_errors_then_crashes_then_returns(mock_of, client_of, until):
    """Streams get one error and [DONE], new requests 500, health 503; later all is well again."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        async with http.stream(
            "POST", "/v1/chat/completions", json=ask_json(LONG, stream=True)
        ) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            await begin(http, "engine_dead", linger_s=LONG, for_s=None)
            rest = [line async for line in lines if line]
        assert answer.status_code == 200
        assert rest[-1] == "data: [DONE]"
        assert '"code": 500' in rest[-2]
        assert (await http.get("/health")).status_code == 503
        with pytest.raises(openai.InternalServerError, match="had an error while processing"):
            await ask.chat.completions.create(model="m", messages=user("a"))
        assert await end(http) == 1
        assert await works(http)
        await begin(http, "engine_dead", linger_s=1, for_s=2)
        await until(lambda: not mock.endpoints[0].board.faults())
        await comes_back(http, until)
        assert await works(http)


async def test_a_hang_sends_nothing_while_health_stays_well(mock_of, client_of, until):
    """No token comes, health is 200 and gauges stand still; afterwards the stream goes on."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        paced = mock.endpoints[0].paced
        events = await stream_one(ask, 400)
        await begin(http, "hang", for_s=None)
        await until(lambda: paced.paused)
        await asyncio.sleep(0.02)  # the step under way ends
        handed = paced.lateness.total
        waiting = [asyncio.create_task(works(http)) for _ in range(5)]
        await until(lambda: paced.engine.num_waiting == 5)
        assert (await http.get("/health")).status_code == 200
        text = (await http.get("/metrics")).text
        assert 'num_requests_waiting{model_name="m",engine="0"} 0' in text
        assert paced.lateness.total == handed
        assert await end(http, "hang") == 1
        assert all(await asyncio.gather(*waiting))
        tokens = 1 + sum([bool(chunk.choices[0].delta.content) async for chunk in events])
        assert tokens >= 400


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("straggler", {"factor": 4}), ("drift", {"factor": 4, "ramp_s": 0})],
)
async def test_slowness_is_a_factor_on_step_times(mock_of, kind, settings):
    """The engine's own times grow by the factor, and shrink again when the fault is over."""
    async with mock_of() as mock, connect(mock) as http:

        async def decode_s():
            metrics = mock.endpoints[0].metrics
            before = total(metrics.render())
            await http.post("/v1/chat/completions", json=ask_json(50))
            return total(metrics.render()) - before

        def total(text):
            name = "vllm:request_decode_time_seconds_sum"
            return float(next(line for line in text.splitlines() if name in line).split()[-1])

        usual_s = await decode_s()
        await begin(http, kind, **settings)
        assert await decode_s() == pytest.approx(4 * usual_s, rel=0.01)
        await end(http)
        assert await decode_s() == pytest.approx(usual_s, rel=0.01)


async def test_a_drift_grows_over_its_ramp(mock_of):
    """Half-way up the ramp the factor is half-way, and it stays at its end."""
    async with mock_of() as mock:
        board = mock.endpoints[0].board
        mock.endpoints[0].inject(
            read_fault({"kind": "drift", "factor": 1.5, "ramp_s": 1e6}, "test")
        )
        await asyncio.sleep(0)
        assert board.scale(5e5) == pytest.approx(1.25)
        assert board.scale(2e6) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("http_503", openai.InternalServerError), ("http_429", openai.RateLimitError)],
)
async def test_refusals_reach_the_client_s_exceptions(mock_of, client_of, kind, error):
    """Overload is 503 with vLLM's type, 429 carries Retry-After; health is not touched."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        await begin(http, kind, **({"retry_after_s": 7} if kind == "http_429" else {}))
        with pytest.raises(error) as caught:
            await ask.chat.completions.create(model="m", messages=user("a"))
        if kind == "http_429":
            assert caught.value.response.headers["retry-after"] == "7"
        else:
            assert caught.value.response.json()["error"]["type"] == "Service Unavailable"
        assert (await http.get("/health")).status_code == 200
        await end(http)
        assert await works(http)


async def test_the_client_retries_what_is_refused_now_and_then(mock_of, client_of):
    """With a share of refusals the real client's own retries bring every call through."""
    async with mock_of() as mock, client_of(mock, max_retries=20) as ask, connect(mock) as http:
        await begin(http, "http_429", share=0.3, retry_after_s=0.001)
        for number in range(10):
            answer = await ask.chat.completions.create(
                model="m", messages=user(f"w{number}"), extra_body=xargs(2)
            )
            assert answer.usage.completion_tokens == 2


async def test_a_preemption_storm_evicts_running_calls(mock_of, until):
    """With the KV pool shrunk, calls are preempted and usage is near 1; all of them end."""
    changes = {"kv_blocks": 200, "max_num_seqs": 8}
    async with mock_of(changes=changes) as mock, connect(mock) as http:
        engine = mock.endpoints[0].paced.engine
        calls = [
            asyncio.create_task(http.post("/v1/chat/completions", json=ask_json(700, user=str(n))))
            for n in range(4)
        ]
        await until(lambda: engine.num_running == 4)
        await begin(http, "preemption_storm", left=0.3, for_s=None)
        await until(lambda: engine.preemptions_total > 0)
        assert engine.kv_usage > 0.9
        await end(http)
        answers = [await call for call in calls]
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [700] * 4
        assert engine.kv_usage == 0
        text = (await http.get("/metrics")).text
        assert "vllm:num_preemptions_total" in text
        assert 'num_requests_waiting{model_name="m",engine="0"} 0' in text


async def test_a_network_cut_keeps_the_engine(mock_of, client_of, until):
    """Connections are reset and refused; afterwards the same process answers from its cache."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        body = ask_json(messages=user("word " * 100))
        await http.post("/v1/chat/completions", json=body)
        events = await stream_one(ask)
        await begin(http, "network_cut", for_s=20)
        with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
            async for _ in events:
                pass
        await until(lambda: mock.endpoints[0].paced.live == 0)
        await comes_back(http, until)
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 90


async def test_a_blackhole_swallows_everything_until_it_ends(mock_of, client_of, until):
    """Streams stall and new requests time out, health too; then the bytes flow again."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        events = await stream_one(ask, 300)
        await begin(http, "blackhole", for_s=None)
        for path in ("/health", "/metrics"):
            with pytest.raises(httpx.ReadTimeout):
                await http.get(path, timeout=httpx.Timeout(5, read=0.05))
        await until(lambda: mock.endpoints[0].paced.live == 0)  # the engine went on
        assert await end(http, "blackhole") == 1
        text = "".join([chunk.choices[0].delta.content async for chunk in events])
        assert len(text.split()) >= 298
        assert await works(http)


async def test_network_delay_comes_before_every_answer(mock_of):
    """An answer cannot come before the delay has passed."""
    async with mock_of() as mock, connect(mock) as http:
        await begin(http, "network_delay", delay_s=2)
        before_s = mock.clock.now_s()
        await http.get("/health")
        assert mock.clock.now_s() - before_s >= 2
        before_s = mock.clock.now_s()
        assert await works(http)
        assert mock.clock.now_s() - before_s >= 2


async def test_stale_and_missing_metrics(mock_of):
    """Frozen metrics repeat themselves, missing ones are an error, and both pass."""
    async with mock_of() as mock, connect(mock) as http:
        await begin(http, "stale_metrics")
        before = (await http.get("/metrics")).text
        assert await works(http)
        assert (await http.get("/metrics")).text == before
        await begin(http, "missing_metrics")
        assert (await http.get("/metrics")).status_code == 500
        assert await end(http) == 2
        assert (
            'generation_tokens_total{model_name="m",engine="0"} 3'
            in (await http.get("/metrics")).text
        )


async def test_stale_metrics_may_be_renewed_slowly(mock_of):
    """With a period they change, but no sooner."""
    async with mock_of() as mock, connect(mock) as http:
        await begin(http, "stale_metrics", every_s=1e-3)
        await http.get("/metrics")
        assert await works(http)
        assert (
            'generation_tokens_total{model_name="m",engine="0"} 3'
            in (await http.get("/metrics")).text
        )


async def test_a_cold_restart_forgets_and_is_slow_at_first(mock_of, until):
    """What runs is aborted, the cache is gone, and the first two steps take 2.1 times as long."""
    async with mock_of() as mock, connect(mock) as http:
        body = ask_json(2, messages=user("word " * 100))
        await http.post("/v1/chat/completions", json=body)
        first = ttft_s(mock)
        await begin(http, "cold_restart", for_s=1)
        await until(lambda: mock.endpoints[0].board.faults() == [])
        await comes_back(http, until)
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert ttft_s(mock) == pytest.approx(2.1 * first, rel=1e-6)


def ttft_s(mock):
    """Return the prefill time that the engine of the only endpoint has seen."""
    lines = mock.endpoints[0].metrics.render().splitlines()
    name = "vllm:request_prefill_time_seconds_sum"
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


async def test_a_drain_lets_running_calls_end(mock_of, client_of, until):
    """New requests get 503 or are refused, the running stream ends properly, then it is gone."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        assert await works(http)
        events = await stream_one(ask, 100)
        await begin(http, "drain", grace_s=1000, for_s=1010)
        reasons = [chunk.choices[0].finish_reason async for chunk in events]
        assert reasons[-1] == "stop"
        with pytest.raises(httpx.TransportError):
            async with connect(mock) as fresh:
                await fresh.get("/health")


async def test_a_drain_without_grace_aborts(mock_of, client_of):
    """With no grace, as vLLM's default has it, running calls are cut off."""
    async with mock_of() as mock, client_of(mock) as ask, connect(mock) as http:
        events = await stream_one(ask)
        await begin(http, "drain", grace_s=0)
        with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
            async for _ in events:
                pass


async def test_faults_of_the_fleet_file_happen_at_their_time(mock_of, until):
    """A scheduled fault begins and ends by itself; others of the fleet are not touched."""
    faults = (
        read_fault({"kind": "http_429", "at_s": 5, "for_s": 5}, "file"),
        read_fault({"kind": "http_503", "at_s": 20, "for_s": None}, "file"),
        read_fault({"kind": "straggler", "at_s": 10**6, "for_s": 1}, "file"),
    )
    async with mock_of(2, faults={EndpointId("e1"): faults}) as mock, connect(mock, 1) as http:
        board = mock.endpoints[1].board
        await until(lambda: board.active("http_503"))
        assert not await works(http)
        async with connect(mock, 0) as other:
            assert await works(other)
        rows = (await http.get("/mock/faults")).json()["faults"]
        assert [(row["kind"], row["state"]) for row in rows] == [
            ("http_503", "active"),
            ("straggler", "scheduled"),
        ]


async def test_any_port_reaches_any_worker_and_bad_faults_are_refused(mock_of):
    """Faults can be steered through another endpoint; a wrong one says what is wrong."""
    async with mock_of(2) as mock, connect(mock) as http:
        there = {"params": {"worker": "e1"}}
        assert (
            await http.post("/mock/faults", json=[{"kind": "http_503"}], **there)
        ).status_code == 200
        assert await works(http)
        assert len((await http.get("/mock/faults", **there)).json()["faults"]) == 1
        assert (await http.get("/mock/faults")).json()["faults"] == []
        for body, status, words in (
            ({"kind": "flood"}, 400, "'flood' is unknown"),
            ({"kind": "hang", "for_s": -1}, 400, "faults[0].for_s"),
            (7, 400, "expected a mapping"),
        ):
            answer = await http.post("/mock/faults", json=body)
            assert (answer.status_code, words in answer.text) == (status, True)
        assert (await http.post("/mock/faults", content=b"{")).status_code == 400
        nobody = await http.post("/mock/faults", json={"kind": "hang"}, params={"worker": "e7"})
        assert nobody.status_code == 404
        await begin(http, "crash", at_s=1000)
        again = await http.post("/mock/faults", json={"kind": "drain", "at_s": 1010})
        assert "overlaps crash" in again.text


async def test_outages_cannot_overlap(mock_of):
    """Two faults that shut the door at the same time are refused."""
    async with mock_of() as mock:
        one = mock.endpoints[0]
        one.inject(read_fault({"kind": "crash", "at_s": 1000}, "test"))
        with pytest.raises(InvalidInput, match="overlaps crash from 1000 s"):
            one.inject(read_fault({"kind": "drain", "at_s": 1030}, "test"))
        one.inject(read_fault({"kind": "hang", "at_s": 1030}, "test"))


async def test_closing_a_fleet_ends_its_faults(mock_of, client_of):
    """A fleet closes cleanly in the middle of a crash and of a hang."""
    mock = mock_of(2)
    async with mock:
        mock.endpoints[0].inject(read_fault({"kind": "crash", "for_s": None}, "test"))
        mock.endpoints[1].inject(read_fault({"kind": "hang", "for_s": None}, "test"))
        await asyncio.sleep(0)
    assert not any(one.board.faults() for one in mock.endpoints)
