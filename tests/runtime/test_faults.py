"""One of three endpoints goes bad in front of clients that never stop: what they notice of it."""

from __future__ import annotations

import json

import pytest
from multidict import CIMultiDict

from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.desk import LocalDesk
from runtime.forwarding import Forwarder
from runtime.mock.scenarios import SCENARIOS, Load, play
from runtime.wire import DONE, sse

LIMITS = {
    "first_byte_floor_s": 0.3,
    "stall_floor_s": 0.4,
    "health_interval_s": 0.1,
    "breaker_pause_s": 0.05,
    "probe_interval_s": 0.05,
}
NOTICED_S = 3.0
"""Within which a call that is cut off is told so: the limits above, on a slow machine."""


@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - {"slow"}))
async def test_one_bad_endpoint_of_three(stack, until, name):
    """Calls without a first byte succeed, cut ones hear why, and the endpoint is left alone."""
    scenario = SCENARIOS[name]
    async with stack(
        3,
        policy="least_load",
        config=LIMITS,
        dilation=4.0,
        mock_config={"stream_interval": 8},
    ) as s:

        async def attempts():
            return s.control.metrics.selected.get("e1")

        async def detected():
            await until(lambda: not s.control.breakers[1].takes_calls, 0.01)

        score = await play(
            scenario,
            Load(model="m", warm_calls=20, later_calls=200),
            router_url=s.gateway.address,
            fault_url=s.mock.addresses[0],
            victim="e1",
            attempts=attempts,
            detected=detected,
        )
        assert (score.refused, score.lost, score.broken) == (0, 0, 0), score.details
        assert score.error_events == 0 or scenario.cuts
        assert score.slowest_error_s < NOTICED_S
        assert score.later_share < 0.02
        assert s.control.router.in_flight == 0
        assert s.control.admission.in_flight == 0


class Engine:
    """An endpoint that takes its time by a clock of the test: 5 ms a step, times a factor."""

    status = 200
    tokens = 8

    def __init__(self, time):
        self.headers = {"Content-Type": "text/event-stream"}
        self._time = time
        self.factor = 1.0
        self.sent = 0

    async def send(self, path, body, headers):
        self.sent += 1
        return self

    async def chunks(self):
        for _ in range(self.tokens):
            self._time[0] += 0.005 * self.factor
            yield sse({"choices": [{"delta": {"content": "w"}}]})
        usage = {"prompt_tokens": 10, "completion_tokens": self.tokens}
        yield sse({"choices": [], "usage": usage})
        yield DONE

    async def __aenter__(self):
        return self

    async def __aexit__(self, *details):
        pass


class Client:
    """Takes everything."""

    async def start(self, status, headers):
        pass

    async def write(self, data):
        pass


async def test_an_endpoint_that_gets_ten_times_slower_is_left_out(fleet_of):
    """A few slow answers take it out, and it stays out as long as its trials are slow."""
    time = [0.0]
    control = Control(
        fleet_of(3),
        policy="round_robin",
        config=GatewayConfig(),
        clock=Clock(wall=lambda: time[0]),
    )
    engines = [Engine(time) for _ in range(3)]
    forwarder = Forwarder(LocalDesk(control), engines)

    async def ask(calls):
        before = engines[1].sent
        for number in range(calls):
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": f"call {number}"}],
                "stream": True,
            }
            await forwarder.serve(
                "/v1/chat/completions", json.dumps(body).encode(), CIMultiDict(), {}, Client()
            )
        return engines[1].sent - before

    assert await ask(150) == 50
    engines[1].factor = 10.0
    assert 0 < await ask(60) <= 7
    assert (control.breakers[1].down, control.breakers[1].why) == (True, "slow")
    control.guard.recovered(1)
    assert await ask(200) <= 2
    assert control.breakers[1].down
    engines[1].factor = 1.0
    control.guard.recovered(1)
    await ask(400)
    assert await ask(30) == 10
