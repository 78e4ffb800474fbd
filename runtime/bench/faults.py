"""One of three endpoints goes bad in front of clients that never stop, scenario by scenario."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import aiohttp

from runtime.bench.figures import Figure
from runtime.bench.processes import ALMANAC, free_ports, started, write_fleet
from runtime.mock.scenarios import SCENARIOS, Load, play

__all__ = ["fault_figures"]

_VICTIM = "e1"
_LIMITS = (
    "--first-byte-floor-s", "0.5", "--stall-floor-s", "1", "--health-interval-s", "0.2",
    "--breaker-pause-s", "0.1", "--probe-interval-s", "0.1",
)  # fmt: skip
_TOLD_S = 5.0
"""Within which a call that is cut off is told so under these limits."""


async def fault_figures(folder: Path, *, workers: int = 1) -> AsyncIterator[Figure]:
    """Play every scenario on a fresh fleet and yield what clients noticed."""
    for name, scenario in SCENARIOS.items():
        ports = free_ports(4)
        fleet = write_fleet(folder, ports[1:])
        mock = [*ALMANAC, "mock-fleet", str(fleet), "--dilation", "4", "--stream-interval", "8"]
        gateway = [
            *ALMANAC, "serve", str(fleet), "--port", str(ports[0]), "--dilation", "4",
            "--policy", "least_load", "--workers", str(workers), *_LIMITS,
        ]  # fmt: skip
        async with started(mock, folder / "mock.log"), started(gateway, folder / "gateway.log"):
            url = f"http://127.0.0.1:{ports[0]}"
            score = await play(
                scenario,
                Load(model="m", warm_calls=150),
                router_url=url,
                fault_url=f"http://127.0.0.1:{ports[1]}",
                victim=_VICTIM,
                attempts=lambda url=url: _sent(url),  # type: ignore[misc]
            )
        seen = asdict(score)
        failed = sum(seen[kind] for kind in ("refused", "lost", "broken"))
        yield Figure.of(f"fault_{name}_calls", score.calls, "calls")
        yield Figure.at_most(f"fault_{name}_failed_before_first_byte", failed, "calls", 0)
        yield Figure.of(f"fault_{name}_cut_and_told", score.error_events, "calls")
        yield Figure.at_most(f"fault_{name}_told_within", score.slowest_error_s, "s", _TOLD_S)
        yield Figure.at_most(
            f"fault_{name}_sent_to_bad_endpoint", 100 * score.later_share, "%", 2.0
        )


async def _sent(url: str) -> float:
    """Return how many attempts the gateway has sent to the endpoint that goes bad."""
    async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    wanted = f'almanac_worker_selection_total{{endpoint="{_VICTIM}"}}'
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted))
