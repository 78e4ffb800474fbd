"""How long to wait for an endpoint: a multiple of what its answer was forecast to take.

A limit is ``multiple x q(forecast)``, where q is the forecast as corrected online to a high
quantile, kept between a floor and a cap. So limits are tight on an idle fleet, grow with the queue
in front of a call, and follow a fleet that turns out slower than its rows say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from planner.dispatch.events import Call, Send
from planner.dispatch.view import Crowd
from planner.domain.calibration import QuantileTracker

__all__ = ["LearnedLimit", "Watch", "first_byte_s", "step_s", "whole_s"]

_LOOK_S = 1.0
"""Longest time between two looks at a limit that may move."""
_HELD_UP_S = 0.05
"""Lateness of a look from which this process itself is taken to have been held up."""
_UNKNOWN_LENGTH = 20.0
"""Times its forecast length that a whole answer may have before anything was learned of errors."""


class LearnedLimit:
    """A limit on something that is forecast.

    Parameters
    ----------
    multiple
        Of the forecast quantile, >= 1.
    floor_s, cap_s
        Least and largest limit, same seconds as the forecasts.
    level
        Of the quantile, in (0, 1).
    """

    __slots__ = ("_cap_s", "_floor_s", "_multiple", "_tracker")

    def __init__(
        self, *, multiple: float, floor_s: float, cap_s: float, level: float = 0.99
    ) -> None:
        self._multiple = multiple
        self._floor_s = min(floor_s, cap_s)
        self._cap_s = cap_s
        self._tracker = QuantileTracker(level=level)

    @property
    def seen(self) -> int:
        """Observations behind the correction."""
        return self._tracker.seen

    def of(self, forecast_s: float) -> float:
        """Return the limit for something forecast to take ``forecast_s``."""
        limit_s = self._multiple * self._tracker.correct(max(0.0, forecast_s))
        return min(self._cap_s, max(self._floor_s, limit_s))

    def quantile_s(self, forecast_s: float) -> float:
        """Return the forecast as corrected to the level."""
        return self._tracker.correct(max(0.0, forecast_s))

    def to_json(self) -> dict[str, float | int]:
        """Return the bounds and what was learned, JSON-ready."""
        return {
            "level": self._tracker.level,
            "seen": self._tracker.seen,
            "multiple": self._multiple,
            "floor_s": self._floor_s,
            "cap_s": self._cap_s,
            "of_nothing_s": round(self.of(0.0), 4),
            "of_a_second_s": round(self.of(1.0), 4),
        }

    def learn(self, forecast_s: float, observed_s: float) -> None:
        """Note what it took; something given up is told with the time it was given."""
        self._tracker.update(max(0.0, forecast_s), observed_s)


def step_s(crowd: Crowd) -> float:
    """Return the engine seconds of a decode step with the calls an endpoint has now."""
    calls = min(max(crowd.in_flight, 1), crowd.state.endpoint.max_num_seqs)
    context = crowd.context_tokens * calls / max(crowd.in_flight, 1)
    return crowd.state.latency.decode_step_s(calls, context)


def first_byte_s(call: Call, send: Send, crowd: Crowd) -> float:
    """Return the engine seconds from a send to its first token.

    Parameters
    ----------
    call, send
        Just decided.
    crowd
        Of its endpoint, this call in it.

    Notes
    -----
    Prefill of all that waits for it, this call last; one decode step per token budget of it;
    and where the slots are taken, one mean decode for each turn of the slots ahead.
    """
    endpoint, row = crowd.state.endpoint, crowd.state.latency
    slots = endpoint.max_num_seqs
    mean_context = crowd.context_tokens / max(crowd.in_flight, 1)
    if mean_context * slots > endpoint.kv_tokens:
        slots = max(1, int(endpoint.kv_tokens / mean_context))
    decode_s = step_s(crowd)
    waiting = max(crowd.prefill_tokens, float(call.prompt_tokens - send.cached_tokens))
    passes = 1.5 + waiting / endpoint.max_num_batched_tokens
    seconds = row.prefill_s(waiting, send.cached_tokens) + passes * decode_s
    if send.in_flight >= slots:
        turns = 1.0 + (send.in_flight - slots) / slots
        seconds += turns * crowd.output_tokens / max(crowd.in_flight, 1) * decode_s
    return seconds


def whole_s(call: Call, send: Send, crowd: Crowd) -> float:
    """Return the engine seconds that an answer sent as a whole may well take.

    Nothing is seen of it before its end, so its length counts: what the call allows itself, else
    many times the forecast; never more than the endpoint can hold.
    """
    tokens = _UNKNOWN_LENGTH * send.predicted_output_tokens
    if call.max_tokens is not None:
        tokens = max(send.predicted_output_tokens, float(call.max_tokens))
    tokens = min(tokens, float(max(1, crowd.state.most_tokens - call.prompt_tokens)))
    return first_byte_s(call, send, crowd) + tokens * step_s(crowd)


class Watch:
    """Gives a piece of work up when it is overdue, by a limit that may move while it runs.

    An async context manager; the work inside it is cancelled and `TimeoutError` raised.

    Parameters
    ----------
    left_s
        Wall seconds left, asked now and then; <= 0 ends it.
    """

    __slots__ = ("_due_s", "_left_s", "_scope", "_timer")

    def __init__(self, left_s: Callable[[], float]) -> None:
        self._left_s = left_s
        self._timer: asyncio.TimerHandle | None = None
        self._scope = asyncio.timeout(None)
        self._due_s = 0.0

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._due_s = asyncio.get_running_loop().time()
        self._look()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._scope.__aexit__(kind, error, traceback)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        late_s = now_s - self._due_s
        # Bytes that came while this process stood still have not been read yet: nobody is blamed
        # before they are.
        left_s = late_s if late_s > _HELD_UP_S else self._left_s()
        if left_s <= 0:
            self._timer = None
            self._scope.reschedule(now_s)
            return
        wait_s = min(left_s, _LOOK_S)
        self._due_s = now_s + wait_s
        self._timer = loop.call_later(wait_s, self._look)
