"""Prefill on one mock endpoint, decode on another: vLLM's KV transfer as a router sees it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest

from planner.domain.faults import read_fault

PREFILL = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
    "remote_block_ids": None, "remote_host": None, "remote_port": None,
}  # fmt: skip
WORDS = 400  # prompt: these and seven more


def body(tokens=5, **more):
    messages = [{"role": "user", "content": "word " * WORDS}]
    return {
        "model": "m", "messages": messages, "vllm_xargs": {"mock_output_tokens": tokens}, **more,
    }  # fmt: skip


class Pair:
    """A prefill and a decode endpoint, with what a router does between them."""

    def __init__(self, mock, http):
        self.mock = mock
        self.sender, self.receiver = mock.endpoints
        self._http = http

    async def ask(self, index, **fields):
        url = f"{self.mock.addresses[index]}/v1/chat/completions"
        return await self._http.post(url, json=body(**fields))

    async def prefill(self):
        """Return the ``kv_transfer_params`` of a finished prefill."""
        answer = await self.ask(0, max_tokens=1, kv_transfer_params=PREFILL)
        assert answer.status_code == 200
        return answer.json()["kv_transfer_params"]

    async def decode(self, params, **fields):
        return await self.ask(1, kv_transfer_params=params, **fields)


@pytest.fixture
def pair_of(mock_of):
    """Return a factory: ``async with pair_of() as pair``."""

    @asynccontextmanager
    async def make(**options):
        # Unless a test is about leases none runs out, however long this process is held up.
        options = {"lease_s": 10_000.0, **options}
        async with mock_of(2, **options) as mock, httpx.AsyncClient(timeout=5) as http:
            yield Pair(mock, http)

    return make


async def test_a_prompt_is_computed_once(pair_of, until):
    """The decode side pulls the prompt: one token is left to compute, the answer is the same."""
    async with pair_of() as pair:
        plain = (await pair.ask(1)).json()
        pair.receiver.paced.engine.reset_prefix_cache()
        params = await pair.prefill()
        assert params["do_remote_prefill"] is True
        assert params["remote_engine_id"] == "e0"
        assert params["remote_num_tokens"] == WORDS + 7
        assert len(params["remote_block_ids"]) == -(-(WORDS + 7) // 16)
        assert pair.sender.paced.engine.kv_usage > 0
        answer = (await pair.decode(params)).json()
        assert answer["choices"][0]["message"] == plain["choices"][0]["message"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == WORDS + 6
        assert pair.sender.paced.engine.kv_usage == 0
        await until(lambda: pair.receiver.paced.engine.kv_usage == 0)
        text = pair.receiver.metrics.render()
        labels = 'model_name="m",engine="0"'
        assert f"vllm:nixl_xfer_time_seconds_count{{{labels}}} 1" in text
        external = f'vllm:prompt_tokens_by_source_total{{{labels},source="external_kv_transfer"}}'
        assert f"{external} {WORDS + 6}" in text


async def test_streams_pull_too(pair_of):
    """A streamed decode pulls and ends properly."""
    async with pair_of() as pair:
        answer = await pair.decode(await pair.prefill(), stream=True)
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_a_prefix_that_is_there_already_shortens_the_pull(pair_of):
    """What the decode side has cached is not pulled again."""
    async with pair_of() as pair:
        await pair.decode(await pair.prefill())
        first = transferred_bytes(pair)
        await pair.decode(await pair.prefill())
        # 25 of its 26 blocks are there; of the last one, seven tokens are pulled.
        assert transferred_bytes(pair) - first == (WORDS + 7) % 16 * 131072


def transferred_bytes(pair):
    lines = pair.receiver.metrics.render().splitlines()
    name = "vllm:nixl_bytes_transferred_sum"
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


async def test_only_a_prefill_cut_by_its_limit_is_kept(pair_of):
    """A prefill that stopped by itself offers nothing, as in vLLM."""
    async with pair_of() as pair:
        answer = await pair.ask(0, tokens=1, max_tokens=5, kv_transfer_params=PREFILL)
        assert answer.json()["kv_transfer_params"] is None


async def test_blocks_nobody_fetches_are_given_back_after_the_lease(pair_of, until):
    """Until then they are in use; afterwards the pull fails and the expiry is counted."""
    async with pair_of(lease_s=10.0) as pair:
        params = await pair.prefill()
        assert pair.sender.paced.engine.kv_usage > 0
        await until(lambda: pair.sender.paced.engine.kv_usage == 0)
        assert (await pair.decode(params)).status_code == 500
        assert "vllm:nixl_num_kv_expired_reqs_total" in pair.sender.metrics.render()
        assert 'expired_reqs_total{model_name="m",engine="0"} 1' in pair.sender.metrics.render()


async def test_a_failed_transfer_is_a_500_or_a_prefill(pair_of):
    """By default a call whose KV does not arrive fails; with `recompute` it is served anyway."""
    for policy, status in (("fail", 500), ("recompute", 200)):
        async with pair_of(kv_load_failure_policy=policy) as pair:
            pair.receiver.inject(read_fault({"kind": "kv_transfer_failure"}, "test"))
            answer = await pair.decode(await pair.prefill())
            assert answer.status_code == status
            assert pair.receiver.paced.live == 0
            text = pair.receiver.metrics.render()
            assert 'nixl_num_failed_transfers_total{model_name="m",engine="0"} 1' in text
            await pair.receiver.board.clear()
            assert (await pair.decode(await pair.prefill())).status_code == 200


@pytest.mark.parametrize("name", [None, "e9", 7])
async def test_an_unknown_sender_is_a_failed_transfer(pair_of, name):
    """Parameters that name nobody fail as a peer that is gone."""
    async with pair_of() as pair:
        params = {"do_remote_prefill": True, "remote_engine_id": name, "remote_request_id": "x"}
        assert (await pair.decode(params)).status_code == 500
        assert pair.receiver.paced.engine.kv_usage == 0


async def test_a_sender_that_died_is_a_failed_transfer(pair_of, until):
    """KV of a process that crashed is gone."""
    async with pair_of() as pair:
        params = await pair.prefill()
        pair.sender.inject(read_fault({"kind": "cold_restart", "for_s": 1}, "test"))
        await until(lambda: not pair.sender.board.faults())
        assert (await pair.decode(params)).status_code == 500


async def test_a_receiver_that_leaves_lets_the_lease_run(pair_of, until):
    """A decode aborted during its pull frees its own blocks; the sender's wait for the lease."""
    async with pair_of(transfer_setup_s=1000.0, lease_s=20.0) as pair:
        params = await pair.prefill()
        waiting = asyncio.create_task(pair.decode(params))
        engine = pair.receiver.paced.engine
        await until(lambda: engine.kv_usage > 0)
        assert engine.num_running == 0
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: engine.kv_usage == 0)
        await until(lambda: pair.sender.paced.engine.kv_usage == 0)
        assert 'expired_reqs_total{model_name="m",engine="0"} 1' in pair.sender.metrics.render()


async def test_pulls_share_the_links(pair_of, until):
    """Many transfers at once all arrive, while other calls are decoded beside them."""
    async with pair_of(changes={"kv_blocks": 900, "max_num_seqs": 8}) as pair:
        params = await asyncio.gather(*(pair.prefill() for _ in range(8)))
        answers = await asyncio.gather(
            *(pair.decode(one) for one in params), *(pair.ask(1, tokens=40) for _ in range(4))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert pair.sender.paced.engine.kv_usage == 0


async def test_a_pull_survives_a_pause(pair_of, until):
    """A request that comes while the engine is held asks for its KV when it is let go."""
    async with pair_of() as pair:
        params = await pair.prefill()
        running = asyncio.create_task(pair.ask(1, tokens=300))
        await until(lambda: pair.receiver.paced.engine.num_running == 1)
        pair.receiver.pause("test")
        pulling = asyncio.create_task(pair.decode(params))
        await until(lambda: pair.receiver.paced.engine.num_waiting == 1)
        await asyncio.sleep(0.02)
        pair.receiver.resume("test")
        assert (await pulling).status_code == 200
        assert (await running).status_code == 200
