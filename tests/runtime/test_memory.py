"""What keeps the resident set flat."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import subprocess
import sys
from asyncio import selector_events

import pytest

from runtime.memory import READ_BYTES, small_reads, steady_heap

_COUNT = """
import ctypes
from runtime.memory import steady_heap
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
{first}
for _ in range(3):
    bytearray(1 << 20)
before = libc.mallinfo2().d
kept = bytearray(1 << 20)
print(libc.mallinfo2().d - before)
"""


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
    loop = asyncio.get_running_loop()
    _, sizes = await loop.create_connection(_Sizes, sock=far)
    await loop.sock_sendall(near, bytes(5 * READ_BYTES))
    near.close()
    await sizes.ended.wait()
    assert sum(sizes.sizes) == 5 * READ_BYTES
    assert max(sizes.sizes) <= READ_BYTES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts blocks as glibc does")
def test_a_large_block_has_pages_of_its_own_also_after_others_were_freed():
    """Once one was freed they come from the heap; after `steady_heap` they do not."""
    if not steady_heap() or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("another C library")
    mapped = [
        subprocess.run(  # noqa: S603 - our own text
            [sys.executable, "-c", _COUNT.format(first=first)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for first in ("", "steady_heap()")
    ]
    assert mapped == ["0", "1"]
