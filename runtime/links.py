"""The seams of forwarding: the way to an endpoint, its answer, and the way back to a client.

No HTTP library here: both sides are protocols, so tests need no sockets.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from planner.domain.errors import EndpointFailed

__all__ = [
    "Answer",
    "ClientGone",
    "Downstream",
    "EndpointBroken",
    "EndpointUnreachable",
    "Link",
    "Upstream",
]


class EndpointUnreachable(EndpointFailed):
    """No connection came about; the request was not sent."""


class EndpointBroken(EndpointFailed):
    """The connection broke, or fell silent, before the answer was complete."""


class ClientGone(Exception):
    """The client closed its connection."""


class Upstream(Protocol):
    """An endpoint's answer whose status and headers have come."""

    status: int
    headers: Mapping[str, str]

    async def read(self) -> bytes:
        """Return the whole body, or raise `EndpointBroken`."""
        ...

    def chunks(self) -> AsyncGenerator[bytes]:
        """Yield the body as it comes, or raise `EndpointBroken`."""
        ...

    async def __aenter__(self) -> Self:
        """Return itself."""
        ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the connection back, or close it if the body was not read to its end."""
        ...


class Link(Protocol):
    """The way to one endpoint."""

    async def send(self, path: str, body: bytes, headers: Mapping[str, str]) -> Upstream:
        """Send a request and return when status and headers have come.

        Raises
        ------
        EndpointUnreachable, EndpointBroken
            If they do not come.
        """
        ...

    async def healthy(self) -> bool:
        """Return whether the endpoint says that it is well."""
        ...


class Downstream(Protocol):
    """The way back to the client, for streamed answers."""

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send status and headers."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes at once, or raise `ClientGone`."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is sent as a whole."""

    status: int
    body: bytes
    headers: Mapping[str, str]
