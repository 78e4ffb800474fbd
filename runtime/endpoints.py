"""The client side towards one endpoint: send, stream back, look after its health."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from planner.domain.fleet import Endpoint
from runtime.links import EndpointBroken, EndpointUnreachable

__all__ = ["EndpointLink", "UpstreamAnswer"]

_PROBE = aiohttp.ClientTimeout(total=2.0)
_BOOTED = re.compile(rb"^process_start_time_seconds(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_KEPT_BACK = frozenset(
    {
        "connection", "content-length", "date", "keep-alive", "proxy-authenticate", "server",
        "te", "trailer", "transfer-encoding", "upgrade", "x-request-id",
    }
)  # fmt: skip
"""Answer headers that end at the gateway, which sets its own."""


class UpstreamAnswer:
    """An answer on its way; see `runtime.links.Upstream`."""

    __slots__ = ("_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = {
            name: value
            for name, value in response.headers.items()
            if name.lower() not in _KEPT_BACK
        }

    async def read(self) -> bytes:
        """Return the whole body."""
        try:
            return await self._response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointBroken(type(error).__name__) from error

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yield bytes as they come from the socket."""
        content = self._response.content
        try:
            while data := await content.readany():
                yield data
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointBroken(type(error).__name__) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A connection whose body was read to the end has gone back to the pool by itself; any
        # other is closed, which makes the engine abort the request.
        self._response.close()


class EndpointLink:
    """The way to one endpoint.

    Parameters
    ----------
    endpoint
        With an address.
    session
        Shared; closed by its owner.
    """

    __slots__ = ("_session", "_url", "_urls", "endpoint")

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        assert endpoint.url is not None  # noqa: S101 - checked by Control
        self.endpoint = endpoint
        self._url = URL(endpoint.url)
        self._session = session
        self._urls: dict[str, URL] = {}  # by route; making one takes as long as a decision

    async def send(self, path: str, body: bytes, headers: Mapping[str, str]) -> UpstreamAnswer:
        """Send a request and return when status and headers have come."""
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._url.with_path(path)
        try:
            response = await self._session.post(
                url, data=body, headers=headers, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as error:
            raise EndpointUnreachable(type(error).__name__) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointBroken(type(error).__name__) from error
        return UpstreamAnswer(response)

    async def booted_s(self) -> float | None:
        """Return when its process started, by its own clock; None if ``/metrics`` does not say."""
        try:
            async with self._session.get(
                self._url.with_path("/metrics"), timeout=_PROBE, allow_redirects=False
            ) as response:
                found = _BOOTED.search(await response.read()) if response.status == 200 else None
            return float(found.group(1)) if found else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    async def metrics(self) -> str | None:
        """Return the text of ``GET /metrics``, None if it does not come within two seconds."""
        try:
            async with self._session.get(
                self._url.with_path("/metrics"), timeout=_PROBE, allow_redirects=False
            ) as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    async def healthy(self) -> bool:
        """Return whether ``GET /health`` answers 200 within two seconds."""
        try:
            async with self._session.get(
                self._url.with_path("/health"), timeout=_PROBE, allow_redirects=False
            ) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False
