"""A gateway of several worker processes behaves as one, whoever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import asynccontextmanager

import httpx
import pytest

from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.gateway import Gateway
from runtime.mock.server import MockConfig, MockFleet
from runtime.processes.channel import Channel
from runtime.processes.crew import Crew

KEY = {"authorization": "Bearer secret"}
SHORT = {"model": "m", "prompt": "a b c", "max_tokens": 4, "user": "somebody"}
LONG = {
    "model": "m", "prompt": "a", "stream": True, "vllm_xargs": {"mock_output_tokens": 400},
}  # fmt: skip


@pytest.fixture
def crew_of(fleet_of, urls_of):
    """Return a factory of running crews: ``async with crew_of() as (crew, http)``."""

    @asynccontextmanager
    async def running(dilation=20.0, policy="round_robin", **config):
        fleet = fleet_of(2)
        mock = MockFleet(fleet, MockConfig(dilation=dilation), any_port=True)
        async with mock:
            control = Control(
                urls_of(fleet, list(mock.addresses)),
                policy=policy,
                config=GatewayConfig(dilation=dilation, admin_key="secret", **config),
            )
            crew = Crew(Gateway(control), host="127.0.0.1", port=0, workers=2)
            limits = httpx.Limits(max_keepalive_connections=0)
            async with (
                crew,
                httpx.AsyncClient(base_url=crew.address, limits=limits, timeout=20) as http,
            ):
                yield crew, http
            assert control.router.in_flight == 0
            assert control.admission.in_flight == 0
            assert all(run.open_calls == 0 for run in control.runs.active())

    return running


async def eventually(condition):
    """Wait for something that other processes are about to do, however busy the machine is."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the condition belongs to the code under test
            await asyncio.sleep(0.02)


async def workers(http):
    """Return what the diagnostics say of the workers."""
    return (await http.get("/almanac/v1/diagnostics", headers=KEY)).json()["processes"]


async def test_two_workers_are_one_gateway(crew_of):
    """Calls, runs, counters, errors, admin routes and what they change are those of one."""
    async with crew_of() as (crew, http):
        control = crew.gateway.control
        async with httpx.AsyncClient(base_url=crew.address, timeout=20) as other:
            both = (http, other)
            answers = await asyncio.gather(
                *(both[n % 2].post("/v1/completions", json=SHORT) for n in range(40))
            )
            assert {answer.status_code for answer in answers} == {200}
            places = [answer.headers["x-almanac-endpoint"] for answer in answers]
            assert places.count("e0") == places.count("e1") == 20
            assert [run.calls for run in control.runs.active()] == [40]
        await eventually(lambda: control.metrics.requests.get("m", "200") == 40)
        assert "almanac_requests_total{" in (await http.get("/metrics")).text
        refused = await http.post("/v1/completions", json={**SHORT, "model": "none"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        assert (await http.get("/nowhere")).json()["error"]["code"] == 404
        assert (await http.get("/workers")).status_code == 401
        ended = await http.post("/finish_session", json={"session_id": "somebody"})
        assert ended.json() == {"ended": 1}
        assert len(await workers(http)) == 2
        # What is said to one process counts in all of them.
        assert (await http.post("/workers/e0/drain", headers=KEY)).status_code == 200
        answers = [await http.post("/v1/completions", json=SHORT) for _ in range(8)]
        assert {answer.headers["x-almanac-endpoint"] for answer in answers} == {"e1"}
        assert (await http.delete("/workers/e0", headers=KEY)).status_code == 200
        assert (await http.post("/v1/completions", json=SHORT)).status_code == 200


async def test_a_dead_worker_leaks_nothing_and_is_replaced(crew_of):
    """Calls of a worker that is killed are given back; another takes its place and serves."""
    async with crew_of(dilation=0.5) as (crew, http):
        control = crew.gateway.control

        async def read():
            async with http.stream("POST", "/v1/completions", json=LONG) as answer:
                async for _ in answer.aiter_bytes():
                    pass

        streams = [asyncio.create_task(read()) for _ in range(6)]
        await eventually(lambda: control.router.in_flight == 6)
        before = await workers(http)
        for worker in before:
            os.kill(worker["pid"], signal.SIGKILL)
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(result, httpx.HTTPError) for result in results)
        await eventually(lambda: control.router.in_flight == 0)
        assert control.admission.in_flight == 0
        short = {**SHORT, "max_tokens": 1}
        assert (await http.post("/v1/completions", json=short)).status_code == 200
        after = await workers(http)
        assert {one["pid"] for one in after}.isdisjoint(one["pid"] for one in before)


async def test_clients_that_leave_give_everything_back(crew_of):
    """A client that goes in the middle of a stream, or of a wait for its turn, holds nothing."""
    async with crew_of(dilation=0.5, max_in_flight=2) as (crew, http):
        control = crew.gateway.control

        async def read():
            async with http.stream("POST", "/v1/completions", json=LONG) as answer:
                async for _ in answer.aiter_bytes():
                    pass

        streams = [asyncio.create_task(read()) for _ in range(5)]
        await eventually(lambda: control.admission.waiting == 3)
        await eventually(lambda: control.router.in_flight == 2)
        for stream in reversed(streams):
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await eventually(lambda: control.router.in_flight == control.admission.waiting == 0)
        assert control.admission.in_flight == 0


async def test_workers_end_with_their_hub(crew_of):
    """A worker whose hub is gone ends at once."""
    async with crew_of() as (crew, http):
        pids = [one["pid"] for one in await workers(http)]
        for hand in crew._hands:
            hand.session.channel._transport.abort()

        def gone():
            return not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # noqa: PTH110

        await eventually(gone)


async def test_messages_arrive_whole_and_in_order():
    """Messages of any size keep their order, and the end is told once."""
    taken, ended = [], asyncio.Event()
    one, two = socket.socketpair()
    left = await Channel.over(one, taken.append, lambda: None)
    right = await Channel.over(two, taken.append, ended.set)
    for number in range(50):
        left.tell("number", number, "x" * (number * 5000))
    left.close()
    await asyncio.wait_for(ended.wait(), 5)
    assert [message[1] for message in taken] == list(range(50))
    right.tell("nobody", "hears")
    right.close()


async def test_an_endpoint_that_leaves_ends_no_worker_and_hinders_no_new_one(crew_of):
    """Workers go on without it, and so does one that is started after it left."""
    async with crew_of() as (_, http):
        before = await workers(http)
        assert (await http.delete("/workers/e0", headers=KEY)).status_code == 200
        for _ in range(8):
            answer = await http.post("/v1/completions", json=SHORT)
            assert answer.headers["x-almanac-endpoint"] == "e1"
        assert [one["pid"] for one in await workers(http)] == [one["pid"] for one in before]
        for one in before:
            os.kill(one["pid"], signal.SIGKILL)
        answer = await http.post("/v1/completions", json=SHORT)
        assert (answer.status_code, answer.headers["x-almanac-endpoint"]) == (200, "e1")
