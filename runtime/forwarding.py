"""One client request from arrival to last byte: identity, decision, attempts, relay, records.

Rules
-----
* Until a byte of the answer went to the client, a failed attempt is tried again elsewhere: a
  refused connect, a broken answer, an answer of 5xx or 429, a first byte that is overdue. After
  that the client gets the error event of the API, never a second answer.
* Other answers of 4xx are the client's affair; they are passed on and count against nobody. An
  answer of 5xx counts against its endpoint once another one has answered the same call, or where
  none was tried; a call that fails everywhere may be at fault itself.
* An endpoint that falls silent in the middle of an answer is given up after a time limit, too.
* Where hedging is on, a late call is sent to a second endpoint; the first to answer is passed on,
  the other attempt cancelled.
* Each attempt is a call of its own for the router, and its ticket is settled whatever happens. A
  client that leaves cancels the attempt, which closes the connection to the endpoint.

No HTTP library here: both sides are protocols, so tests need no sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

from planner.dispatch.events import Call
from planner.domain.errors import EndpointFailed, NoEndpointAvailable
from runtime.admission import Asked, Pass
from runtime.control import Control
from runtime.dispatcher import Ticket
from runtime.fingerprint import Prompt, read_prompt
from runtime.guard import Patience
from runtime.hints import deadline_s, head_start_s
from runtime.limits import Tenant
from runtime.runs import Run
from runtime.timeouts import Watch
from runtime.tracing import SpanLike
from runtime.wire import (
    DONE,
    ApiError,
    SseTap,
    Usage,
    error_body,
    plain_text,
    read_usage,
    sse,
    with_fields,
)

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
_SALTED = frozenset({_CHAT, "/v1/completions", "/v1/responses"})
"""Routes whose prompts are cached by prefix, and that take a ``cache_salt``."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failed:
    """An attempt that may be tried again.

    Parameters
    ----------
    index
        Where it failed.
    kind
        In a word, for metrics: ``connect``, ``broken``, ``late`` or ``http_<status>``.
    detail
        For logs and the client.
    answer
        What the endpoint said, if anything.
    """

    index: int
    kind: str
    detail: str = ""
    answer: Answer | None = None

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass(slots=True, kw_only=True)
class _Begun:
    """An attempt whose first byte is here: nothing is tried again any more.

    A whole answer has ``answer``; a stream has ``chunks``, a ``tap`` and its first ``events``.
    ``held`` gives back the connection and the ticket.
    """

    ticket: Ticket
    status: int
    headers: Mapping[str, str]
    patience: Patience
    held: contextlib.AsyncExitStack
    answer: Answer | None = None
    chunks: AsyncGenerator[bytes] | None = None
    tap: SseTap | None = None
    events: bytes = b""


@dataclass(slots=True)
class _Tries:
    """What was tried so far for one call."""

    sent: int = 0
    exclude: frozenset[int] = frozenset()
    tried: set[int] = field(default_factory=set)
    suspects: list[_Failed] = field(default_factory=list)
    last: _Failed | None = None


@dataclass(slots=True, kw_only=True)
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
    head_start_s: float = 0.0
    span: SpanLike | None = None

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
    ) -> _Request:
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
        self,
        request: _Request,
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
                return await self._attempts(request, call, identity.attempt, admitted, downstream)
        finally:
            span.end()
            run.open_calls -= 1
            run.last_s = control.clock.now_s()
            if identity.final:
                self._end(run)

    def _end(self, run: Run) -> None:
        if run.open_calls == 0:
            self._control.end_run(run.run_id)

    async def _attempts(
        self,
        request: _Request,
        call: Call,
        client_attempt: int,
        admitted: Pass,
        downstream: Downstream,
    ) -> tuple[Answer | None, int]:
        control = self._control
        tries = _Tries()
        while True:
            try:
                ticket = await self._place(request, call, client_attempt, admitted, tries)
            except NoEndpointAvailable as error:
                raise ApiError(
                    503,
                    f"{error}. Try again later.",
                    retry_after_s=control.retry_after_s(call.model),
                    reason="no_endpoint",
                ) from error
            with ticket:
                begun = await self._begin(request, call, client_attempt, ticket, tries)
                if begun is not None:
                    async with begun.held:
                        for suspect in tries.suspects:
                            # Another endpoint could do it, so it was not the call's fault.
                            control.endpoint_failed(suspect.index, suspect.reason)
                        return await self._pass_on(request, begun, tries, admitted, downstream)
            failed = tries.last
            assert failed is not None  # noqa: S101 - nothing began, so something failed
            elsewhere = control.others(call, tries.exclude)
            again = tries.sent <= control.config.retries
            if failed.answer is not None and not (again and elsewhere):
                self._suspect(call, tries)
                return failed.answer, failed.answer.status
            if not again:
                self._suspect(call, tries)
                raise ApiError(
                    502, f"No endpoint answered in {tries.sent} attempts ({failed.reason})."
                )
            if not elsewhere:
                # All have failed: go by health alone, and wait if nothing is up.
                tries.exclude = frozenset()
            control.metrics.retries.inc(control.fleet.endpoints[failed.index].id, failed.kind)

    def _suspect(self, call: Call, tries: _Tries) -> None:
        """Hold answers of 5xx against endpoints, as far as the call itself is not to blame."""
        for failed in tries.suspects:
            if len(tries.tried) > 1:
                # It failed everywhere: only a bad endpoint does so more often than its peers.
                self._control.endpoint_refused(failed.index)
            elif self._control.others(call, frozenset({failed.index})):
                # It was tried nowhere else though it could have been.
                self._control.endpoint_failed(failed.index, failed.reason)

    async def _place(
        self, request: _Request, call: Call, client_attempt: int, admitted: Pass, tries: _Tries
    ) -> Ticket:
        """Return a ticket for the next attempt."""
        control, attempt = self._control, tries.sent
        tries.sent += 1
        # The router knows each attempt as a call of its own.
        tried = call if attempt == 0 else replace(call, call_id=f"{call.call_id}.{attempt}")
        began = time.perf_counter()
        ticket = await control.place(tried, tries.exclude, client_attempt + attempt)
        if attempt == 0:
            waited_s = admitted.waited_s + time.perf_counter() - began
            control.metrics.queue_wait.observe(waited_s)
            decision_s = ticket.decision_us * 1e-6
            reading_s = began - request.started - admitted.waited_s
            control.metrics.overhead.observe(reading_s + decision_s)
        return ticket

    async def _begin(
        self, request: _Request, call: Call, client_attempt: int, ticket: Ticket, tries: _Tries
    ) -> _Begun | None:
        """Return the attempt whose answer has begun, or None if there is none; see ``tries``."""
        control = self._control
        patience = control.patience(
            ticket, streams=request.stream, attempt=tries.sent - 1, exclude=tries.exclude
        )
        if not (request.stream and control.guard.hedges.share):
            return await self._open(request, ticket, patience, tries)
        first = asyncio.create_task(self._open(request, ticket, patience, tries))
        tasks = [first]
        begun: _Begun | None = None
        try:
            await asyncio.wait(tasks, timeout=patience.hedge_s)
            beyond = tries.exclude | {ticket.send.endpoint}
            if not first.done() and control.others(call, beyond) and control.guard.hedges.spend():
                hedge = self._hedge(request, call, client_attempt, beyond, tries)
                tasks.append(asyncio.create_task(hedge))
            winner = await _first_of(tasks)
            await _call_off(tasks, winner)
            begun = winner
        finally:
            if begun is None:  # also where the client left in between
                await asyncio.shield(_call_off(tasks, None))
        if len(tasks) > 1:
            won = begun is not None and begun.ticket is not ticket
            control.metrics.hedges.inc("won" if won else "lost")
        return begun

    async def _hedge(
        self,
        request: _Request,
        call: Call,
        client_attempt: int,
        exclude: frozenset[int],
        tries: _Tries,
    ) -> _Begun | None:
        """Send a late call to another endpoint, too."""
        control, attempt = self._control, tries.sent
        tries.sent += 1
        second = replace(call, call_id=f"{call.call_id}.{attempt}")
        try:
            ticket = await control.place(second, exclude, client_attempt + attempt)
        except NoEndpointAvailable:
            return None
        with contextlib.ExitStack() as held:
            held.enter_context(ticket)
            patience = control.patience(ticket, streams=True, attempt=attempt, exclude=exclude)
            begun = await self._open(request, ticket, patience, tries)
            if begun is not None:
                held.pop_all()
            return begun

    async def _open(
        self, request: _Request, ticket: Ticket, patience: Patience, tries: _Tries
    ) -> _Begun | None:
        """Send an attempt and wait for its first byte; None if it failed, see ``tries``."""
        async with contextlib.AsyncExitStack() as held:
            if request.span is not None:
                held.callback(self._span(request, ticket).end)
            held.enter_context(ticket)
            outcome = await self._first(request, ticket, patience, held, tries)
            if isinstance(outcome, _Begun):
                if outcome.status < 400:  # a refused request says nothing of how long others take
                    patience.begun()
                outcome.held = held.pop_all()
                return outcome
        self._note(outcome, ticket.call.call_id, tries)
        return None

    def _span(self, request: _Request, ticket: Ticket) -> SpanLike:
        """Return a span for an attempt: what was decided, and what was forecast."""
        control, send = self._control, ticket.send
        return control.tracing.start(
            "attempt",
            {
                "endpoint": control.fleet.endpoints[send.endpoint].id,
                "policy": control.router.policy.name,
                "reason": send.reason,
                "plan": control.table_version,
                "prompt_tokens": ticket.call.prompt_tokens,
                "cached_tokens": send.cached_tokens,
                "predicted_output_tokens": send.predicted_output_tokens,
                "router_us": ticket.decision_us,
            },
            parent=request.span,
        )

    def _note(self, failed: _Failed, call_id: str, tries: _Tries) -> None:
        control = self._control
        endpoint_id = control.fleet.endpoints[failed.index].id
        _log.info(
            "attempt failed",
            extra={"call": call_id, "endpoint": endpoint_id, "reason": failed.reason},
        )
        tries.last = failed
        tries.exclude |= {failed.index}
        tries.tried.add(failed.index)
        if failed.kind == "http_503":
            control.endpoint_refused(failed.index)  # one that is full is not broken
        elif failed.answer is None:
            control.endpoint_failed(
                failed.index, failed.reason, unreachable=failed.kind == "connect"
            )
        elif failed.answer.status >= 500:
            tries.suspects.append(failed)

    async def _first(
        self,
        request: _Request,
        ticket: Ticket,
        patience: Patience,
        held: contextlib.AsyncExitStack,
        tries: _Tries,
    ) -> _Begun | _Failed:
        """Send an attempt and wait for its first byte, within its time limit."""
        index = ticket.send.endpoint
        try:
            async with Watch(patience.first_left_s):
                return await self._exchange(request, ticket, patience, held, tries)
        except EndpointUnreachable as error:
            ticket.fail("connect")
            return _Failed(index=index, kind="connect", detail=str(error))
        except EndpointBroken as error:
            ticket.fail("broken")
            return _Failed(index=index, kind="broken", detail=str(error))
        except TimeoutError:
            ticket.fail("late")
            return _Failed(index=index, kind="late", detail=f"no byte in {patience.first_s:.3g} s")

    async def _exchange(
        self,
        request: _Request,
        ticket: Ticket,
        patience: Patience,
        held: contextlib.AsyncExitStack,
        tries: _Tries,
    ) -> _Begun | _Failed:
        index = ticket.send.endpoint
        endpoint = self._control.fleet.endpoints[index]
        body = request.body
        if endpoint.scheduling == "priority":
            # Policies that order by age have the hints in it; others leave the engine's order to
            # arrival, and so to the hints alone.
            urgent = ticket.send.priority or -round(request.head_start_s * 1000.0)
            body = with_fields(body, request.payload, {"priority": urgent})
        upstream = await held.enter_async_context(
            await self._links[index].send(request.path, body, request.headers)
        )
        begun = _Begun(
            ticket=ticket,
            status=upstream.status,
            headers={
                **upstream.headers,
                "x-request-id": request.request_id,
                "x-almanac-endpoint": endpoint.id,
                "x-almanac-reason": ticket.send.reason,
                "x-almanac-plan": self._control.table_version,
                "x-almanac-router-us": f"{ticket.decision_us:.0f}",
            },
            patience=patience,
            held=held,
        )
        if upstream.status >= 400:
            headers = {**begun.headers, "x-almanac-attempts": str(tries.sent)}
            answer = Answer(upstream.status, await upstream.read(), headers)
            kind = f"http_{upstream.status}"
            ticket.fail(kind)
            if upstream.status >= 500 or upstream.status == 429:
                return _Failed(index=index, kind=kind, answer=answer)
            begun.answer = answer
        elif "event-stream" in upstream.headers.get("Content-Type", ""):
            return await self._first_event(request, begun, upstream)
        else:
            ticket.expect_first_token()
            begun.answer = Answer(upstream.status, await upstream.read(), begun.headers)
        return begun

    async def _first_event(
        self, request: _Request, begun: _Begun, upstream: Upstream
    ) -> _Begun | _Failed:
        """Wait for the first event of a stream.

        The client's headers go out with it, so that an endpoint that accepts a request and then
        fails can still be replaced.
        """
        ticket = begun.ticket
        tap = begun.tap = SseTap(strip_usage=request.adds_usage)
        chunks = begun.chunks = await begun.held.enter_async_context(
            contextlib.aclosing(upstream.chunks())
        )
        async for data in chunks:
            begun.events += tap.feed(data)
            if tap.failed:
                ticket.fail("error event")
                return _Failed(index=ticket.send.endpoint, kind="broken", detail="error event")
            if begun.events:
                ticket.first_token()
                return begun
        if request.has_done and not tap.done:
            ticket.fail("ended without [DONE]")
            return _Failed(index=ticket.send.endpoint, kind="broken", detail="ended without [DONE]")
        return begun

    async def _pass_on(
        self,
        request: _Request,
        begun: _Begun,
        tries: _Tries,
        admitted: Pass,
        downstream: Downstream,
    ) -> tuple[Answer | None, int]:
        """Give the client an answer that has begun, to its end."""
        headers = {**begun.headers, "x-almanac-attempts": str(tries.sent)}
        if begun.answer is None:
            return await self._relay(request, begun, headers, admitted, downstream)
        if begun.status < 400:
            self._finished(request, begun.ticket, _usage_of(begun.answer.body), 0, admitted)
        return replace(begun.answer, headers=headers), begun.status

    async def _relay(
        self,
        request: _Request,
        begun: _Begun,
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
        request: _Request,
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


async def _first_of(tasks: Sequence[asyncio.Task[_Begun | None]]) -> _Begun | None:
    """Return what began first, in the order given where several did; None if nothing did."""
    pending = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task not in pending and (begun := task.result()) is not None:
                return begun
    return None


async def _call_off(tasks: Sequence[asyncio.Task[_Begun | None]], kept: _Begun | None) -> None:
    """End all tasks, and close what they began but for one."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, _Begun) and outcome is not kept:
            await outcome.held.aclose()


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
