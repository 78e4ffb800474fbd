"""Latency learned from the mock's ``/metrics`` alone."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import httpx
import numpy as np

from planner.dispatch.online import LatencyBook, OnlineLatency, scrape_counts
from planner.dispatch.scrape import read_scrape
from runtime.clock import Clock

DILATION = 1e5
STATES = ((400, 40, 1, 500), (100, 30, 4, 1000), (300, 60, 8, 4000), (200, 50, 12, 5000))
"""Prompt, output, calls, context."""


async def _served(mock, client, now_s):
    """Serve closed loops of several widths; give the scrapes taken while calls ran."""
    rng = random.Random(5)
    scrapes = []
    async with httpx.AsyncClient(base_url=mock.addresses[0]) as http:

        async def call(number):
            await client.chat.completions.create(
                model="m",
                messages=[
                    {"role": "user", "content": f"{number} " + "word " * rng.randint(20, 400)}
                ],
                extra_body={"vllm_xargs": {"mock_output_tokens": rng.randint(15, 60)}},
            )
            text = (await http.get("/metrics")).text
            scrapes.append(read_scrape(text, now_s()))

        async def loop(width, worker):
            for turn in range(6):
                await call(f"{width}-{worker}-{turn}")

        for width in (1, 3, 6, 12):
            await asyncio.gather(*(loop(width, worker) for worker in range(width)))
    return scrapes


async def test_scrapes_alone_teach_the_row(mock_of, client_of, monkeypatch):
    """From scrapes alone a row three times too slow comes within 15 % of the engine's times."""
    running = []

    def wall():
        # Time stands still but for the engine's steps, so no wake-up is ever late.
        return running[0].paced.engine.now_s / DILATION if running else 0.0

    monkeypatch.setattr("runtime.mock.server.Clock", lambda dilation: Clock(dilation, wall=wall))
    async with (
        mock_of(1, changes={"kv_blocks": 2000, "max_num_seqs": 32}, dilation=DILATION) as mock,
        client_of(mock) as client,
    ):
        running.append(mock.endpoints[0])
        scrapes = await _served(mock, client, mock.clock.now_s)
        truth = mock.endpoints[0].endpoint.latency
    learner = OnlineLatency(truth.scaled(3.0))
    for before, after in pairwise(scrapes):
        found = scrape_counts(before, after)
        if found is not None:
            learner.observe(*found, after.time_s)
    errors = []
    for prompt, output, calls, kv in STATES:
        _, (tpot, wanted), (total, asked) = LatencyBook([learner.row, truth]).forecast(
            prompt, output, np.array([calls] * 2), np.array([kv] * 2)
        )
        errors.append((tpot / wanted - 1, total / asked - 1))
    assert np.max(np.abs(errors)) < 0.15
