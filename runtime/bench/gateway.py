"""What a gateway adds to engines that answer at once; direct and through it, in the same run.

Client, engines and gateway are processes of their own on one machine. Each round measures both
ways one after the other, and the figure is the median over the rounds, so that a disturbance of
one round does not decide.
"""

from __future__ import annotations

import asyncio
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from planner.domain.errors import InvalidInput
from runtime.bench.client import hammer
from runtime.bench.figures import Figure, quantile
from runtime.bench.instant import BODY, STREAM_BODY
from runtime.bench.processes import (
    ALMANAC,
    family,
    free_ports,
    processor_s,
    started,
    write_fleet,
)

__all__ = ["Added", "Size", "added_figures", "measure_almanac", "measure_peer"]

_ENGINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured: rounds, and requests of each part of a round."""

    rounds: int = 5
    requests: int = 1500
    streams: int = 300
    connections: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """Medians over the rounds; milliseconds, requests per second."""

    direct_p50_ms: float
    direct_p99_ms: float
    direct_rps: float
    p50_ms: float
    p99_ms: float
    stream_ms: float
    rps: float
    processor_ms: float


async def measure_almanac(
    folder: Path, size: Size, *, policy: str = "marginal_cost", workers: int = 1
) -> Added:
    """Measure our gateway with a number of worker processes."""
    ports = free_ports(_ENGINES + 1)
    fleet = write_fleet(folder, ports[1:])
    command = [
        *ALMANAC, "serve", str(fleet), "--port", str(ports[0]), "--policy", policy,
        *(() if workers == 1 else ("--workers", str(workers))),
    ]  # fmt: skip
    return await _measure(command, None, ports, folder, size)


async def measure_peer(folder: Path, size: Size, template: str) -> Added:
    """Measure another router in the same place.

    Parameters
    ----------
    template
        Its command; ``{port}`` stands for its port, ``{urls}`` for the engines' addresses,
        separated by blanks.

    Raises
    ------
    InvalidInput
        If the template does not name both.
    """
    if "{port}" not in template or "{urls}" not in template:
        raise InvalidInput(
            f"{template!r} does not say where to listen and whom to serve",
            where="--peer",
            remedy="write {port} and {urls} into the command",
        )
    ports = free_ports(_ENGINES + 1)
    urls = " ".join(f"http://127.0.0.1:{port}" for port in ports[1:])
    filled = template.replace("{port}", str(ports[0])).replace("{urls}", urls)
    return await _measure(shlex.split(filled), ports[0], ports, folder, size)


async def _measure(
    command: Sequence[str], up: int | None, ports: Sequence[int], folder: Path, size: Size
) -> Added:
    router, direct = ports[0], ports[1]
    async with AsyncExitStack() as running:
        for port in ports[1:]:
            engine = (sys.executable, "-m", "runtime.bench.instant", str(port))
            await running.enter_async_context(started(engine, folder / f"{port}.log", port=port))
        process = await running.enter_async_context(
            started(command, folder / "router.log", port=up)
        )
        await hammer(direct, BODY, 200)
        await hammer(router, BODY, 500)
        await hammer(router, STREAM_BODY, 50)
        rounds = [await _round(direct, router, process.pid, size) for _ in range(size.rounds)]
    return _median(rounds)


async def _round(direct: int, router: int, pid: int, size: Size) -> Added:
    straight = await hammer(direct, BODY, size.requests)
    through = await hammer(router, BODY, size.requests)
    straight_stream = await hammer(direct, STREAM_BODY, size.streams)
    through_stream = await hammer(router, STREAM_BODY, size.streams)
    direct_rps = await _rate(direct, size)
    used_s = processor_s(family(pid))
    rps = await _rate(router, size)
    used_s = processor_s(family(pid)) - used_s
    return Added(
        direct_p50_ms=1e3 * quantile(straight, 0.5),
        direct_p99_ms=1e3 * quantile(straight, 0.99),
        direct_rps=direct_rps,
        p50_ms=1e3 * (quantile(through, 0.5) - quantile(straight, 0.5)),
        p99_ms=1e3 * (quantile(through, 0.99) - quantile(straight, 0.99)),
        stream_ms=1e3 * (quantile(through_stream, 0.5) - quantile(straight_stream, 0.5)),
        rps=rps,
        processor_ms=1e3 * used_s / (size.connections * _each(size)),
    )


async def _rate(port: int, size: Size) -> float:
    each = _each(size)
    begun_s = time.perf_counter()
    await asyncio.gather(*(hammer(port, BODY, each) for _ in range(size.connections)))
    return size.connections * each / (time.perf_counter() - begun_s)


def _each(size: Size) -> int:
    return max(1, size.requests // 2)


def _median(rounds: Sequence[Added]) -> Added:
    names = Added.__dataclass_fields__
    return Added(**{n: statistics.median(getattr(one, n) for one in rounds) for n in names})


def added_figures(who: str, added: Added, *, judged: bool = True) -> Iterator[Figure]:
    """Yield the figures of a router; those of a peer are not judged."""
    bars = (
        ("latency_p50", added.p50_ms, "ms", Figure.at_most, 0.8),
        ("latency_p99", added.p99_ms, "ms", Figure.at_most, 4.0),
        ("per_stream_p50", added.stream_ms, "ms", Figure.at_most, 1.0),
        ("requests_8_connections", added.rps, "1/s", Figure.at_least, 1500.0),
    )
    for name, value, unit, make, bar in bars:
        title = f"{who}_{'added_' if unit == 'ms' else ''}{name}"
        yield make(title, value, unit, bar) if judged else Figure.of(title, value, unit)
    # Of router processes alone, so that a busy machine distorts it least.
    yield Figure.of(f"{who}_processor_per_request", added.processor_ms, "ms")
    yield Figure.of(f"{who}_baseline_direct_p50", added.direct_p50_ms, "ms")
    yield Figure.of(f"{who}_baseline_direct_p99", added.direct_p99_ms, "ms")
    yield Figure.of(f"{who}_baseline_direct_requests", added.direct_rps, "1/s")
