"""What the engines say of themselves: ``/metrics`` of each endpoint, read in the background.

The router needs none of it, because it counts its own calls. It shows what the router cannot see:
load from elsewhere, the engine's own queue, how full the KV pool is. A report that is old, broken
or missing is shown as such and never taken for an idle engine.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

from planner.dispatch.online import Scrape
from planner.dispatch.scrape import parse_metrics, read_scrape
from planner.domain.errors import InvalidInput

__all__ = ["EngineReport", "Scraper", "read_report"]

_log = logging.getLogger(__name__)

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_STARTED = "process_start_time_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What one scrape says; None for what it does not.

    Parameters
    ----------
    running, waiting
        Requests in the engine's batch and in its queue.
    kv_usage
        Share of the KV pool in use, [0, 1].
    started_s
        When the process started, seconds since the epoch; another value means a cold cache.
    scrape
        The counters a latency row can be learned from, where they are all there.
    """

    time_s: float
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    started_s: float | None = None
    scrape: Scrape | None = None


def read_report(text: str, time_s: float, *, pool_tokens: float | None = None) -> EngineReport:
    """Return what the text of ``/metrics`` says.

    Parameters
    ----------
    time_s
        When it was asked for, clock seconds.
    pool_tokens
        Tokens of the KV pool, where the text does not say.

    Raises
    ------
    InvalidInput
        If it is not in the Prometheus text format.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for name, _labels, value in parse_metrics(text):
        sums[name] += value
        counts[name] += 1
    usage = next((name for name in _USAGE if name in sums), None)
    try:
        scrape = read_scrape(text, time_s, pool_tokens=pool_tokens)
    except InvalidInput:
        scrape = None
    return EngineReport(
        time_s=time_s,
        running=sums.get(_RUNNING),
        waiting=sums.get(_WAITING),
        # Several engines behind one server: the mean of their shares.
        kv_usage=None if usage is None else sums[usage] / counts[usage],
        started_s=sums.get(_STARTED),
        scrape=scrape,
    )


class MetricsLink(Protocol):
    """The way to one endpoint's metrics."""

    async def metrics(self) -> str | None:
        """Return the text of ``GET /metrics``, None if it does not come."""
        ...


class Scraper:
    """The latest report of each endpoint.

    Parameters
    ----------
    stale_s
        Age beyond which a report counts as missing, clock seconds.
    """

    __slots__ = ("_failed", "_reports", "stale_s")

    def __init__(self, stale_s: float) -> None:
        self.stale_s = stale_s
        self._reports: dict[int, EngineReport] = {}
        self._failed: set[int] = set()

    async def scrape(
        self, index: int, link: MetricsLink, now_s: float, *, pool_tokens: float | None = None
    ) -> EngineReport | None:
        """Ask an endpoint once; return its report, or None if there is no new one."""
        text = await link.metrics()
        if text is None:
            self._miss(index, "no answer")
            return None
        try:
            report = read_report(text, now_s, pool_tokens=pool_tokens)
        except InvalidInput as error:
            self._miss(index, str(error))
            return None
        self._failed.discard(index)
        self._reports[index] = report
        return report

    def _miss(self, index: int, why: str) -> None:
        if index not in self._failed:  # told once, not every few seconds
            self._failed.add(index)
            _log.info("metrics of an endpoint cannot be read", extra={"index": index, "why": why})

    def report(self, index: int, now_s: float) -> EngineReport | None:
        """Return the latest report that is not too old, or None."""
        report = self._reports.get(index)
        return report if report is not None and now_s - report.time_s <= self.stale_s else None

    def started_s(self, index: int) -> float | None:
        """Return when an endpoint's process started, however old the news."""
        report = self._reports.get(index)
        return None if report is None else report.started_s

    def forget(self, index: int) -> None:
        """Drop what is known of an endpoint: another one has its place."""
        self._reports.pop(index, None)
        self._failed.discard(index)

    def to_json(self, index: int, now_s: float) -> dict[str, Any]:
        """Return an endpoint's report for diagnostics: ``fresh``, ``stale`` or ``missing``."""
        known = self._reports.get(index)
        if known is None:
            return {"state": "missing"}
        return {
            "state": "fresh" if self.report(index, now_s) is not None else "stale",
            "age_s": round(now_s - known.time_s, 3),
            "running": known.running,
            "waiting": known.waiting,
            "kv_usage": known.kv_usage,
            "started_s": known.started_s,
        }
