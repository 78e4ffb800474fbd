"""From a LangGraph application, or any client with headers, through the gateway to mock endpoints.

What arrives is read from the gateway's trace and diagnostics.
"""

import asyncio
import json
import operator
import urllib.request
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import aiohttp
import openai
import pytest
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send

from planner.domain.trace import BranchRecord, CallRecord, RunRecord, ToolRecord, load_trace
from planner.domain.workflow import Workflow
from runtime.diagnostics import diagnostics
from runtime.langgraph.declare import tool_call
from runtime.langgraph.identity import aclose_clients, openai_client_kwargs
from runtime.langgraph.instrument import instrument
from runtime.langgraph.settings import run

Stack = Callable[..., AbstractAsyncContextManager[Any]]


class State(TypedDict, total=False):
    part: int
    messages: Annotated[list[AnyMessage], add_messages]
    notes: Annotated[list[str], operator.add]


@tool
@tool_call(expected_latency_s=0.1)
async def search(query: str) -> str:
    """Search the web."""
    return f"found {query}"


def application(chat: ChatOpenAI) -> Any:
    """Return one graph with everything LangGraph has for control flow.

    ::

        plan -> (Send) work x3 -> gather -+-> left (sub-graph: deep) -+-> agent -> tools
                                          +-> right (fails once) -----+     ^--------+
        agent -> (Command) tools or END
    """
    failures = iter([True, False])

    async def asks(state: State) -> dict[str, Any]:
        await chat.ainvoke("think")
        return {"notes": ["thought"]}

    async def streams(state: State) -> dict[str, Any]:
        async for _ in chat.astream("think aloud"):
            pass
        return {"notes": ["streamed"]}

    def sync(state: State) -> dict[str, Any]:
        chat.invoke("think")
        if next(failures):
            raise ConnectionError("once")
        return {"notes": ["right"]}

    def spread(state: State) -> list[Send]:
        return [Send("work", {"part": part}) for part in range(3)]

    async def agent(state: State) -> Command[Literal["tools", "__end__"]]:
        await chat.ainvoke("which tool?")
        if any(message.type == "tool" for message in state["messages"]):
            return Command(goto=END)
        # The same tool twice, as models do.
        calls = [{"name": "search", "args": {"query": "x"}, "id": f"call-{n}"} for n in range(2)]
        return Command(goto="tools", update={"messages": [AIMessage("", tool_calls=calls)]})

    inner = StateGraph(State)
    inner.add_node("deep", streams)
    inner.add_edge(START, "deep")

    graph = StateGraph(State)
    graph.add_node("plan", asks)
    graph.add_node("work", asks)
    graph.add_node("gather", asks)
    graph.add_node("left", inner.compile())
    graph.add_node("right", sync, retry_policy=RetryPolicy(initial_interval=0.0, jitter=False))
    graph.add_node("agent", agent)
    graph.add_node("tools", ToolNode([search]))
    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", spread, ["work"])
    graph.add_edge("work", "gather")
    graph.add_edge("gather", "left")
    graph.add_edge("gather", "right")
    graph.add_edge(["left", "right"], "agent")
    graph.add_edge("tools", "agent")
    return graph.compile(name="everything")


async def test_a_whole_application(stack: Stack, tmp_path: Path) -> None:
    """Parallel branches, Send, sub-graph, tools, stream, retry, Command: all known at the gateway.

    Every call's workflow, node, site, visit and attempt, every tool and branch, the run with its
    session; and each call site and branch is one that the registered workflow lists.
    """
    trace = tmp_path / "trace.jsonl"
    async with stack() as s:
        s.control.set_trace(trace)
        clients = openai_client_kwargs()
        chat = ChatOpenAI(
            base_url=s.base_url, api_key="none", model="m", max_retries=0,
            max_tokens=3, **clients,
        )  # fmt: skip
        app = instrument(application(chat), gateway=s.gateway.address)
        async for _ in app.astream({"notes": []}, run(run_id="r", session_id="s")):
            pass
        await app.aclose()
        assert diagnostics(s.control)["workflows"] == {app.almanac.workflow_hash: "everything"}
        await aclose_clients(clients)
        s.control.set_trace(None)
    records = load_trace(trace)
    calls = [one for one in records if isinstance(one, CallRecord)]
    assert sorted((one.site, one.visit, one.attempt) for one in calls) == [
        ("agent#0", 0, 0),
        ("agent#0", 1, 0),
        ("gather#0", 0, 0),
        ("left|deep#0", 0, 0),
        ("plan#0", 0, 0),
        ("right#0", 0, 0),
        ("right#0", 0, 1),
        ("work#0", 0, 0),
        ("work#0", 1, 0),
        ("work#0", 2, 0),
    ]
    assert {one.node for one in calls} == {one.site.removesuffix("#0") for one in calls}
    assert {one.status for one in calls} == {"ok"}
    assert [one.node for one in records if isinstance(one, ToolRecord)] == ["tools"]
    branches = [one for one in records if isinstance(one, BranchRecord)]
    assert [(one.branch, one.outcome, one.visit) for one in branches] == [
        ("plan:spread", "work", 0),
        ("agent:goto", "tools", 0),
        ("agent:goto", END, 1),
    ]
    (whole,) = [one for one in records if isinstance(one, RunRecord)]
    assert (whole.run_id, whole.session_id, whole.status, whole.calls) == ("r", "s", "ok", 10)
    assert {one.run_id for one in records} == {"r"}
    assert {one.workflow_hash for one in records} == {app.almanac.workflow_hash}
    workflow = Workflow.from_json(app.almanac.ir)
    inner = workflow.node("left").subgraph
    assert inner is not None
    assert {one.site for one in calls} == {*workflow.call_sites, *inner.call_sites}
    assert {one.branch for one in branches} == {one.id for one in workflow.branches}


HEADERS = {
    "x-almanac-run-id": "r",
    "x-almanac-workflow": "mine",
    "x-almanac-node": "draft",
    "x-almanac-visit": "2",
    "x-session-id": "s",
}
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


async def by_openai(base_url: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key="none", default_headers=HEADERS
    ) as client:
        await client.chat.completions.create(**BODY)


async def by_aiohttp(base_url: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{base_url}/chat/completions", json=BODY, headers=HEADERS) as answer,
    ):
        assert answer.status == 200


async def by_urllib(base_url: str) -> None:
    def post() -> None:
        request = urllib.request.Request(  # noqa: S310 loopback
            f"{base_url}/chat/completions",
            data=json.dumps(BODY).encode(),
            headers={"content-type": "application/json", **HEADERS},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 loopback
            assert answer.status == 200

    await asyncio.to_thread(post)


@pytest.mark.parametrize("client", [by_openai, by_aiohttp, by_urllib])
async def test_headers_alone_are_enough(stack: Stack, tmp_path: Path, client: Any) -> None:
    """Without LangGraph and without us in the process, headers give a call its place in a run."""
    trace = tmp_path / "trace.jsonl"
    async with stack(1) as s:
        s.control.set_trace(trace)
        await client(s.base_url)
        s.control.lifecycle.end("r")
        s.control.set_trace(None)
    call, whole = load_trace(trace)
    assert isinstance(call, CallRecord)
    assert (call.run_id, call.workflow_hash) == ("r", "mine")
    assert (call.node, call.site, call.visit) == ("draft", "draft#0", 2)
    assert isinstance(whole, RunRecord)
    assert whole.session_id == "s"
