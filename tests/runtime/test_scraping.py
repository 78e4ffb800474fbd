"""What engines say of themselves."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from planner.domain.errors import InvalidInput
from runtime.diagnostics import diagnostics, metrics_text
from runtime.scraping import Scraper, read_report

TEXT = """
# HELP vllm:num_requests_running Running
vllm:num_requests_running{engine="0"} 3
vllm:num_requests_running{engine="1"} 1
vllm:num_requests_waiting{engine="0"} 2
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
process_start_time_seconds 1700000000.5
"""


class Link:
    """An endpoint whose metrics are what it is given."""

    def __init__(self, *texts):
        self.texts = list(texts)

    async def metrics(self):
        return self.texts.pop(0)


def test_a_report_adds_up_engines():
    """Requests of several engines are added, shares of their pools are averaged."""
    report = read_report(TEXT, 7.0)
    assert (report.running, report.waiting, report.kv_usage) == (4.0, 2.0, 0.375)
    assert report.started_s == 1700000000.5
    assert report.scrape is None  # no counters to learn from


def test_what_is_missing_is_none():
    """An engine that does not say is not taken for an idle one."""
    report = read_report("something_else 1\n", 7.0)
    assert (report.running, report.waiting, report.kv_usage) == (None, None, None)
    with pytest.raises(InvalidInput):
        read_report("<html>busy</html>", 7.0)


async def test_old_reports_are_stale_and_broken_ones_are_left_out():
    """A report counts until it is too old; a failed scrape neither renews nor drops it."""
    scraper = Scraper(10.0)
    assert scraper.to_json(0, 0.0) == {"state": "missing"}
    link = Link(TEXT, None, "<html>")
    await scraper.scrape(0, link, 100.0)
    assert scraper.report(0, 105.0).running == 4.0
    assert await scraper.scrape(0, link, 106.0) is None
    assert await scraper.scrape(0, link, 107.0) is None
    assert scraper.to_json(0, 108.0)["state"] == "fresh"
    assert scraper.report(0, 111.0) is None
    assert scraper.to_json(0, 111.0)["state"] == "stale"
    assert scraper.started_s(0) == 1700000000.5
    scraper.forget(0)
    assert scraper.started_s(0) is None


async def test_engines_are_scraped_in_the_background(stack, until):
    """Load and KV use of each engine show in diagnostics and gauges until it falls silent."""
    config = {"scrape_interval_s": 0.005, "scrape_stale_s": 0.3}
    async with (
        stack(2, config=config) as s,
        httpx.AsyncClient(base_url=s.base_url, timeout=20) as http,
    ):
        call = asyncio.create_task(
            http.post("/completions", json={"model": "m", "prompt": "a", "max_tokens": 2000})
        )

        def running():
            return [one["engine"].get("running") for one in diagnostics(s.control)["endpoints"]]

        await until(lambda: sorted(running(), key=str) == [0.0, 1.0], 0.005)
        text = metrics_text(s.control)
        assert 'almanac_worker_engine_running{endpoint="e0"}' in text
        assert 'almanac_worker_kv_usage_ratio{endpoint="e1"}' in text
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await s.mock.endpoints[0].go_down(abort=True)
        await until(
            lambda: diagnostics(s.control)["endpoints"][0]["engine"]["state"] == "stale", 0.01
        )
        text = metrics_text(s.control)
        assert 'almanac_worker_engine_running{endpoint="e0"}' not in text
        assert 'almanac_worker_engine_running{endpoint="e1"}' in text
