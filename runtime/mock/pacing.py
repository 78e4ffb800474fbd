"""Drives one engine in real or dilated time and hands its tokens to waiting answers.

One task an endpoint: run a step, sleep until its end, hand out its tokens, go on. Step ends are
absolute instants of the engine, so a late wake-up is made good by the next step and lateness does
not add up. There is no timer per token.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from planner.sim.engine import Engine, EngineRequest, PullStarted, StepResult
from runtime.clock import Clock

__all__ = ["Answer", "Bell", "EngineDead", "Lateness", "Listener", "PacedEngine"]

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


class Bell:
    """Wakes the one reader of a request's answers."""

    __slots__ = ("_waiter", "answers")

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._waiter: asyncio.Future[None] | None = None

    async def more(self) -> None:
        """Wait until one of the answers has something new to send.

        Raises
        ------
        EngineDead
            If nothing more will come.
        """
        if not any(one.ready or one.dead for one in self.answers):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        for one in self.answers:
            if one.dead:
                raise EngineDead
            one.told = one.produced
            one.told_end = one.finish_reason is not None

    def ring(self) -> None:
        """Wake the reader if it waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Answer:
    """Tokens of one engine request as they come.

    Parameters
    ----------
    request
        The engine's request; its attributes hold the instants.
    interval
        Tokens to collect before the reader is woken again, >= 1; the first and the last token
        wake it at once, as vLLM's ``stream_interval`` does.
    bell
        Shared by the answers that one reader waits for.

    Attributes
    ----------
    produced
        Tokens handed out so far.
    finish_reason
        ``stop`` or ``length`` once it has ended.
    told, told_end
        What the reader has been woken for.
    """

    __slots__ = (
        "_interval", "bell", "dead", "finish_reason", "last_token_s", "produced", "request",
        "told", "told_end",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, interval: int, bell: Bell) -> None:
        self.request = request
        self.bell = bell
        self._interval = interval
        self.told = 0
        self.told_end = False
        self.produced = 0
        self.finish_reason: str | None = None
        self.last_token_s: float | None = None
        self.dead = False
        bell.answers.append(self)

    async def more(self) -> None:
        """Wait until there is something new to send; see `Bell.more`."""
        await self.bell.more()

    @property
    def ready(self) -> bool:
        """Whether the reader has something to send."""
        if self.finish_reason is not None:
            return not self.told_end
        fresh = self.produced - self.told
        return fresh >= self._interval or (self.told == 0 and fresh > 0)

    def add(self, tokens: int, reason: str | None) -> None:
        """Take in tokens, and the reason if they are the last."""
        self.produced += tokens
        self.finish_reason = reason
        if self.ready:
            self.bell.ring()

    def die(self) -> None:
        """Let the reader fail."""
        self.dead = True
        self.bell.ring()


class Listener(Protocol):
    """Is told what an engine does, in engine seconds."""

    def tokens(self, answer: Answer, count: int, gap_s: float | None) -> None:
        """``count`` tokens were handed out, ``gap_s`` after those before, None for the first."""

    def stepped(self, tokens: int) -> None:
        """Take note of a step that ended with so many tokens, or of an engine gone idle (0)."""

    def pull(self, answer: Answer, tokens: int) -> None:
        """Fetch the KV a request waits for, then call `PacedEngine.pulled`."""


class PacedEngine:
    """One engine with its clock.

    Parameters
    ----------
    engine
        Driven by nobody else.
    clock
        Engine seconds.
    listener
        For metrics.
    scale
        Asked before each step: the factor on step times at an instant.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        listener: Listener,
        scale: Callable[[float], float] | None = None,
    ) -> None:
        self.engine = engine
        self.lateness = Lateness()
        self.dead = False
        self._clock = clock
        self._listener = listener
        self._scale = scale
        self._answers: dict[str, Answer] = {}
        self._work = asyncio.Event()
        self._pauses: set[str] = set()
        self._not_before_s = 0.0
        self._end_s = 0.0  # of the last step
        self._remote: set[str] = set()  # requests that may yet ask for KV

    @property
    def live(self) -> int:
        """Answers that have not ended."""
        return len(self._answers)

    @property
    def paused(self) -> bool:
        """Whether no further step is run."""
        return bool(self._pauses)

    def submit(self, request: EngineRequest, interval: int, bell: Bell | None = None) -> Answer:
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
        if not engine.num_running:
            self._not_before_s = now_s
        engine.submit(request, now_s)
        answer = Answer(request, interval, bell or Bell())
        self._answers[request.request_id] = answer
        if request.remote_tokens:
            self._remote.add(request.request_id)
        self._work.set()
        return answer

    def drop(self, answer: Answer) -> None:
        """Take an answer out; if it has not ended, the engine frees its blocks at once."""
        name = answer.request.request_id
        self._remote.discard(name)
        if self._answers.pop(name, None) is not None:
            # Its last step may be done and not yet handed out; then it may have kept its blocks.
            self.alter(
                lambda engine, now_s: engine.abort(name, now_s) or engine.release(name, now_s)
            )
            if not self._answers:
                self._listener.stepped(0)

    def pulled(self, answer: Answer, *, ok: bool) -> None:
        """Say that the KV an answer waited for is there, or is to be computed here."""
        name = answer.request.request_id
        if name in self._answers:
            self.alter(lambda engine, now_s: engine.pulled(name, now_s, ok=ok))

    def release(self, request_id: str) -> None:
        """Give back the blocks that a finished request kept."""
        self.alter(lambda engine, now_s: engine.release(request_id, now_s))

    def alter(self, change: Callable[[Engine, float], object]) -> None:
        """Do something to the engine at the present instant, and look again what can be run."""
        if self.dead:
            return
        now_s = self._now_s()
        change(self.engine, now_s)
        if not self.engine.num_running:
            self._not_before_s = now_s
        self._work.set()

    def pause(self, why: str) -> None:
        """Run no step until `resume` is called with the same reason."""
        self._pauses.add(why)

    def resume(self, why: str) -> None:
        """Take a pause back; time has passed for whatever was under way."""
        if why in self._pauses:
            self._pauses.remove(why)
            self._not_before_s = self._clock.now_s()
            self._work.set()

    def kill(self) -> None:
        """Stop for good, as an internal error does: all answers fail."""
        self.dead = True
        for answer in tuple(self._answers.values()):
            answer.die()

    def _now_s(self) -> float:
        # A timer may fire a moment early: never speak to the engine of its past. Nor, while calls
        # run, of what lies behind the last step run: steps that are late have not happened.
        now_s = self._clock.now_s()
        if self.engine.num_running:
            now_s = min(now_s, self._end_s)
        return max(now_s, self.engine.now_s)

    async def run(self) -> None:
        """Drive the engine until cancelled; an internal error kills it and all its answers."""
        try:
            await self._drive()
        except Exception:
            self.kill()
            raise

    async def _drive(self) -> None:
        clock, engine, listener = self._clock, self.engine, self._listener
        at_s = 0.0
        while not self.dead:
            self._work.clear()
            if self._pauses:
                await self._work.wait()
                continue
            start_s = max(at_s, self._not_before_s)
            if self._scale is not None:
                engine.scale = self._scale(start_s)
            # Steps follow each other without a gap; after a pause they start with the arrival.
            result = self._step_with_pulls(start_s) if self._remote else engine.step(start_s)
            if result is None:
                await self._work.wait()
                continue
            at_s = self._end_s = result.end_s
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
                listener.tokens(answer, tokens, None if last_s is None else at_s - last_s)
            listener.stepped(handed)
            if handed:
                self.lateness.add(late_s, handed)

    def _step_with_pulls(self, start_s: float) -> StepResult | None:
        """Run a step, and tell of the requests that ask for KV in it.

        `Engine.step` does not say who does. `Engine.advance` does, and plans the same step, but
        only if it starts where the one before ended.
        """
        engine = self.engine
        planned_s = engine.next_event_s()
        if planned_s < start_s and engine.num_running:
            # Time has passed without a step: nobody may ask for KV in this one.
            waiting = [self._answers[name] for name in self._remote]
            for answer in waiting:
                engine.abort(answer.request.request_id, self._end_s)
            result = engine.step(start_s)
            for answer in waiting:
                answer.request = replace(answer.request)
                engine.submit(answer.request, start_s)
            return result
        if planned_s < start_s:
            # Nothing runs: any change of the pool moves the engine on to the present.
            engine.pin("", (), start_s)
            engine.unpin("", start_s)
        if planned_s <= start_s:
            for event in engine.advance(start_s):
                # Others than ours may take blocks in this way; see `runtime.mock.ballast`.
                if isinstance(event, PullStarted) and event.request.request_id in self._remote:
                    name = event.request.request_id
                    self._remote.remove(name)
                    self._listener.pull(self._answers[name], event.tokens)
        return engine.step(start_s)
