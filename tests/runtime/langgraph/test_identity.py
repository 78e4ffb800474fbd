"""Identity of requests: who calls, in every way LangGraph runs a node."""

import asyncio
import gc
import operator
import uuid
import weakref
from typing import Annotated, Any, Literal, TypedDict

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_config
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send

from runtime.langgraph.declare import llm_call
from runtime.langgraph.identity import (
    aclose_clients,
    async_request_hook,
    identity_headers,
    openai_client_kwargs,
    request_hook,
)
from runtime.langgraph.instrument import instrument
from runtime.langgraph.settings import run
from runtime.langgraph.tracker import RunTracker, tracker_of


class State(TypedDict, total=False):
    x: int
    tag: str
    log: Annotated[list[str], operator.add]


class Recorder:
    """HTTP clients with the hooks, and the requests they would have sent."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        transport = httpx.MockTransport(self.answer)
        self.sync = httpx.Client(transport=transport, event_hooks={"request": [request_hook]})
        self.asynchronous = httpx.AsyncClient(
            transport=transport, event_hooks={"request": [async_request_hook]}
        )

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200, json={})

    def call(self, **kwargs: Any) -> None:
        self.sync.post("http://model/v1/chat/completions", **kwargs)

    async def acall(self) -> None:
        await self.asynchronous.post("http://model/v1/chat/completions")

    def node(self, state: State) -> dict[str, Any]:
        self.call()
        return {"log": ["sync"]}

    async def anode(self, state: State) -> dict[str, Any]:
        await self.acall()
        return {"log": ["async"]}

    def seen(self, *names: str) -> list[tuple[str | None, ...]]:
        """Return the named headers (without ``x-almanac-``) of all requests, sorted."""
        rows = [
            tuple(r.headers.get(n if n.startswith("x-") else f"x-almanac-{n}") for n in names)
            for r in self.requests
        ]
        return sorted(rows, key=str)

    def one(self, name: str) -> str | None:
        """Return the value of a header that is the same in all requests."""
        (value,) = {r.headers.get(f"x-almanac-{name}") for r in self.requests}
        return value


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def diamond(node: Any) -> StateGraph[Any]:
    graph = StateGraph(State)
    for name in ("a", "left", "right", "z"):
        graph.add_node(name, node)
    graph.add_edge(START, "a")
    graph.add_edge("a", "left")
    graph.add_edge("a", "right")
    graph.add_edge(["left", "right"], "z")
    return graph


DIAMOND = [("a", "1"), ("left", "2"), ("right", "2"), ("z", "3")]


def test_outside_a_graph_nothing_is_added(recorder: Recorder) -> None:
    """A client with the hook is an ordinary client anywhere else."""
    recorder.call()
    assert recorder.seen("run-id", "node", "step", "x-session-id") == [(None, None, None, None)]
    assert identity_headers() == {}


def test_parallel_sync_nodes_without_thread_id(recorder: Recorder) -> None:
    """Nodes without a ``config`` parameter, on worker threads, no thread_id: all carry the run."""
    app = instrument(diamond(recorder.node).compile())
    app.invoke({"x": 1})
    assert recorder.seen("node", "step") == DIAMOND
    assert recorder.one("run-id")
    assert recorder.one("workflow") == app.almanac.workflow_hash
    assert recorder.seen("site", "attempt", "visit")[0] == ("a#0", "0", "0")


async def test_parallel_async_nodes(recorder: Recorder) -> None:
    """Coroutine nodes in parallel carry their own node and the same run."""
    app = instrument(diamond(recorder.anode).compile())
    await app.ainvoke({"x": 1})
    assert recorder.seen("node", "step") == DIAMOND
    assert recorder.one("run-id")


async def test_sync_nodes_of_an_async_run(recorder: Recorder) -> None:
    """A sync node of an async run runs on a worker thread and is known all the same."""
    await instrument(diamond(recorder.node).compile()).ainvoke({"x": 1})
    assert recorder.seen("node", "step") == DIAMOND


async def test_every_way_to_run_a_graph(recorder: Recorder) -> None:
    """Streaming, events and batches: each run has one id, and no two runs share it."""
    app = instrument(diamond(recorder.anode).compile())
    async for _ in app.astream({"x": 1}, stream_mode=["updates", "messages"]):
        pass
    async for _ in app.astream_events({"x": 1}, version="v2"):
        pass
    await app.abatch([{"x": 1}, {"x": 2}])
    bound = app.with_config({"tags": ["t"]})
    await bound.ainvoke({"x": 1})
    ids = [row[0] for row in recorder.seen("run-id")]
    assert [ids.count(one) for one in sorted(set(ids), key=str)] == [4] * 5
    assert None not in ids


def test_sync_streaming(recorder: Recorder) -> None:
    """A sync stream carries the identity too."""
    app = instrument(diamond(recorder.node).compile())
    assert len(list(app.stream({"x": 1}))) == 4
    assert recorder.seen("node", "step") == DIAMOND
    assert recorder.one("run-id")


async def test_send_workers_are_told_apart(recorder: Recorder) -> None:
    """Workers started by Send in one step have the same node and step and visits of their own."""

    def spread(state: State) -> list[Send]:
        return [Send("work", {"x": i}) for i in range(3)]

    graph = StateGraph(State)
    graph.add_node("plan", recorder.anode)
    graph.add_node("work", recorder.anode)
    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", spread, ["work"])
    await instrument(graph.compile()).ainvoke({"x": 1})
    assert recorder.seen("node", "step", "visit") == [
        ("plan", "1", "0"),
        ("work", "2", "0"),
        ("work", "2", "1"),
        ("work", "2", "2"),
    ]


async def test_loops_and_jumps_count_visits(recorder: Recorder) -> None:
    """A node entered again by Command has the next visit, whatever else ran in between."""

    async def decide(state: State) -> Command[Literal["work", "__end__"]]:
        await recorder.acall()
        done = len(state.get("log", ())) >= 2
        return Command(goto=END if done else "work")

    graph = StateGraph(State)
    graph.add_node("decide", decide)
    graph.add_node("work", recorder.anode)
    graph.add_edge(START, "decide")
    graph.add_edge("work", "decide")
    await instrument(graph.compile()).ainvoke({"x": 1})
    assert recorder.seen("node", "visit") == [
        ("decide", "0"),
        ("decide", "1"),
        ("decide", "2"),
        ("work", "0"),
        ("work", "1"),
    ]


@pytest.mark.parametrize("inner_is_instrumented", [False, True])
async def test_subgraphs_keep_the_run_of_their_parent(
    recorder: Recorder, inner_is_instrumented: bool
) -> None:
    """Inside a sub-graph the node is a path; before, inside and after it the run is the same."""
    inner = StateGraph(State)
    inner.add_node("deep", recorder.anode)
    inner.add_edge(START, "deep")
    compiled = inner.compile()
    graph = StateGraph(State)
    graph.add_node("before", recorder.anode)
    graph.add_node("mid", instrument(compiled) if inner_is_instrumented else compiled)
    graph.add_node("after", recorder.anode)
    graph.add_edge(START, "before")
    graph.add_edge("before", "mid")
    graph.add_edge("mid", "after")
    app = instrument(graph.compile())
    await app.ainvoke({"x": 1})
    assert recorder.seen("node", "site") == [
        ("after", "after#0"),
        ("before", "before#0"),
        ("mid|deep", "mid|deep#0"),
    ]
    assert recorder.one("run-id")
    assert recorder.one("workflow") == app.almanac.workflow_hash


async def test_a_graph_called_by_hand_takes_part_in_the_run(recorder: Recorder) -> None:
    """A graph invoked inside a node, even on a thread of its own, belongs to the same run."""
    inner = StateGraph(State)
    inner.add_node("deep", recorder.anode)
    inner.add_edge(START, "deep")
    helper = instrument(inner.compile(checkpointer=InMemorySaver()))

    async def outer(state: State) -> dict[str, Any]:
        await helper.ainvoke({"x": 1}, {"configurable": {"thread_id": "own"}})
        await recorder.acall()
        return {}

    graph = StateGraph(State)
    graph.add_node("outer", outer)
    graph.add_edge(START, "outer")
    await instrument(graph.compile()).ainvoke({"x": 1})
    assert len(recorder.requests) == 2
    assert recorder.one("run-id")
    assert ("outer",) in recorder.seen("node")


async def test_an_instrumented_part_of_a_plain_graph(recorder: Recorder) -> None:
    """Inside a graph that is not instrumented, the inner graph's paths start at its own nodes."""
    inner = StateGraph(State)
    inner.add_node("deep", recorder.anode)
    inner.add_edge(START, "deep")
    app = instrument(inner.compile())
    graph = StateGraph(State)
    graph.add_node("mid", app)
    graph.add_edge(START, "mid")
    await graph.compile().ainvoke({"x": 1})
    assert recorder.seen("node", "workflow") == [("deep", app.almanac.workflow_hash)]


async def test_calls_inside_tools(recorder: Recorder) -> None:
    """A model called by a tool is a call of the tool's node."""

    @tool
    async def research(topic: str) -> str:
        """Look a topic up."""
        await recorder.acall()
        return topic

    def agent(state: MessagesState) -> dict[str, Any]:
        call = {"name": "research", "args": {"topic": "x"}, "id": "1"}
        return {"messages": [AIMessage("", tool_calls=[call])]}

    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_node("tools", ToolNode([research]))
    graph.add_edge(START, "agent")
    graph.add_edge("agent", "tools")
    await instrument(graph.compile()).ainvoke({"messages": []})
    assert recorder.seen("node", "step") == [("tools", "2")]
    assert recorder.one("run-id")


async def test_concurrent_runs_with_the_same_thread_id_do_not_mix(recorder: Recorder) -> None:
    """Two runs in flight at once on one thread_id: every request carries its own run's id."""
    barrier = asyncio.Barrier(2)

    async def node(state: State) -> dict[str, Any]:
        await barrier.wait()  # both runs are inside the node now
        await recorder.asynchronous.post("http://model/", headers={"x-tag": state["tag"]})
        await barrier.wait()
        return {}

    graph = StateGraph(State)
    for name in ("a", "b", "c"):
        graph.add_node(name, node)
    graph.add_edge(START, "a")
    graph.add_edge("a", "b")
    graph.add_edge("b", "c")
    app = instrument(graph.compile())
    config = {"configurable": {"thread_id": "shared"}}
    await asyncio.gather(app.ainvoke({"tag": "A"}, config), app.ainvoke({"tag": "B"}, config))
    pairs = set(recorder.seen("x-tag", "run-id"))
    assert len(pairs) == 2
    assert len({run_id for _, run_id in pairs}) == 2
    assert {row[0] for row in recorder.seen("x-session-id")} == {"shared"}
    assert config == {"configurable": {"thread_id": "shared"}}


def test_retries_of_a_node_are_attempts(recorder: Recorder) -> None:
    """LangGraph's retry of a node is another attempt of the same visit and site."""
    failures = iter([True, False])

    @llm_call()
    @llm_call()
    def flaky(state: State) -> dict[str, Any]:
        recorder.call()
        recorder.call()
        if next(failures):
            raise ConnectionError("again")
        return {}

    graph = StateGraph(State)
    policy = RetryPolicy(initial_interval=0.0, jitter=False)
    graph.add_node("flaky", flaky, retry_policy=policy)
    graph.add_edge(START, "flaky")
    instrument(graph.compile()).invoke({"x": 1})
    assert recorder.seen("attempt", "visit", "site") == [
        ("0", "0", "flaky#0"),
        ("0", "0", "flaky#1"),
        ("1", "0", "flaky#0"),
        ("1", "0", "flaky#1"),
    ]


def test_retries_of_the_client_are_attempts_too(recorder: Recorder) -> None:
    """The OpenAI client's retry is an attempt of the same call; calls beyond the last site stay."""

    @llm_call()
    @llm_call()
    def node(state: State) -> dict[str, Any]:
        recorder.call()
        recorder.call(headers={"x-stainless-retry-count": "0"})
        recorder.call(headers={"x-stainless-retry-count": "1"})
        recorder.call()
        return {}

    graph = StateGraph(State)
    graph.add_node("n", node)
    graph.add_edge(START, "n")
    instrument(graph.compile()).invoke({"x": 1})
    assert [
        (r.headers["x-almanac-site"], r.headers["x-almanac-attempt"]) for r in recorder.requests
    ] == [("n#0", "0"), ("n#1", "0"), ("n#1", "1"), ("n#1", "0")]


def test_plain_graphs_send_what_langgraph_knows(recorder: Recorder) -> None:
    """Without `instrument` node, step and session are known, and the run if the caller names it."""
    app = diamond(recorder.node).compile(checkpointer=InMemorySaver())
    run_id = uuid.uuid4()
    app.invoke({"x": 1}, {"configurable": {"thread_id": "t"}, "run_id": run_id})
    assert recorder.seen("node", "step") == DIAMOND
    assert recorder.one("run-id") == str(run_id)
    assert recorder.one("workflow") is None
    assert {row[0] for row in recorder.seen("x-session-id")} == {"t"}


def test_settings_of_a_run(recorder: Recorder) -> None:
    """Run id, session, deadline and priority given by the caller reach every request."""
    app = instrument(diamond(recorder.node).compile())
    app.invoke({"x": 1}, run(run_id="r1", session_id="s1", deadline_s=20, priority="interactive"))
    assert set(recorder.seen("run-id", "x-session-id", "deadline-s", "priority")) == {
        ("r1", "s1", "20", "interactive")
    }
    with pytest.raises(ValueError, match="deadline_s=0"):
        run(deadline_s=0)


def test_declared_urgency_of_a_call(recorder: Recorder) -> None:
    """A call site's priority wins over the run's; of two deadlines the earlier one counts."""

    @llm_call(priority=7, deadline_s=5)
    @llm_call(deadline_s=500)
    @llm_call()
    def node(state: State) -> dict[str, Any]:
        for _ in range(3):
            recorder.call()
        return {}

    inner = StateGraph(State)
    inner.add_node("deep", node)
    inner.add_edge(START, "deep")
    graph = StateGraph(State)
    graph.add_node("mid", inner.compile())
    graph.add_edge(START, "mid")
    app = instrument(graph.compile())
    app.invoke({"x": 1}, run(deadline_s=60, priority="batch"))
    first, second, third = recorder.requests
    assert [r.headers["x-almanac-priority"] for r in recorder.requests] == ["7", "batch", "batch"]
    # Five seconds after the call is a little more than five seconds after the run's start.
    assert 5 <= float(first.headers["x-almanac-deadline-s"]) < 60
    assert second.headers["x-almanac-deadline-s"] == third.headers["x-almanac-deadline-s"] == "60"
    with pytest.raises(ValueError, match="deadline_s=-1"):
        llm_call(deadline_s=-1)


async def test_parallel_calls_of_one_node_match_the_graph(recorder: Recorder) -> None:
    """Calls gathered inside one node all carry a call site that the workflow graph lists."""

    @llm_call()
    async def node(state: State) -> dict[str, Any]:
        await asyncio.gather(*(recorder.acall() for _ in range(3)))
        return {}

    graph = StateGraph(State)
    graph.add_node("n", node)
    graph.add_edge(START, "n")
    app = instrument(graph.compile())
    await app.ainvoke({"x": 1})
    (site,) = app.almanac.ir["nodes"][0]["call_sites"]
    assert recorder.seen("site") == [(site["id"],)] * 3


async def test_nothing_is_kept_after_a_run(recorder: Recorder) -> None:
    """The record of a run dies with the run."""
    trackers: list[weakref.ref[RunTracker]] = []

    async def node(state: State) -> dict[str, Any]:
        tracker = tracker_of(get_config())
        assert tracker is not None
        trackers.append(weakref.ref(tracker))
        return {}

    graph = StateGraph(State)
    graph.add_node("n", node)
    graph.add_edge(START, "n")
    app = instrument(graph.compile())
    await asyncio.gather(*(app.ainvoke({"x": 1}) for _ in range(3)))
    gc.collect()
    assert [tracker() for tracker in trackers] == [None] * 3


def test_header_values_are_always_valid(recorder: Recorder) -> None:
    """Names in any script, with spaces at the ends, become valid header values."""
    graph = StateGraph(State)
    graph.add_node("研究 ", recorder.node)
    graph.add_edge(START, "研究 ")
    instrument(graph.compile()).invoke({"x": 1}, run(session_id="two words\r\nx: y"))
    assert recorder.seen("node", "x-session-id") == [
        ("%E7%A0%94%E7%A9%B6%20", "two words%0D%0Ax: y")
    ]


def test_headers_of_the_caller_win(recorder: Recorder) -> None:
    """What the program sets itself is left alone."""

    def node(state: State) -> dict[str, Any]:
        recorder.call(headers={"X-Almanac-Site": "mine"})
        return {}

    graph = StateGraph(State)
    graph.add_node("n", node)
    graph.add_edge(START, "n")
    instrument(graph.compile()).invoke({"x": 1})
    assert recorder.seen("site", "node") == [("mine", "n")]


def test_the_hook_never_raises() -> None:
    """A request without identity is better than none."""
    request_hook(object())  # type: ignore[arg-type]


def chat_on(url: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="m", max_retries=0,
        **openai_client_kwargs(), **options,
    )  # fmt: skip


async def test_chat_models_over_http(stub: Any) -> None:
    """ChatOpenAI in a closure: invoke, stream, batch, bound tools, sync and async, all known."""
    chat = chat_on(stub.url)

    def sync_node(state: State) -> dict[str, Any]:
        chat.invoke("hi")
        list(chat.stream("hi"))
        chat.batch(["hi", "hi"])
        chat.bind_tools([]).invoke("hi")
        return {}

    async def async_node(state: State) -> dict[str, Any]:
        await chat.ainvoke("hi")
        async for _ in chat.astream("hi"):
            pass
        await chat.abatch(["hi", "hi"])
        await chat.bind_tools([]).ainvoke("hi")
        return {}

    graph = StateGraph(State)
    graph.add_node("sync", sync_node)
    graph.add_node("async", async_node)
    graph.add_edge(START, "sync")
    graph.add_edge("sync", "async")
    await instrument(graph.compile()).ainvoke({"x": 1}, run(run_id="r"))
    assert stub.headers("x-almanac-run-id") == ["r"] * 10
    assert stub.headers("x-almanac-node") == ["sync"] * 5 + ["async"] * 5
    await aclose_clients({n: getattr(chat, n) for n in ("http_client", "http_async_client")})


def test_plain_openai_clients(stub: Any) -> None:
    """The hook serves OpenAI's own client as well; the switch turns everything off."""
    http_client = openai_client_kwargs()["http_client"]
    client = openai.OpenAI(base_url=f"{stub.url}/v1", api_key="none", http_client=http_client)

    def node(state: State) -> dict[str, Any]:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        return {}

    graph = StateGraph(State)
    graph.add_node("n", node)
    graph.add_edge(START, "n")
    app = instrument(graph.compile())
    app.invoke({"x": 1})
    assert stub.headers("x-almanac-node") == ["n"]
    assert app.almanac.ir["nodes"][0]["kind"] == "llm"
    assert openai_client_kwargs(gateway_headers=False) == {}
    client.close()
