"""One client request from arrival to last byte: identity, decision, relay, records.

Rules
-----
* Until a byte of the answer went to the client, failed attempts are tried again elsewhere (see
  `runtime.attempts`). After that the client gets the error event of the API, never a second answer.
* An endpoint that falls silent in the middle of an answer is given up after a time limit, too.
* A client that leaves cancels the attempt, which closes the connection to the endpoint.

No HTTP library here: both sides are protocols, so tests need no sockets.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from runtime.attempts import Attempts, Begun, Request
from runtime.desk import Arrival, Case, Desk
from runtime.fingerprint import read_prompt
from runtime.limits import Tenant
from runtime.links import Answer, ClientGone, Downstream, EndpointBroken, Link
from runtime.timeouts import Watch
from runtime.wire import (
    DONE,
    ApiError,
    Usage,
    error_body,
    plain_text,
    read_usage,
    sse,
    with_fields,
)

__all__ = ["Forwarder"]

_CHAT = "/v1/chat/completions"
_USAGE_ON_REQUEST = frozenset({_CHAT, "/v1/completions"})
"""Routes that take ``stream_options`` and end a stream with ``[DONE]``."""
_SALTED = frozenset({_CHAT, "/v1/completions", "/v1/responses"})
"""Routes whose prompts are cached by prefix, and that take a ``cache_salt``."""


class Forwarder:
    """Serves inference requests.

    Parameters
    ----------
    desk
        Decides and records.
    links
        One per endpoint, in fleet order.

    Attributes
    ----------
    desk
        As given.
    """

    def __init__(self, desk: Desk, links: Sequence[Link]) -> None:
        self.desk = desk
        self._links = links

    async def serve(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        passed_on: Mapping[str, str],
        downstream: Downstream,
    ) -> Answer | None:
        """Serve one request.

        Parameters
        ----------
        path
            API route, ``/v1/...``.
        headers
            Of the request, by name in lower case.
        passed_on
            Those the endpoint gets.
        downstream
            Where a streamed answer goes.

        Returns
        -------
        Answer or None
            None if the answer was streamed.

        Raises
        ------
        ApiError
            For requests that are answered with an error of the gateway's own.
        ClientGone
            If the client left.
        """
        started = time.perf_counter()
        desk, metrics = self.desk, self.desk.metrics
        model = ""
        status = "499"  # nobody there any more to get an answer
        try:
            tenant = desk.tenancy.of(headers)
            payload = _parse(body)
            asked = _model(payload, desk.models)
            model = asked or desk.models[0]
            request = self._request(path, body, payload, headers, passed_on, asked, started, tenant)
            answer, code = await self._serve(request, tenant, headers, downstream)
            status = str(code)
        except ApiError as error:
            status = str(error.status)
            raise
        else:
            return answer
        finally:
            metrics.requests.inc(model or "other", status)
            metrics.duration.observe(time.perf_counter() - started, model or "other")

    def _request(
        self,
        path: str,
        body: bytes,
        payload: Mapping[str, Any],
        headers: Mapping[str, str],
        passed_on: Mapping[str, str],
        model: str | None,
        started: float,
        tenant: Tenant,
    ) -> Request:
        names = self.desk.config.request_id_headers
        given = (plain_text(headers.get(name.lower())) for name in names)
        request_id = next(filter(None, given), "") or uuid4().hex
        stream = bool(payload.get("stream"))
        if path in _SALTED and not self.desk.config.share_prefixes:
            salt = self.desk.tenancy.salt(tenant, payload.get("cache_salt"))
            if salt is not None:
                body = with_fields(body, payload, {"cache_salt": salt})
                payload = {**payload, "cache_salt": salt}
        adds_usage = False
        if stream and path in _USAGE_ON_REQUEST:
            options = payload.get("stream_options")
            options = options if isinstance(options, dict) else {}
            if not options.get("include_usage"):
                # Token counts are what the router learns from; the client will not see them.
                fields = {"stream_options": {**options, "include_usage": True}}
                body = with_fields(body, payload, fields)
                payload = {**payload, **fields}
                adds_usage = True
        return Request(
            path=path,
            body=body,
            payload=payload,
            headers={**passed_on, "x-request-id": request_id},
            request_id=request_id,
            model=model,
            prompt=read_prompt(payload),
            stream=stream,
            adds_usage=adds_usage,
            has_done=path in _USAGE_ON_REQUEST,
            started=started,
        )

    async def _serve(
        self,
        request: Request,
        tenant: Tenant,
        headers: Mapping[str, str],
        downstream: Downstream,
    ) -> tuple[Answer | None, int]:
        arrival = Arrival(
            headers=headers,
            payload=request.payload,
            prompt=request.prompt,
            model=request.model,
            tenant=tenant,
            request_id=request.request_id,
            stream=request.stream,
        )
        async with self.desk.case(arrival) as case:
            attempts = Attempts(self.desk, case, self._links, request)
            begun = await attempts.begin()
            if isinstance(begun, Answer):
                return begun, begun.status
            async with begun.held:
                return await self._pass_on(request, case, begun, attempts.sent, downstream)

    async def _pass_on(
        self,
        request: Request,
        case: Case,
        begun: Begun,
        sent: int,
        downstream: Downstream,
    ) -> tuple[Answer | None, int]:
        """Give the client an answer that has begun, to its end."""
        headers = {**begun.headers, "x-almanac-attempts": str(sent)}
        if begun.answer is None:
            try:
                return await self._relay(request, case, begun, headers, downstream)
            except (ClientGone, asyncio.CancelledError):
                # Many clients close once they have read the last event: nothing was cut short.
                tap = begun.tap
                if tap is not None and tap.done and not tap.failed:
                    case.finish(begun.seat, tap.usage, tap.chunks)
                raise
        if begun.status < 400:
            case.finish(begun.seat, _usage_of(begun.answer.body), 0)
        return Answer(begun.answer.status, begun.answer.body, headers), begun.status

    async def _relay(
        self,
        request: Request,
        case: Case,
        begun: Begun,
        headers: Mapping[str, str],
        downstream: Downstream,
    ) -> tuple[None, int]:
        """Pass a stream on event by event."""
        desk, seat, patience, tap = self.desk, begun.seat, begun.patience, begun.tap
        assert tap is not None  # noqa: S101 - it is a stream
        assert begun.chunks is not None  # noqa: S101 - as above
        desk.metrics.ttft.observe(time.perf_counter() - request.started, request.model or "other")
        await downstream.start(begun.status, headers)
        if begun.events:
            await downstream.write(begun.events)
        patience.client_took()
        broken, kind, seen = "", "broken", tap.chunks
        try:
            async with Watch(patience.stall_left_s):
                async for data in begun.chunks:
                    out = tap.feed(data)
                    if tap.chunks != seen:  # comments keep a connection alive, not an answer
                        seen = tap.chunks
                        patience.moved()
                    if out:
                        patience.waits_for_client = True
                        await downstream.write(out)
                        patience.client_took()
        except EndpointBroken as error:
            broken = f"broken: {error}"
        except TimeoutError:
            broken, kind = f"silent for {patience.stall_s:.3g} s", "silent"
        if tap.failed:
            broken = "error event"
        elif not broken and request.has_done and not tap.done:
            broken = "ended without [DONE]"
        if not broken:
            if rest := tap.rest():
                await downstream.write(rest)
            patience.ended()
            case.finish(seat, tap.usage, tap.chunks)
            return None, begun.status
        seat.fail(broken)
        desk.endpoint_failed(seat.send.endpoint, broken)
        desk.metrics.cut.inc(desk.endpoints[seat.send.endpoint].id, kind)
        if not tap.failed:
            await downstream.write(
                sse(error_body(502, "The endpoint failed during the answer.", "BadGateway"))
            )
        if not tap.done:
            await downstream.write(DONE)
        return None, 502


def _parse(body: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", kind="Bad Request") from error
    if not isinstance(payload, dict):
        raise ApiError(400, "The body must be a JSON object.", kind="Bad Request")
    return payload


def _model(payload: Mapping[str, Any], models: Sequence[str]) -> str | None:
    """Return the model asked for; None lets any endpoint answer, as vLLM does without a name."""
    model = payload.get("model")
    if model is None:
        return models[0] if len(models) == 1 else None
    if model not in models:
        raise ApiError(404, f"The model `{str(model)[:200]}` does not exist.", param="model")
    return str(model)


def _usage_of(body: bytes) -> Usage | None:
    try:
        return read_usage(json.loads(body))
    except ValueError:
        return None
