"""The attempts of one call, from its placement to the first byte of an answer.

Rules
-----
* Until a byte of the answer is here, a failed attempt is tried again elsewhere: a refused connect,
  a broken answer, an answer of 5xx or 429, a first byte that is overdue.
* Other answers of 4xx are the client's affair; they are passed on and count against nobody. An
  answer of 5xx counts against its endpoint once another one has answered the same call, or where
  none was tried; a call that fails everywhere may be at fault itself.
* Where hedging is on, a late call is sent to a second endpoint; the first to answer is passed on,
  the other attempt cancelled.
* Each attempt is a call of its own for the router, and its ticket is settled whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.dispatch.events import Call
from planner.domain.errors import NoEndpointAvailable
from runtime.control import Control
from runtime.dispatcher import Ticket
from runtime.fingerprint import Prompt
from runtime.guard import Patience
from runtime.links import Answer, EndpointBroken, EndpointUnreachable, Link, Upstream
from runtime.timeouts import Watch
from runtime.tracing import SpanLike
from runtime.wire import ApiError, SseTap, with_fields

__all__ = ["Attempts", "Begun", "Request"]

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Request:
    """A client's request as it goes to an endpoint.

    Parameters
    ----------
    path
        API route.
    body, payload
        As sent, and the same parsed.
    headers
        That the endpoint gets.
    request_id
        The client's, or a new one.
    model
        Asked for; None lets any endpoint answer.
    prompt
        Its fingerprint.
    stream
        Whether the answer is streamed.
    adds_usage
        Whether the stream's usage was asked for on behalf of the router, not of the client.
    has_done
        Whether a complete stream ends with ``[DONE]``.
    started
        Arrival, ``time.perf_counter`` seconds.
    head_start_s
        Seconds that the client's hints put it ahead of others of its age.
    span
        Of the whole call, if it is traced.
    """

    path: str
    body: bytes
    payload: Mapping[str, Any]
    headers: Mapping[str, str]
    request_id: str
    model: str | None
    prompt: Prompt
    stream: bool
    adds_usage: bool
    has_done: bool
    started: float
    head_start_s: float = 0.0
    span: SpanLike | None = None


@dataclass(slots=True, kw_only=True)
class Begun:
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


class Attempts:
    """Tries one call until an answer begins.

    Parameters
    ----------
    control
        Decides and records.
    links
        One per endpoint, in fleet order.
    request
        What is sent.
    call
        The same as the router knows it.
    client_attempt
        Which attempt of the client's own this call is, >= 0.
    waited_s
        Wall seconds it waited to be admitted, for metrics.

    Attributes
    ----------
    sent
        Attempts made so far.
    """

    def __init__(
        self,
        control: Control,
        links: Sequence[Link],
        request: Request,
        call: Call,
        *,
        client_attempt: int,
        waited_s: float,
    ) -> None:
        self.sent = 0
        self._control = control
        self._links = links
        self._request = request
        self._call = call
        self._client_attempt = client_attempt
        self._waited_s = waited_s
        self._exclude: frozenset[int] = frozenset()
        self._tried: set[int] = set()
        self._suspects: list[_Failed] = []
        self._last: _Failed | None = None

    async def begin(self) -> Begun | Answer:
        """Return the attempt whose answer has begun, or the last refusal there was.

        Raises
        ------
        ApiError
            If no endpoint answered.
        """
        control = self._control
        while True:
            try:
                ticket = await self._place()
            except NoEndpointAvailable as error:
                raise ApiError(
                    503,
                    f"{error}. Try again later.",
                    retry_after_s=control.retry_after_s(self._call.model),
                    reason="no_endpoint",
                ) from error
            begun = await self._start(ticket)
            if begun is not None:
                for suspect in self._suspects:
                    # Another endpoint could do it, so it was not the call's fault.
                    control.endpoint_failed(suspect.index, suspect.reason)
                return begun
            failed = self._last
            assert failed is not None  # noqa: S101 - nothing began, so something failed
            elsewhere = control.others(self._call, self._exclude)
            again = self.sent <= control.config.retries
            if failed.answer is not None and not (again and elsewhere):
                self._suspect()
                return failed.answer
            if not again:
                self._suspect()
                raise ApiError(
                    502, f"No endpoint answered in {self.sent} attempts ({failed.reason})."
                )
            if not elsewhere:
                # All have failed: go by health alone, and wait if nothing is up.
                self._exclude = frozenset()
            control.metrics.retries.inc(control.fleet.endpoints[failed.index].id, failed.kind)

    def _suspect(self) -> None:
        """Hold answers of 5xx against endpoints, as far as the call itself is not to blame."""
        for failed in self._suspects:
            if len(self._tried) > 1:
                # It failed everywhere: only a bad endpoint does so more often than its peers.
                self._control.endpoint_refused(failed.index)
            elif self._control.others(self._call, frozenset({failed.index})):
                # It was tried nowhere else though it could have been.
                self._control.endpoint_failed(failed.index, failed.reason)

    async def _place(self) -> Ticket:
        """Return a ticket for the next attempt."""
        began = time.perf_counter()
        ticket = await self._ticket(self._exclude)
        if self.sent == 1:
            metrics = self._control.metrics
            metrics.queue_wait.observe(self._waited_s + time.perf_counter() - began)
            reading_s = began - self._request.started - self._waited_s
            metrics.overhead.observe(reading_s + ticket.decision_us * 1e-6)
        return ticket

    async def _ticket(self, exclude: frozenset[int]) -> Ticket:
        call, attempt = self._call, self.sent
        self.sent += 1
        # The router knows each attempt as a call of its own.
        tried = call if attempt == 0 else replace(call, call_id=f"{call.call_id}.{attempt}")
        return await self._control.place(tried, exclude, self._client_attempt + attempt)

    async def _start(self, ticket: Ticket) -> Begun | None:
        """Return what began of an attempt or of its hedge, or None if both failed."""
        control = self._control
        with contextlib.ExitStack() as held:
            held.enter_context(ticket)
            patience = control.patience(
                ticket,
                streams=self._request.stream,
                attempt=self.sent - 1,
                exclude=self._exclude,
            )
            if self._request.stream and control.guard.hedges.share:
                begun = await self._hedged(ticket, patience)
            else:
                begun = await self._open(ticket, patience)
            if begun is not None and begun.ticket is ticket:
                held.pop_all()  # what began settles it
        return begun

    async def _hedged(self, ticket: Ticket, patience: Patience) -> Begun | None:
        """Send an attempt, and once it is late a second one to another endpoint."""
        control = self._control
        first = asyncio.create_task(self._open(ticket, patience))
        tasks = [first]
        begun: Begun | None = None
        try:
            await asyncio.wait(tasks, timeout=patience.hedge_s)
            beyond = self._exclude | {ticket.send.endpoint}
            if (
                not first.done()
                and control.others(self._call, beyond)
                and control.guard.hedges.spend()
            ):
                tasks.append(asyncio.create_task(self._hedge(beyond)))
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

    async def _hedge(self, exclude: frozenset[int]) -> Begun | None:
        """Send a late call to another endpoint, too."""
        attempt = self.sent
        try:
            ticket = await self._ticket(exclude)
        except NoEndpointAvailable:
            return None
        with contextlib.ExitStack() as held:
            held.enter_context(ticket)
            patience = self._control.patience(
                ticket, streams=True, attempt=attempt, exclude=exclude
            )
            begun = await self._open(ticket, patience)
            if begun is not None:
                held.pop_all()
            return begun

    async def _open(self, ticket: Ticket, patience: Patience) -> Begun | None:
        """Send an attempt and wait for its first byte; None if it failed, which is noted."""
        async with contextlib.AsyncExitStack() as held:
            if self._request.span is not None:
                held.callback(self._span(ticket, self._request.span).end)
            held.enter_context(ticket)
            outcome = await self._first(ticket, patience, held)
            if isinstance(outcome, Begun):
                if outcome.status < 400:  # a refused request says nothing of how long others take
                    patience.begun()
                outcome.held = held.pop_all()
                return outcome
        self._note(outcome, ticket.call.call_id)
        return None

    def _span(self, ticket: Ticket, parent: SpanLike) -> SpanLike:
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
            parent=parent,
        )

    def _note(self, failed: _Failed, call_id: str) -> None:
        control = self._control
        endpoint_id = control.fleet.endpoints[failed.index].id
        _log.info(
            "attempt failed",
            extra={"call": call_id, "endpoint": endpoint_id, "reason": failed.reason},
        )
        self._last = failed
        self._exclude |= {failed.index}
        self._tried.add(failed.index)
        if failed.kind == "http_503":
            control.endpoint_refused(failed.index)  # one that is full is not broken
        elif failed.answer is None:
            control.endpoint_failed(
                failed.index, failed.reason, unreachable=failed.kind == "connect"
            )
        elif failed.answer.status >= 500:
            self._suspects.append(failed)

    async def _first(
        self, ticket: Ticket, patience: Patience, held: contextlib.AsyncExitStack
    ) -> Begun | _Failed:
        """Send an attempt and wait for its first byte, within its time limit."""
        index = ticket.send.endpoint
        try:
            async with Watch(patience.first_left_s):
                return await self._exchange(ticket, patience, held)
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
        self, ticket: Ticket, patience: Patience, held: contextlib.AsyncExitStack
    ) -> Begun | _Failed:
        request, index = self._request, ticket.send.endpoint
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
        begun = Begun(
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
            headers = {**begun.headers, "x-almanac-attempts": str(self.sent)}
            answer = Answer(upstream.status, await upstream.read(), headers)
            kind = f"http_{upstream.status}"
            ticket.fail(kind)
            if upstream.status >= 500 or upstream.status == 429:
                return _Failed(index=index, kind=kind, answer=answer)
            begun.answer = answer
        elif "event-stream" in upstream.headers.get("Content-Type", ""):
            return await self._first_event(begun, upstream)
        else:
            ticket.expect_first_token()
            begun.answer = Answer(upstream.status, await upstream.read(), begun.headers)
        return begun

    async def _first_event(self, begun: Begun, upstream: Upstream) -> Begun | _Failed:
        """Wait for the first event of a stream.

        The client's headers go out with it, so that an endpoint that accepts a request and then
        fails can still be replaced.
        """
        request, ticket = self._request, begun.ticket
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


async def _first_of(tasks: Sequence[asyncio.Task[Begun | None]]) -> Begun | None:
    """Return what began first, in the order given where several did; None if nothing did."""
    pending = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task not in pending and (begun := task.result()) is not None:
                return begun
    return None


async def _call_off(tasks: Sequence[asyncio.Task[Begun | None]], kept: Begun | None) -> None:
    """End all tasks, and close what they began but for one."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Begun) and outcome is not kept:
            await outcome.held.aclose()
