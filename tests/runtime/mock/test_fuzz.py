"""Random requests: each is answered or refused, none breaks the reader."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.mock.answers import Writer, usage_json
from runtime.mock.protocol import Limits, read_object, read_request
from runtime.mock.text import Vocabulary
from runtime.wire import ApiError

LIMITS = Limits(models=("m",), max_model_len=200, block_tokens=16)
FIELDS = [
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "min_tokens",
    "ignore_eos", "n", "stop", "stop_token_ids", "include_stop_str_in_output", "stream",
    "stream_options", "temperature", "top_p", "seed", "logprobs", "top_logprobs", "tools",
    "tool_choice", "response_format", "priority", "cache_salt", "kv_transfer_params", "request_id",
    "stream_interval", "vllm_xargs", "return_token_ids", "unheard_of",
]  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "name", "function", "type", "arguments", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
xargs = st.fixed_dictionaries(
    {},
    optional={
        "mock_output_tokens": values,
        "mock_reply": st.text(max_size=20),
        "mock_tool_calls": values,
    },
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5)
good = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": st.text(), "content": values}), min_size=1,
                          max_size=3),
     "prompt": st.text() | st.lists(st.text(), min_size=1, max_size=3)},
    optional={"vllm_xargs": xargs, "n": st.integers(1, 4), "logprobs": st.booleans(),
              "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
              "return_token_ids": st.booleans(), "max_tokens": st.integers(1, 300)},
)  # fmt: skip


def check_refusal(error):
    assert error.status in (400, 404)
    assert json.loads(error.body)["error"]["code"] == error.status


def answer(body, chat):
    """Read a request and write its answers, or check that it was refused properly."""
    vocabulary = Vocabulary()
    try:
        request = read_request(body, LIMITS, chat=chat, seed=1, vocabulary=vocabulary)
    except ApiError as error:
        check_refusal(error)
        return
    writer = Writer(request, "id", vocabulary)
    whole = json.loads(writer.whole(usage_json(request, 1, 0)))
    assert len(whole["choices"]) == len(request.samples)
    for index, sample in enumerate(request.samples):
        assert 1 <= len(sample.tokens) == len(sample.pieces)
        assert len(sample.prompt) + len(sample.tokens) <= LIMITS.max_model_len
        for position in range(len(sample.tokens)):
            json.loads(writer.chunk(index, position, position + 1)[6:])


@given(st.binary(max_size=40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_bytes_are_refused(body, chat):
    """Bytes that are no JSON object are a 400."""
    answer(body, chat)


@given(bodies, st.booleans())
@settings(max_examples=150, deadline=None)
def test_random_fields_are_answered_or_refused(fields, chat):
    """Any JSON in any field gives an answer or a 4xx, never an error of ours."""
    answer(json.dumps(fields).encode(), chat)


@given(good, st.dictionaries(st.sampled_from(FIELDS), values, max_size=2), st.booleans())
@settings(max_examples=150, deadline=None)
def test_good_requests_with_a_strange_field(fields, strange, chat):
    """The same around requests that would be fine: most are answered, within the context."""
    answer(json.dumps({**fields, **strange}).encode(), chat)


async def test_strange_requests_over_http_end(mock_of):
    """None of some hundred odd requests gets a 5xx or hangs, and none leaves anything behind."""
    odd = [None, True, -1, 0, 3, 2.5, "", "a b", [], [1], ["a"], {}, {"role": "user"}, 10**40]
    draw = random.Random(5)
    async with (
        mock_of(dilation=2000.0) as mock,
        httpx.AsyncClient(base_url=mock.addresses[0], timeout=5) as http,
    ):

        async def send(path):
            body = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "max_tokens": 9}
            for _ in range(draw.randint(1, 3)):
                body[draw.choice(FIELDS)] = draw.choice(odd)
            answer = await http.post(path, json=body)
            return answer.status_code

        paths = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
        seen = await asyncio.gather(*(send(path) for path in paths for _ in range(40)))
        assert {200, 400} <= set(seen) <= {200, 400, 404}
        assert mock.endpoints[0].paced.live == 0


@given(values)
@settings(max_examples=40, deadline=None)
def test_only_objects_are_requests(value):
    """A body is an object or a 400."""
    try:
        assert isinstance(read_object(json.dumps(value).encode()), dict)
    except ApiError as error:
        check_refusal(error)
