"""A worker process: ``python -m runtime.processes.worker LISTENER CHANNEL`` (open descriptors).

It accepts from a socket that all workers share, forwards and streams inference calls, and asks the
hub where to send each. Every other request is handed to the hub as it is. It ends when it is told
to, letting calls in flight end, or at once when the hub is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from runtime.endpoints import EndpointLink, UpstreamAnswer
from runtime.forwarding import Forwarder
from runtime.gateway import tls_context
from runtime.inference import INFERENCE, errors, infer, limit_headers, open_runner
from runtime.links import EndpointUnreachable
from runtime.memory import small_reads, steady_heap
from runtime.processes.channel import Channel, Message
from runtime.processes.remote import RemoteDesk, State
from runtime.transport import open_session
from runtime.wire import ApiError

__all__ = ["BACKLOG", "PULSE_S", "Setup", "main"]

PULSE_S = 0.2
"""Between two reports of counters, and of endpoints heard of."""
BACKLOG = 1024
"""Connections that may wait to be accepted."""
_HOP = frozenset(
    {
        "connection", "content-encoding", "content-length", "date", "keep-alive", "server", "te",
        "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
"""Headers of an answer of the hub that this side writes itself."""
_ENDED = frozenset({"connection", "content-encoding", "expect", "transfer-encoding"})
"""Headers of a request that the hub does not get: its body was read already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the hub tells a worker first.

    Parameters
    ----------
    hub_path
        Unix-domain socket where the hub serves every other route.
    certificate, key
        PEM files to serve HTTPS with, or None.
    """

    state: State
    hub_path: str
    certificate: str | None = None
    key: str | None = None


class _Worker:
    """The process, from its set-up to its end."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._stop = asyncio.Event()
        self._set_up: asyncio.Future[Setup] = asyncio.get_running_loop().create_future()
        self._links: list[EndpointLink | _Left] = []
        self._desk: RemoteDesk
        self._session: aiohttp.ClientSession
        self._hub: aiohttp.ClientSession
        self._forwarder: Forwarder

    async def run(self, end: socket.socket) -> None:
        """Serve until told to stop."""
        channel = await Channel.over(end, self._receive, _hub_gone)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the hub's to handle
        setup = await self._set_up
        desk = self._desk
        desk.channel = channel
        config = desk.config
        async with contextlib.AsyncExitStack() as opened:
            self._session = await opened.enter_async_context(
                open_session(
                    connect_timeout_s=config.connect_timeout_s,
                    read_timeout_s=config.read_timeout_s,
                )
            )
            self._hub = await opened.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(setup.hub_path),
                    cookie_jar=aiohttp.DummyCookieJar(),
                )
            )
            self._link()
            self._forwarder = Forwarder(desk, self._links)
            runner = await open_runner(self._app(), config)
            opened.push_async_callback(runner.cleanup)
            tls = tls_context(setup.certificate, setup.key or "") if setup.certificate else None
            # One connection per turn of the loop, so that a burst is spread over the workers.
            await web.SockSite(runner, self._listener, ssl_context=tls, backlog=1).start()
            self._listener.listen(BACKLOG)
            pulse = asyncio.create_task(self._pulse())
            channel.tell("ready")
            await self._stop.wait()
            await runner.cleanup()
            pulse.cancel()
            desk.pulse()
        channel.close()

    def _app(self) -> web.Application:
        app = web.Application(
            client_max_size=self._desk.config.max_body_bytes,
            middlewares=[errors, limit_headers(lambda: self._desk.config)],
        )
        app.add_routes([web.post(path, self._infer) for path in INFERENCE])
        app.add_routes([web.route("*", "/{path:.*}", self._ask_hub)])
        return app

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        return await infer(request, self._forwarder)

    async def _ask_hub(self, request: web.Request) -> web.Response:
        self._desk.pulse()  # what is asked about may be what this worker has counted
        body = await request.read()
        headers = {n: v for n, v in request.headers.items() if n.lower() not in _ENDED}
        try:
            async with self._hub.request(
                request.method,
                f"http://hub{request.raw_path}",
                data=body or None,
                headers=headers,
                allow_redirects=False,
            ) as answer:
                return web.Response(
                    status=answer.status, body=await answer.read(), headers=_kept(answer.headers)
                )
        except (aiohttp.ClientError, ValueError, OSError) as error:
            raise ApiError(400, "The request cannot be handled.") from error

    # The hub's messages

    def _receive(self, message: Message) -> None:
        name = message[0]
        if name in ("placed", "refused"):
            self._desk.answered(message)
        elif name == "heard":
            self._desk.set_heard(message[1])
        elif name == "state":
            self._desk.set_state(message[1])
            if self._links:
                self._link()
        else:
            # The desk has to be there for messages that follow in this very turn of the loop.
            self._desk = RemoteDesk(message[1].state)
            self._set_up.set_result(message[1])

    def _link(self) -> None:
        """Have a link to each endpoint as it is now.

        One that has left the fleet keeps its place and has no address any more. Calls it still
        has end over the link it had; to a worker that came later it is `_Left`.
        """
        for index, endpoint in enumerate(self._desk.endpoints):
            if index == len(self._links):
                self._links.append(_LEFT)
            if endpoint.url is not None and self._links[index].endpoint != endpoint:
                self._links[index] = EndpointLink(endpoint, self._session)

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            self._desk.pulse()


class _Left:
    """In the place of the way to an endpoint that left the fleet; no call is decided for it."""

    endpoint = None

    async def send(self, *_request: object) -> UpstreamAnswer:
        raise EndpointUnreachable("it has left the fleet")

    async def healthy(self) -> bool:
        return False


_LEFT = _Left()


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP}


def _hub_gone() -> None:
    # Without the hub nothing can be decided, and its successor starts workers of its own.
    os._exit(1)


async def _main(listener: int, channel: int) -> None:
    with socket.socket(fileno=listener) as accepting:
        await _Worker(accepting).run(socket.socket(fileno=channel))


def main() -> None:
    """Run the worker that the command line names."""
    small_reads()
    steady_heap()
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
