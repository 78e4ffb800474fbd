"""Many streaming runs at once for a long time: errors, memory, and what is left at the end.

Mock fleet and gateway are processes of their own; the client here keeps a number of runs under way,
each of several calls one after the other, and starts a new one where one ends. Memory is sampled
once a second; it is flat if the median of its last quarter is not above that of the quarter after
warm-up by more than a few percent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.domain.errors import EndpointFailed, InvalidInput
from runtime.bench.figures import Figure
from runtime.bench.processes import (
    ALMANAC,
    family,
    free_ports,
    open_files,
    resident_mb,
    started,
    write_fleet,
)

__all__ = ["Soaked", "soak", "soak_figures"]

_ENDPOINTS = 8
_FILES_PER_RUN = 2
_SPARE_FILES = 256
_KEY = "soak"
_PACE = "0.1"
"""Of the engines' clocks: slow, because it is concurrency that is tried, not pacing."""
_SETTLE_S = 30.0
_PATIENCE_S = 300.0
_GROWTH = 1.05


@dataclass(slots=True, kw_only=True)
class Soaked:
    """What was seen.

    Parameters
    ----------
    calls, runs, errors
        Ended, and calls that did not end well.
    first_error
        What the first of them was.
    memory_mb
        Resident set of all processes of the gateway, once a second.
    files
        Files and sockets the gateway had open before the runs, and after their end.
    left
        Counters of the gateway that should be zero at the end, by name.
    """

    calls: int = 0
    runs: int = 0
    errors: int = 0
    first_error: str = ""
    memory_mb: list[float] = field(default_factory=list)
    files: tuple[int, int] = (0, 0)
    left: dict[str, float] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Memory of the last quarter over that of the second one, which follows warm-up."""
        quarter = max(1, len(self.memory_mb) // 4)
        early = self.memory_mb[quarter : 2 * quarter] or self.memory_mb
        return statistics.median(self.memory_mb[-quarter:]) / statistics.median(early)


async def soak(
    folder: Path, *, seconds: float, runs: int, calls: int = 4, workers: int = 1
) -> Soaked:
    """Keep runs under way for a time.

    Parameters
    ----------
    seconds
        Wall seconds in which new runs are started; those begun are waited for.
    runs
        Under way at a time.
    calls
        Of each run.
    workers
        Processes of the gateway.

    Raises
    ------
    InvalidInput
        If this user may not open as many sockets.
    EndpointFailed
        If a process does not start.
    """
    _allow_files(runs)
    ports = free_ports(_ENDPOINTS + 1)
    fleet = write_fleet(folder, ports[1:], slots=256, kv_blocks=4000)
    # With so few blocks what is remembered of their caches is complete within warm-up.
    mock = [*ALMANAC, "mock-fleet", str(fleet), "--dilation", _PACE, "--stream-interval", "8"]
    gateway = [
        *ALMANAC, "serve", str(fleet), "--port", str(ports[0]), "--dilation", _PACE,
        "--policy", "marginal_cost", "--admin-key", _KEY, "--workers", str(workers),
        "--run-done-idle-s", "0.1", "--run-idle-s", "1",
    ]  # fmt: skip
    soaked = Soaked()
    async with (
        started(mock, folder / "mock.log"),
        started(gateway, folder / "gateway.log") as process,
    ):
        port, pids = ports[0], family(process.pid)
        before = sum(map(open_files, pids))
        clients = _Clients(port, soaked, calls)
        watching = asyncio.create_task(_watch(pids, soaked))
        await clients.run(runs, seconds)
        watching.cancel()
        soaked.left = await _settled(port)
        soaked.files = before, sum(map(open_files, pids))
    return soaked


def soak_figures(soaked: Soaked, runs: int, seconds: float) -> Iterator[Figure]:
    """Yield the figures of a soak."""
    title = f"soak_{runs}_runs_{seconds:g}s"
    yield Figure.of(f"{title}_calls", soaked.calls, "calls")
    yield Figure.at_least(f"{title}_runs_ended", soaked.runs, "runs", runs)
    yield Figure.at_most(f"{title}_errors", soaked.errors, "calls", 0)
    yield Figure.of(f"{title}_memory_most", max(soaked.memory_mb), "MB")
    yield Figure.at_most(f"{title}_memory_growth", soaked.growth, "x", _GROWTH)
    yield Figure.at_most(f"{title}_counters_left", sum(soaked.left.values()), "calls", 0)
    opened = soaked.files[1] - soaked.files[0]
    # The connections to endpoints that are kept for the next call stay open for a while.
    yield Figure.of(f"{title}_files_more_than_before", opened, "files")


def _allow_files(runs: int) -> None:
    """Raise this process's limit on open files as far as is needed; children inherit it."""
    needed = _FILES_PER_RUN * runs + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise InvalidInput(
                f"{runs} runs need {needed} open files, and this user may open {hard}",
                where="--soak-runs",
                remedy=f"raise the limit (`ulimit -n {needed}` as root) or keep fewer runs",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _watch(pids: list[int], soaked: Soaked) -> None:
    while True:
        soaked.memory_mb.append(resident_mb(pids))
        await asyncio.sleep(1.0)


class _Clients:
    """Runs under way, each a client of its own."""

    def __init__(self, port: int, soaked: Soaked, calls: int) -> None:
        self._port = port
        self._soaked = soaked
        self._calls = calls

    async def run(self, runs: int, seconds: float) -> None:
        """Keep so many runs under way; return when the last has ended."""
        end_s = time.monotonic() + seconds

        async def chain(number: int) -> None:
            # Not all in one instant: so many connects at a time are a test of the kernel.
            await asyncio.sleep(number * min(5.0, seconds / 4) / runs)
            turn = 0
            while turn == 0 or time.monotonic() < end_s:
                await self._one(f"run-{number}-{turn}")
                turn += 1

        await asyncio.gather(*(chain(number) for number in range(runs)))

    async def _one(self, run: str) -> None:
        """Be one run: calls one after the other, each with what was said before."""
        history = f"{run} " + "word " * 50
        for call in range(self._calls):
            final = call == self._calls - 1
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await self._call(run, history, final=final)
            except (OSError, TimeoutError, EndpointFailed, ValueError) as error:
                self._soaked.errors += 1
                self._soaked.first_error = self._soaked.first_error or f"{error!r:.300}"
            self._soaked.calls += 1
            history += "more words of the conversation " * 10
        self._soaked.runs += 1

    async def _call(self, run: str, history: str, *, final: bool) -> None:
        payload = {
            "model": "m",
            "stream": True,
            "messages": [{"role": "user", "content": history}],
            "vllm_xargs": {"mock_output_tokens": 64},
        }
        body = json.dumps(payload).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                f"x-almanac-run-id: {run}\r\nx-almanac-run-final: {str(final).lower()}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            answer = await reader.read(-1)
        finally:
            writer.close()
        if b" 200 " not in answer[:20] or b"data: [DONE]" not in answer or b'"error"' in answer:
            raise EndpointFailed(f"{answer[:60]!r} ... {answer[-200:]!r}")


async def _settled(port: int) -> dict[str, float]:
    """Return the counters of what is under way once they have come to rest."""
    end_s = time.monotonic() + _SETTLE_S
    while True:
        facts = await _diagnostics(port)
        left = {
            "in_flight": facts["in_flight"],
            "held": facts["held"],
            "admission_in_flight": facts["admission"]["in_flight"],
            "admission_waiting": facts["admission"]["waiting"],
            "runs_active": facts["runs_active"],
            **{f"endpoint_{one['id']}": one["in_flight"] for one in facts["endpoints"]},
        }
        if not any(left.values()) or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.5)


async def _diagnostics(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(
            f"GET /almanac/v1/diagnostics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Authorization: Bearer {_KEY}\r\n\r\n".encode()
        )
        answer = await reader.read(-1)
    facts: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return facts
