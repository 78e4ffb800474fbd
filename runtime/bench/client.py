"""A client that costs little: one keep-alive connection, no library."""

from __future__ import annotations

import asyncio
import time

from planner.domain.errors import EndpointFailed

__all__ = ["Connection", "hammer"]


class Connection(asyncio.Protocol):
    """One connection, one request at a time.

    Attributes
    ----------
    data
        The last answer, head included.
    """

    def __init__(self) -> None:
        self.data = b""
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to a port of loopback."""
        _, protocol = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return protocol

    def close(self) -> None:
        """Close it."""
        self._transport.close()

    async def post(self, body: bytes, path: bytes = b"/v1/chat/completions") -> float:
        """Send a request; return the seconds until its answer was complete.

        Raises
        ------
        EndpointFailed
            If the answer is an error, or the connection ends before it.
        """
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % path
        self.data = b""
        done = self._done = asyncio.get_running_loop().create_future()
        begun_s = time.perf_counter()
        self._transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await done
        took_s = time.perf_counter() - begun_s
        if not self.data.startswith(b"HTTP/1.1 200"):
            raise EndpointFailed(f"the answer is {self.data[:300]!r}")
        return took_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a TCP connection
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Look whether the answer is complete."""
        self.data = self.data + data if self.data else data
        if self._done is None or self._done.done():
            return
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        _, sized, rest = head.lower().partition(b"content-length:")
        whole = (
            len(body) >= int(rest.split(b"\r\n")[0]) if sized else self.data.endswith(b"0\r\n\r\n")
        )
        if whole:
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what was under way."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(EndpointFailed(f"the connection ended: {error}"))


async def hammer(port: int, body: bytes, requests: int) -> list[float]:
    """Send requests one after the other on one connection; return the seconds of each."""
    connection = await Connection.open(port)
    try:
        return [await connection.post(body) for _ in range(requests)]
    finally:
        connection.close()
