"""Small fleets, and mock endpoints with the gateway in front of them in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.gateway import Gateway
from runtime.mock.server import MockConfig, MockFleet

DILATION = 50.0
ADMIN_KEY = "secret"


def make_fleet(count: int = 2, **changes: Any) -> Fleet:
    """Return equal endpoints ``e0``, ``e1``, ... of model ``m``."""
    row = LatencyRow(
        prefill_base_ms=3.0,
        prefill_us_per_token=20.0,
        prefill_ns_per_token_sq=0.5,
        decode_base_ms=6.0,
        decode_us_per_call=10.0,
        decode_ns_per_kv_token=40.0,
    )
    values: dict[str, Any] = {"kv_blocks": 500, "max_num_seqs": 4, "scheduling": "fcfs"} | changes
    return Fleet(
        name="test",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{position}"),
                model="m",
                gpu="H100",
                latency=row,
                url=f"http://127.0.0.1:{9000 + position}",
                **values,
            )
            for position in range(count)
        ),
    )


def with_urls(fleet: Fleet, urls: list[str]) -> Fleet:
    """Return the fleet with other addresses."""
    return Fleet(
        name=fleet.name,
        endpoints=tuple(
            replace(endpoint, url=url) for endpoint, url in zip(fleet.endpoints, urls, strict=True)
        ),
    )


@dataclass(frozen=True)
class Stack:
    """Everything between a client and the engines."""

    mock: MockFleet
    control: Control
    gateway: Gateway

    @property
    def base_url(self) -> str:
        return f"{self.gateway.address}/v1"


async def wait_until(condition: Callable[[], Any], pause_s: float = 0.0) -> None:
    """Wait for something that is about to happen, five seconds at most."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the condition belongs to the code under test
            await asyncio.sleep(pause_s)


@pytest.fixture
def until() -> Callable[..., Any]:
    """Return `wait_until`."""
    return wait_until


@pytest.fixture
def fleet_of() -> Callable[..., Fleet]:
    """Return `make_fleet`."""
    return make_fleet


@pytest.fixture
def urls_of() -> Callable[[Fleet, list[str]], Fleet]:
    """Return `with_urls`."""
    return with_urls


@pytest.fixture
def stack() -> Callable[..., AbstractAsyncContextManager[Stack]]:
    """Return a factory of running stacks: ``async with stack(count=2, policy=...) as s``."""

    @asynccontextmanager
    async def running(
        count: int = 2,
        *,
        policy: str = "round_robin",
        config: dict[str, Any] | None = None,
        mock_config: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
        dilation: float = DILATION,
        **control: Any,
    ) -> AsyncIterator[Stack]:
        fleet = make_fleet(count, **(changes or {}))
        mock = MockFleet(fleet, MockConfig(dilation=dilation, **(mock_config or {})), any_port=True)
        async with mock:
            state = Control(
                with_urls(fleet, list(mock.addresses)),
                policy=policy,
                config=GatewayConfig(
                    dilation=dilation,
                    admin_key=ADMIN_KEY,
                    **({"probe_interval_s": 0.01, "breaker_pause_s": 0.01} | (config or {})),
                ),
                **control,
            )
            async with Gateway(state, port=0) as gateway:
                yield Stack(mock, state, gateway)
                assert state.router.in_flight == 0
                assert state.router.held == 0
            assert all(one.paced.live == 0 for one in mock.endpoints)

    return running
