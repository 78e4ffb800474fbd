"""Who may go on to the router, and in which order those go who have to wait.

House rules
-----------
* Without limits nothing waits. With limits, a call over its tenant's rate is refused at once; one
  that finds no room waits in a bounded queue.
* Order: calls that have waited beyond the ageing bound, oldest first; then by priority class; then
  calls of runs that have begun before those of new runs, so that started work finishes; then
  start-time fair queueing on predicted service seconds over the tenants' weights.
* A full queue sheds the least urgent call, new runs before begun ones, the latest first. Whoever
  is refused hears why, and when to come back by the measured rate of service.
* Whatever was taken is given back when the call ends, however it ends. Times are wall seconds.

References
----------
Goyal, Vin and Cheng, Start-time Fair Queueing (1996): start tag ``S = max(v, F)``, finish tag
``F = S + service / weight``, virtual time v the start tag of the call admitted last.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, Self

from runtime.limits import Limits, Rate, Tenant
from runtime.metrics import GatewayMetrics
from runtime.wire import ApiError

__all__ = ["Admission", "Asked", "Pass", "Throughput"]

_ENDS = 128
"""Ends of calls from which the rate of service is measured."""
_NO_RATE_S = 1.0
"""What a refused client is told where no call has ended yet."""
_LONGEST_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A call that wants to go on.

    Parameters
    ----------
    begun
        Whether its run has had a call admitted.
    service_s
        Predicted seconds of service, >= 0.
    tokens
        Predicted tokens of prompt and answer.
    priority
        Class: higher is more urgent.
    """

    tenant: Tenant
    begun: bool = False
    service_s: float = 0.0
    tokens: float = 0.0
    priority: int = 0


class Throughput:
    """How many calls end per second, measured over the last ones."""

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_ENDS)

    def add(self, now_s: float) -> None:
        """Count the end of a call."""
        self._ends.append(now_s)

    def per_s(self, now_s: float) -> float | None:
        """Return the rate, None before two calls have ended."""
        if len(self._ends) < 2:
            return None
        span_s = now_s - self._ends[0]
        return len(self._ends) / span_s if span_s > 0 else None

    def wait_s(self, calls: int, now_s: float) -> float:
        """Return the seconds in which so many calls will have ended, at most ten minutes."""
        rate = self.per_s(now_s)
        return _NO_RATE_S if rate is None else min(_LONGEST_S, max(1, calls) / rate)


@dataclass(slots=True, eq=False)
class _Waiting:
    asked: Asked
    tag: float
    number: int
    since_s: float
    turn: asyncio.Future[None]

    @property
    def key(self) -> tuple[int, bool, float, int]:
        """Smallest first."""
        return -self.asked.priority, not self.asked.begun, self.tag, self.number

    @property
    def worth(self) -> tuple[int, bool, int]:
        """Smallest is shed first."""
        return self.asked.priority, self.asked.begun, -self.number

    def __lt__(self, other: _Waiting) -> bool:
        return self.key < other.key


@dataclass(slots=True)
class _Account:
    """What the gateway keeps of one tenant."""

    tenant: Tenant
    requests: Rate | None
    tokens: Rate | None
    in_flight: int = 0
    waiting: int = 0
    finish_tag: float = 0.0
    service_s: float = 0.0
    queue: list[_Waiting] = field(default_factory=list)  # a heap; ended ones stay until on top
    order: deque[_Waiting] = field(default_factory=deque)  # by arrival, the same

    @property
    def room(self) -> bool:
        most = self.tenant.max_in_flight
        return most is None or self.in_flight < most

    def tidy(self) -> None:
        """Take calls that no longer wait from the heads of both queues."""
        while self.order and self.order[0].turn.done():
            self.order.popleft()
        while self.queue and self.queue[0].turn.done():
            heapq.heappop(self.queue)


class Pass:
    """Leave to go on; a context manager that gives it back.

    Attributes
    ----------
    waited_s
        Wall seconds in the queue.
    """

    __slots__ = ("_account", "_admission", "_asked", "_open", "waited_s")

    def __init__(
        self, admission: Admission, account: _Account, asked: Asked, waited_s: float
    ) -> None:
        self._admission = admission
        self._account = account
        self._asked = asked
        self._open = True
        self.waited_s = waited_s

    def used(self, tokens: float) -> None:
        """Settle the account of tokens: what the call really took, instead of the prediction."""
        rate = self._account.tokens
        if rate is not None:
            rate.take(tokens - self._asked.tokens, self._admission.now_s())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open:
            self._open = False
            self._admission.leave(self._account)


class Admission:
    """The door of a gateway.

    Parameters
    ----------
    limits
        Of the gateway as a whole.
    now_s
        Monotonic wall clock.
    refused
        Told the reason and the tenant of each refusal, for metrics.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        now_s: Callable[[], float],
        refused: Callable[[str, str], None] = lambda _reason, _tenant: None,
    ) -> None:
        self.limits = limits
        self.now_s = now_s
        self.throughput = Throughput()
        self.in_flight = 0
        self.waiting = 0
        self._refused = refused
        self._accounts: dict[str, _Account] = {}
        self._virtual = 0.0
        self._numbers = count()

    async def enter(self, asked: Asked) -> Pass:
        """Return a pass at once or when it is the call's turn.

        Raises
        ------
        ApiError
            429, with the seconds after which it is worth trying again.
        """
        now_s = self.now_s()
        account = self._account(asked.tenant, now_s)
        self._check_rates(account, asked, now_s)
        weight = asked.tenant.weight
        tag = max(self._virtual, account.finish_tag)
        account.finish_tag = tag + asked.service_s / weight
        waiting = _Waiting(
            asked, tag, next(self._numbers), now_s, asyncio.get_running_loop().create_future()
        )
        try:
            if self._room and account.room and not account.waiting:
                self._admit(account, waiting)
            else:
                self._queue(account, waiting)
                self._admit_waiting()
                if not waiting.turn.done():
                    await self._turn(account, waiting)
        except BaseException:
            self._take_back(account, waiting)
            raise
        return Pass(self, account, asked, self.now_s() - now_s)

    def leave(self, account: _Account) -> None:
        """Give a pass back, and admit whoever may go on now."""
        account.in_flight -= 1
        self.in_flight -= 1
        self.throughput.add(self.now_s())
        self._admit_waiting()

    def set_limits(self, limits: Limits, tenants: Iterable[Tenant]) -> None:
        """Use other limits from now on; rates start full, and what waits may go on."""
        self.limits = limits
        now_s = self.now_s()
        for tenant in tenants:
            account = self._accounts.get(tenant.name)
            if account is not None:
                fresh = _account(tenant, now_s)
                account.tenant = tenant
                account.requests, account.tokens = fresh.requests, fresh.tokens
        self._admit_waiting()

    def fairness(self) -> float:
        """Return Jain's index of service received per weight, 1 if it is even or nobody came."""
        shares = [one.service_s / one.tenant.weight for one in self._accounts.values()]
        squares = sum(share * share for share in shares)
        return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the counters, JSON-ready."""
        rate = self.throughput.per_s(self.now_s())
        return {
            "in_flight": self.in_flight,
            "waiting": self.waiting,
            "ends_per_s": None if rate is None else round(rate, 3),
            "fairness": round(self.fairness(), 4),
            "tenants": {
                name: {
                    "in_flight": one.in_flight,
                    "waiting": one.waiting,
                    "service_s": round(one.service_s, 3),
                    "priority": one.tenant.priority,
                    "weight": one.tenant.weight,
                }
                for name, one in self._accounts.items()
            },
        }

    def gauge(self, metrics: GatewayMetrics) -> None:
        """Set the gauges of all tenants."""
        for name, one in self._accounts.items():
            metrics.tenant_service.set(one.service_s, name)
            metrics.tenant_queue.set(one.waiting, name)
        metrics.fairness.set(self.fairness())

    # Inside

    @property
    def _room(self) -> bool:
        most = self.limits.max_in_flight
        return most is None or self.in_flight < most

    def _account(self, tenant: Tenant, now_s: float) -> _Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = _account(tenant, now_s)
        return account

    def _check_rates(self, account: _Account, asked: Asked, now_s: float) -> None:
        """Take from the rates, or refuse and take nothing."""
        wanted = (("requests", account.requests, 1.0), ("tokens", account.tokens, asked.tokens))
        for what, rate, amount in wanted:
            wait_s = 0.0 if rate is None else rate.wait_s(amount, now_s)
            if rate is not None and wait_s > 0:
                raise self._refusal(
                    f"rate_{what}",
                    account,
                    f"Limit of {rate.per_minute:g} {what} per minute reached.",
                    wait_s,
                )
        for _, rate, amount in wanted:
            if rate is not None:
                rate.take(amount, now_s)

    def _queue(self, account: _Account, waiting: _Waiting) -> None:
        """Let a call wait, shedding the least urgent one if there are too many."""
        if self.waiting >= self.limits.queue_limit:
            victims = [one for other in self._accounts.values() for one in _alive(other.order)]
            victim = min([*victims, waiting], key=lambda one: one.worth)
            reason = "queue_full" if victim is waiting else "shed"
            owner = self._accounts[victim.asked.tenant.name]
            refusal = self._refusal(
                reason,
                owner,
                "The gateway is overloaded: its queue is full, and calls of this priority are shed "
                "first.",
                self.throughput.wait_s(self.waiting + 1, self.now_s()),
            )
            if victim is waiting:
                raise refusal
            victim.turn.set_exception(refusal)
            owner.waiting -= 1
            self.waiting -= 1
        heapq.heappush(account.queue, waiting)
        account.order.append(waiting)
        account.waiting += 1
        self.waiting += 1

    async def _turn(self, account: _Account, waiting: _Waiting) -> None:
        try:
            async with asyncio.timeout(self.limits.queue_timeout_s):
                await waiting.turn
        except TimeoutError:
            raise self._refusal(
                "queue_timeout",
                account,
                f"The call waited {self.limits.queue_timeout_s:g} s for its turn.",
                self.throughput.wait_s(self.waiting, self.now_s()),
            ) from None

    def _take_back(self, account: _Account, waiting: _Waiting) -> None:
        """Undo what a call that is not going on has taken."""
        turn, asked = waiting.turn, waiting.asked
        # Nothing was served: its tenant is not charged for it.
        account.finish_tag -= asked.service_s / asked.tenant.weight
        if account.tokens is not None:
            account.tokens.take(-asked.tokens, self.now_s())
        if turn.cancelled():
            account.waiting -= 1
            self.waiting -= 1
            account.tidy()
        elif turn.done() and turn.exception() is None:
            # Its turn came in the very moment in which it left.
            account.service_s -= asked.service_s
            self.leave(account)

    def _admit(self, account: _Account, waiting: _Waiting) -> None:
        account.in_flight += 1
        account.service_s += waiting.asked.service_s
        self.in_flight += 1
        self._virtual = max(self._virtual, waiting.tag)
        waiting.turn.set_result(None)

    def _admit_waiting(self) -> None:
        """Admit whoever may go on, in order."""
        while self.waiting and self._room:
            best = self._next()
            if best is None:
                return
            account = self._accounts[best.asked.tenant.name]
            account.waiting -= 1
            self.waiting -= 1
            self._admit(account, best)

    def _next(self) -> _Waiting | None:
        oldest: _Waiting | None = None
        best: _Waiting | None = None
        for account in self._accounts.values():
            if not account.waiting or not account.room:
                continue
            account.tidy()
            first, top = account.order[0], account.queue[0]
            if oldest is None or first.number < oldest.number:
                oldest = first
            if best is None or top < best:
                best = top
        if oldest is not None and self.now_s() - oldest.since_s >= self.limits.ageing_s:
            return oldest
        return best

    def _refusal(self, reason: str, account: _Account, text: str, wait_s: float) -> ApiError:
        self._refused(reason, account.tenant.name)
        return ApiError(429, f"{text} Try again later.", retry_after_s=wait_s, reason=reason)


def _account(tenant: Tenant, now_s: float) -> _Account:
    requests, tokens = tenant.requests_per_minute, tenant.tokens_per_minute
    return _Account(
        tenant=tenant,
        requests=None if requests is None else Rate(requests, now_s),
        tokens=None if tokens is None else Rate(tokens, now_s),
    )


def _alive(order: Iterable[_Waiting]) -> list[_Waiting]:
    return [one for one in order if not one.turn.done()]
