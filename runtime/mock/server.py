"""A fleet of mock endpoints in one process: one port and one engine per endpoint."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Self
from urllib.parse import urlsplit

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.faults import Fault
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.sim.transfer import Transfers
from runtime.clock import Clock
from runtime.mock.config import MockConfig
from runtime.mock.endpoint import MockEndpoint
from runtime.mock.exchange import KvExchange
from runtime.mock.network import Port
from runtime.mock.routes import make_app

__all__ = ["MockConfig", "MockFleet"]

_log = logging.getLogger(__name__)


class MockFleet:
    """All endpoints of a fleet in one process; an async context manager.

    Parameters
    ----------
    fleet
        Each endpoint needs an address; its port is bound.
    config
        Settings.
    faults
        Faults of each endpoint, in engine seconds after the start.
    host
        Interface to bind; the address in the fleet file only gives the port.
    any_port
        Bind a free port per endpoint instead (tests); see `addresses`.

    Raises
    ------
    InvalidInput
        On construction, if an endpoint has no address and ``any_port`` is off, or two want the
        same port.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: MockConfig | None = None,
        *,
        faults: Mapping[EndpointId, Sequence[Fault]] | None = None,
        host: str = "127.0.0.1",
        any_port: bool = False,
    ) -> None:
        self.config = config or MockConfig()
        self.clock = Clock(self.config.dilation)
        self._faults = faults or {}
        ports = _ports(fleet, any_port=any_port)
        self._exchange = KvExchange(
            fleet,
            self.clock,
            Transfers(setup_s=self.config.transfer_setup_s, lease_s=self.config.lease_s),
        )
        streams = np.random.default_rng(self.config.seed).spawn(len(fleet.endpoints))
        self.endpoints = [
            MockEndpoint(endpoint, self.config, self.clock, self._exchange, rng)
            for endpoint, rng in zip(fleet.endpoints, streams, strict=True)
        ]
        by_id = {mock.endpoint.id: mock for mock in self.endpoints}
        for mock, number in zip(self.endpoints, ports, strict=True):
            mock.port = Port(make_app(mock, by_id), host, number, mock.endpoint.id)
        self._task: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> Sequence[str]:
        """Base addresses in fleet order, once started."""
        return [mock.port.address for mock in self.endpoints]

    async def start(self) -> None:
        """Bind all ports and start the engines; faults count from now.

        Raises
        ------
        InvalidInput
            If a port cannot be bound; the ones bound before are given back.
        """
        try:
            for mock in self.endpoints:
                await mock.port.open()
            self._task = asyncio.create_task(self._exchange.run(), name="kv exchange")
            started_s = self.clock.now_s()
            for mock in self.endpoints:
                mock.start_engine()
                for fault in self._faults.get(mock.endpoint.id, ()):
                    mock.inject(fault.moved(started_s))
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close ports and engines; requests in flight are aborted."""
        for mock in self.endpoints:
            await mock.aclose()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._exchange.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_details: object) -> None:
        for mock in self.endpoints:
            _log.info("mock endpoint closed: %s", json.dumps(mock.stats()))
        await self.aclose()


def _ports(fleet: Fleet, *, any_port: bool) -> list[int]:
    """Return the port of each endpoint; one process cannot bind one twice."""
    if any_port:
        return [0] * len(fleet.endpoints)
    owners: dict[int, Endpoint] = {}
    for endpoint in fleet.endpoints:
        if endpoint.url is None:
            raise InvalidInput(
                "no address to serve",
                where=f"worker {endpoint.id!r}: url",
                remedy="add url: http://127.0.0.1:<port>",
            )
        port = urlsplit(endpoint.url).port
        assert port is not None  # noqa: S101 - the fleet reader demands one
        if port in owners:
            raise InvalidInput(
                f"port {port} is already that of {owners[port].id!r}",
                where=f"worker {endpoint.id!r}: url",
                remedy="all mock endpoints run on this machine: give each its own port",
            )
        owners[port] = endpoint
    return list(owners)
