"""What a gateway knows of its endpoints' health, and how long it waits for them.

Joins breakers, learned time limits and the budget of early give-ups, and says in wall seconds what
the router's forecasts say in engine seconds. The router hears of an endpoint only when it may take
calls again or no longer (`Switch`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from planner.dispatch.router import Router
from planner.domain.fleet import Endpoint
from planner.domain.trace import CallRecord
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.dispatcher import Ticket
from runtime.health import FleetHealth, HealthRules, State
from runtime.hedging import Budget
from runtime.metrics import GatewayMetrics
from runtime.timeouts import LearnedLimit, first_byte_s, step_s, whole_s

__all__ = ["HASTE", "Guard", "Patience", "Switch", "Teacher"]

_log = logging.getLogger(__name__)

HASTE = 0.1
"""Share of calls that may give an endpoint up by time while its breaker is closed: where the
whole fleet is late, sending everything twice would make it later."""
_STATE_NUMBER = {State.CLOSED: 0.0, State.HALF_OPEN: 1.0, State.OPEN: 2.0}


class Switch(Protocol):
    """Tells the router which endpoints may take calls."""

    def endpoint_down(self, index: int) -> None:
        """Send nothing more to an endpoint."""
        ...

    def endpoint_up(self, index: int, *, cold: bool) -> None:
        """Send to an endpoint again."""
        ...

    def move_held(self) -> None:
        """Place every held call anew."""
        ...


class Teacher(Protocol):
    """What an attempt's patience asks, and teaches, whoever gave it."""

    @property
    def heard_s(self) -> list[float]:
        """When each endpoint last sent a byte of an answer, on the event loop's clock."""
        ...

    @property
    def cap_s(self) -> float:
        """Longest wait for a byte, wall seconds."""
        ...

    def may_give_up(self, index: int) -> bool:
        """Return whether an attempt may be taken elsewhere because it is late."""
        ...

    def learn_first(self, patience: Patience, observed_s: float) -> None:
        """Learn from a first byte."""
        ...

    def learn_gap(self, patience: Patience, observed_s: float) -> None:
        """Learn from the longest silence in a stream."""
        ...

    def late_first(self, patience: Patience) -> None:
        """Learn from a first byte that was not waited for."""
        ...


class Patience:
    """How long one attempt is waited for; wall seconds.

    Parameters
    ----------
    guard, index
        Whose attempt it is, and on which endpoint.
    forecast_s, step_s
        Forecast of the first byte, and of the time between two.
    first_s, stall_s
        Limits on them.
    hedge_s
        When a second attempt is due.
    streams
        Whether the answer comes in pieces; else its first byte is its end.
    elsewhere
        Whether another endpoint could take the call now.

    Attributes
    ----------
    waits_for_client
        Whether the client is what keeps the answer; its slowness is not the endpoint's.
    """

    __slots__ = (
        "_elsewhere", "_gap_s", "_guard", "_heard_s", "_index", "_now_s", "_sent_s", "first_s",
        "forecast_s", "hedge_s", "stall_s", "step_s", "streams", "waits_for_client",
    )  # fmt: skip

    def __init__(
        self,
        guard: Teacher,
        index: int,
        *,
        forecast_s: float,
        step_s: float,
        first_s: float,
        stall_s: float,
        hedge_s: float,
        streams: bool,
        elsewhere: Callable[[], bool],
    ) -> None:
        self._guard = guard
        self._index = index
        self._elsewhere = elsewhere
        self._now_s = asyncio.get_running_loop().time
        self._sent_s = self._now_s()
        self._heard_s = 0.0
        self._gap_s = 0.0
        self.forecast_s = forecast_s
        self.step_s = step_s
        self.first_s = first_s
        self.stall_s = stall_s
        self.hedge_s = hedge_s
        self.streams = streams
        self.waits_for_client = False

    def begun(self) -> None:
        """Note the first byte."""
        now_s = self._now_s()
        self._heard_s = self._guard.heard_s[self._index] = now_s
        self._guard.learn_first(self, now_s - self._sent_s)

    def moved(self) -> None:
        """Note a further byte: the endpoint is alive, whoever it was for."""
        now_s = self._now_s()
        self._gap_s = max(self._gap_s, now_s - self._heard_s)
        self._heard_s = self._guard.heard_s[self._index] = now_s

    def client_took(self) -> None:
        """Note that the client has taken what it was sent, however long that took."""
        self.waits_for_client = False
        self._heard_s = self._now_s()

    def ended(self) -> None:
        """Note the end of a stream."""
        self._guard.learn_gap(self, self._gap_s)

    def first_left_s(self) -> float:
        """Return what is left of the limit on the first byte; it grows where nobody else helps."""
        waited_s = self._now_s() - self._sent_s
        if waited_s < self.first_s:
            return self.first_s - waited_s
        if waited_s < self._guard.cap_s:
            if not (self._elsewhere() and self._guard.may_give_up(self._index)):
                self.first_s = min(self._guard.cap_s, 1.5 * waited_s)
                return self.first_s - waited_s
            self._guard.late_first(self)
        return 0.0

    def stall_left_s(self) -> float:
        """Return what is left of the limit on the endpoint's silence.

        One stream may well stand still, its request preempted; the limit is on all of them.
        """
        if self.waits_for_client:
            return self.stall_s
        heard_s = max(self._heard_s, self._guard.heard_s[self._index])
        return self.stall_s - (self._now_s() - heard_s)


class Guard:
    """Health and time limits of a fleet.

    Parameters
    ----------
    endpoints
        In fleet order.
    config, clock, metrics
        Of the gateway.

    Attributes
    ----------
    health
        The breakers.
    config
        Settings; those read while running may be changed.
    hedges
        Budget of second attempts.
    heard_s
        When each endpoint last sent a byte of an answer, on the event loop's clock.
    cap_s
        Longest wait for a byte, wall seconds.
    switch
        Told of endpoints that go down or come up; set by the owner.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        config: GatewayConfig,
        clock: Clock,
        metrics: GatewayMetrics,
    ) -> None:
        self._endpoints = tuple(endpoints)
        self.config = config
        self._clock = clock
        self._metrics = metrics
        self.health = FleetHealth(
            [endpoint.model for endpoint in endpoints],
            HealthRules(
                failures=config.breaker_failures,
                pause_s=config.breaker_pause_s,
                trial_share=config.trial_share,
                slow_ratio=config.slow_ratio,
                max_ejected=config.max_ejected,
            ),
        )
        self.cap_s = config.read_timeout_s

        def limit(floor_s: float) -> LearnedLimit:
            return LearnedLimit(multiple=config.timeout_multiple, floor_s=floor_s, cap_s=self.cap_s)

        self._first = limit(config.first_byte_floor_s)
        self._whole = limit(config.first_byte_floor_s)
        self._gap = limit(config.stall_floor_s)
        self._hedge = LearnedLimit(
            multiple=1.0, floor_s=0.0, cap_s=self.cap_s, level=config.hedge_level
        )
        self._haste = Budget(HASTE)
        self.hedges = Budget(config.hedge_share)
        self.heard_s = [0.0] * len(self._endpoints)
        self._boots: list[float | None] = [None] * len(self._endpoints)
        self._looked_s = [time.monotonic()] * len(self._endpoints)
        self.switch: Switch | None = None

    # Verdicts

    def succeeded(self, index: int, record: CallRecord, router: Router) -> None:
        """Note an attempt that ended well."""
        ratio = self._slowness(index, record, router)
        self._after(index, self.health.succeeded(index, time.monotonic(), ratio))

    def failed(self, index: int, why: str, *, unreachable: bool = False) -> None:
        """Note a failure of an endpoint; it may be taken out by it."""
        now_s = time.monotonic()
        self._after(index, self.health.failed(index, now_s, why, unreachable=unreachable))

    def refused(self, index: int) -> None:
        """Note that an endpoint was too busy to take a call."""
        self._after(index, self.health.refused(index, time.monotonic()))

    def probed(self, index: int, *, well: bool, boot_s: float | None = None) -> None:
        """Note what a health check said.

        ``boot_s`` is when the endpoint's process started, by its own clock, None if it does not
        say: another one than before means an empty cache, the same one that it is still there.
        """
        now_s = time.monotonic()
        self._looked_s[index] = now_s
        breaker = self.health.breakers[index]
        changed = breaker.probed(now_s, well=well)
        known = self._boots[index]
        restarted = boot_s is not None and known is not None and boot_s != known
        if boot_s is not None:
            self._boots[index] = boot_s
            if known is not None:
                breaker.cold = restarted
        if restarted:
            self._metrics.restarts.inc(self._endpoints[index].id)
            _log.warning("endpoint restarted", extra={"endpoint": self._endpoints[index].id})
        # A restart between two looks changes no state, but the cache is gone.
        self._after(index, changed or (restarted and breaker.takes_calls))

    def recovered(self, index: int) -> None:
        """Take somebody's word that an endpoint that is open is well again."""
        self._after(index, self.health.breakers[index].recovered())

    def drain(self, index: int) -> None:
        """Send no new call to an endpoint; those it has go on."""
        breaker = self.health.breakers[index]
        if not breaker.draining:
            breaker.draining = True
            self._after(index, breaker.state is not State.OPEN)

    def undrain(self, index: int) -> None:
        """Take a drain back."""
        breaker = self.health.breakers[index]
        if breaker.draining:
            breaker.draining = False
            self._after(index, breaker.state is not State.OPEN)

    def _after(self, index: int, changed: bool) -> None:
        """Tell the router, the log and the metrics of a change."""
        if not changed:
            return
        breaker, endpoint = self.health.breakers[index], self._endpoints[index]
        state = "draining" if breaker.draining else breaker.state.value
        self._metrics.transitions.inc(endpoint.id, state)
        _log.log(
            logging.INFO if breaker.takes_calls else logging.WARNING,
            "endpoint changed",
            extra={"endpoint": endpoint.id, "state": state, "reason": breaker.why},
        )
        if self.switch is None:
            return
        if not breaker.takes_calls:
            self.switch.endpoint_down(index)
            if any(one.state is State.HALF_OPEN for one in self.health.breakers):
                # Calls were kept from those on trial for the sake of one that is out now.
                self.switch.move_held()
            return
        spared = index in self.health.spared(endpoint.model)
        if spared:
            # Else all calls that wait for their turn would take it for one of the others.
            self.switch.move_held()
        self.switch.endpoint_up(index, cold=breaker.cold)
        if breaker.state is State.CLOSED:
            self.switch.move_held()  # what was kept from it need not be any longer
        breaker.cold = False

    def refit(self, endpoints: Sequence[Endpoint]) -> None:
        """Go on with these endpoints: those known so far, perhaps changed, and new ones."""
        new = len(endpoints) - len(self._endpoints)
        self._endpoints = tuple(endpoints)
        self.health.refit([endpoint.model for endpoint in endpoints])
        self.heard_s += [0.0] * new
        self._boots += [None] * new
        self._looked_s += [time.monotonic()] * new

    # Time limits

    def patience(
        self,
        ticket: Ticket,
        router: Router,
        *,
        streams: bool,
        attempt: int,
        last: bool,
        elsewhere: Callable[[], bool],
    ) -> Patience:
        """Return how long an attempt just decided is waited for.

        Parameters
        ----------
        attempt
            0 for the first; each further one is given twice as long.
        last
            Whether no other will follow; it is waited for to the cap.
        """
        self._haste.earn()
        self.hedges.earn()
        call, send = ticket.call, ticket.send
        crowd = router.crowd(send.endpoint)  # the view would count before the call is under way
        wall_s = self._clock.wall_s
        gap_s = wall_s(step_s(crowd))
        if streams:
            forecast_s = wall_s(first_byte_s(call, send, crowd))
            first_s = self._first.of(forecast_s)
        else:
            # Never less than it may well take: an answer that is cut short is paid for twice.
            forecast_s = wall_s(whole_s(call, send, crowd))
            first_s = max(forecast_s, self._whole.of(forecast_s))
        return Patience(
            self,
            send.endpoint,
            forecast_s=forecast_s,
            step_s=gap_s,
            first_s=self.cap_s if last else min(self.cap_s, first_s * 2**attempt),
            # An answer sent as a whole has neither pauses nor a hedge.
            stall_s=self._gap.of(gap_s) if streams else self.cap_s,
            hedge_s=self._hedge.of(forecast_s) if streams else self.cap_s,
            streams=streams,
            elsewhere=elsewhere,
        )

    def learn_first(self, patience: Patience, observed_s: float) -> None:
        """Learn from a first byte."""
        (self._first if patience.streams else self._whole).learn(patience.forecast_s, observed_s)
        if patience.streams:
            self._hedge.learn(patience.forecast_s, observed_s)

    def learn_gap(self, patience: Patience, observed_s: float) -> None:
        """Learn from the longest silence in a stream."""
        self._gap.learn(patience.step_s, observed_s)

    def late_first(self, patience: Patience) -> None:
        """Learn from a first byte that was not waited for."""
        self.learn_first(patience, patience.first_s)

    def may_give_up(self, index: int) -> bool:
        """Return whether an attempt may be taken elsewhere because it is late.

        Freely from an endpoint that is out; else within a budget, so that a fleet that is late as
        a whole is not sent everything twice.
        """
        return self.health.breakers[index].down or self._haste.spend()

    # Views

    def to_probe(self) -> list[int]:
        """Return the endpoints whose health may be looked at now."""
        now_s, every_s = time.monotonic(), self.config.health_interval_s
        return [
            index
            for index, breaker in enumerate(self.health.breakers)
            if (
                breaker.may_probe(now_s)
                if breaker.down
                else 0 < every_s <= now_s - self._looked_s[index]
            )
        ]

    def booted(self, index: int) -> float | None:
        """Return when an endpoint's process started, by its own clock, as far as it has said."""
        return self._boots[index]

    def up_in_s(self, model: str | None, here: Iterable[int]) -> float:
        """Return the seconds until an endpoint of a model may be back, at the earliest."""
        now_s = time.monotonic()
        return min(
            (
                self.health.breakers[index].pause_left_s(now_s)
                for index in here
                if model is None or self._endpoints[index].model == model
            ),
            default=0.0,
        )

    def to_json(self, index: int) -> dict[str, Any]:
        """Return what is known of an endpoint's health, JSON-ready."""
        return self.health.to_json(index, time.monotonic())

    def limits_json(self) -> dict[str, Any]:
        """Return the time limits and budgets as they are now, JSON-ready; wall seconds."""
        return {
            "first_byte": self._first.to_json(),
            "whole_answer": self._whole.to_json(),
            "silence": self._gap.to_json(),
            "hedge": {**self._hedge.to_json(), "share": self.hedges.share},
            "budget_left": {
                "give_up": round(self._haste.left, 2),
                "hedge": round(self.hedges.left, 2),
            },
        }

    def gauge(self) -> None:
        """Set the gauges of all endpoints."""
        for breaker, endpoint in zip(self.health.breakers, self._endpoints, strict=True):
            self._metrics.breaker.set(_STATE_NUMBER[breaker.state], endpoint.id)
            self._metrics.draining.set(float(breaker.draining), endpoint.id)

    def _slowness(self, index: int, record: CallRecord, router: Router) -> float | None:
        """Return observed over usual seconds of a call that ended well, None if unknown.

        Usual is what the endpoint's row said once it was learned, so that an endpoint whose row
        was wrong from the start is not taken for a slow one. Calls that found the slots taken are
        expected to have waited in proportion.
        """
        state = router.view.states[index]
        row = state.latency
        if router.learner is not None:
            learned = router.learner.rows[index].usual
            if learned is None:
                return None
            row = learned
        if record.finish_s is None or record.output_tokens < 1 or state.endpoint.role != "both":
            return None
        slots = state.endpoint.max_num_seqs
        calls = max(record.in_flight or 0, state.in_flight) + 1
        batch = min(calls, slots)
        own = record.prompt_tokens + record.output_tokens / 2
        cached = min(record.cached_tokens or 0, max(record.prompt_tokens - 1, 0))
        expected_s = row.prefill_s(record.prompt_tokens - cached, cached)
        expected_s += record.output_tokens * row.decode_step_s(batch, batch * own)
        return (record.finish_s - record.sent_s) / (expected_s * max(1.0, calls / slots))
