"""`instrument`: lifecycle events, and an application that never notices."""

import asyncio
import json
import logging
import operator
import threading
from typing import Annotated, Any, Literal, TypedDict

import httpx
import pytest
from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

from runtime.langgraph.declare import tool_call
from runtime.langgraph.instrument import instrument
from runtime.langgraph.reporter import Reporter
from runtime.langgraph.settings import run

IDENTITY = ("run_id", "workflow", "workflow_hash", "session_id")


class State(TypedDict, total=False):
    x: int
    secret: str
    log: Annotated[list[str], operator.add]


def code(state: State) -> dict[str, Any]:
    return {"log": ["code"]}


@tool_call()
async def search(state: State) -> dict[str, Any]:
    if state.get("x") == 13:
        raise LookupError("nothing found")
    return {"log": ["search"]}


def route(state: State) -> Literal["again", "done"]:
    return "done" if len(state["log"]) > 4 else "again"


def loop() -> Any:
    graph = StateGraph(State)
    graph.add_node("plan", code)
    graph.add_node("search", search)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "search")
    graph.add_conditional_edges("search", route, {"again": "plan", "done": END})
    return graph.compile(name="looping")


class Listener:
    """Stands where the reporter stands and keeps the events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def short(self) -> list[dict[str, Any]]:
        """Return the events without the run's identity."""
        return [{k: v for k, v in event.items() if k not in IDENTITY} for event in self.events]

    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


def listened(graph: Any) -> tuple[Any, Listener]:
    app, listener = instrument(graph), Listener()
    app.almanac.reporter = listener
    return app, listener


async def test_lifecycle_of_a_run() -> None:
    """Start, tools, branches with the outcome taken, end: in order, with visits, and no states."""
    app, listener = listened(loop())
    await app.ainvoke({"x": 1, "secret": "prompt text"}, run(run_id="r", session_id="s"))
    assert listener.short() == [
        {"type": "run_start"},
        {"type": "tool_start", "node": "search", "visit": 0},
        {"type": "branch", "branch": "search:route", "outcome": "again", "visit": 0},
        {"type": "tool_end", "node": "search", "visit": 0, "status": "ok"},
        {"type": "tool_start", "node": "search", "visit": 1},
        {"type": "branch", "branch": "search:route", "outcome": "again", "visit": 1},
        {"type": "tool_end", "node": "search", "visit": 1, "status": "ok"},
        {"type": "tool_start", "node": "search", "visit": 2},
        {"type": "branch", "branch": "search:route", "outcome": "done", "visit": 2},
        {"type": "tool_end", "node": "search", "visit": 2, "status": "ok"},
        {"type": "run_end", "status": "ok"},
    ]
    identity = {"run_id": "r", "session_id": "s", "workflow": "looping"}
    for event in listener.events:
        assert {**event, **identity, "workflow_hash": app.almanac.workflow_hash} == event
    assert "prompt text" not in json.dumps(listener.events)


def test_every_kind_of_choice_is_reported() -> None:
    """Entry routers, several labels at once, Send, unnamed routers and Command."""

    def spread(state: State) -> list[Any]:
        return [Send("work", {}), Send("work", {}), "side"]

    def jump(state: State) -> Command[Literal["last", "__end__"]]:
        return Command(goto="last")

    graph = StateGraph(State)
    for name in ("first", "work", "last"):
        graph.add_node(name, code)
    graph.add_node("side", jump)
    graph.add_conditional_edges(START, lambda state: True, {True: "first", False: END})
    graph.add_conditional_edges("first", spread, {"workers": "work", "side": "side"})
    graph.add_conditional_edges("last", lambda state: END)
    app, listener = listened(graph.compile())
    app.invoke({"x": 1})
    choices = [(e["branch"], e["outcome"]) for e in listener.events if e["type"] == "branch"]
    assert choices == [
        ("__start__:condition", "True"),
        ("first:spread", "side+workers"),
        ("side:goto", "last"),
        ("last:condition", "__end__"),
    ]


async def test_branches_of_subgraphs_carry_the_path() -> None:
    """Events inside a sub-graph name its branch and node as the workflow graph does."""
    graph = StateGraph(State)
    graph.add_node("mid", loop())
    graph.add_edge(START, "mid")
    app, listener = listened(graph.compile())
    await app.ainvoke({"x": 1})
    assert listener.types().count("run_start") == 1
    known = {branch["id"] for branch in app.almanac.ir["nodes"][0]["subgraph"]["branches"]}
    assert {e["branch"] for e in listener.events if e["type"] == "branch"} == known
    assert {e["node"] for e in listener.events if e["type"] == "tool_end"} == {"mid|search"}


async def test_failed_run() -> None:
    """The application's exception comes through; the tool and the run are reported as failed."""
    app, listener = listened(loop())
    with pytest.raises(LookupError, match="nothing found"):
        await app.ainvoke({"x": 13})
    assert listener.short()[-2:] == [
        {"type": "tool_end", "node": "search", "visit": 0, "status": "failed"},
        {"type": "run_end", "status": "failed"},
    ]


async def test_cancelled_run() -> None:
    """A run whose task is cancelled ends as cancelled, its open tool too."""
    entered = asyncio.Event()

    @tool_call()
    async def hang(state: State) -> None:
        entered.set()
        await asyncio.Event().wait()

    graph = StateGraph(State)
    graph.add_node("hang", hang)
    graph.add_edge(START, "hang")
    app, listener = listened(graph.compile())
    task = asyncio.create_task(app.ainvoke({"x": 1}))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert listener.short()[1:] == [
        {"type": "tool_start", "node": "hang", "visit": 0},
        {"type": "tool_end", "node": "hang", "visit": 0, "status": "cancelled"},
        {"type": "run_end", "status": "cancelled"},
    ]


async def test_streams_left_early_end_their_run() -> None:
    """A consumer that stops reading stops the run, sync and async."""
    app, listener = listened(loop())
    stream = app.astream({"x": 1})
    await anext(stream)
    await stream.aclose()
    assert listener.short()[-1] == {"type": "run_end", "status": "cancelled"}

    graph = StateGraph(State)
    graph.add_node("a", code)
    graph.add_node("b", code)
    graph.add_edge(START, "a")
    graph.add_edge("a", "b")
    app, listener = listened(graph.compile())
    sync_stream = app.stream({"x": 1})
    next(sync_stream)
    sync_stream.close()
    assert listener.short()[-1] == {"type": "run_end", "status": "cancelled"}


def test_interrupts_are_no_failures() -> None:
    """A run that waits for a human ends as interrupted, and its resumption as ok."""

    @tool_call()
    def ask(state: State) -> dict[str, Any]:
        return {"log": [interrupt("?")]}

    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    app, listener = listened(graph.compile(checkpointer=InMemorySaver()))
    config = {"configurable": {"thread_id": "t"}}
    app.invoke({"x": 1}, config)
    app.invoke(Command(resume="yes"), config)
    assert [e["status"] for e in listener.events if "status" in e] == [
        "interrupted",
        "interrupted",
        "ok",
        "ok",
    ]


async def test_concurrent_runs_report_apart() -> None:
    """Runs in flight together have ids, visits and ends of their own."""
    app, listener = listened(loop())
    config = {"configurable": {"thread_id": "shared"}}
    await asyncio.gather(*(app.ainvoke({"x": 1}, config) for _ in range(5)))
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in listener.events:
        runs.setdefault(event["run_id"], []).append(
            {k: v for k, v in event.items() if k not in IDENTITY}
        )
    first, *others = runs.values()
    assert len(others) == 4
    assert all(other == first for other in others)


def test_the_original_stays_as_it_was() -> None:
    """The graph handed in is not touched, the result has its type, and runs give the same."""
    graph = loop()
    before = dict(vars(graph))
    app = instrument(graph)
    assert vars(graph) == before
    assert not hasattr(graph, "almanac")
    assert isinstance(app, type(graph))
    assert app.invoke is not None
    assert app.get_graph().to_json() == graph.get_graph().to_json()
    assert app.with_config({"tags": ["t"]}).almanac is app.almanac


def test_callbacks_of_the_caller_are_kept() -> None:
    """Handlers given as a list or a manager hear what they would have heard."""

    class Count(BaseCallbackHandler):
        starts = 0

        def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
            self.starts += 1

    def build() -> Any:
        graph = StateGraph(State)
        graph.add_node("a", code)
        graph.add_edge(START, "a")
        return graph.compile()

    counts = []
    for app in (build(), instrument(build())):
        one, other = Count(), Count()
        app.invoke({"x": 1}, {"callbacks": [one]})
        manager = CallbackManager([], inheritable_handlers=[other])
        app.invoke({"x": 1}, {"callbacks": manager})
        assert len(manager.handlers) <= 1
        counts.append((one.starts, other.starts))
    assert counts[0] == counts[1]


def test_what_cannot_be_read_still_runs(caplog: pytest.LogCaptureFixture) -> None:
    """The functional API gets an identity without a graph; other objects are left as they are."""

    @entrypoint()
    def functional(x: int) -> int:
        return x + 1

    with caplog.at_level(logging.WARNING):
        app, listener = listened(functional)
        assert app.invoke(1) == 2
        assert listener.types() == ["run_start", "run_end"]
        assert (app.almanac.ir, app.almanac.workflow_hash) == (None, "")
        plain = RunnableLambda(lambda x: x)
        assert instrument(plain) is plain
    assert "not read" in caplog.text
    assert "left as it is" in caplog.text


def test_mistakes_at_start_are_named() -> None:
    """A builder and an address that cannot be: one clear error, before any run."""
    with pytest.raises(TypeError, match=r"call .compile\(\) first"):
        instrument(StateGraph(State))
    with pytest.raises(ValueError, match="http://host:port"):
        instrument(loop(), gateway="localhost:8000")
    with pytest.raises(TypeError, match="gateway=8000: give http://host:port or"):
        instrument(loop(), gateway=8000)  # type: ignore[arg-type]


async def test_gateway_gets_graph_and_events(stub: Any) -> None:
    """The workflow graph arrives once and first, then all events, over real HTTP."""
    app = instrument(loop(), workflow="named", gateway=f"{stub.url}/v1")
    await app.ainvoke({"x": 1})
    await app.ainvoke({"x": 1})
    await app.aclose()
    assert stub.workflows == [app.almanac.ir]
    assert stub.workflows[0]["name"] == "named"
    assert [e["type"] for e in stub.events].count("run_end") == 2
    assert len(stub.events) == app.almanac.reporter.sent == 22
    assert app.almanac.reporter.dropped == 0


@pytest.mark.parametrize("status", [404, 429, 500, None])
async def test_a_failing_gateway_does_not_disturb(stub: Any, status: int | None) -> None:
    """Unknown routes, errors and an address nobody listens at: results as ever, events counted."""
    stub.status = status or 200
    gateway = stub.url if status else "http://127.0.0.1:1"
    app = instrument(loop(), gateway=gateway)
    assert await app.ainvoke({"x": 1}) == await loop().ainvoke({"x": 1})
    await app.aclose()
    assert (app.almanac.reporter.sent, app.almanac.reporter.dropped) == (0, 11)


def test_a_gateway_that_asks_for_a_key_gets_it() -> None:
    """Graph and events bear the key that was given, and no key is sent unasked."""
    heard: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        heard.append(request.headers.get("authorization"))
        return httpx.Response(200)

    for api_key in ("secret", None):
        reporter = Reporter(
            "http://gateway", api_key=api_key, transport=httpx.MockTransport(answer)
        )
        reporter.register({"name": "w"})
        reporter.emit({"n": 1})
        reporter.close()
        assert "secret" not in repr(reporter)
    assert heard == ["Bearer secret"] * 2 + [None] * 2


def test_closing_tries_once_more() -> None:
    """After a failure the graph is kept, and closing sends it without waiting for the pause."""
    tried = threading.Event()
    log: list[tuple[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if not tried.is_set():
            tried.set()
            raise httpx.ConnectError("down")
        log.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200)

    reporter = Reporter("http://gateway", transport=httpx.MockTransport(answer))
    reporter.register({"name": "w"})
    reporter.emit({"n": 1})
    tried.wait()
    reporter.close()
    assert log == [
        ("/almanac/v1/workflows", {"name": "w"}),
        ("/almanac/v1/events", {"events": [{"n": 1}]}),
    ]
    assert (reporter.sent, reporter.dropped) == (1, 0)


def test_without_a_gateway_there_is_nothing_to_close() -> None:
    """Closing is always allowed, and a closed application still runs."""
    graph = StateGraph(State)
    graph.add_node("a", code)
    graph.add_edge(START, "a")
    app = instrument(graph.compile())
    app.close()
    asyncio.run(app.aclose())
    assert app.invoke({"x": 1})["x"] == 1


def test_the_queue_is_bounded() -> None:
    """What does not fit is dropped, oldest first, and counted; so is what comes after closing."""
    gate = threading.Event()
    log: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        gate.wait()
        log.extend(json.loads(request.content).get("events", ()))
        return httpx.Response(200)

    reporter = Reporter("http://gateway", capacity=3, transport=httpx.MockTransport(answer))
    reporter.register({"name": "w"})  # the sender is busy with this one
    for number in range(5):
        reporter.emit({"n": number})
    gate.set()
    reporter.close()
    assert [event["n"] for event in log] == [2, 3, 4]
    reporter.emit({"n": 5})
    assert (reporter.sent, reporter.dropped) == (3, 3)
    assert "dropped=3" in repr(reporter)


def test_what_is_not_json_is_dropped() -> None:
    """An event that cannot be written is lost alone."""
    refuse = httpx.MockTransport(lambda request: httpx.Response(500))
    reporter = Reporter("http://gateway", transport=refuse)
    reporter.emit({"n": object()})
    reporter.close()
    assert (reporter.sent, reporter.dropped) == (0, 1)
