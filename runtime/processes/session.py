"""One worker as the hub knows it: its calls, its seats, and their end.

House rules
-----------
* A call is a task that ends when the worker says so, or when the worker is gone. Whatever it holds
  (its pass, its seats, its place in a queue) hangs on that task, so that its end gives back all.
* Messages about seats that are settled, or of calls that ended, are late and mean nothing.
* What a worker says is believed: it is our own program.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from multidict import CIMultiDict

from runtime.control import Control
from runtime.desk import Arrival, LocalCase, LocalDesk
from runtime.dispatcher import Ticket
from runtime.fingerprint import Prompt
from runtime.guard import Patience
from runtime.processes.channel import Channel, Message
from runtime.processes.remote import Placed, Waits
from runtime.tracing import SpanLike
from runtime.wire import ApiError, Usage

__all__ = ["Session"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    """A call of the worker; ``left`` is set when the worker is done with it."""

    task: asyncio.Task[None]
    left: asyncio.Event = field(default_factory=asyncio.Event)
    placed: bool = False
    case: LocalCase | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    places: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Seat:
    case: LocalCase
    ticket: Ticket
    patience: Patience
    span: SpanLike


class Session:
    """The hub's end of a worker.

    Parameters
    ----------
    control, desk
        The gateway's state, and its desk.
    changed
        Called after something was told that may concern all workers.
    """

    def __init__(self, control: Control, desk: LocalDesk, *, changed: Callable[[], None]) -> None:
        self._control = control
        self._desk = desk
        self._changed = changed
        self._open: dict[int, _Open] = {}
        self._seats: dict[int, _Seat] = {}
        self._placing: dict[int, asyncio.Task[None]] = {}
        self.channel: Channel
        self.ready = asyncio.Event()
        self._on: Mapping[str, Callable[..., None]] = {
            "enter": self._enter, "place": self._place, "drop": self._drop, "leave": self._leave,
            "first_token": self._first_token, "expect_first_token": self._expect_first_token,
            "finish": self._finish, "fail": self._fail, "cancel": self._cancel,
            "learn_first": self._learn_first, "learn_gap": self._learn_gap,
            "endpoint_failed": self._endpoint_failed, "endpoint_refused": self._endpoint_refused,
            "pulse": self._pulse, "ready": self.ready.set,
        }  # fmt: skip

    @property
    def calls(self) -> int:
        """Calls of the worker that have not ended."""
        return len(self._open)

    def receive(self, message: Message) -> None:
        """Take a message of the worker."""
        name, *details = message
        self._on[name](*details)

    async def end(self) -> None:
        """Give back whatever the worker held; it is gone."""
        tasks = [one.task for one in self._open.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Calls

    def _enter(
        self,
        number: int,
        place: int,
        headers: Mapping[str, str],
        payload: Mapping[str, Any],
        prompt: tuple[int, tuple[int, ...], int, int | None],
        model: str | None,
        tenant: str,
        request_id: str,
        stream: bool,
    ) -> None:
        size_bytes, chain, head, exact_tokens = prompt
        known = next((one for one in self._control.tenancy.tenants if one.name == tenant), None)
        if known is None:
            self._refuse(place, ApiError(401, "Wrong or missing API key."))
            return
        arrival = Arrival(
            headers=CIMultiDict(headers),
            payload=payload,
            prompt=Prompt(size_bytes=size_bytes, chain=chain, head=head, exact_tokens=exact_tokens),
            model=model,
            tenant=known,
            request_id=request_id,
            stream=stream,
        )
        self._open[number] = _Open(
            asyncio.create_task(self._call(number, place, arrival), name=f"call {number}")
        )

    async def _call(self, number: int, place: int, arrival: Arrival) -> None:
        """Be a call of the worker from its arrival to its end."""
        own = self._open[number]
        try:
            async with self._desk.case(arrival) as own.case:
                with own.held:
                    await self._seat(own, place, frozenset(), 0)
                    await own.left.wait()
        except ApiError as error:
            self._refuse(place, error)
        except Exception:  # noqa: BLE001 - the worker waits for an answer; the log says why
            _log.exception("internal error", extra={"call": number})
            self._refuse(place, ApiError(500, "Internal error of the gateway."))
        finally:
            for one in own.places:
                self._taken(one)
                if (placing := self._placing.pop(one, None)) is not None:
                    placing.cancel()
            del self._open[number]

    async def _seat(self, own: _Open, place: int, exclude: frozenset[int], attempt: int) -> None:
        """Place an attempt and say where."""
        case = own.case
        assert case is not None  # noqa: S101 - calls are placed once they are admitted
        own.places.add(place)
        begun_s = time.perf_counter()
        ticket = await case.place(exclude, attempt)
        own.held.enter_context(ticket)
        patience = case.patience(ticket, attempt=attempt, exclude=exclude)
        self._seats[place] = _Seat(case, ticket, patience, case.span(ticket))
        own.placed = True
        call = case.call
        self.channel.tell(
            "placed",
            place,
            Placed(
                send=replace(ticket.send, ranking=None),
                call_id=ticket.call_id,
                decision_us=ticket.decision_us,
                waits=Waits(
                    forecast_s=patience.forecast_s,
                    step_s=patience.step_s,
                    first_s=patience.first_s,
                    stall_s=patience.stall_s,
                    hedge_s=patience.hedge_s,
                ),
                head_start_s=case.head_start_s,
                waited_s=case.waited_s + time.perf_counter() - begun_s,
                room_tokens=call.least_tokens,
            ),
        )

    def _place(self, number: int, place: int, exclude: frozenset[int], attempt: int) -> None:
        own = self._open.get(number)
        if own is not None:
            self._placing[place] = asyncio.create_task(
                self._again(own, place, exclude, attempt), name=f"call {number}.{attempt}"
            )

    async def _again(self, own: _Open, place: int, exclude: frozenset[int], attempt: int) -> None:
        try:
            await self._seat(own, place, exclude, attempt)
        except ApiError as error:
            self._refuse(place, error)
        finally:
            self._placing.pop(place, None)

    def _refuse(self, place: int, error: ApiError) -> None:
        facts = {
            "kind": error.kind,
            "param": error.param,
            "retry_after_s": error.retry_after_s,
            "reason": error.reason,
        }
        self.channel.tell("refused", place, error.status, error.message, facts)

    def _drop(self, place: int) -> None:
        """Take back a place that nobody waits for any more, given or not."""
        if (placing := self._placing.pop(place, None)) is not None:
            placing.cancel()
        self._cancel(place)

    def _leave(self, number: int) -> None:
        own = self._open.get(number)
        if own is None:
            return
        if own.placed:
            own.left.set()
        else:
            own.task.cancel()  # it still waits to be admitted or placed

    # Seats

    def _taken(self, place: int) -> _Seat | None:
        """Return a seat that is about to be settled; it is known no longer."""
        seat = self._seats.pop(place, None)
        if seat is not None:
            seat.span.end()
        return seat

    def _first_token(self, place: int) -> None:
        if (seat := self._seats.get(place)) is not None:
            seat.ticket.first_token()

    def _expect_first_token(self, place: int) -> None:
        if (seat := self._seats.get(place)) is not None:
            seat.ticket.expect_first_token()

    def _finish(
        self,
        place: int,
        told: tuple[int | None, int, int | None, str | None] | None,
        chunks: int,
    ) -> None:
        if (seat := self._taken(place)) is not None:
            usage = told and Usage(
                prompt_tokens=told[0],
                output_tokens=told[1],
                cached_tokens=told[2],
                response_id=told[3],
            )
            seat.case.finish(seat.ticket, usage, chunks)

    def _fail(self, place: int, reason: str) -> None:
        if (seat := self._taken(place)) is not None:
            seat.ticket.fail(reason)

    def _cancel(self, place: int) -> None:
        if (seat := self._taken(place)) is not None:
            seat.ticket.cancel()

    def _learn_first(self, place: int, observed_s: float) -> None:
        if (seat := self._seats.get(place)) is not None:
            self._control.guard.learn_first(seat.patience, observed_s)

    def _learn_gap(self, place: int, observed_s: float) -> None:
        if (seat := self._seats.get(place)) is not None:
            self._control.guard.learn_gap(seat.patience, observed_s)

    # The fleet

    def _endpoint_failed(self, index: int, reason: str, unreachable: bool) -> None:
        self._control.endpoint_failed(index, reason, unreachable=unreachable)
        self._changed()

    def _endpoint_refused(self, index: int) -> None:
        self._control.endpoint_refused(index)
        self._changed()

    def _pulse(self, counted: list[Any], heard_s: tuple[float, ...]) -> None:
        self._control.metrics.merge(counted)
        mine = self._control.guard.heard_s
        mine[: len(heard_s)] = map(max, mine, heard_s)
