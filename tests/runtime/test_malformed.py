"""Whatever a client sends, the answer has the form that clients expect, and nothing breaks."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from runtime.fingerprint import read_prompt
from runtime.hints import read_hints
from runtime.identity import identify

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "model", "messages", "prompt", "input", "stream", "stream_options", "max_tokens", "user",
        "session_params", "prompt_cache_key", "previous_response_id", "vllm_xargs", "nvext",
        "cache_salt", "tools",
    ]
)  # fmt: skip
BODIES = st.dictionaries(FIELDS, JSON, max_size=6)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


def usual(answer):
    """Check an error's form; anything else is an answer of the engine."""
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert isinstance(error["message"], str)
        assert answer.headers["content-type"].startswith("application/json")
    return answer.status_code


@given(BODIES)
@settings(max_examples=150, deadline=None)
def test_odd_bodies_are_read_without_harm(payload):
    """Prompt, identity and hints of any JSON object are read, and identities stay bounded."""
    prompt = read_prompt(payload)
    identity = identify(CIMultiDict(), payload, prompt)
    assert 0 < len(identity.run_id) <= 401
    read_hints(CIMultiDict(), payload)
    assert prompt.size_bytes >= 0


ODD = [
    b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"{}" * 2, b"[" * 100_000,
    b'{"model": "m", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model": "m", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "m", "prompt": "a", "max_tokens": 1e999}',
    b'{"model": "m", "prompt": "\\ud800", "max_tokens": 1, "user": "\\ud800"}',
    b'{"model": "m", "prompt": "a", "max_tokens": 1, "cache_salt": "\\ud800"}',
    b'{"model": ["m"], "prompt": "a"}', b'{"model": "\\ud800"}', b'{"model": "m", "stream": "x"}',
    b'{"model": "m", "messages": {"role": "user"}}', b'{"model": "m", "messages": [[[]]]}',
]  # fmt: skip


@pytest.mark.parametrize("path", [*PATHS, "/almanac/v1/events", "/finish_session"])
async def test_odd_bytes_get_the_usual_error(stack, path):
    """Bodies that are no JSON, no object, far too deep or of odd types are refused, never 500."""
    async with stack(1) as s, httpx.AsyncClient(base_url=s.gateway.address) as http:
        for body in ODD:
            assert usual(await http.post(path, content=body)) in {200, 400, 404, 422}, body[:60]
        assert s.control.ready


@pytest.mark.parametrize(
    "header",
    [
        b"x-request-id: \xff\xfe", b"x-session-id: \xc3\xa9\xff", b"x-other: \xff",
        b"x-almanac-visit: " + b"9" * 400, b"authorization: Bearer \xff", b"traceparent: 00-\xff",
        b"x-almanac-deadline-s: \xd9\xa3", b"content-type: \xff",
    ],
)  # fmt: skip
async def test_odd_headers_are_no_server_error(stack, header):
    """Header values that are no text cannot make the gateway fail, nor reach an answer."""
    body = b'{"model": "m", "prompt": "a", "max_tokens": 2}'
    async with stack(1) as s:
        host, port = s.gateway.address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n%s\r\n"
            b"content-length: %d\r\n\r\n%s" % (header, len(body), body)
        )
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert int(answer.split()[1]) in {200, 400}, answer
    assert b"\xff" not in answer.partition(b"\r\n\r\n")[0]


@given(BODIES, st.sampled_from(PATHS))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_odd_objects_get_an_answer_or_the_usual_error(served, payload, path):
    """Objects of known fields with odd values are answered by the engine or refused in form."""
    payload.setdefault("max_tokens", 2)
    payload["model"] = "m"
    body = json.dumps(payload)
    assert usual(served(path, body)) != 500


@pytest.fixture
def served(stack):
    """Return a function that posts to a gateway on a loop of its own."""
    with asyncio.Runner() as runner:
        context = stack(1)
        s = runner.run(context.__aenter__())
        http = httpx.AsyncClient(base_url=s.gateway.address)

        def post(path, body):
            return runner.run(http.post(path, content=body.encode()))

        yield post
        runner.run(http.aclose())
        runner.run(context.__aexit__(None, None, None))
