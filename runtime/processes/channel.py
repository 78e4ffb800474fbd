"""Messages between two processes of ours over a Unix-domain socket.

A frame is four bytes of length and one pickled tuple whose first item names the message. What is
told in one turn of the event loop leaves in one write. Both ends are processes of the same program
and user, joined by a socket pair that nobody else can open; so pickle, which must never read what
strangers send, is in order here.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["Channel"]

_LENGTH = 4

Message = tuple[Any, ...]


class Channel(asyncio.Protocol):
    """One end.

    Parameters
    ----------
    receive
        Takes each message, in order.
    lost
        Called once, when the other end is gone.
    """

    def __init__(self, receive: Callable[[Message], None], lost: Callable[[], None]) -> None:
        self._receive = receive
        self._lost = lost
        self._transport: asyncio.Transport
        self._loop: asyncio.AbstractEventLoop
        self._outbox: list[bytes] = []
        self._inbox = bytearray()

    @classmethod
    async def over(
        cls, end: socket.socket, receive: Callable[[Message], None], lost: Callable[[], None]
    ) -> Channel:
        """Return a channel over one end of a socket pair, which is closed with it."""
        end.setblocking(False)
        _, channel = await asyncio.get_running_loop().create_unix_connection(
            lambda: cls(receive, lost), sock=end
        )
        return channel

    def tell(self, *message: Any) -> None:
        """Send a message, after all told before; to an end that is gone, nothing.

        Raises
        ------
        RecursionError
            If it is nested too deeply; nothing is sent.
        """
        data = pickle.dumps(message, protocol=5)
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(len(data).to_bytes(_LENGTH, "little"))
        self._outbox.append(data)

    def close(self) -> None:
        """Send what was told, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        data, self._outbox = b"".join(self._outbox), []
        if data and not self._transport.is_closing():
            self._transport.write(data)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a stream socket
        self._transport = transport
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        """Hand on the messages that are complete."""
        inbox = self._inbox
        inbox += data
        begin = 0
        while len(inbox) - begin >= _LENGTH:
            end = begin + _LENGTH + int.from_bytes(inbox[begin : begin + _LENGTH], "little")
            if len(inbox) < end:
                break
            message = pickle.loads(inbox[begin + _LENGTH : end])  # noqa: S301 - see above
            begin = end
            self._receive(message)
        del inbox[:begin]

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        """Tell the owner."""
        self._lost()
