"""How a running gateway looks after its endpoints: health checks, restarts, drains; its trace."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import openai
import pytest

from planner.domain.faults import read_fault
from planner.domain.fleet import Fleet
from planner.domain.trace import BranchRecord, load_trace
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.diagnostics import diagnostics, metrics_text
from runtime.health import State
from runtime.keys import KeyedTenancy, read_tenants

OFTEN = {"health_interval_s": 0.01}


def user(text):
    return [{"role": "user", "content": text}]


def client(s):
    return openai.AsyncOpenAI(base_url=s.base_url, api_key="none", max_retries=0)


async def answer(ask, text, tokens=3, **more):
    return await ask.chat.completions.with_raw_response.create(
        model="m",
        messages=user(text),
        extra_body={"vllm_xargs": {"mock_output_tokens": tokens}},
        **more,
    )


def fault(s, index, kind, **settings):
    s.mock.endpoints[index].inject(
        read_fault({"kind": kind, "at_s": s.mock.clock.now_s(), **settings}, "test")
    )


async def test_an_endpoint_that_vanishes_is_noticed_without_any_call(stack, until):
    """Health checks take an endpoint out that nobody has called, and bring it back."""
    async with stack(2, config=OFTEN) as s:
        fault(s, 0, "network_cut", for_s=None)
        await until(lambda: s.control.breakers[0].down, 0.005)
        assert s.control.breakers[0].why == "health"
        assert not s.control.router.view.states[0].healthy
        assert 'almanac_cb_state{endpoint="e0"} 2' in metrics_text(s.control)
        await s.mock.endpoints[0].board.clear()
        await until(lambda: s.control.breakers[0].state is State.HALF_OPEN, 0.005)
        async with client(s) as ask:
            for number in range(4):
                await answer(ask, f"w{number}")
        assert s.control.breakers[0].state is State.CLOSED
        text = metrics_text(s.control)
        assert 'almanac_cb_transitions_total{endpoint="e0",to="half_open"} 1' in text
        assert diagnostics(s.control)["endpoints"][0]["health"]["state"] == "closed"


async def test_a_cut_network_leaves_the_cache_warm_and_a_restart_does_not(stack, until):
    """Whether the process is the same one tells whether its prefixes are still there."""
    async with stack(1, config=OFTEN) as s, client(s) as ask:
        held = s.control.router.view.states[0].prefix
        await answer(ask, "word " * 200)
        known = held.held_tokens
        assert known > 0
        await until(lambda: s.control.guard.booted(0) is not None, 0.005)
        for kind, left in (("network_cut", known), ("cold_restart", 0.0)):
            fault(s, 0, kind, for_s=None)
            await until(lambda: s.control.breakers[0].down, 0.005)
            await s.mock.endpoints[0].board.clear()
            await until(lambda: not s.control.breakers[0].down, 0.005)
            assert held.held_tokens == left
        assert 'almanac_worker_restarts_total{endpoint="e0"} 1' in metrics_text(s.control)


async def test_a_restart_between_two_looks_is_noticed(stack, until):
    """An endpoint that is back before anybody missed it has an empty cache all the same."""
    async with stack(1, config=OFTEN) as s, client(s) as ask:
        held = s.control.router.view.states[0].prefix
        await answer(ask, "word " * 200)
        await until(lambda: s.control.guard.booted(0) is not None, 0.005)
        s.control.endpoint_probed(0, well=True, boot_s=12345.0)
        assert held.held_tokens == 0
        assert s.control.breakers[0].state is State.CLOSED


async def test_a_drained_endpoint_finishes_what_it_has(stack, until):
    """It takes no new call, its stream ends well, and it serves again once the drain is over."""
    async with stack(2, config=OFTEN) as s, client(s) as ask:
        events = await ask.chat.completions.create(
            model="m",
            messages=user("long"),
            stream=True,
            extra_body={"vllm_xargs": {"mock_output_tokens": 300}},
        )
        busy = next(i for i, one in enumerate(s.control.router.view.states) if one.in_flight)
        other = f"e{1 - busy}"
        s.control.drain(busy)
        for number in range(6):
            raw = await answer(ask, f"w{number}")
            assert raw.headers["x-almanac-endpoint"] == other
        assert f'almanac_worker_draining{{endpoint="e{busy}"}} 1' in metrics_text(s.control)
        assert len([chunk async for chunk in events]) > 300
        await until(lambda: s.control.router.in_flight == 0)
        assert s.control.breakers[busy].draining
        s.control.undrain(busy)
        served = {(await answer(ask, f"x{n}")).headers["x-almanac-endpoint"] for n in range(4)}
        assert served == {"e0", "e1"}


async def test_a_drained_fleet_makes_calls_wait(stack, until):
    """With everything draining a call is held, and sent when one is taken back."""
    async with stack(2) as s, client(s) as ask:
        s.control.drain(0)
        s.control.drain(1)
        assert not s.control.ready
        waiting = asyncio.create_task(answer(ask, "a"))
        await until(lambda: s.control.router.held == 1)
        s.control.undrain(1)
        assert (await waiting).headers["x-almanac-endpoint"] == "e1"


@pytest.mark.parametrize("streams", [True, False])
async def test_held_calls_take_one_on_trial_rather_than_nothing(stack, until, streams):
    """When the last closed endpoint goes, those half-open take every call."""
    async with stack(2) as s, client(s) as ask:
        for index in (0, 1):
            s.control.endpoint_failed(index, "test", unreachable=True)
        await until(lambda: not any(one.down for one in s.control.breakers), 0.005)
        for number in range(6):
            assert (await answer(ask, f"w{number}", stream=streams)).status_code == 200


def test_a_refused_client_hears_when_an_endpoint_of_its_model_may_be_back(fleet_of):
    """The time is that of the soonest probe, and of the backlog that will be served before."""
    here, there = fleet_of(2).endpoints
    fleet = Fleet(name="f", endpoints=(here, replace(there, model="n")))
    control = Control(
        fleet,
        policy="round_robin",
        config=GatewayConfig(breaker_pause_s=60.0, probe_interval_s=0.5),
    )
    control.endpoint_failed(0, "test", unreachable=True)
    assert control.retry_after_s("m") == pytest.approx(60.5, abs=1.0)
    assert control.retry_after_s("n") == pytest.approx(0.5)
    assert control.retry_after_s() == pytest.approx(0.5)
    control.admission.waiting = 10
    for ago in range(10):
        control.admission.throughput.add(time.monotonic() - 5.0 + ago / 2)
    assert control.retry_after_s("n") == pytest.approx(0.5 + 5.0, abs=0.5)


def test_a_killed_gateway_leaves_a_readable_trace(tmp_path):
    """Each record is on disk when the next begins: kill -9 loses nothing that was written."""
    path = tmp_path / "t.jsonl"
    story = (
        "import sys, itertools; from pathlib import Path\n"
        "from planner.domain.trace import BranchRecord\n"
        "from runtime.traces import TraceWriter\n"
        "writer = TraceWriter(Path(sys.argv[1]), header={})\n"
        "for number in itertools.count():\n"
        "    writer.write(BranchRecord(run_id=str(number), workflow_hash='h', branch='b' * 5000,\n"
        "                              outcome='o', time_s=1.0))\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", story, str(path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().split()]
    records = load_trace(path) if path.read_bytes().endswith(b"\n") else _whole(path)
    assert all(isinstance(record, BranchRecord) for record in records)
    assert len(records) >= len(said)


def _whole(path):
    """Read a trace whose last line was torn: opening it again cuts that off."""
    from runtime.traces import TraceWriter

    TraceWriter(path, header={}).close()
    return load_trace(path)


async def test_overload_loses_nobody(stack):
    """Of a burst beyond limit and queue each call is answered once: whole, or 429 with a time."""
    async with (
        stack(2, config={"max_in_flight": 4, "queue_limit": 20}) as s,
        httpx.AsyncClient(base_url=s.gateway.address, timeout=30.0) as http,
    ):

        async def one(number):
            body = {
                "model": "m",
                "messages": user(f"w{number}"),
                "vllm_xargs": {"mock_output_tokens": 20},
            }
            return await http.post("/v1/chat/completions", json=body)

        answers = await asyncio.gather(*(one(number) for number in range(60)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) + sum(answer.status_code == 200 for answer in answers) == 60
        assert 0 < len(refused) <= 60 - 24
        for answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["x-almanac-reason"] == "queue_full"
            assert answer.json()["error"]["type"] == "RateLimitError"
        text = metrics_text(s.control)
        count = f'almanac_rejections_total{{reason="queue_full",tenant="default"}} {len(refused)}'
        assert count in text
        assert f"almanac_queue_wait_seconds_count {60 - len(refused)}" in text
        assert diagnostics(s.control)["admission"]["in_flight"] == 0


async def test_each_tenant_has_its_own_limits(stack, until):
    """A tenant at its limit of calls or rate waits or is refused; the other one does not notice."""
    tenancy = KeyedTenancy(
        read_tenants(
            [
                {"name": "small", "key_env": "A", "max_in_flight": 1, "requests_per_minute": 3},
                {"name": "large", "key_env": "B"},
            ],
            "test",
            {"A": "key-a", "B": "key-b"},
        )
    )
    async with stack(1, tenancy=tenancy, changes={"max_num_seqs": 16}) as s:
        small, large = (
            openai.AsyncOpenAI(base_url=s.base_url, api_key=key, max_retries=0)
            for key in ("key-a", "key-b")
        )
        async with small, large:
            first = asyncio.create_task(answer(small, "a", 200))
            await until(lambda: s.control.router.in_flight == 1)
            second = asyncio.create_task(answer(small, "b", 3))
            await until(lambda: s.control.admission.waiting == 1)
            await asyncio.gather(*(answer(large, f"c{n}") for n in range(5)))
            assert s.control.admission.waiting == 1
            assert 'almanac_tenant_queue_depth{tenant="small"} 1' in metrics_text(s.control)
            await asyncio.gather(first, second)
            await answer(small, "d")
            with pytest.raises(openai.RateLimitError) as caught:
                await answer(small, "e")
            assert 10 <= int(caught.value.response.headers["retry-after"]) <= 20
            await answer(large, "f")


async def test_calls_in_a_queue_do_not_rush_to_one_on_trial(stack, until):
    """Calls that wait their turn in the router stay away from an endpoint on trial, too."""
    config = {"breaker_pause_s": 60.0, "health_interval_s": 0.0}
    async with (
        stack(2, policy="fcfs_call", config=config, changes={"max_num_seqs": 1}) as s,
        client(s) as ask,
    ):
        for _ in range(3):
            s.control.endpoint_failed(1, "http_500")
        assert s.control.breakers[1].down
        tasks = [asyncio.create_task(answer(ask, f"w{n}", 40)) for n in range(8)]
        await until(lambda: s.control.router.held >= 5)
        s.control.endpoint_recovered(1)
        assert s.control.breakers[1].state is State.HALF_OPEN
        answers = await asyncio.gather(*tasks)
        assert {raw.headers["x-almanac-endpoint"] for raw in answers} == {"e0"}
