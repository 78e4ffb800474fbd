"""vLLM's HTTP contract at a mock endpoint."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest

KEY = {"Authorization": "Bearer secret"}


def user(text):
    return [{"role": "user", "content": text}]


def ask(tokens=3, **more):
    return {
        "model": "m", "messages": user("a b c"), "vllm_xargs": {"mock_output_tokens": tokens},
        **more,
    }  # fmt: skip


def connect(mock, **options):
    return httpx.AsyncClient(base_url=mock.addresses[0], timeout=5, **options)


def payloads(text):
    """Return the events of a stream, the last one as text."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [*map(json.loads, events[:-1]), events[-1]]


async def test_headers_come_before_the_first_token_and_bytes_with_it(mock_of, until):
    """While the engine is held, a stream has status and headers but not one byte of body."""
    async with mock_of() as mock, connect(mock) as http:
        mock.endpoints[0].pause("test")
        async with http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            body = answer.aiter_bytes()
            first = asyncio.ensure_future(anext(body))
            done, _ = await asyncio.wait({first}, timeout=0.02)
            assert not done
            mock.endpoints[0].resume("test")
            assert (await first).startswith(b'data: {"id":"chatcmpl-')
            assert b"[DONE]" in b"".join([part async for part in body])


async def test_a_stream_is_role_tokens_usage_done(mock_of):
    """The order of chunks is vLLM's: role, a chunk per token, usage, [DONE]."""
    async with mock_of() as mock, connect(mock) as http:
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await http.post(
            "/v1/chat/completions",
            json=ask(4, stream=True, stream_options=options),
            headers={"X-Request-Id": "abc"},
        )
        role, *tokens, usage, done = payloads(answer.text)
        assert done == "[DONE]"
        assert {event["id"] for event in (role, *tokens, usage)} == {"chatcmpl-abc"}
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [event["usage"]["completion_tokens"] for event in tokens] == [1, 2, 3, 4]
        assert usage["usage"]["completion_tokens"] == 4
        assert "x-request-id" not in answer.headers


async def test_choices_of_several_prompts_are_streamed_side_by_side(mock_of):
    """With n and several prompts each choice has its own index, text and end."""
    async with mock_of() as mock, connect(mock) as http:
        body = {"model": "m", "prompt": ["a b", [3, 4, 5]], "n": 2, "max_tokens": 6}
        whole = (await http.post("/v1/completions", json=body)).json()
        answer = await http.post("/v1/completions", json={**body, "stream": True})
        *events, _done = payloads(answer.text)
        texts = [""] * 4
        ends = [None] * 4
        for event in events:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
        assert texts == [choice["text"] for choice in whole["choices"]]
        assert ends == [choice["finish_reason"] for choice in whole["choices"]]
        assert whole["usage"]["prompt_tokens"] == 5
        assert whole["usage"]["completion_tokens"] == sum(len(text.split()) for text in texts)


async def test_stream_interval_of_a_request_goes_before_the_server_s(mock_of):
    """With an interval of five, chunks carry up to five tokens after the first one."""
    async with mock_of() as mock, connect(mock) as http:
        body = ask(21, stream=True, stream_interval=5)
        answer = await http.post("/v1/chat/completions", json=body)
        assert len(payloads(answer.text)) - 2 <= 1 + 4 + 1


async def test_keys_guard_the_v1_routes_only(mock_of):
    """Without the key /v1 answers 401 with vLLM's body; health and metrics stay open."""
    async with mock_of(api_keys=("other", "secret")) as mock, connect(mock) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = await http.post("/v1/chat/completions", json=ask(), headers=headers)
            assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
            assert (await http.get("/v1/models", headers=headers)).status_code == 401
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
        answer = await http.post("/v1/chat/completions", json=ask(), headers=KEY)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "content_type", "expected"),
    [
        ("POST", "/v1/chat/completions", b"{}", "text/plain", (400, "Bad Request", None)),
        ("POST", "/v1/chat/completions", b"{}", None, (400, "Bad Request", None)),
        ("POST", "/v1/chat/completions", b"{", "application/json", (400, "Bad Request", None)),
        ("POST", "/v1/chat/completions", b"{}", "application/json", (400, "Bad Request", None)),
        ("POST", "/v1/completions", b'{"model": "x", "prompt": "a"}',
         "application/json; charset=utf-8", (404, "NotFoundError", "model")),
        ("POST", "/tokenize", b"{}", "application/json", (400, "Bad Request", None)),
        ("POST", "/detokenize", b'{"tokens": "a"}', "application/json", (400, "Bad Request", None)),
        ("GET", "/v1/completions", None, None, (405, "Method Not Allowed", None)),
        ("POST", "/v1/embeddings", b"{}", "application/json", (404, "Not Found", None)),
        ("POST", "/sleep?level=9", None, None, (400, "Bad Request", None)),
    ],
)  # fmt: skip
async def test_error_bodies(mock_of, method, path, content, content_type, expected):
    """Whatever is wrong, the body is the error object with status, type and parameter."""
    async with mock_of() as mock, connect(mock) as http:
        headers = {"Content-Type": content_type} if content_type else {}
        answer = await http.request(method, path, content=content, headers=headers)
        error = answer.json()["error"]
        assert answer.status_code == error["code"]
        assert (error["code"], error["type"], error["param"]) == expected
        assert error["message"]


async def test_the_model_s_name_is_in_the_404(mock_of):
    """The message is vLLM's own, word for word."""
    async with mock_of() as mock, connect(mock) as http:
        answer = await http.post("/v1/chat/completions", json=ask(model="gone"))
        assert answer.json()["error"]["message"] == "The model `gone` does not exist."


async def test_a_full_queue_is_503(mock_of, until):
    """Above the limit of waiting requests new ones are refused at once, and counted."""
    changes = {"max_num_seqs": 1}
    async with mock_of(max_queued=1, changes=changes) as mock, connect(mock) as http:
        engine = mock.endpoints[0].paced.engine
        url = "/v1/chat/completions"
        first = asyncio.create_task(http.post(url, json=ask(3000)))
        await until(lambda: engine.num_running == 1)
        second = asyncio.create_task(http.post(url, json=ask()))
        await until(lambda: engine.num_waiting == 1)
        refused = await http.post(url, json=ask())
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "Service Unavailable"
        assert (
            'vllm:admission_rejections_total{model_name="m",engine="0",reason'
            in (await http.get("/metrics")).text
        )
        assert [one.status_code for one in await asyncio.gather(first, second)] == [200, 200]


async def test_request_ids_are_echoed_when_asked_for(mock_of):
    """With the switch every answer echoes the id, errors and streams too; twice is legal."""
    async with mock_of(request_id_headers=True) as mock, connect(mock) as http:
        headers = {"X-Request-Id": "abc"}
        for body in (ask(), ask(stream=True), ask(model="x")):
            answer = await http.post("/v1/chat/completions", json=body, headers=headers)
            assert answer.headers["x-request-id"] == "abc"
        both = await asyncio.gather(
            *(http.post("/v1/chat/completions", json=ask(), headers=headers) for _ in range(2))
        )
        assert [one.json()["id"] for one in both] == ["chatcmpl-abc"] * 2
        named = await http.post("/v1/completions", json={"prompt": "a", "request_id": "own"})
        assert named.json()["id"] == "cmpl-own"


async def test_the_priority_header_must_be_a_number(mock_of):
    """A priority that is no integer is refused, in the header as in the body."""
    async with mock_of() as mock, connect(mock) as http:
        for value, status in (("3", 200), ("high", 400)):
            headers = {"X-Vllm-Priority": value}
            answer = await http.post("/v1/chat/completions", json=ask(), headers=headers)
            assert answer.status_code == status


async def test_usage_details_follow_the_switch(mock_of):
    """Switched off, details are null in a whole answer and absent in a stream, as in vLLM."""
    async with mock_of(prompt_tokens_details=False) as mock, connect(mock) as http:
        url = "/v1/chat/completions"
        whole = (await http.post(url, json=ask())).json()
        assert whole["usage"]["prompt_tokens_details"] is None
        body = ask(stream=True, stream_options={"include_usage": True})
        *_, usage, _done = payloads((await http.post(url, json=body)).text)
        assert "prompt_tokens_details" not in usage["usage"]


async def test_adapters_are_listed_and_counted(mock_of):
    """An adapter is a model with a parent, and metrics say which adapters run."""
    async with mock_of(lora=("tuned",)) as mock, connect(mock) as http:
        base, tuned = (await http.get("/v1/models")).json()["data"]
        assert (base["parent"], tuned["id"], tuned["parent"]) == (None, "tuned", "m")
        answer = await http.post("/v1/chat/completions", json=ask(model="tuned"))
        assert answer.json()["model"] == "tuned"
        assert 'vllm:lora_requests_info{max_lora="1"' in (await http.get("/metrics")).text


async def test_tokens_go_there_and_back(mock_of):
    """/detokenize undoes /tokenize, and a prompt of those ids hits the text's prefix cache."""
    async with mock_of() as mock, connect(mock) as http:
        text = " ".join(f"word{number}" for number in range(64))
        sizes = (
            await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})
        ).json()
        assert sizes["count"] == len(sizes["tokens"]) == 64
        assert sizes["token_strs"] == text.split()
        assert sizes["max_model_len"] == mock.endpoints[0].limits.max_model_len
        back = await http.post("/detokenize", json={"tokens": sizes["tokens"]})
        assert back.json() == {"prompt": text}
        await http.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
        again = await http.post(
            "/v1/completions", json={"prompt": sizes["tokens"], "max_tokens": 1}
        )
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 48


async def test_sleep_holds_requests_until_the_wake_up(mock_of, until):
    """Asleep, the server says so and answers nobody; awake, it answers what has waited."""
    async with mock_of() as mock, connect(mock) as http:
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": False}
        assert (await http.post("/sleep")).status_code == 200
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": True}
        state = 'vllm:engine_sleep_state{model_name="m",engine="0",sleep_state="weights_offloaded"}'
        assert f"{state} 1" in (await http.get("/metrics")).text
        waiting = asyncio.create_task(http.post("/v1/chat/completions", json=ask()))
        await until(lambda: mock.endpoints[0].paced.engine.num_waiting == 1)
        assert (await http.post("/wake_up")).status_code == 200
        assert (await waiting).status_code == 200
        assert f"{state} 0" in (await http.get("/metrics")).text


async def test_developer_routes_follow_the_switch(mock_of):
    """Server info and the like are there in developer mode only; the mock's own routes always."""
    async with mock_of() as mock, connect(mock) as http:
        info = (await http.get("/server_info")).json()["vllm_config"]
        assert (info["model"], info["max_num_seqs"]) == ("m", 4)
    async with mock_of(dev_mode=False) as mock, connect(mock) as http:
        for method, path in (("GET", "/server_info"), ("POST", "/sleep"), ("POST", "/wake_up"),
                             ("POST", "/reset_prefix_cache"), ("GET", "/is_sleeping")):  # fmt: skip
            assert (await http.request(method, path)).status_code == 404
        assert (await http.get("/mock/stats")).status_code == 200


async def test_load_is_counted_when_asked_for(mock_of, until):
    """/load is 0 unless tracking is on; then it says how many requests are under way."""
    for tracked in (False, True):
        async with mock_of(track_load=tracked) as mock, connect(mock) as http:
            call = asyncio.create_task(http.post("/v1/chat/completions", json=ask(2000)))
            await until(lambda one=mock.endpoints[0]: one.paced.engine.num_running == 1)
            assert (await http.get("/load")).json() == {"server_load": int(tracked)}
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await until(lambda one=mock.endpoints[0]: one.load == 0)


BUCKETS = {
    "time_to_first_token_seconds":
        ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560",
    "inter_token_latency_seconds":
        ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80",
    "request_time_per_output_token_seconds":
        ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80",
    **dict.fromkeys(
        ("e2e_request_latency_seconds", "request_queue_time_seconds",
         "request_inference_time_seconds", "request_prefill_time_seconds",
         "request_decode_time_seconds"),
        ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680",
    ),
    **dict.fromkeys(
        ("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens",
         "request_params_max_tokens", "request_prefill_kv_computed_tokens"),
        "1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000 50000 100000",
    ),
    "iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
    "request_params_n": "1 2 5 10 20",
    "request_num_preemptions": "1 2 3 4 5 10 20",
}  # fmt: skip

COUNTERS = [
    "prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_queries",
    "external_prefix_cache_hits", "prompt_tokens", "prompt_tokens_cached", "generation_tokens",
    "num_preemptions", "mm_cache_queries", "mm_cache_hits",
]  # fmt: skip


async def test_metrics_have_vllm_s_names_types_and_buckets(mock_of):
    """Every metric of the reference is there before the first request, with its labels."""
    async with mock_of() as mock, connect(mock) as http:
        answer = await http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = answer.text
    labels = 'model_name="m",engine="0"'
    for name in COUNTERS:
        assert f"# TYPE vllm:{name}_total counter\nvllm:{name}_total{{{labels}}} 0" in text
    for name, labelled in (
        ("request_success", "finished_reason=stop length abort error repetition"),
        ("prompt_tokens_by_source",
         "source=local_compute local_cache_hit external_kv_transfer"),
    ):  # fmt: skip
        key, _, values = labelled.partition("=")
        for value in values.split():
            assert f'vllm:{name}_total{{{labels},{key}="{value}"}} 0' in text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"# TYPE vllm:{name} gauge\nvllm:{name}{{{labels}}} 0" in text
    for reason in ("capacity", "deferred"):
        waiting = f'vllm:num_requests_waiting_by_reason{{{labels},reason="{reason}"}} 0'
        assert waiting in text
    assert 'vllm:cache_config_info{block_size="16"' in text
    assert "vllm:gpu_cache_usage_perc" not in text
    for name, bounds in BUCKETS.items():
        assert f"# TYPE vllm:{name} histogram" in text
        found = re.findall(rf'^vllm:{name}_bucket{{{labels},le="([^"]+)"}} 0$', text, re.MULTILINE)
        assert [*map(float, found)] == [*map(float, bounds.split()), float("inf")]
        assert f"vllm:{name}_count{{{labels}}} 0" in text


async def test_metrics_add_up(mock_of):
    """After a few requests sums and counts say what happened."""
    async with mock_of() as mock, connect(mock) as http:
        body = ask(5, max_tokens=5)
        for _ in range(2):
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
        cached = ask(2, messages=user("word " * 60))
        for _ in range(2):
            await http.post("/v1/chat/completions", json=cached)
        text = (await http.get("/metrics")).text

    def value(name, more=""):
        labels = f'model_name="m",engine="0"{more}'
        match = re.search(rf"^vllm:{name}{{{labels}}} (\S+)$", text, re.MULTILINE)
        return float(match.group(1))

    prompts = 2 * 10 + 2 * 67
    assert value("prompt_tokens_total") == prompts
    assert value("generation_tokens_total") == 14
    assert value("prompt_tokens_cached_total") == value("prefix_cache_hits_total") == 64
    assert value("prompt_tokens_by_source_total", ',source="local_compute"') == prompts - 64
    assert value("prompt_tokens_by_source_total", ',source="local_cache_hit"') == 64
    assert value("time_to_first_token_seconds_count") == 4
    assert value("inter_token_latency_seconds_count") == 10
    assert value("iteration_tokens_total_sum") == prompts + 14
    assert value("request_params_max_tokens_sum") == 10
    assert value("request_params_n_count") == 4
    assert value("request_prefill_kv_computed_tokens_sum") == prompts - 64
    assert (
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"} 4' in text
    )
    assert "process_cpu_seconds_total" in text


async def test_old_metric_names_on_request(mock_of):
    """With the switch, routers that read the names of 0.10.2 find them."""
    async with mock_of(old_metrics=True) as mock, connect(mock) as http:
        await http.post("/v1/chat/completions", json=ask(5))
        text = (await http.get("/metrics")).text
    labels = 'model_name="m",engine="0"'
    assert f"vllm:gpu_cache_usage_perc{{{labels}}} 0" in text
    assert f"vllm:gpu_prefix_cache_queries_total{{{labels}}} 10" in text
    assert f"vllm:time_per_output_token_seconds_count{{{labels}}} 4" in text
