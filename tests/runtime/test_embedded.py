"""The router inside the application: same decisions, no port, nothing left behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

import almanac
from planner.dispatch.table import DispatchTable, save_table
from planner.domain.errors import InvalidInput
from planner.domain.fleet import load_fleet
from planner.domain.trace import CallRecord, RunRecord, load_trace
from runtime.config import GatewayConfig
from runtime.embedded import BASE_URL, EmbeddedRouter, embed
from runtime.gateway import Gateway
from runtime.langgraph.instrument import instrument
from runtime.langgraph.settings import run
from runtime.mock.server import MockConfig, MockFleet

DATA = Path(__file__).parents[2] / "data"
DILATION = 50.0
CHAT = "/v1/chat/completions"


def ask(tokens: int = 3, **more: Any) -> dict[str, Any]:
    """Return a request that the mock endpoint answers with so many words."""
    messages = [{"role": "user", "content": "hello there"}]
    mock = {"mock_output_tokens": tokens}
    return {"model": "m", "messages": messages, "vllm_xargs": mock, **more}


@pytest.fixture
def embedded(fleet_of: Any, urls_of: Any) -> Callable[..., Any]:
    """Return a factory of mock endpoints with an embedded router in front of them."""

    @asynccontextmanager
    async def running(
        count: int = 2, *, drain_s: float = 20.0, **options: Any
    ) -> AsyncIterator[tuple[EmbeddedRouter, MockFleet]]:
        fleet = fleet_of(count)
        async with MockFleet(fleet, MockConfig(dilation=DILATION), any_port=True) as mock:
            router = await asyncio.to_thread(
                embed,
                urls_of(fleet, list(mock.addresses)),
                config=replace(GatewayConfig(), dilation=DILATION, drain_s=drain_s),
                **({"policy": "round_robin"} | options),
            )
            async with router:
                yield router, mock
                async with asyncio.timeout(5):
                    while not router.closed and router.diagnostics()["in_flight"]:  # noqa: ASYNC110
                        await asyncio.sleep(0)
            assert not [t for t in threading.enumerate() if t.name == "almanac-router"]
            async with asyncio.timeout(5):
                while any(one.paced.live for one in mock.endpoints):  # noqa: ASYNC110
                    await asyncio.sleep(0)

    return running


def client_of(router: EmbeddedRouter) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url="http://any", transport=router.transports().asynchronous, timeout=30
    )


async def test_any_http_client_is_routed(embedded: Any) -> None:
    """Plain httpx, sync and async, whole and streamed, with headers alone; both endpoints serve."""
    async with embedded(policy="least_expected_finish") as (router, _), client_of(router) as http:
        answers = await asyncio.gather(*(http.post(CHAT, json=ask()) for _ in range(6)))
        assert {one.status_code for one in answers} == {200}
        assert {one.headers["x-almanac-endpoint"] for one in answers} == {"e0", "e1"}
        assert answers[0].headers["x-almanac-reason"] == "finish"

        def sync() -> list[str]:
            transport = router.transports().sync
            with (
                httpx.Client(base_url="http://any", transport=transport, timeout=30) as client,
                client.stream("POST", CHAT, json=ask(stream=True)) as answer,
            ):
                return [line for line in answer.iter_lines() if line]

        lines = await asyncio.to_thread(sync)
        assert lines[-1] == "data: [DONE]"
        models = (await http.get("/v1/models")).json()["data"]
        assert [one["id"] for one in models] == ["m"]


async def test_openai_clients_are_routed(embedded: Any) -> None:
    """OpenAI's clients, sync and async, need the HTTP client only."""
    async with embedded() as (router, _):
        given = router.openai_client_kwargs()
        assert given["base_url"] == BASE_URL
        request = {k: v for k, v in ask().items() if k != "vllm_xargs"}
        extra = {"vllm_xargs": ask(5)["vllm_xargs"]}

        def sync() -> Any:
            with openai.OpenAI(
                base_url=BASE_URL, api_key="none", http_client=given["http_client"]
            ) as client:
                return client.chat.completions.create(**request, extra_body=extra)

        assert (await asyncio.to_thread(sync)).usage.completion_tokens == 5
        async with openai.AsyncOpenAI(
            base_url=BASE_URL, api_key="none", http_client=given["http_async_client"]
        ) as client:
            stream = await client.chat.completions.create(**request, extra_body=extra, stream=True)
            assert len([chunk async for chunk in stream]) == 6


class State(TypedDict, total=False):
    x: int


async def test_a_langgraph_app_without_a_gateway(embedded: Any, tmp_path: Path) -> None:
    """Graph, identity and lifecycle reach the embedded router; the trace holds run and calls."""
    trace = tmp_path / "trace.jsonl"
    async with embedded(trace=trace) as (router, _):
        given = router.openai_client_kwargs()
        chat = ChatOpenAI(model="m", api_key="none", **given)  # type: ignore[arg-type]

        async def asynchronous(state: State) -> dict[str, Any]:
            await chat.ainvoke("hi")
            return {}

        def sync(state: State) -> dict[str, Any]:
            list(chat.stream("hi"))
            return {}

        graph = StateGraph(State)
        graph.add_node("a", asynchronous)
        graph.add_node("b", sync)
        graph.add_edge(START, "a")
        graph.add_edge("a", "b")
        app = instrument(graph.compile(name="small"), gateway=router)
        await app.ainvoke({"x": 1}, run(run_id="r", session_id="s"))
        await app.aclose()  # the router goes on
        assert router.diagnostics()["workflows"] == {app.almanac.workflow_hash: "small"}
        given["http_client"].close()
        await given["http_async_client"].aclose()
    records = load_trace(trace)
    calls = [one for one in records if isinstance(one, CallRecord)]
    assert [(one.run_id, one.site, one.status) for one in calls] == [
        ("r", "a#0", "ok"),
        ("r", "b#0", "ok"),
    ]
    (whole,) = [one for one in records if isinstance(one, RunRecord)]
    assert (whole.run_id, whole.session_id, whole.calls) == ("r", "s", 2)
    assert (whole.workflow, whole.workflow_hash) == ("small", app.almanac.workflow_hash)


async def test_retries_before_the_first_byte(embedded: Any) -> None:
    """An endpoint that is gone costs an attempt, not the call."""
    async with embedded() as (router, mock), client_of(router) as http:
        await mock.endpoints[0].go_down(abort=True)
        answers = [await http.post(CHAT, json=ask()) for _ in range(3)]
        assert [one.status_code for one in answers] == [200] * 3
        assert {one.headers["x-almanac-endpoint"] for one in answers} == {"e1"}
        assert "2" in {one.headers["x-almanac-attempts"] for one in answers}


async def test_it_learns_from_what_it_serves(embedded: Any) -> None:
    """Finished calls teach the latency row of their endpoint."""
    async with embedded(1) as (router, _), client_of(router) as http:
        for _ in range(3):
            await http.post(CHAT, json=ask(40))
        (endpoint,) = router.diagnostics()["endpoints"]
        assert endpoint["latency"]["observations"] > 0


async def test_errors_are_those_of_the_api(embedded: Any) -> None:
    """Unknown models and routes, wrong methods and bodies: error bodies as from a gateway."""
    async with embedded(1) as (router, _), client_of(router) as http:
        for answer, status in (
            (await http.post(CHAT, json=ask(model="other")), 404),
            (await http.post("/v1/nothing", json=ask()), 404),
            (await http.get(CHAT), 405),
            (await http.post(CHAT, content=b"{"), 400),
        ):
            assert answer.status_code == status
            assert answer.json()["error"]["message"]


async def test_a_client_that_leaves_cancels_its_call(embedded: Any) -> None:
    """Cancelled, timed out or closed early: nothing stays in flight (the fixture looks)."""
    async with embedded(1) as (router, mock), client_of(router) as http:
        long = ask(100_000, max_tokens=7000)
        task = asyncio.create_task(http.post(CHAT, json=long))
        async with asyncio.timeout(5):
            while not mock.endpoints[0].paced.live:  # noqa: ASYNC110
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(httpx.ReadTimeout):
            await http.post(CHAT, json=long, timeout=0.01)
        async with http.stream("POST", CHAT, json={**long, "stream": True}) as answer:
            async for _ in answer.aiter_bytes():
                break

        def sync() -> None:
            transport = router.transports().sync
            with httpx.Client(base_url="http://any", transport=transport) as client:
                with client.stream("POST", CHAT, json={**long, "stream": True}) as answer:
                    next(answer.iter_bytes())
                with pytest.raises(httpx.ReadTimeout):
                    client.post(CHAT, json=long, timeout=0.01)

        await asyncio.to_thread(sync)


async def test_closing_ends_what_is_in_flight(embedded: Any) -> None:
    """After the time given, requests are cut off with an error of the client's library."""
    async with embedded(1, drain_s=0.0) as (router, mock), client_of(router) as http:
        task = asyncio.create_task(http.post(CHAT, json=ask(100_000, max_tokens=7000)))
        async with asyncio.timeout(5):
            while not mock.endpoints[0].paced.live:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await router.aclose(drain_s=0.0)
        with pytest.raises(httpx.ReadError, match="closed"):
            await task
        with pytest.raises(httpx.ConnectError, match="closed"):
            await http.post(CHAT, json=ask())
        router.emit({"type": "run_start", "run_id": "late"})
        router.close()
        with pytest.raises(RuntimeError, match="closed"):
            router.diagnostics()
        assert router.closed
        assert "closed" in repr(router)


async def test_closing_waits_for_what_ends_in_time(embedded: Any) -> None:
    """Calls in flight may end when the router is closed."""
    async with embedded(1) as (router, mock):
        http = client_of(router)
        task = asyncio.create_task(http.post(CHAT, json=ask(30)))
        async with asyncio.timeout(5):
            while not mock.endpoints[0].paced.live:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await router.aclose()
        assert (await task).json()["usage"]["completion_tokens"] == 30
        await http.aclose()


def test_a_program_that_forgets_to_close_ends(tmp_path: Path) -> None:
    """The end of the process closes the router: the trace has its run, and nothing is said."""
    trace = tmp_path / "trace.jsonl"
    program = (
        "import almanac\n"
        f"router = almanac.embed({str(DATA / 'fleets' / 'demo.yaml')!r}, trace={str(trace)!r})\n"
        "router.emit({'type': 'run_start', 'run_id': 'r', 'workflow': 'w'})\n"
        "router.diagnostics()\n"
    )
    done = subprocess.run(  # noqa: S603 our own interpreter and program
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
    (whole,) = load_trace(trace)
    assert isinstance(whole, RunRecord)
    assert whole.run_id == "r"


def test_a_failed_start_is_told(fleet_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong on the router's thread at the start comes to the caller; no thread stays."""

    async def broken(self: Any) -> list[str]:
        raise OSError("no sockets left")

    monkeypatch.setattr(Gateway, "open", broken)
    before = threading.active_count()
    with pytest.raises(OSError, match="no sockets left"):
        embed(fleet_of(1), policy="round_robin")
    assert threading.active_count() == before


def test_wrong_input_leaves_nothing_open(fleet_of: Any, tmp_path: Path) -> None:
    """Bad policies, files and fleets: one clear error, and no thread."""
    before = threading.active_count()
    for arguments, message in (
        ({"policy": "nonsense"}, "nonsense"),
        ({"table": tmp_path / "none.json"}, "none.json"),
        ({"estimates": str(tmp_path / "none.json")}, "none.json"),
        ({"workflows": [tmp_path / "none.json"]}, "none.json"),
    ):
        with pytest.raises(InvalidInput, match=message):
            embed(fleet_of(1), **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"none\.yaml"):
        embed(tmp_path / "none.yaml")
    assert threading.active_count() == before


def test_everything_may_be_given_as_files(fleet_of: Any, tmp_path: Path) -> None:
    """Fleet, table, estimates and graphs from files; a table for another fleet is refused."""
    fleet = load_fleet(DATA / "fleets" / "demo.yaml")

    def empty_table(of: Any) -> DispatchTable:
        ids = tuple(endpoint.id for endpoint in of.endpoints)
        return DispatchTable(fleet_hash=of.content_hash(), endpoints=ids, bounds=(1.0,), rows=())

    table = tmp_path / "table.json"
    save_table(empty_table(fleet), table)
    with embed(
        str(DATA / "fleets" / "demo.yaml"),
        table=str(table),
        estimates=DATA / "demo" / "truth.json",
        workflows=[str(DATA / "demo" / "research.json")],
    ) as router:
        facts = router.diagnostics()
        assert facts["policy"] == "almanac"
        assert list(facts["workflows"].values()) == ["research"]
        assert facts["table_version"]
        router.set_table(table)
        with pytest.raises(InvalidInput, match="fleet"):
            router.set_table(empty_table(fleet_of(1)))
        assert router.diagnostics()["table_version"] == facts["table_version"]


def test_endpoints_that_do_not_answer_are_told(
    fleet_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A fleet that is down at the start is no error: calls wait for it. Bad graphs are logged."""
    with almanac.embed(fleet_of(1), policy="round_robin") as router:
        assert "endpoints do not answer" in caplog.text
        router.register({"schema": "nonsense"})
        assert "workflow graph refused" in caplog.text
