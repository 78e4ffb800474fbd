"""Drives one engine in real or dilated time and hands its tokens to waiting answers.

One task an endpoint: run a step, sleep until its end, hand out its tokens, go on. Step ends are
absolute instants of the engine, so a late wake-up is made good by the next step and lateness does
not add up. There is no timer per token.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from planner.sim.engine import Engine, EngineRequest
from runtime.clock import Clock

__all__ = ["Answer", "EngineDead", "Lateness", "PacedEngine"]

_LEAST_S = 1e-5
_GROWTH = 1.15


class EngineDead(Exception):
    """The engine stopped because of an internal error."""


class Lateness:
    """Distribution of how late tokens were handed out, in wall seconds, to about 15 %."""

    __slots__ = ("_counts", "total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.total = 0

    def add(self, late_s: float, tokens: int) -> None:
        """Count tokens that came ``late_s`` after their time."""
        bucket = 0
        if late_s > _LEAST_S:
            bucket = math.ceil(math.log(late_s / _LEAST_S) / math.log(_GROWTH))
        self._counts[bucket] = self._counts.get(bucket, 0) + tokens
        self.total += tokens

    def quantile(self, level: float) -> float:
        """Return an upper bound of a quantile in wall seconds; 0 before the first token."""
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= level * self.total:
                return _LEAST_S * _GROWTH**bucket
        return 0.0


class Answer:
    """Tokens of one request as they come.

    Parameters
    ----------
    request
        The engine's request; its attributes hold the instants.
    interval
        Tokens to collect before the reader is woken again, >= 1; the first and the last token
        wake it at once, as vLLM's ``stream_interval`` does.

    Attributes
    ----------
    produced
        Tokens handed out so far.
    finish_reason
        ``stop`` or ``length`` once it has ended.
    """

    __slots__ = (
        "_interval", "_told", "_waiter", "dead", "finish_reason", "last_token_s", "produced",
        "request",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, interval: int) -> None:
        self.request = request
        self._interval = interval
        self._told = 0
        self._waiter: asyncio.Future[None] | None = None
        self.produced = 0
        self.finish_reason: str | None = None
        self.last_token_s: float | None = None
        self.dead = False

    async def more(self) -> None:
        """Wait until there is something new to send.

        Raises
        ------
        EngineDead
            If nothing more will come.
        """
        if not self._ready() and not self.dead:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.dead:
            raise EngineDead
        self._told = self.produced

    def add(self, tokens: int, reason: str | None) -> None:
        """Take in tokens, and the reason if they are the last."""
        self.produced += tokens
        self.finish_reason = reason
        if self._ready():
            self._wake()

    def die(self) -> None:
        """Let the reader fail."""
        self.dead = True
        self._wake()

    def _ready(self) -> bool:
        if self.finish_reason is not None:
            return True
        fresh = self.produced - self._told
        return fresh >= self._interval or (self._told == 0 and fresh > 0)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class PacedEngine:
    """One engine with its clock.

    Parameters
    ----------
    engine
        Driven by nobody else.
    clock
        Engine seconds.
    on_tokens
        Called with (answer, tokens, gap in engine seconds since its last token or None) at each
        hand-out; for metrics.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        on_tokens: Callable[[Answer, int, float | None], None],
    ) -> None:
        self.engine = engine
        self.lateness = Lateness()
        self.dead = False
        self._clock = clock
        self._on_tokens = on_tokens
        self._answers: dict[str, Answer] = {}
        self._work = asyncio.Event()
        self._not_before_s = 0.0

    @property
    def live(self) -> int:
        """Answers that have not ended."""
        return len(self._answers)

    def submit(self, request: EngineRequest, interval: int) -> Answer:
        """Queue a request and return its answer, to be given back with `drop`.

        Raises
        ------
        InvalidInput
            If it could never run.
        EngineDead
            If the engine has stopped.
        """
        if self.dead:
            raise EngineDead
        engine, now_s = self.engine, self._now_s()
        idle = not engine.num_running and not engine.num_waiting
        engine.submit(request, now_s)
        if idle:
            self._not_before_s = now_s
        answer = self._answers[request.request_id] = Answer(request, interval)
        self._work.set()
        return answer

    def drop(self, answer: Answer) -> None:
        """Take an answer out; if it has not ended, the engine frees its blocks at once."""
        request_id = answer.request.request_id
        if self._answers.pop(request_id, None) is not None and not self.dead:
            self.engine.abort(request_id, self._now_s())

    def _now_s(self) -> float:
        # A timer may fire a moment early: never speak to the engine of its past.
        return max(self._clock.now_s(), self.engine.now_s)

    async def run(self) -> None:
        """Drive the engine until cancelled; an internal error kills it and all its answers."""
        try:
            await self._drive()
        except Exception:
            self.dead = True
            for answer in self._answers.values():
                answer.die()
            raise

    async def _drive(self) -> None:
        clock = self._clock
        at_s = 0.0
        while True:
            self._work.clear()
            # Steps follow each other without a gap; after a pause they start with the arrival.
            result = self.engine.step(max(at_s, self._not_before_s))
            if result is None:
                await self._work.wait()
                continue
            at_s = result.end_s
            # Also when it is late: others must have their turn between two steps.
            await asyncio.sleep(max(0.0, clock.wall_s(at_s - clock.now_s())))
            late_s = clock.wall_s(clock.now_s() - at_s)
            handed = 0
            for request_id, tokens, finished, reason in result.tokens:
                answer = self._answers.get(request_id)
                if answer is None:
                    continue  # dropped during the step
                if finished:
                    del self._answers[request_id]
                handed += tokens
                last_s = answer.last_token_s
                answer.last_token_s = at_s
                answer.add(tokens, reason)
                self._on_tokens(answer, tokens, None if last_s is None else at_s - last_s)
            if handed:
                self.lateness.add(late_s, handed)
