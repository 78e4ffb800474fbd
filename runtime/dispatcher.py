"""The router made awaitable: a call goes in, a ticket for one endpoint comes out.

Decisions are synchronous; only a held call waits, for an endpoint or for its turn. A call is
counted when its request is on its way, or before if anything happens that the count bears on.
A `Ticket` stands for one attempt that the router counts as in flight. It is used as a context
manager and settled exactly once, whatever happens: leaving it unsettled counts as cancelled, so
nothing can stay behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    Command,
    EndpointDown,
    EndpointUp,
    Event,
    FirstToken,
    Hold,
    Send,
    Tick,
)
from planner.dispatch.router import Router, elsewhere
from planner.domain.errors import NoEndpointAvailable
from planner.domain.trace import CallRecord
from runtime.clock import Clock

__all__ = ["Dispatcher", "Moved", "Ticket"]


_TURNS = 3
"""Turns of the event loop until a call just sent is counted, if nothing needs its count before: its
request is written in a task of its own, which a task that may be hedged begins."""


class Moved(Exception):
    """The policy was changed while a call was held; place it with the new one."""


class Ticket:
    """One attempt on one endpoint.

    Attributes
    ----------
    send
        The router's command.
    decision_us
        Time until the decision was known, microseconds; its counting is not in it.
    settled
        Whether it has ended.
    """

    __slots__ = (
        "_attempt", "_dispatcher", "_first_token_s", "_timer", "_told", "call", "decision_us",
        "send", "sent_s", "settled",
    )  # fmt: skip

    def __init__(
        self, dispatcher: Dispatcher, call: Call, send: Send, attempt: int, decision_us: float
    ) -> None:
        self._dispatcher = dispatcher
        self._attempt = attempt
        self._first_token_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._told = False
        self.call = call
        self.send = send
        self.sent_s = dispatcher.clock.now_s()
        self.decision_us = decision_us
        self.settled = False

    @property
    def call_id(self) -> str:
        """Under which the router knows it."""
        return self.call.call_id

    def first_token(self) -> None:
        """Note that the first byte of the answer came; later ones change nothing."""
        if self._first_token_s is None:
            self._first_token_s = self._dispatcher.clock.now_s()
            self._tell_first_token(seen=True)

    def expect_first_token(self) -> None:
        """Tell the router of the first token when it is due, unseen.

        An answer that is not streamed does not show when its prefill ended; left untold, the
        router would count the prompt as waiting for prefill until the very end. The trace keeps
        None. Nothing is told where the call has to wait for a slot first.
        """
        dispatcher = self._dispatcher
        state = dispatcher.router.view.states[self.send.endpoint]
        if self.send.in_flight < state.endpoint.max_num_seqs:
            due_s = state.latency.prefill_s(state.prefill_tokens)
            self._timer = asyncio.get_running_loop().call_later(
                dispatcher.clock.wall_s(due_s), self._tell_first_token
            )

    def _tell_first_token(self, *, seen: bool = False) -> None:
        if not self._told and not self.settled:
            self._told = True
            dispatcher = self._dispatcher
            dispatcher.handle(
                FirstToken(call_id=self.call.call_id, now_s=dispatcher.clock.now_s(), seen=seen)
            )

    def finish(
        self, *, output_tokens: int, prompt_tokens: int | None, cached_tokens: int | None
    ) -> None:
        """Settle: the call ended well."""
        now_s = self._dispatcher.clock.now_s()
        self._settle(
            CallFinished(
                call_id=self.call.call_id,
                now_s=now_s,
                output_tokens=output_tokens,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
            ),
            now_s,
            "ok",
        )

    def fail(self, reason: str) -> None:
        """Settle: the endpoint failed the call or refused it."""
        now_s = self._dispatcher.clock.now_s()
        event = CallFailed(call_id=self.call.call_id, now_s=now_s, reason=reason)
        self._settle(event, now_s, "failed")

    def cancel(self) -> None:
        """Settle: the client went away."""
        now_s = self._dispatcher.clock.now_s()
        self._settle(CallCancelled(call_id=self.call.call_id, now_s=now_s), now_s, "cancelled")

    def _settle(
        self, event: CallFinished | CallFailed | CallCancelled, now_s: float, status: str
    ) -> None:
        if self.settled:
            return
        self.settled = True
        if self._timer is not None:
            self._timer.cancel()
        dispatcher = self._dispatcher
        dispatcher.handle(event)
        finished = event if isinstance(event, CallFinished) else None
        dispatcher.record(self.record(status, finish_s=now_s, finished=finished))

    def record(
        self,
        status: str = "running",
        *,
        finish_s: float | None = None,
        finished: CallFinished | None = None,
    ) -> CallRecord:
        """Return the attempt as the trace has it, by default as it is now.

        Parameters
        ----------
        finish_s
            When it ended, clock seconds; None while it is under way.
        finished
            What the endpoint counted, if it ended well.
        """
        dispatcher, call, send = self._dispatcher, self.call, self.send
        prompt_tokens = finished.prompt_tokens if finished else None
        return CallRecord(
            run_id=call.run_id,
            call_id=call.call_id,
            workflow_hash=call.workflow_hash,
            node=call.node,
            site=call.site,
            ready_s=call.ready_s,
            sent_s=self.sent_s,
            endpoint=dispatcher.router.fleet.endpoints[send.endpoint].id,
            prompt_tokens=call.prompt_tokens if prompt_tokens is None else prompt_tokens,
            output_tokens=finished.output_tokens if finished else 0,
            first_token_s=self._first_token_s,
            finish_s=finish_s,
            cached_tokens=finished.cached_tokens if finished else None,
            max_tokens=call.max_tokens,
            visit=call.visit,
            attempt=self._attempt,
            status=status,
            policy=dispatcher.router.policy.name,
            reason=send.reason,
            table_version=dispatcher.table_version,
            predicted_finish_s=send.predicted_finish_s,
            predicted_output_tokens=send.predicted_output_tokens,
            in_flight=send.in_flight,
            decision_us=self.decision_us,
            **elsewhere(send, dispatcher.router.fleet),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()


class Dispatcher:
    """One router with the calls it holds.

    Parameters
    ----------
    router
        Fresh; used by nobody else.
    clock
        For all times given to the router.
    record
        Takes the record of each settled attempt.
    table_version
        For the records; assign it when the table is swapped.
    hold_limit
        Calls that may wait at a time, >= 0.
    hold_timeout_s
        Wall seconds a call may wait, > 0.
    """

    def __init__(
        self,
        router: Router,
        clock: Clock,
        record: Callable[[CallRecord], None],
        *,
        table_version: str = "",
        hold_limit: int = 1000,
        hold_timeout_s: float = 30.0,
    ) -> None:
        self.router = router
        self.clock = clock
        self.record = record
        self.table_version = table_version
        self._hold_limit = hold_limit
        self._hold_timeout_s = hold_timeout_s
        self._waiting: dict[str, asyncio.Future[Send]] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = 0.0

    async def place(self, call: Call, exclude: frozenset[int], attempt: int) -> Ticket:
        """Return a ticket for a call, at once or when the router sends it.

        Raises
        ------
        NoEndpointAvailable
            If no endpoint can take it, and too many calls wait for one already or this one waited
            too long. A call that waits its turn by the policy's will is not limited here.
        Moved
            If the policy was changed meanwhile.
        """
        started = time.perf_counter()
        commands = self.router.decide(
            CallArrived(call=call, now_s=self.clock.now_s(), exclude=exclude)
        )
        decision_us = (time.perf_counter() - started) * 1e6
        (own,) = (command for command in commands if command.call_id == call.call_id)
        self._obey(command for command in commands if command is not own)
        if isinstance(own, Send):
            self._settle_in(_TURNS)
        else:
            own = await self._wait(call, exclude, own)
        return Ticket(self, call, own, attempt, decision_us)

    def _settle_in(self, turns: int) -> None:
        """Have the router count what was sent, some turns of the loop from now."""
        if turns:
            asyncio.get_running_loop().call_soon(self._settle_in, turns - 1)
        else:
            self.router.settle()

    def handle(self, event: Event) -> None:
        """Tell the router, and wake the calls it sends in answer."""
        self._obey(self.router.handle(event))

    def _obey(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, Send):
                waiter = self._waiting[command.call_id]
                # A waiter that timed out in this turn is done; its own clean-up gives it back.
                with contextlib.suppress(asyncio.InvalidStateError):
                    waiter.set_result(command)
            else:
                self._wake_at(command.until_s)

    def _wake_at(self, until_s: float | None) -> None:
        """Tell the router the time at ``until_s``, unless it will be told earlier anyway."""
        if until_s is None:
            return
        if self._alarm is not None:
            if self._alarm_s <= until_s:
                return
            self._alarm.cancel()
        self._alarm_s = until_s
        wait_s = self.clock.wall_s(max(0.0, until_s - self.clock.now_s()))
        self._alarm = asyncio.get_running_loop().call_later(wait_s, self._tick)

    def _tick(self) -> None:
        self._alarm = None
        self.handle(Tick(now_s=self.clock.now_s()))

    async def _wait(self, call: Call, exclude: frozenset[int], hold: Hold) -> Send:
        if len(self._waiting) >= self._hold_limit and not self.router.servable(call, exclude):
            self.handle(CallCancelled(call_id=call.call_id, now_s=self.clock.now_s()))
            raise NoEndpointAvailable(
                f"no endpoint is up and {self._hold_limit} calls wait already"
            )
        waiter: asyncio.Future[Send] = asyncio.get_running_loop().create_future()
        self._waiting[call.call_id] = waiter
        self._wake_at(hold.until_s)
        try:
            return await self._turn(waiter, call, exclude)
        except BaseException:
            # Held, or sent in this very turn of the loop: the router takes it back either way.
            waiter.cancel()
            self.handle(CallCancelled(call_id=call.call_id, now_s=self.clock.now_s()))
            raise
        finally:
            del self._waiting[call.call_id]

    async def _turn(
        self, waiter: asyncio.Future[Send], call: Call, exclude: frozenset[int]
    ) -> Send:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._hold_timeout_s):
                    return await asyncio.shield(waiter)
            if not self.router.servable(call, exclude):
                raise NoEndpointAvailable(f"no endpoint came up within {self._hold_timeout_s:g} s")

    def endpoint_down(self, index: int) -> None:
        """Send nothing more to an endpoint."""
        self.handle(EndpointDown(endpoint=index, now_s=self.clock.now_s()))

    def endpoint_up(self, index: int, *, cold: bool) -> None:
        """Send to an endpoint again, held calls first."""
        self.handle(EndpointUp(endpoint=index, now_s=self.clock.now_s(), cold=cold))

    def move_held(self) -> None:
        """Make every held call leave with `Moved`."""
        for waiter in self._waiting.values():
            with contextlib.suppress(asyncio.InvalidStateError):
                waiter.set_exception(Moved())
