"""The port of one endpoint: opened, closed, and torn from its clients."""

from __future__ import annotations

import asyncio
import socket
import struct

from aiohttp import web

from planner.domain.errors import InvalidInput
from runtime.transport import bind_problem

__all__ = ["Port"]

_ACCEPT_TURNS = 4
_RESET = struct.pack("ii", 1, 0)  # linger for no time: closing sends RST


class Port:
    """A listening port with its connections.

    Parameters
    ----------
    app
        What answers.
    host, number
        Where to bind; 0 takes a free port and keeps it.
    owner
        Named in errors.
    """

    def __init__(self, app: web.Application, host: str, number: int, owner: str) -> None:
        # A client that leaves cancels its handler, which aborts the request.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        self._listener: asyncio.Server | None = None
        self._host = host
        self.number = number
        self._owner = owner

    @property
    def address(self) -> str:
        """Its base address."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.number}"

    @property
    def connected(self) -> int:
        """Connections that are open."""
        return 0 if self._runner.server is None else len(self._runner.server.connections)

    async def open(self) -> None:
        """Listen; nothing happens if it does.

        Raises
        ------
        InvalidInput
            If the port cannot be bound.
        """
        if self._listener is not None:
            return
        if self._runner.server is None:
            await self._runner.setup()
        assert self._runner.server is not None  # noqa: S101 - set up
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(self._runner.server, self._host, self.number)
        except OSError as error:
            raise InvalidInput(
                f"port {self.number} cannot be bound ({bind_problem(error)})",
                where=f"worker {self._owner!r}: url",
                remedy="stop what uses it, or change the port in the fleet file or --host",
            ) from error
        self.number = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listen no longer; connections stay."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        loop = asyncio.get_running_loop()
        try:
            # Connections accepted a moment ago get their transport in the next turns of the loop.
            # asyncio forgets those whose server is closed before, and whoever hangs up after this
            # must not miss them.
            for one in listener.sockets:
                loop.remove_reader(one.fileno())
            for _ in range(_ACCEPT_TURNS):
                await asyncio.sleep(0)
        finally:
            listener.close()

    def finish(self) -> None:
        """Let each connection end with the answer under way, or now."""
        if self._runner.server is not None:
            self._runner.server.pre_shutdown()

    def hang_up(self, *, reset: bool) -> None:
        """End all connections: with a reset, or as a process does that exits."""
        if self._runner.server is None:
            return
        for connection in self._runner.server.connections:
            transport = connection.transport
            if transport is None:
                continue
            own = transport.get_extra_info("socket")
            if reset and own is not None:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()

    async def aclose(self) -> None:
        """Close port and connections for good."""
        await self.close()
        await self._runner.cleanup()
