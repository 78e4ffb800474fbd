"""An engine that answers at once, so that what is left to measure is the way to it.

``python -m runtime.bench.instant PORT`` serves chat completions on loopback: a short answer, or,
for a request that asks for a stream, `EVENTS` events, each written on its own.
"""

from __future__ import annotations

import asyncio
import json
import sys

__all__ = ["BODY", "EVENTS", "STREAM_BODY", "main"]

EVENTS = 20
_MESSAGES = [{"role": "user", "content": "word " * 200}]
BODY = json.dumps({"model": "m", "messages": _MESSAGES, "max_tokens": 8}).encode()
"""A request of a thousand characters."""
STREAM_BODY = json.dumps(
    {"model": "m", "messages": _MESSAGES, "max_tokens": EVENTS, "stream": True}
).encode()
"""The same, streamed."""
_USAGE = {"prompt_tokens": 200, "completion_tokens": 1, "total_tokens": 201}
_ANSWER = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi"},
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    }
).encode()
_WHOLE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    % len(_ANSWER)
    + _ANSWER
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_EVENT = _chunk(
    b"data: "
    + json.dumps(
        {
            "id": "x",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}],
        }
    ).encode()
    + b"\n\n"
)
_LAST = (
    _chunk(
        b"data: "
        + json.dumps({"id": "x", "model": "m", "choices": [], "usage": _USAGE}).encode()
        + b"\n\n"
    )
    + _chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


class _Instant(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - of a TCP server
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self._data) < end + 4 + length:
                return
            body = self._data[end + 4 : end + 4 + length]
            self._data = self._data[end + 4 + length :]
            if not head.startswith(b"post"):
                self._transport.write(_EMPTY)
            elif b'"stream": true' in body:
                self._transport.write(_STREAM_HEAD)
                for _ in range(EVENTS):
                    self._transport.write(_EVENT)
                self._transport.write(_LAST)
            else:
                self._transport.write(_WHOLE)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Instant, "127.0.0.1", port)
    await server.serve_forever()


def main(port: int) -> None:
    """Serve until the process is ended."""
    asyncio.run(_serve(port))


if __name__ == "__main__":
    main(int(sys.argv[1]))
