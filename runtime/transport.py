"""The connection pool to the endpoints.

asyncio sets TCP_NODELAY on its sockets, so each write leaves at once. There is no limit on
connections: how many calls an endpoint gets is the router's decision, not the pool's.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import LineTooLong

from runtime.timeouts import LearnedLimit, Watch
from runtime.wire import ApiError

__all__ = ["TimedConnector", "bind_problem", "open_session", "speak_openai"]

_log = logging.getLogger(__name__)

_CONNECT_FLOOR_S = 1.5
"""Least limit on a connect: a full accept queue drops its first packet, and the second one follows
after a second."""
_CONNECTS_KNOWN = 5
"""Connects after which their limit is learned."""


def open_session(*, connect_timeout_s: float, read_timeout_s: float) -> aiohttp.ClientSession:
    """Return a session for all endpoints; whoever opens it closes it.

    Parameters
    ----------
    connect_timeout_s
        Wall seconds for a connect.
    read_timeout_s
        Wall seconds of silence between two reads of an answer, its first byte included. There is
        no limit on the whole: long answers are legitimate.
    """
    return aiohttp.ClientSession(
        connector=TimedConnector(connect_timeout_s),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=read_timeout_s),
        # Cookies of one client must not reach another; answers are passed on as they are.
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    )


class TimedConnector(aiohttp.TCPConnector):
    """A pool that limits each connect by how long those to the same address usually take.

    aiohttp's own tracing would tell, too, at a tenth of what a request costs; and its own limit
    takes a connect that came about while this process stood still for one that did not.

    Parameters
    ----------
    connect_timeout_s
        Longest connect, wall seconds.
    """

    def __init__(self, connect_timeout_s: float) -> None:
        super().__init__(limit=0, keepalive_timeout=30.0)
        self._connect_timeout_s = connect_timeout_s
        self._limits: dict[tuple[str | None, int | None], LearnedLimit] = {}

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the base class names it
    ) -> ResponseHandler:
        address = req.url.host, req.url.port
        limit = self._limits.get(address)
        if limit is None:
            limit = self._limits[address] = LearnedLimit(
                multiple=3.0, floor_s=_CONNECT_FLOOR_S, cap_s=self._connect_timeout_s
            )
        known = limit.seen >= _CONNECTS_KNOWN
        limit_s = limit.of(0.0) if known else self._connect_timeout_s
        begun_s = time.monotonic()
        async with Watch(lambda: begun_s + limit_s - time.monotonic()):
            connection = await super()._create_connection(req, traces, timeout)
        limit.learn(0.0, time.monotonic() - begun_s)
        return connection


class _Handler(web.RequestHandler):
    """Answers requests that are no HTTP with an error body like any other."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - may quote the request, which may hold a key
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        if isinstance(exc, LineTooLong):
            error = ApiError(431, "The headers are too large.")
        elif status < 500:
            error = ApiError(status, "The request is not valid HTTP.")
        else:
            _log.error("internal error", exc_info=exc)
            error = ApiError(500, "Internal error of the gateway.")
        response = web.Response(
            status=error.status, body=error.body, content_type="application/json"
        )
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Handler(self, loop=self._loop, **self._kwargs)


def speak_openai(runner: web.AppRunner) -> None:
    """Let a server that was set up answer broken requests with OpenAI error bodies."""
    server = runner.server
    assert server is not None  # noqa: S101 - documented
    server.__class__ = _Server  # the application makes it itself, and offers no other way
    application = server.request_handler

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        # The application would answer it before any of its middlewares is asked.
        if request.headers.get("Expect", "100-continue").lower() != "100-continue":
            error = ApiError(417, "Of Expect, only 100-continue is understood.")
            return web.Response(
                status=error.status, body=error.body, content_type="application/json"
            )
        return await application(request)

    server.request_handler = handle


def bind_problem(error: OSError) -> str:
    """Return in a few words why a port could not be bound."""
    # asyncio wraps the reason into a sentence of its own; name resolution has negative numbers.
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return error.strerror or type(error).__name__
