"""The mock endpoints over HTTP, with the real client."""

from __future__ import annotations

import asyncio
import socket

import httpx
import openai
import pytest

from planner.domain.errors import InvalidInput
from planner.sim.engine import Engine
from runtime.mock.server import MockConfig, MockFleet

CONFIG = MockConfig(dilation=100.0, seed=3)


def user(text):
    return [{"role": "user", "content": text}]


def client(mock):
    return openai.AsyncOpenAI(base_url=f"{mock.addresses[0]}/v1", api_key="none", max_retries=0)


def xargs(tokens, reply=""):
    return {"vllm_xargs": {"mock_output_tokens": tokens, "mock_reply": reply}}


@pytest.fixture
async def mock(fleet_of):
    async with MockFleet(fleet_of(1), CONFIG, any_port=True) as running:
        yield running
        assert all(endpoint.paced.live == 0 for endpoint in running.endpoints)


async def test_openai_chat_whole_and_streamed_agree(mock):
    """The same request gives the same text whole and streamed, with the same usage."""
    async with client(mock) as ask:
        fields = {"model": "m", "messages": user("a b c"), "extra_body": xargs(6, "deep")}
        whole = await ask.chat.completions.create(**fields)
        chunks = [
            chunk
            async for chunk in await ask.chat.completions.create(
                **fields, stream=True, stream_options={"include_usage": True}
            )
        ]
    text = whole.choices[0].message.content
    assert text.startswith("deep ")
    assert len(text.split()) == 6
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 6 + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 6
    assert whole.usage.prompt_tokens == 3 + 4 + 3


async def test_openai_completions(mock):
    """The completions route answers by text, whole and streamed, cut at the limit."""
    async with client(mock) as ask:
        fields = {"model": "m", "prompt": "a b c", "max_tokens": 4, "extra_body": xargs(9)}
        whole = await ask.completions.create(**fields)
        stream = await ask.completions.create(**fields, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert whole.choices[0].text == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == 3 + 4


async def test_a_conversation_hits_the_prefix_cache(mock):
    """The second turn finds prompt and answer of the first one in the cache."""
    async with client(mock) as ask:
        messages = user("word " * 100)
        first = await ask.chat.completions.create(
            model="m", messages=messages, extra_body=xargs(60)
        )
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            *user("go on"),
        ]
        second = await ask.chat.completions.create(
            model="m", messages=messages, extra_body=xargs(3)
        )
        salted = await ask.chat.completions.create(
            model="m", messages=messages, extra_body={**xargs(3), "cache_salt": "me"}
        )
    assert second.usage.prompt_tokens_details.cached_tokens >= (100 + 7 + 60) // 16 * 16 - 16
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


async def test_errors_are_mapped_by_the_client(mock):
    """Unknown models and overlong prompts arrive as the client's own exceptions."""
    async with client(mock) as ask:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await ask.chat.completions.create(model="x", messages=user("a"))
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await ask.chat.completions.create(model="m", messages=user("w " * 9000))


async def test_leaving_a_stream_aborts_the_request(mock, until):
    """A client that closes its connection frees the engine at once."""
    engine = mock.endpoints[0].paced.engine
    async with client(mock) as ask:
        stream = await ask.chat.completions.create(
            model="m", messages=user("a"), stream=True, extra_body=xargs(5000)
        )
        await anext(aiter(stream))
        assert engine.num_running == 1
        await stream.close()
        await until(lambda: mock.endpoints[0].paced.live == 0)
    assert engine.num_running == 0
    assert 'finished_reason="abort"} 1' in mock.endpoints[0].metrics.render()


async def test_leaving_before_the_answer_aborts_the_request(mock, until):
    """A client that gives up waiting for a whole answer frees the engine too."""
    async with client(mock) as ask:
        waiting = asyncio.create_task(
            ask.chat.completions.create(model="m", messages=user("a"), extra_body=xargs(7000))
        )
        await until(lambda: mock.endpoints[0].paced.engine.num_running == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: mock.endpoints[0].paced.live == 0)


async def test_the_other_routes(mock):
    """Health, models, version, metrics, tokenize, cache reset and statistics answer as vLLM's."""
    async with httpx.AsyncClient(base_url=mock.addresses[0]) as http:
        assert (await http.get("/health")).status_code == 200
        (card,) = (await http.get("/v1/models")).json()["data"]
        assert (card["id"], card["owned_by"]) == ("m", "vllm")
        assert card["max_model_len"] == 499 * 16
        assert (await http.get("/version")).json() == {"version": "0.33.0"}
        sizes = await http.post("/tokenize", json={"model": "m", "messages": user("a b")})
        assert sizes.json()["count"] == 9
        body = {"model": "m", "messages": user("word " * 50), **xargs(4)}
        await http.post("/v1/chat/completions", json=body)
        text = (await http.get("/metrics")).text
        for line in (
            'vllm:num_requests_running{model_name="m",engine="0"} 0',
            'vllm:generation_tokens_total{model_name="m",engine="0"} 4',
            'vllm:request_success_total{model_name="m",engine="0",finished_reason="stop"} 1',
            'vllm:time_to_first_token_seconds_count{model_name="m",engine="0"} 1',
            'vllm:inter_token_latency_seconds_count{model_name="m",engine="0"} 3',
        ):
            assert line in text
        assert (await http.post("/reset_prefix_cache")).status_code == 200
        again = (await http.post("/v1/chat/completions", json=body)).json()
        assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        stats = (await http.get("/mock/stats")).json()
        assert stats["tokens_handed_out"] == 8
        assert stats["late_p99_ms"] >= stats["late_p50_ms"] > 0


async def test_priority_is_obeyed(fleet_of, until):
    """With one slot and the priority policy the waiting call with the smaller number goes first."""
    fleet = fleet_of(1, max_num_seqs=1, scheduling="priority")
    async with MockFleet(fleet, CONFIG, any_port=True) as mock, client(mock) as ask:
        done = []

        async def one(name, priority):
            await ask.chat.completions.create(
                model="m",
                messages=user(name),
                extra_body={**xargs(3000 if name == "first" else 5), "priority": priority},
            )
            done.append(name)

        engine = mock.endpoints[0].paced.engine
        tasks = [asyncio.create_task(one("first", 0))]
        await until(lambda: engine.num_running == 1)
        tasks.append(asyncio.create_task(one("late", 9)))
        await until(lambda: engine.num_waiting == 1)
        tasks.append(asyncio.create_task(one("urgent", 1)))
        await asyncio.gather(*tasks)
        assert done == ["first", "urgent", "late"]


async def test_a_dead_engine_is_reported(fleet_of, caplog, monkeypatch):
    """A dead engine answers 500 and 503, and running streams get an error event."""
    async with MockFleet(fleet_of(1), CONFIG, any_port=True) as mock, client(mock) as ask:
        stream = await ask.chat.completions.create(
            model="m", messages=user("a"), stream=True, extra_body=xargs(5000)
        )
        events = aiter(stream)
        await anext(events)

        def explode(engine, now_s):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(Engine, "step", explode)
        with pytest.raises(openai.APIError, match="had an error"):
            async for _ in events:
                pass
        with pytest.raises(openai.InternalServerError):
            await ask.chat.completions.create(model="m", messages=user("a"))
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{mock.addresses[0]}/health")).status_code == 503
    assert "engine died" in caplog.text


async def test_a_port_in_use_is_one_clear_error(fleet_of, urls_of):
    """A taken port names port and worker, and the ports bound before are given back."""
    with socket.socket() as taken, socket.socket() as free:
        for one in (taken, free):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        free_port = free.getsockname()[1]
        free.close()
        urls = [f"http://127.0.0.1:{port}" for port in (free_port, taken.getsockname()[1])]
        mock = MockFleet(urls_of(fleet_of(2), urls), CONFIG)
        with pytest.raises(InvalidInput, match=rf"'e1'.*port {taken.getsockname()[1]} cannot"):
            await mock.start()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", free_port))


def test_endpoints_need_an_address(fleet_of, urls_of):
    """A fleet that exists only on paper cannot be served, and the error says what to add."""
    with pytest.raises(InvalidInput, match=r"'e0'.*add url"):
        MockFleet(urls_of(fleet_of(1), [None]), CONFIG)


@pytest.mark.parametrize("bad", [{"stream_interval": 0}, {"noise_cv": -1.0}])
def test_bad_settings_are_named(bad):
    """A setting out of range names itself."""
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        MockConfig(**bad)
