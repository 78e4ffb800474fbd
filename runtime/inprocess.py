"""HTTP transports that hand requests to a router in this process instead of to a socket.

The router lives on an event loop of its own, on a thread of its own; clients, sync and async, live
on any other. A request goes over as one function call, its answer comes back as items: a `Head`,
then bytes, then None, or a `Failure` at any point. Whoever stops reading early cancels the request.

The transports serve any client built on httpx, or on httpx2, which has the same interface.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from runtime.links import ClientGone

__all__ = ["Failure", "Head", "Item", "Pipe", "Server", "Transports", "transports"]


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an answer."""

    status: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why no more of the answer comes."""

    reason: str


Item = Head | bytes | Failure | None
Deliver = Callable[[Item], None]


class Server(Protocol):
    """Answers requests on a loop of its own."""

    def submit(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], deliver: Deliver
    ) -> Future[None]:
        """Start to answer a request; cancelling the future stops it.

        Raises
        ------
        RuntimeError
            If the server was closed.
        """
        ...


class Pipe:
    """The way of a streamed answer back to its client; see `runtime.links.Downstream`."""

    __slots__ = ("_deliver", "begun")

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self.begun = False

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Pass status and headers on."""
        self.begun = True
        self.put(Head(status, headers))

    async def write(self, data: bytes) -> None:
        """Pass bytes on."""
        self.put(data)

    def put(self, item: Item) -> None:
        """Pass an item on, or raise `ClientGone` if the client's loop was closed."""
        try:
            self._deliver(item)
        except RuntimeError as error:
            raise ClientGone from error


class Transports(NamedTuple):
    """A transport for sync and one for async clients; neither holds anything to close."""

    sync: Any
    asynchronous: Any


def transports(server: Server, library: ModuleType) -> Transports:
    """Return transports of an HTTP library that lead to a server in this process.

    Parameters
    ----------
    server
        Answers the requests.
    library
        The module ``httpx`` or ``httpx2``.
    """
    sync, asynchronous = _kinds(library)
    return Transports(sync(server), asynchronous(server))


@cache
def _kinds(library: Any) -> tuple[type, type]:
    """Return the transport classes, derived from the library's own as its clients demand."""

    class Stream(library.SyncByteStream):  # type: ignore[misc]
        """An answer's body, read on the client's thread."""

        def __init__(self, receive: Callable[[], Item], ticket: Future[None]) -> None:
            self._receive, self._ticket = receive, ticket

        def __iter__(self) -> Iterator[bytes]:
            while (item := self._receive()) is not None:
                yield _data(item, library)

        def close(self) -> None:
            self._ticket.cancel()

    class AsyncStream(library.AsyncByteStream):  # type: ignore[misc]
        """An answer's body, read on the client's event loop."""

        def __init__(self, receive: Callable[[], Any], ticket: Future[None]) -> None:
            self._receive, self._ticket = receive, ticket

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while (item := await self._receive()) is not None:
                yield _data(item, library)

        async def aclose(self) -> None:
            self._ticket.cancel()

    class SyncTransport(library.BaseTransport):  # type: ignore[misc]
        """For ``Client(transport=...)``."""

        def __init__(self, server: Server) -> None:
            self._server = server

        def handle_request(self, request: Any) -> Any:
            inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
            timeout_s = _timeout_s(request)

            def receive() -> Item:
                try:
                    return inbox.get(timeout=timeout_s)
                except queue.Empty:
                    raise library.ReadTimeout(_SILENT, request=request) from None

            ticket = _submit(self._server, request, request.read(), inbox.put, library)
            try:
                return _response(receive(), Stream(receive, ticket), library)
            except BaseException:
                ticket.cancel()
                raise

    class AsyncTransport(library.AsyncBaseTransport):  # type: ignore[misc]
        """For ``AsyncClient(transport=...)``, on asyncio."""

        def __init__(self, server: Server) -> None:
            self._server = server

        async def handle_async_request(self, request: Any) -> Any:
            inbox: asyncio.Queue[Item] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            timeout_s = _timeout_s(request)

            async def receive() -> Item:
                try:
                    async with asyncio.timeout(timeout_s):
                        return await inbox.get()
                except TimeoutError:
                    raise library.ReadTimeout(_SILENT, request=request) from None

            def deliver(item: Item) -> None:
                loop.call_soon_threadsafe(inbox.put_nowait, item)

            ticket = _submit(self._server, request, await request.aread(), deliver, library)
            try:
                return _response(await receive(), AsyncStream(receive, ticket), library)
            except BaseException:
                ticket.cancel()
                raise

    return SyncTransport, AsyncTransport


_SILENT = "no answer within the client's read timeout"


def _timeout_s(request: Any) -> float | None:
    # Connecting has limits of the router's own.
    timeout_s: float | None = request.extensions.get("timeout", {}).get("read")
    return timeout_s


def _submit(
    server: Server, request: Any, body: bytes, deliver: Deliver, library: Any
) -> Future[None]:
    try:
        return server.submit(request.method, request.url.path, body, request.headers, deliver)
    except RuntimeError as error:
        raise library.ConnectError(str(error), request=request) from error


def _response(item: Item, stream: Any, library: Any) -> Any:
    if isinstance(item, Head):
        return library.Response(item.status, headers=item.headers, stream=stream)
    raise library.ReadError(item.reason if isinstance(item, Failure) else "no answer")


def _data(item: Item, library: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    raise library.ReadError(item.reason if isinstance(item, Failure) else "no answer")
