"""A worker's desk: the questions of `runtime.desk`, asked of the hub.

One message asks for a call to be admitted and placed at once; its end is told without waiting. What
is asked often and changes rarely (settings, tenants, endpoints, who is up) the hub sends when it
changes. Budgets of early give-ups and of second attempts are kept here with the hub's shares: the
shares of all workers' calls are those shares of all calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Self

from planner.dispatch.events import Send
from planner.domain.fleet import Endpoint
from runtime.config import GatewayConfig
from runtime.desk import Arrival, Seat
from runtime.guard import HASTE, Patience
from runtime.hedging import Budget
from runtime.keys import KeyedTenancy
from runtime.metrics import GatewayMetrics
from runtime.processes.channel import Channel, Message
from runtime.wire import ApiError, Usage

__all__ = ["Placed", "RemoteCase", "RemoteDesk", "RemoteSeat", "State", "Waits"]

_UNSENT = frozenset({"messages", "prompt", "input", "tools"})
"""Fields of a body that only the prompt is made of."""
_SECRET = frozenset({"authorization", "x-api-key", "cookie"})


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the hub tells all workers of itself.

    Parameters
    ----------
    up
        For each place of the fleet, whether it takes calls.
    down
        Whether it is out for its failures.
    rooms
        Longest sequence it can hold, tokens.
    """

    config: GatewayConfig
    tenancy: KeyedTenancy
    models: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]
    table_version: str
    up: tuple[bool, ...]
    down: tuple[bool, ...]
    rooms: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """The limits of an attempt, wall seconds; see `runtime.guard.Patience`."""

    forecast_s: float
    step_s: float
    first_s: float
    stall_s: float
    hedge_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The hub's answer to a call that wants a place.

    Parameters
    ----------
    head_start_s, waited_s
        See `runtime.desk.Case`; the wait for a place counts as well.
    room_tokens
        What the call needs at least.
    """

    send: Send
    call_id: str
    decision_us: float
    waits: Waits
    head_start_s: float
    waited_s: float
    room_tokens: int


class RemoteDesk:
    """See `runtime.desk.Desk`.

    Parameters
    ----------
    state
        As the hub has it at the start.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.metrics = GatewayMetrics(label_limit=state.config.label_limit)
        self.hedges = Budget(state.config.hedge_share)
        self.haste = Budget(HASTE)
        self.heard_s = [0.0] * len(state.endpoints)
        self.channel: Channel
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[Placed]] = {}

    @property
    def state(self) -> State:
        """The hub's, as far as it has told."""
        return self._state

    @property
    def config(self) -> GatewayConfig:
        """See `Desk`."""
        return self._state.config

    @property
    def tenancy(self) -> KeyedTenancy:
        """See `Desk`."""
        return self._state.tenancy

    @property
    def models(self) -> Sequence[str]:
        """See `Desk`."""
        return self._state.models

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """See `Desk`."""
        return self._state.endpoints

    @property
    def table_version(self) -> str:
        """See `Desk`."""
        return self._state.table_version

    def case(self, arrival: Arrival) -> RemoteCase:
        """See `Desk`."""
        return RemoteCase(self, arrival, next(self._numbers))

    def endpoint_failed(self, index: int, reason: str, *, unreachable: bool = False) -> None:
        """See `Desk`."""
        self.channel.tell("endpoint_failed", index, reason, unreachable)

    def endpoint_refused(self, index: int) -> None:
        """See `Desk`."""
        self.channel.tell("endpoint_refused", index)

    def set_state(self, state: State) -> None:
        """Go on with what the hub says of itself now."""
        self._state = state
        self.heard_s += [0.0] * (len(state.endpoints) - len(self.heard_s))

    def set_heard(self, heard_s: Sequence[float]) -> None:
        """Note when other workers heard of each endpoint."""
        mine = self.heard_s
        self.heard_s[: len(heard_s)] = map(max, mine, heard_s)

    def pulse(self) -> None:
        """Tell the hub what was counted and heard since the last time."""
        self.channel.tell("pulse", self.metrics.drain(), tuple(self.heard_s))

    async def ask(self, name: str, number: int, *details: Any) -> tuple[int, Placed]:
        """Ask for a place; return it with the number it is known by.

        Raises
        ------
        ApiError
            As the hub refused.
        """
        place = next(self._numbers)
        answer = self._asked[place] = asyncio.get_running_loop().create_future()
        self.channel.tell(name, number, place, *details)
        try:
            return place, await answer
        except asyncio.CancelledError:
            self.channel.tell("drop", place)
            raise
        finally:
            del self._asked[place]

    def answered(self, message: Message) -> None:
        """Take the hub's answer to a question; nobody may want it any more."""
        name, place, *details = message
        waiting = self._asked.get(place)
        if waiting is None or waiting.done():
            return
        if name == "placed":
            waiting.set_result(details[0])
        else:
            status, text, facts = details
            waiting.set_exception(ApiError(status, text, **facts))


class RemoteCase:
    """See `runtime.desk.Case`; an async context manager."""

    def __init__(self, desk: RemoteDesk, arrival: Arrival, number: int) -> None:
        self._desk = desk
        self._arrival = arrival
        self._number = number
        self._first: RemoteSeat
        self._room_tokens = 0
        self.head_start_s = 0.0
        self.waited_s = 0.0

    async def __aenter__(self) -> Self:
        arrival = self._arrival
        prompt = arrival.prompt
        details = (
            {name: value for name, value in arrival.headers.items() if name.lower() not in _SECRET},
            {name: value for name, value in arrival.payload.items() if name not in _UNSENT},
            (prompt.size_bytes, prompt.chain, prompt.head, prompt.exact_tokens),
            arrival.model, arrival.tenant.name, arrival.request_id, arrival.stream,
        )  # fmt: skip
        try:
            place, placed = await self._desk.ask("enter", self._number, *details)
        except asyncio.CancelledError:
            self._leave()
            raise
        self.head_start_s = placed.head_start_s
        self.waited_s = placed.waited_s
        self._room_tokens = placed.room_tokens
        self._first = RemoteSeat(self._desk, place, placed)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._desk.channel.tell("leave", self._number)

    async def place(self, exclude: frozenset[int], attempt: int) -> RemoteSeat:
        """See `Case`."""
        if attempt == 0:
            return self._first
        place, placed = await self._desk.ask("place", self._number, exclude, attempt)
        return RemoteSeat(self._desk, place, placed)

    def patience(self, seat: Seat, *, attempt: int, exclude: frozenset[int]) -> Patience:
        """See `Case`; the hub has thought of the attempt and of those excluded."""
        assert isinstance(seat, RemoteSeat)  # noqa: S101 - those of this desk are
        del attempt
        self._desk.haste.earn()
        self._desk.hedges.earn()
        waits, index = seat.placed.waits, seat.send.endpoint
        beyond = exclude | {index}
        return Patience(
            _Reports(self._desk, seat.place),
            index,
            forecast_s=waits.forecast_s,
            step_s=waits.step_s,
            first_s=waits.first_s,
            stall_s=waits.stall_s,
            hedge_s=waits.hedge_s,
            streams=self._arrival.stream,
            elsewhere=lambda: self.others(beyond),
        )

    def others(self, exclude: frozenset[int]) -> bool:
        """See `Case`."""
        state, model = self._desk.state, self._arrival.model
        return any(
            state.up[index]
            and index not in exclude
            and endpoint.role != "decode"
            and (model is None or endpoint.model == model)
            and state.rooms[index] >= self._room_tokens
            for index, endpoint in enumerate(state.endpoints)
        )

    def span(self, seat: Seat) -> None:  # noqa: ARG002 - the protocol
        """See `Case`; the hub traces."""
        return

    def finish(self, seat: Seat, usage: Usage | None, chunks: int) -> None:
        """See `Case`."""
        assert isinstance(seat, RemoteSeat)  # noqa: S101 - as above
        told = usage and (
            usage.prompt_tokens, usage.output_tokens, usage.cached_tokens, usage.response_id,
        )  # fmt: skip
        seat.settle("finish", told, chunks)


class RemoteSeat:
    """See `runtime.desk.Seat`."""

    __slots__ = ("_channel", "_settled", "_told", "place", "placed")

    def __init__(self, desk: RemoteDesk, place: int, placed: Placed) -> None:
        self._channel = desk.channel
        self._told = False
        self._settled = False
        self.place = place
        self.placed = placed

    @property
    def send(self) -> Send:
        """See `Seat`."""
        return self.placed.send

    @property
    def call_id(self) -> str:
        """See `Seat`."""
        return self.placed.call_id

    @property
    def decision_us(self) -> float:
        """See `Seat`."""
        return self.placed.decision_us

    def first_token(self) -> None:
        """See `Seat`."""
        if not self._told:
            self._told = True
            self._channel.tell("first_token", self.place)

    def expect_first_token(self) -> None:
        """See `Seat`."""
        self._channel.tell("expect_first_token", self.place)

    def fail(self, reason: str) -> None:
        """See `Seat`."""
        self.settle("fail", reason)

    def settle(self, how: str, *details: Any) -> None:
        """Tell the hub how it ended, once."""
        if not self._settled:
            self._settled = True
            self._channel.tell(how, self.place, *details)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.settle("cancel")


class _Reports:
    """What an attempt's patience teaches, told to the hub; see `runtime.guard.Teacher`."""

    __slots__ = ("_desk", "_place")

    def __init__(self, desk: RemoteDesk, place: int) -> None:
        self._desk = desk
        self._place = place

    @property
    def heard_s(self) -> list[float]:
        """When each endpoint last sent a byte to any worker, as far as is known here."""
        return self._desk.heard_s

    @property
    def cap_s(self) -> float:
        """Longest wait for a byte."""
        return self._desk.config.read_timeout_s

    def may_give_up(self, index: int) -> bool:
        """Return whether an attempt may be taken elsewhere because it is late."""
        return self._desk.state.down[index] or self._desk.haste.spend()

    def learn_first(self, patience: Patience, observed_s: float) -> None:
        """Tell of a first byte."""
        del patience
        self._desk.channel.tell("learn_first", self._place, observed_s)

    def learn_gap(self, patience: Patience, observed_s: float) -> None:
        """Tell of the longest silence in a stream."""
        del patience
        self._desk.channel.tell("learn_gap", self._place, observed_s)

    def late_first(self, patience: Patience) -> None:
        """Tell of a first byte that was not waited for."""
        self._desk.channel.tell("learn_first", self._place, patience.first_s)
