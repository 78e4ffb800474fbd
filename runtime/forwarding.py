"""One client request from arrival to last byte: identity, decision, attempts, relay, records.

Rules
-----
* Until a byte of the answer went to the client, a failed attempt is tried again elsewhere: a
  refused connect, a broken answer, an answer of 5xx. After that the client gets the error event of
  the API, never a second answer.
* Answers of 4xx are the client's affair; they are passed on and count against nobody.
* Each attempt is a call of its own for the router, and its ticket is settled whatever happens. A
  client that leaves cancels the attempt, which closes the connection to the endpoint.

No HTTP library here: both sides are protocols, so tests need no sockets.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

from planner.dispatch.events import Call
from planner.domain.errors import EndpointFailed, NoEndpointAvailable
from runtime.control import Control
from runtime.dispatcher import Ticket
from runtime.fingerprint import Prompt, read_prompt
from runtime.identity import identify
from runtime.runs import Run
from runtime.wire import DONE, ApiError, SseTap, Usage, error_body, read_usage, sse, with_fields

__all__ = [
    "Answer",
    "ClientGone",
    "Downstream",
    "EndpointBroken",
    "EndpointUnreachable",
    "Forwarder",
    "Link",
    "Upstream",
]

_log = logging.getLogger(__name__)

_CHAT = "/v1/chat/completions"
_USAGE_ON_REQUEST = frozenset({_CHAT, "/v1/completions"})
"""Routes that take ``stream_options`` and end a stream with ``[DONE]``."""


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

    def chunks(self) -> AsyncIterator[bytes]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failed:
    """An attempt that may be tried again; ``answer`` is what the endpoint said, if anything."""

    reason: str
    unreachable: bool = False
    answer: Answer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    path: str
    body: bytes
    payload: Mapping[str, Any]
    headers: Mapping[str, str]
    request_id: str
    model: str | None
    prompt: Prompt
    stream: bool
    adds_usage: bool
    started: float

    @property
    def has_done(self) -> bool:
        return self.path in _USAGE_ON_REQUEST


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
            payload = _parse(body)
            asked = _model(payload, control.models)
            model = asked or control.models[0]
            request = self._request(path, body, payload, headers, passed_on, asked, started)
            answer, code = await self._serve(request, headers, downstream)
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
    ) -> _Request:
        request_id = headers.get("x-request-id") or uuid4().hex
        stream = bool(payload.get("stream"))
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
        return _Request(
            path=path,
            body=body,
            payload=payload,
            headers={**passed_on, "x-request-id": request_id},
            request_id=request_id,
            model=model,
            prompt=read_prompt(payload),
            stream=stream,
            adds_usage=adds_usage,
            started=started,
        )

    async def _serve(
        self, request: _Request, headers: Mapping[str, str], downstream: Downstream
    ) -> tuple[Answer | None, int]:
        control = self._control
        ready_s = control.clock.now_s()
        identity = identify(headers, request.payload, request.prompt)
        run = control.run_of(identity)
        run.calls += 1
        run.open_calls += 1
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
                run_arrival_s=run.arrival_s,
                ready_s=ready_s,
                visit=identity.visit,
                max_tokens=max_tokens,
                session_id=run.session_id,
                model=request.model,
            )
            return await self._attempts(request, call, identity.attempt, downstream)
        finally:
            run.open_calls -= 1
            run.last_s = control.clock.now_s()
            if identity.final:
                self._end(run)

    def _end(self, run: Run) -> None:
        if run.open_calls == 0:
            self._control.end_run(run.run_id)

    async def _attempts(
        self, request: _Request, call: Call, client_attempt: int, downstream: Downstream
    ) -> tuple[Answer | None, int]:
        control = self._control
        exclude: frozenset[int] = frozenset()
        for attempt in count():
            # The router knows each attempt as a call of its own.
            tried = call if attempt == 0 else replace(call, call_id=f"{call.call_id}.{attempt}")
            try:
                ticket = await control.place(tried, exclude, client_attempt + attempt)
            except NoEndpointAvailable as error:
                raise ApiError(
                    503, f"{error}. Try again later.", retry_after_s=control.retry_after_s()
                ) from error
            if attempt == 0:
                control.metrics.overhead.observe(time.perf_counter() - request.started)
            index = ticket.send.endpoint
            with ticket:
                outcome = await self._attempt(request, ticket, attempt + 1, downstream)
            if not isinstance(outcome, _Failed):
                return outcome
            endpoint_id = control.fleet.endpoints[index].id
            _log.info(
                "attempt failed",
                extra={"call": tried.call_id, "endpoint": endpoint_id, "reason": outcome.reason},
            )
            if outcome.reason != "http_503":  # an endpoint that is full is not broken
                control.endpoint_failed(index, outcome.reason, unreachable=outcome.unreachable)
            exclude |= {index}
            elsewhere = control.others(request.model, exclude)
            again = attempt < control.config.retries
            if outcome.answer is not None and not (again and elsewhere):
                return outcome.answer, outcome.answer.status
            if not again:
                raise ApiError(
                    502, f"No endpoint answered in {attempt + 1} attempts ({outcome.reason})."
                )
            if not elsewhere:
                # All have failed: go by health alone, and wait if nothing is up.
                exclude = frozenset()
            control.metrics.retries.inc(endpoint_id)
        raise AssertionError("unreachable")

    async def _attempt(
        self, request: _Request, ticket: Ticket, attempts: int, downstream: Downstream
    ) -> tuple[Answer | None, int] | _Failed:
        """Send one attempt and relay its answer; settles the ticket unless the client leaves."""
        control = self._control
        index = ticket.send.endpoint
        endpoint = control.fleet.endpoints[index]
        body = request.body
        if endpoint.scheduling == "priority":
            body = with_fields(body, request.payload, {"priority": ticket.send.priority})
        try:
            async with await self._links[index].send(
                request.path, body, request.headers
            ) as upstream:
                headers = {
                    **upstream.headers,
                    "x-request-id": request.request_id,
                    "x-almanac-endpoint": endpoint.id,
                    "x-almanac-reason": ticket.send.reason,
                    "x-almanac-attempts": str(attempts),
                    "x-almanac-router-us": f"{ticket.decision_us:.0f}",
                }
                if upstream.status >= 400:
                    answer = Answer(upstream.status, await upstream.read(), headers)
                    ticket.fail(f"http_{upstream.status}")
                    if upstream.status < 500:
                        return answer, upstream.status
                    return _Failed(reason=f"http_{upstream.status}", answer=answer)
                if "event-stream" in upstream.headers.get("Content-Type", ""):
                    return await self._relay(request, ticket, upstream, headers, downstream)
                ticket.expect_first_token()
                answer = Answer(upstream.status, await upstream.read(), headers)
                self._finished(request, ticket, _usage_of(answer.body), 0)
                return answer, upstream.status
        except EndpointUnreachable as error:
            ticket.fail("connect")
            return _Failed(reason=f"connect: {error}", unreachable=True)
        except EndpointBroken as error:
            ticket.fail("broken")
            return _Failed(reason=f"broken: {error}")

    async def _relay(
        self,
        request: _Request,
        ticket: Ticket,
        upstream: Upstream,
        headers: Mapping[str, str],
        downstream: Downstream,
    ) -> tuple[None, int] | _Failed:
        """Pass a stream on event by event.

        The client's headers go out with the first event, so that an endpoint that accepts a
        request and then fails can still be replaced.
        """
        control = self._control
        tap = SseTap(strip_usage=request.adds_usage)
        begun = False
        broken = ""
        try:
            async for data in upstream.chunks():
                ticket.first_token()
                out = tap.feed(data)
                if tap.failed and not begun:
                    break
                if out:
                    if not begun:
                        begun = True
                        control.metrics.ttft.observe(
                            time.perf_counter() - request.started, request.model or "other"
                        )
                        await downstream.start(upstream.status, headers)
                    await downstream.write(out)
        except EndpointBroken as error:
            broken = f"broken: {error}"
        if tap.failed:
            broken = "error event"
        elif not broken and request.has_done and not tap.done:
            broken = "ended without [DONE]"
        if broken and not begun:
            ticket.fail(broken)
            return _Failed(reason=broken)
        if not broken:
            if not begun:
                await downstream.start(upstream.status, headers)
            if rest := tap.rest():
                await downstream.write(rest)
            self._finished(request, ticket, tap.usage, tap.chunks)
            return None, upstream.status
        ticket.fail(broken)
        control.endpoint_failed(ticket.send.endpoint, broken)
        if not tap.failed:
            await downstream.write(
                sse(error_body(502, "The endpoint failed during the answer.", "BadGateway"))
            )
        if not tap.done:
            await downstream.write(DONE)
        return None, 502

    def _finished(
        self, request: _Request, ticket: Ticket, usage: Usage | None, chunks: int
    ) -> None:
        control = self._control
        control.endpoint_ok(ticket.send.endpoint)
        if usage is None:
            # Without usage a stream's events are the best count there is.
            ticket.finish(output_tokens=chunks, prompt_tokens=None, cached_tokens=None)
            return
        if usage.prompt_tokens is not None:
            control.scale.learn(request.model, request.prompt.size_bytes, usage.prompt_tokens)
        ticket.finish(
            output_tokens=usage.output_tokens,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
        )


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
