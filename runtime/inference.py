"""Answering inference requests over HTTP, in a gateway of one process and in workers alike."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from planner.domain.errors import InvalidInput
from runtime.config import GatewayConfig
from runtime.forwarding import Forwarder
from runtime.keys import bearer, same_key
from runtime.links import ClientGone
from runtime.transport import speak_openai
from runtime.wire import ApiError, plain_text

__all__ = [
    "INFERENCE",
    "KEPT_BACK",
    "error_response",
    "errors",
    "infer",
    "is_admin",
    "limit_headers",
    "open_runner",
]

_log = logging.getLogger(__name__)

INFERENCE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
KEPT_BACK = frozenset(
    {
        "accept-encoding", "connection", "content-encoding", "content-length", "expect", "host",
        "keep-alive", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade",
        "x-request-id",
    }
)  # fmt: skip
"""Request headers that end at the gateway."""
_KEYS = frozenset({"authorization", "x-api-key"})
_LEAST_PARSED_BYTES = 2**16


async def infer(request: web.Request, forwarder: Forwarder) -> web.StreamResponse:
    """Answer one inference request."""
    desk = forwarder.desk
    body = await request.read()
    headers: dict[str, str] = {}  # looked at dozens of times, which a plain dictionary answers best
    passed_on: dict[str, str] = {}
    for name, value in request.headers.items():
        lower = name.lower()
        headers.setdefault(lower, value)
        if lower not in KEPT_BACK and (value.isascii() or _is_text(value)):
            passed_on[name] = value
    if is_admin(request, desk.config) or desk.tenancy.keyed:
        # Keys of the gateway are none of the endpoints' business.
        passed_on = {n: v for n, v in passed_on.items() if n.lower() not in _KEYS}
    downstream = _ClientStream(request)
    try:
        answer = await forwarder.serve(request.path, body, headers, passed_on, downstream)
    except ClientGone:
        return downstream.abandoned()
    if answer is None:
        return await downstream.finish()
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)


def is_admin(request: web.Request, config: GatewayConfig) -> bool:
    """Return whether a request bears the admin key."""
    key = config.admin_key
    return key is not None and same_key(bearer(request.headers), key)


async def open_runner(app: web.Application, config: GatewayConfig) -> web.AppRunner:
    """Return what serves an application by the gateway's rules, set up; its owner cleans it up."""
    most_parsed = max(_LEAST_PARSED_BYTES, 4 * config.max_header_bytes)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves cancels its attempt
        access_log=None,
        shutdown_timeout=config.drain_s,
        lingering_time=2.0,  # for the rest of a body that nobody wants
        # The middleware refuses politely what is larger than allowed; this is the most the parser
        # takes in at all.
        max_field_size=most_parsed,
        max_line_size=most_parsed,
    )
    await runner.setup()
    speak_openai(runner)
    return runner


def limit_headers(config: Callable[[], GatewayConfig]) -> Middleware:
    """Return a middleware that refuses headers larger than the configuration in use allows."""

    @web.middleware
    async def limit(request: web.Request, handler: Handler) -> web.StreamResponse:
        most = config().max_header_bytes
        sizes = [len(name) + len(value) for name, value in request.raw_headers]
        if sum(sizes) > most or len(request.raw_path) > most:
            raise ApiError(431, f"The headers are larger than {most} bytes.")
        return await handler(request)

    return limit


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into an OpenAI error body; internal ones say nothing of their cause."""
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(request, error)
    except InvalidInput as error:
        return error_response(request, ApiError(400, str(error)))
    except RecursionError:
        return error_response(request, ApiError(400, "The body is nested too deeply."))
    except web.RequestPayloadError:
        return error_response(request, ApiError(400, "The body is not encoded as it says."))
    except web.HTTPException as error:
        return error_response(request, ApiError(error.status, error.reason))
    except Exception:  # noqa: BLE001 - the last resort; the log has the traceback
        _log.exception("internal error", extra={"path": request.path})
        return error_response(request, ApiError(500, "Internal error of the gateway."))


def error_response(request: web.Request, error: ApiError) -> web.Response:
    """Return an error as clients expect it, with their request's id."""
    response = web.Response(
        status=error.status,
        body=error.body,
        content_type="application/json",
        headers=error.headers,
    )
    if request_id := plain_text(request.headers.get("x-request-id")):
        response.headers["x-request-id"] = request_id
    return response


def _is_text(value: str) -> bool:
    """Return whether a header's value is UTF-8; others cannot be sent on."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _ClientStream:
    """A streamed answer to one client; see `runtime.links.Downstream`."""

    __slots__ = ("_request", "_response")

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response: web.StreamResponse | None = None

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self._response = web.StreamResponse(status=status, headers=headers)
        try:
            await self._response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGone from error

    async def write(self, data: bytes) -> None:
        assert self._response is not None  # noqa: S101 - started before the first write
        try:
            await self._response.write(data)
        except ConnectionError as error:
            raise ClientGone from error

    def abandoned(self) -> web.StreamResponse:
        """Return what the server needs to hear of a client that left."""
        return self._response or web.Response(status=499)

    async def finish(self) -> web.StreamResponse:
        assert self._response is not None  # noqa: S101 - as above
        with contextlib.suppress(ConnectionError):
            await self._response.write_eof()
        return self._response
