"""What keeps the resident set flat."""

from __future__ import annotations

import asyncio
import socket
from asyncio import selector_events

from runtime.memory import READ_BYTES, small_reads


class _Sizes(asyncio.Protocol):
    """Notes how much comes at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.sizes.append(len(data))

    def connection_lost(self, _error: Exception | None) -> None:
        self.ended.set()


async def test_no_read_is_larger_than_said(monkeypatch):
    """All that is sent comes, a bounded piece at a time; this asyncio can be told so."""
    transport = selector_events._SelectorTransport
    monkeypatch.setattr(transport, "max_size", transport.max_size)  # put back afterwards
    assert small_reads()
    near, far = socket.socketpair()
    far.setblocking(False)
    near.setblocking(False)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    loop = asyncio.get_running_loop()
    _, sizes = await loop.create_connection(_Sizes, sock=far)
    await loop.sock_sendall(near, bytes(5 * READ_BYTES))
    near.close()
    await sizes.ended.wait()
    assert sum(sizes.sizes) == 5 * READ_BYTES
    assert max(sizes.sizes) <= READ_BYTES
