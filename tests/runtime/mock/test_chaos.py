"""Everything at once: impatient clients, transfers and faults leave nothing behind."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import httpx
import pytest

from planner.domain.errors import InvalidInput
from planner.domain.faults import FAULT_KINDS, read_fault

WORKERS, USERS, CALLS = 3, 8, 12


class User:
    """Sends calls of all sorts, some of them as prefill and decode, and leaves some early."""

    def __init__(self, mock, seed):
        self._mock = mock
        self._draw = random.Random(seed)

    async def run(self):
        async with httpx.AsyncClient(timeout=5) as http:
            for _ in range(CALLS):
                try:
                    async with asyncio.timeout(self._draw.choice([0.005, 0.02, 0.1, 1.0])):
                        await self._call(http)
                except (TimeoutError, httpx.TransportError):
                    pass

    async def _call(self, http):
        draw = self._draw
        here, there = draw.sample(self._mock.addresses, 2)
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "w " * draw.randint(1, 600)}],
            "vllm_xargs": {"mock_output_tokens": draw.randint(1, 150)},
            "priority": draw.randint(0, 3),
        }
        if draw.random() < 0.5:
            prefill = body | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
            answer = await http.post(f"{there}/v1/chat/completions", json=prefill)
            if answer.status_code == 200:
                body["kv_transfer_params"] = answer.json()["kv_transfer_params"]
        body["stream"] = draw.random() < 0.5
        answer = await http.post(f"{here}/v1/chat/completions", json=body)
        assert answer.status_code in (200, 429, 500, 503)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
async def test_chaos_leaves_nothing_behind(mock_of, until, caplog, policy):
    """After the last fault and the last call all blocks are free, and no engine broke."""
    changes = {"kv_blocks": 150, "scheduling": policy}
    async with mock_of(WORKERS, changes=changes, lease_s=5.0, noise_cv=0.1) as mock:
        draw = random.Random(policy)
        users = asyncio.gather(*(User(mock, seed).run() for seed in range(USERS)))
        while not users.done():
            kind = draw.choice(list(FAULT_KINDS))
            fault = read_fault({"kind": kind, "for_s": draw.uniform(0.5, 4)}, "chaos")
            with suppress(InvalidInput):  # that endpoint is down already
                draw.choice(mock.endpoints).inject(fault.moved(mock.clock.now_s()))
            await asyncio.wait({users}, timeout=0.02)
        await users
        for one in mock.endpoints:
            await one.board.clear()
        await until(lambda: all(one.paced.engine.kv_usage == 0 for one in mock.endpoints), 0.01)
        assert not any(one.paced.live or one.load or one.paced.dead for one in mock.endpoints)
    assert "engine died" not in caplog.text
