"""The planner's process as the gateway has it: one question at a time, started anew if need be.

Rules
-----
* Questions and answers are JSON lines over pipes, so whatever happens to the process shows as the
  end of its output, and nothing of it is shared with the gateway.
* A process that is late, silent, talks nonsense or has ended is killed; the next one is started
  after a pause that doubles with each failure in a row.
* Its beats are read at all times, so that its output never fills up.
* Times are wall seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.domain.errors import PlannerError

__all__ = ["PlanProcess", "ProcessLimits", "WorkerFailed"]

_log = logging.getLogger(__name__)

_LINE_LIMIT = 64 * 2**20
"""Longest answer, bytes."""


class WorkerFailed(PlannerError):
    """The planner's process gave no answer; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """How long the process may take.

    Parameters
    ----------
    deadline_s
        From question to answer, > 0.
    silence_s
        Between two signs of life, the start included, > 0.
    pause_s, most_pause_s
        Before the second start, and before any, > 0.
    stop_s
        From the request to end to the kill, > 0.
    """

    deadline_s: float = 60.0
    silence_s: float = 20.0
    pause_s: float = 1.0
    most_pause_s: float = 60.0
    stop_s: float = 2.0


class PlanProcess:
    """One worker at a time.

    Parameters
    ----------
    command
        How to start it.
    limits
        See `ProcessLimits`.
    clock
        Monotonic wall seconds.
    """

    def __init__(
        self,
        command: Sequence[str],
        limits: ProcessLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or ProcessLimits()
        self.starts = 0
        self.failures = 0
        """In a row."""
        self._command = tuple(command)
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._alive_s = 0.0
        self._not_before_s = 0.0
        self._number = 0

    @property
    def pid(self) -> int | None:
        """Id of the process that runs, or None."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def ensure(self) -> bool:
        """Start a process if none runs and the pause is over; return whether one runs."""
        if self.pid is not None and self._reader is not None and not self._reader.done():
            return True
        if self._process is not None:
            await self._give_up("the process ended")
        if self._clock() < self._not_before_s:
            return False
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_LIMIT,
                start_new_session=True,  # a Ctrl-C is the gateway's, which then ends it in order
            )
        except OSError as error:
            self._failed(f"the process cannot be started: {error}")
            return False
        self.starts += 1
        self._alive_s = self._clock()
        self._reader = asyncio.create_task(self._read(self._process))
        return True

    async def ask(self, question: Callable[[int], bytes]) -> dict[str, Any]:
        """Return the answer to a question.

        Parameters
        ----------
        question
            Makes the line from its number; runs in a thread, as it may be long.

        Raises
        ------
        WorkerFailed
            If there is no answer in time, or no process to ask.
        """
        if not await self.ensure():
            raise WorkerFailed("no process: it failed and is started again after a pause")
        process = self._process
        assert process is not None and process.stdin is not None  # noqa: S101, PT018 - just ensured
        self._number += 1
        try:
            async with asyncio.timeout(self.limits.deadline_s):
                answer = await self._exchange(process.stdin, question)
        except TimeoutError:
            await self._give_up("late")
            raise WorkerFailed(f"late: no answer in {self.limits.deadline_s:g} s") from None
        except (WorkerFailed, ConnectionError) as error:
            await self._give_up(str(error) or "the process ended")
            raise WorkerFailed(str(error) or "the process ended") from error
        self.failures = 0
        return answer

    async def aclose(self) -> None:
        """End the process, with force if it takes too long."""
        process, self._process = self._process, None
        reader, self._reader = self._reader, None
        try:
            if process is not None:
                await self._end(process)
        finally:
            if reader is not None:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _exchange(
        self, stdin: asyncio.StreamWriter, question: Callable[[int], bytes]
    ) -> dict[str, Any]:
        answer = self._answer = asyncio.get_running_loop().create_future()
        try:
            stdin.write(await asyncio.to_thread(question, self._number))
            await stdin.drain()
            return await self._wait(answer)
        finally:
            self._answer = None
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # it may have come while something else went wrong

    async def _wait(self, answer: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
        while True:
            left_s = self._alive_s + self.limits.silence_s - self._clock()
            if left_s <= 0:
                raise WorkerFailed(f"silent for {self.limits.silence_s:g} s")
            done, _ = await asyncio.wait({answer}, timeout=left_s)
            if done:
                return answer.result()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Take in what the process says until it ends."""
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        problem = "the process ended"
        while True:
            try:
                line = await process.stdout.readline()
                message = json.loads(line) if line else None
            except ValueError:  # no JSON, or a line beyond all limits
                message, line = None, b"nonsense"
            if not isinstance(message, dict):
                problem = "it does not speak JSON lines" if line else problem
                break
            self._alive_s = self._clock()
            # Answers to earlier questions come too late for anything.
            if "beat" not in message and message.get("id") == self._number:
                self._settle(message)
        self._settle(WorkerFailed(problem))

    def _settle(self, outcome: dict[str, Any] | WorkerFailed) -> None:
        answer = self._answer
        if answer is None or answer.done():
            return
        if isinstance(outcome, WorkerFailed):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    async def _give_up(self, reason: str) -> None:
        """Kill the process and make the next one wait."""
        self._failed(reason)
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await self._forget(process)

    async def _forget(self, process: asyncio.subprocess.Process | None) -> None:
        reader, self._reader = self._reader, None
        if process is not None:
            await process.wait()
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def _failed(self, reason: str) -> None:
        self.failures += 1
        pause_s = min(self.limits.most_pause_s, self.limits.pause_s * 2.0 ** (self.failures - 1))
        self._not_before_s = self._clock() + pause_s
        _log.warning(
            "planner process failed", extra={"reason": reason, "next_start_in_s": round(pause_s, 1)}
        )

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self.limits.stop_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
