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
* Each attempt is a call of its own for the router, and its seat is settled whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.desk import Case, Desk, Seat
from runtime.fingerprint import Prompt
from runtime.guard import Patience
from runtime.links import Answer, EndpointBroken, EndpointUnreachable, Link, Upstream
from runtime.timeouts import Watch
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


@dataclass(slots=True, kw_only=True)
class Begun:
    """An attempt whose first byte is here: nothing is tried again any more.

    A whole answer has ``answer``; a stream has ``chunks``, a ``tap`` and its first ``events``.
    ``held`` gives back the connection and the seat.
    """

    seat: Seat
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
    desk
        Keeps count.
    case
        The call, which is placed by it.
    links
        One per endpoint, in fleet order.
    request
        What is sent.

    Attributes
    ----------
    sent
        Attempts made so far.
    """

    def __init__(self, desk: Desk, case: Case, links: Sequence[Link], request: Request) -> None:
        self.sent = 0
        self._desk = desk
        self._case = case
        self._links = links
        self._request = request
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
        desk, case = self._desk, self._case
        while True:
            begun = await self._start(await self._place())
            if begun is not None:
                for suspect in self._suspects:
                    # Another endpoint could do it, so it was not the call's fault.
                    desk.endpoint_failed(suspect.index, suspect.reason)
                return begun
            failed = self._last
            assert failed is not None  # noqa: S101 - nothing began, so something failed
            elsewhere = case.others(self._exclude)
            again = self.sent <= desk.config.retries
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
            desk.metrics.retries.inc(desk.endpoints[failed.index].id, failed.kind)

    def _suspect(self) -> None:
        """Hold answers of 5xx against endpoints, as far as the call itself is not to blame."""
        for failed in self._suspects:
            if len(self._tried) > 1:
                # It failed everywhere: only a bad endpoint does so more often than its peers.
                self._desk.endpoint_refused(failed.index)
            elif self._case.others(frozenset({failed.index})):
                # It was tried nowhere else though it could have been.
                self._desk.endpoint_failed(failed.index, failed.reason)

    async def _place(self) -> Seat:
        """Return a seat for the next attempt."""
        began = time.perf_counter()
        seat = await self._seat(self._exclude)
        if self.sent == 1:
            metrics, waited_s = self._desk.metrics, self._case.waited_s
            metrics.queue_wait.observe(waited_s + time.perf_counter() - began)
            reading_s = began - self._request.started - waited_s
            metrics.overhead.observe(reading_s + seat.decision_us * 1e-6)
        return seat

    async def _seat(self, exclude: frozenset[int]) -> Seat:
        attempt = self.sent
        self.sent += 1
        return await self._case.place(exclude, attempt)

    async def _start(self, seat: Seat) -> Begun | None:
        """Return what began of an attempt or of its hedge, or None if both failed."""
        begun: Begun | None = None
        try:
            patience = self._case.patience(seat, attempt=self.sent - 1, exclude=self._exclude)
            if self._request.stream and self._desk.hedges.share:
                begun = await self._hedged(seat, patience)
            else:
                begun = await self._open(seat, patience)
        finally:
            if begun is None or begun.seat is not seat:  # else what began settles it
                seat.__exit__(None, None, None)
        return begun

    async def _hedged(self, seat: Seat, patience: Patience) -> Begun | None:
        """Send an attempt, and once it is late a second one to another endpoint."""
        desk = self._desk
        first = asyncio.create_task(self._open(seat, patience))
        tasks = [first]
        begun: Begun | None = None
        try:
            await asyncio.wait(tasks, timeout=patience.hedge_s)
            beyond = self._exclude | {seat.send.endpoint}
            if not first.done() and self._case.others(beyond) and desk.hedges.spend():
                tasks.append(asyncio.create_task(self._hedge(beyond)))
            winner = await _first_of(tasks)
            await _call_off(tasks, winner)
            begun = winner
        finally:
            if begun is None:  # also where the client left in between
                await asyncio.shield(_call_off(tasks, None))
        if len(tasks) > 1:
            won = begun is not None and begun.seat is not seat
            desk.metrics.hedges.inc("won" if won else "lost")
        return begun

    async def _hedge(self, exclude: frozenset[int]) -> Begun | None:
        """Send a late call to another endpoint, too."""
        attempt = self.sent
        try:
            seat = await self._seat(exclude)
        except ApiError:
            return None
        with contextlib.ExitStack() as held:
            held.enter_context(seat)
            patience = self._case.patience(seat, attempt=attempt, exclude=exclude)
            begun = await self._open(seat, patience)
            if begun is not None:
                held.pop_all()
            return begun

    async def _open(self, seat: Seat, patience: Patience) -> Begun | None:
        """Send an attempt and wait for its first byte; None if it failed, which is noted."""
        async with contextlib.AsyncExitStack() as held:
            if (span := self._case.span(seat)) is not None:
                held.callback(span.end)
            held.enter_context(seat)
            outcome = await self._first(seat, patience, held)
            if isinstance(outcome, Begun):
                if outcome.status < 400:  # a refused request says nothing of how long others take
                    patience.begun()
                outcome.held = held.pop_all()
                return outcome
        self._note(outcome, seat.call_id)
        return None

    def _note(self, failed: _Failed, call_id: str) -> None:
        desk = self._desk
        endpoint_id = desk.endpoints[failed.index].id
        _log.info(
            "attempt failed",
            extra={"call": call_id, "endpoint": endpoint_id, "reason": failed.reason},
        )
        self._last = failed
        self._exclude |= {failed.index}
        self._tried.add(failed.index)
        if failed.kind == "http_503":
            desk.endpoint_refused(failed.index)  # one that is full is not broken
        elif failed.answer is None:
            desk.endpoint_failed(failed.index, failed.reason, unreachable=failed.kind == "connect")
        elif failed.answer.status >= 500:
            self._suspects.append(failed)

    async def _first(
        self, seat: Seat, patience: Patience, held: contextlib.AsyncExitStack
    ) -> Begun | _Failed:
        """Send an attempt and wait for its first byte, within its time limit."""
        index = seat.send.endpoint
        try:
            async with Watch(patience.first_left_s):
                return await self._exchange(seat, patience, held)
        except EndpointUnreachable as error:
            seat.fail("connect")
            return _Failed(index=index, kind="connect", detail=str(error))
        except EndpointBroken as error:
            seat.fail("broken")
            return _Failed(index=index, kind="broken", detail=str(error))
        except TimeoutError:
            seat.fail("late")
            return _Failed(index=index, kind="late", detail=f"no byte in {patience.first_s:.3g} s")

    async def _exchange(
        self, seat: Seat, patience: Patience, held: contextlib.AsyncExitStack
    ) -> Begun | _Failed:
        request, index = self._request, seat.send.endpoint
        endpoint = self._desk.endpoints[index]
        body = request.body
        if endpoint.scheduling == "priority":
            # Policies that order by age have the hints in it; others leave the engine's order to
            # arrival, and so to the hints alone.
            urgent = seat.send.priority or -round(self._case.head_start_s * 1000.0)
            body = with_fields(body, request.payload, {"priority": urgent})
        upstream = await held.enter_async_context(
            await self._links[index].send(request.path, body, request.headers)
        )
        begun = Begun(
            seat=seat,
            status=upstream.status,
            headers={
                **upstream.headers,
                "x-request-id": request.request_id,
                "x-almanac-endpoint": endpoint.id,
                "x-almanac-reason": seat.send.reason,
                "x-almanac-plan": self._desk.table_version,
                "x-almanac-router-us": f"{seat.decision_us:.0f}",
            },
            patience=patience,
            held=held,
        )
        if upstream.status >= 400:
            headers = {**begun.headers, "x-almanac-attempts": str(self.sent)}
            answer = Answer(upstream.status, await upstream.read(), headers)
            kind = f"http_{upstream.status}"
            seat.fail(kind)
            if upstream.status >= 500 or upstream.status == 429:
                return _Failed(index=index, kind=kind, answer=answer)
            begun.answer = answer
        elif "event-stream" in upstream.headers.get("Content-Type", ""):
            return await self._first_event(begun, upstream)
        else:
            seat.expect_first_token()
            begun.answer = Answer(upstream.status, await upstream.read(), begun.headers)
        return begun

    async def _first_event(self, begun: Begun, upstream: Upstream) -> Begun | _Failed:
        """Wait for the first event of a stream.

        The client's headers go out with it, so that an endpoint that accepts a request and then
        fails can still be replaced.
        """
        request, seat = self._request, begun.seat
        tap = begun.tap = SseTap(strip_usage=request.adds_usage)
        chunks = begun.chunks = await begun.held.enter_async_context(
            contextlib.aclosing(upstream.chunks())
        )
        async for data in chunks:
            begun.events += tap.feed(data)
            if tap.failed:
                seat.fail("error event")
                return _Failed(index=seat.send.endpoint, kind="broken", detail="error event")
            if begun.events:
                seat.first_token()
                return begun
        if request.has_done and not tap.done:
            seat.fail("ended without [DONE]")
            return _Failed(index=seat.send.endpoint, kind="broken", detail="ended without [DONE]")
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
