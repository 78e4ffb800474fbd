"""Real clients at a mock endpoint: `openai` and `langchain-openai`."""

from __future__ import annotations

import json

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

CALL = [{"name": "look_up", "arguments": {"word": "a plan"}}]


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return word


def xargs(**values):
    return {"vllm_xargs": {f"mock_{name}": value for name, value in values.items()}}


@pytest.fixture
def chat_of():
    """Return a factory of LangChain's chat model for a running mock fleet."""

    def make(mock, **options):
        values = {"api_key": "none", "model": "m", "max_retries": 0, **options}
        return ChatOpenAI(base_url=f"{mock.addresses[0]}/v1", **values)

    return make


async def test_langchain_answers_with_usage(mock_of, chat_of):
    """An answer has text, reason and usage; the second turn's cached tokens are told."""
    async with mock_of() as mock:
        chat = chat_of(mock, extra_body=xargs(output_tokens=20))
        history = [HumanMessage("word " * 100)]
        first = await chat.ainvoke(history)
        assert first.usage_metadata["output_tokens"] == 20
        assert first.response_metadata["finish_reason"] == "stop"
        second = await chat.ainvoke([*history, first, HumanMessage("go on")])
        assert second.usage_metadata["input_token_details"]["cache_read"] >= 112


async def test_langchain_streams_the_same_text(mock_of, chat_of):
    """Streamed text and usage are those of the whole answer."""
    async with mock_of() as mock:
        chat = chat_of(mock, extra_body=xargs(output_tokens=7), stream_usage=True)
        whole = await chat.ainvoke("a b c")
        parts = [part async for part in chat.astream("a b c")]
        assert len(parts) > 7
        total = parts[0]
        for part in parts[1:]:
            total += part
        assert total.content == whole.content
        assert total.usage_metadata == whole.usage_metadata | {
            "input_token_details": total.usage_metadata["input_token_details"]
        }


async def test_langchain_calls_tools_and_goes_on(mock_of, chat_of):
    """Tool calls come whole and streamed alike, and the next turn hits the cache past them."""
    async with mock_of() as mock:
        chat = chat_of(mock, extra_body=xargs(tool_calls=CALL, reply="let me see")).bind_tools(
            [look_up]
        )
        history = [HumanMessage("word " * 90)]
        answer = await chat.ainvoke(history)
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("look_up", {"word": "a plan"})
        assert answer.response_metadata["finish_reason"] == "tool_calls"
        parts = [part async for part in chat.astream(history)]
        total = parts[0]
        for part in parts[1:]:
            total += part
        assert [(one["name"], one["args"]) for one in total.tool_calls] == [
            ("look_up", {"word": "a plan"})
        ]
        history += [answer, ToolMessage("found", tool_call_id=call["id"])]
        after = await chat_of(mock).bind_tools([look_up]).ainvoke(history)
        assert isinstance(after, AIMessage)
        cached = after.usage_metadata["input_token_details"]["cache_read"]
        before = answer.usage_metadata["total_tokens"]
        assert cached == (before - 1) // 16 * 16


async def test_langchain_sees_errors_as_openai_s(mock_of, chat_of):
    """Errors arrive as the exceptions of the client below."""
    async with mock_of(api_keys=("secret",)) as mock:
        with pytest.raises(openai.AuthenticationError):
            await chat_of(mock).ainvoke("a")
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await chat_of(mock, api_key="secret", model="x").ainvoke("a")
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await chat_of(mock, api_key="secret").ainvoke("w " * 9000)


async def test_openai_reads_choices_tools_and_log_probabilities(mock_of, client_of):
    """The client's own types take in n answers, log probabilities and tool calls."""
    async with mock_of() as mock, client_of(mock) as ask:
        fields = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
        two = await ask.chat.completions.create(
            **fields, n=2, max_tokens=3, logprobs=True, top_logprobs=2, seed=4, temperature=0.5,
            response_format={"type": "json_object"}, stop=["nothing"],
        )  # fmt: skip
        assert [choice.index for choice in two.choices] == [0, 1]
        assert len(two.choices[1].logprobs.content[0].top_logprobs) == 2
        called = await ask.chat.completions.create(
            **fields,
            tools=[{"type": "function", "function": {"name": "look_up", "parameters": {}}}],
            tool_choice="required",
            extra_body=xargs(tool_calls=json.dumps(CALL)),
        )
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == CALL[0]["arguments"]
        assert called.choices[0].message.content is None


async def test_openai_maps_every_error(mock_of, client_of):
    """400, 401 and 404 are the client's exceptions, with message, parameter and code."""
    async with mock_of(api_keys=("secret",)) as mock:
        async with client_of(mock) as ask:
            with pytest.raises(openai.AuthenticationError):
                await ask.models.list()
        async with client_of(mock, api_key="secret") as ask:
            assert [one.id async for one in ask.models.list()] == ["m"]
            message = [{"role": "user", "content": "a"}]
            with pytest.raises(openai.NotFoundError) as missing:
                await ask.chat.completions.create(model="x", messages=message)
            assert (missing.value.param, missing.value.code) == ("model", "404")
            with pytest.raises(openai.BadRequestError) as bad:
                await ask.chat.completions.create(model="m", messages=message, max_tokens=0)
            assert bad.value.param == "max_tokens"
            with pytest.raises(openai.BadRequestError):
                await ask.chat.completions.create(model="m", messages=message, n=1000)
