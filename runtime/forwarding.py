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

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any
from uuid import uuid4

from planner.dispatch.events import Call
from runtime.admission import Asked, Pass
from runtime.attempts import Attempts, Begun, Request
from runtime.control import Control
from runtime.dispatcher import Ticket
from runtime.fingerprint import read_prompt
from runtime.hints import deadline_s, head_start_s
from runtime.limits import Tenant
from runtime.links import Answer, Downstream, EndpointBroken, Link
from runtime.runs import Run
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
    control
        Decides and records.
    links
        One per endpoint, in fleet order.
    """

    def __init__(self, control: Control, links: Sequence[Link]) -> None:
        self._control = control
        self._links = links
        self._ids = count(1)
        self._process = uuid4().hex[:6]  # call ids differ between restarts of one trace

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
            Of the request, with case-insensitive look-up.
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
        control, metrics = self._control, self._control.metrics
        model = ""
        status = "499"  # nobody there any more to get an answer
        try:
            tenant = control.tenancy.of(headers)
            payload = _parse(body)
            asked = _model(payload, control.models)
            model = asked or control.models[0]
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
        names = self._control.config.request_id_headers
        given = (plain_text(headers.get(name)) for name in names)
        request_id = next(filter(None, given), "") or uuid4().hex
        stream = bool(payload.get("stream"))
        if path in _SALTED and not self._control.config.share_prefixes:
            salt = self._control.tenancy.salt(tenant, payload.get("cache_salt"))
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
        control = self._control
        ready_s = control.clock.now_s()
        identity = control.identify(headers, request.payload, request.prompt, tenant)
        run = control.begin_call(identity, tenant)
        hints = control.hints(headers, request.payload, tenant)
        age_s = ready_s - run.since_s
        ahead_s = head_start_s(hints, age_s=age_s)
        due_s = deadline_s(hints, age_s=age_s)
        request.span = span = control.tracing.start(
            "call",
            {"run_id": run.run_id, "node": identity.node, "request_id": request.request_id},
            parent=None if "traceparent" in headers else run.span,
            headers=headers,
        )
        request.head_start_s = ahead_s
        try:
            tokens, per_item = control.scale.tokens(request.prompt, request.model)
            max_tokens = _max_tokens(request.payload)
            room_tokens = control.room_tokens(request.model)
            if tokens + (max_tokens or 1) > room_tokens:
                # By our estimate no endpoint can hold it, so it would wait in vain. An endpoint
                # counts exactly, and refuses in its own words what is really too long.
                tokens, max_tokens = min(tokens, room_tokens - 1), None
            call = Call(
                call_id=f"{self._process}-{next(self._ids)}",
                run_id=run.run_id,
                workflow_hash=run.workflow_hash,
                node=identity.node,
                site=identity.site,
                prompt_tokens=tokens,
                prefix=request.prompt.chain,
                prefix_tokens=per_item,
                run_arrival_s=run.since_s - ahead_s,
                ready_s=ready_s,
                visit=identity.visit,
                max_tokens=max_tokens,
                session_id=run.session_id,
                model=request.model,
                tenant=tenant.name,
                hinted_tokens=hints.output_tokens,
                deadline_s=None if due_s is None else due_s + ahead_s,
            )
            urgency = hints.priority or 0
            if control.tenancy.keyed:
                # A client may step back for others of its tenant, not ahead of other tenants.
                urgency = min(0, urgency)
            asked = Asked(
                tenant=tenant,
                begun=run.admitted,
                service_s=control.service_s(call),
                tokens=tokens + control.router.forecaster.of(call).output_tokens,
                priority=tenant.priority + urgency,
            )
            with await control.admission.enter(asked) as admitted:
                run.admitted = True
                attempts = Attempts(
                    control,
                    self._links,
                    request,
                    call,
                    client_attempt=identity.attempt,
                    waited_s=admitted.waited_s,
                )
                begun = await attempts.begin()
                if isinstance(begun, Answer):
                    return begun, begun.status
                async with begun.held:
                    return await self._pass_on(request, begun, attempts.sent, admitted, downstream)
        finally:
            span.end()
            run.open_calls -= 1
            run.last_s = control.clock.now_s()
            if identity.final:
                self._end(run)

    def _end(self, run: Run) -> None:
        if run.open_calls == 0:
            self._control.end_run(run.run_id)

    async def _pass_on(
        self,
        request: Request,
        begun: Begun,
        sent: int,
        admitted: Pass,
        downstream: Downstream,
    ) -> tuple[Answer | None, int]:
        """Give the client an answer that has begun, to its end."""
        headers = {**begun.headers, "x-almanac-attempts": str(sent)}
        if begun.answer is None:
            return await self._relay(request, begun, headers, admitted, downstream)
        if begun.status < 400:
            self._finished(request, begun.ticket, _usage_of(begun.answer.body), 0, admitted)
        return replace(begun.answer, headers=headers), begun.status

    async def _relay(
        self,
        request: Request,
        begun: Begun,
        headers: Mapping[str, str],
        admitted: Pass,
        downstream: Downstream,
    ) -> tuple[None, int]:
        """Pass a stream on event by event."""
        control, ticket, patience, tap = self._control, begun.ticket, begun.patience, begun.tap
        assert tap is not None  # noqa: S101 - it is a stream
        assert begun.chunks is not None  # noqa: S101 - as above
        control.metrics.ttft.observe(
            time.perf_counter() - request.started, request.model or "other"
        )
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
            self._finished(request, ticket, tap.usage, tap.chunks, admitted)
            return None, begun.status
        ticket.fail(broken)
        control.endpoint_failed(ticket.send.endpoint, broken)
        control.metrics.cut.inc(control.fleet.endpoints[ticket.send.endpoint].id, kind)
        if not tap.failed:
            await downstream.write(
                sse(error_body(502, "The endpoint failed during the answer.", "BadGateway"))
            )
        if not tap.done:
            await downstream.write(DONE)
        return None, 502

    def _finished(
        self,
        request: Request,
        ticket: Ticket,
        usage: Usage | None,
        chunks: int,
        admitted: Pass,
    ) -> None:
        control = self._control
        if usage is None:
            # Without usage a stream's events are the best count there is.
            ticket.finish(output_tokens=chunks, prompt_tokens=None, cached_tokens=None)
            admitted.used(ticket.call.prompt_tokens + chunks)
            return
        if usage.response_id is not None:
            control.runs.answered(usage.response_id, ticket.call.run_id)
        prompt_tokens = usage.prompt_tokens
        if prompt_tokens is not None:
            control.scale.learn(request.model, request.prompt.size_bytes, prompt_tokens)
        ticket.finish(
            output_tokens=usage.output_tokens,
            prompt_tokens=prompt_tokens,
            cached_tokens=usage.cached_tokens,
        )
        if prompt_tokens is None:
            prompt_tokens = ticket.call.prompt_tokens
        admitted.used(prompt_tokens + usage.output_tokens)


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


def _max_tokens(payload: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = payload.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _usage_of(body: bytes) -> Usage | None:
    try:
        return read_usage(json.loads(body))
    except ValueError:
        return None
