"""Endpoints known by their address alone: what they say of themselves makes the rest.

An OpenAI-compatible server names its model and, if it is vLLM, the longest context
(``/v1/models``) and the KV pool (``vllm:cache_config_info`` in ``/metrics``). Its speed is not
known; it starts from the row of a middling GPU and is learned from the first calls on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from planner.dispatch.scrape import parse_metrics
from planner.domain.errors import FleetError, InvalidInput
from planner.domain.fleet import Endpoint, Fleet, latency_rows
from planner.domain.ids import EndpointId

__all__ = ["ask_fleet"]

_LIMIT = aiohttp.ClientTimeout(total=3.0)
_ROW = "8b-a100-1-bf16"
_SLOTS = 256
"""vLLM's default ``max_num_seqs``."""
_BLOCKS, _BLOCK_TOKENS = 10_000, 16
_CONTEXT = 131_072


async def ask_fleet(urls: Sequence[str]) -> Fleet:
    """Return the fleet behind some addresses.

    Parameters
    ----------
    urls
        ``http://host:port``, with or without ``/v1``.

    Raises
    ------
    InvalidInput
        If an address is none, or one does not answer: then nothing is known of it.
    """
    plain = [_address(url, position) for position, url in enumerate(urls)]
    async with aiohttp.ClientSession(timeout=_LIMIT) as session:
        endpoints = await asyncio.gather(*(_ask(session, url) for url in plain))
    return Fleet(name="worker-urls", endpoints=tuple(endpoints))


def _address(url: str, position: int) -> str:
    parts = urlsplit(url)
    try:
        well = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port
    except ValueError:
        well = None
    if not well:
        raise InvalidInput(
            f"{url!r} is not an address",
            where=f"--worker-urls[{position}]",
            remedy="use http://host:port",
        )
    return url.rstrip("/").removesuffix("/v1")


async def _ask(session: aiohttp.ClientSession, url: str) -> Endpoint:
    try:
        async with session.get(f"{url}/v1/models") as answer:
            cards = (await answer.json(content_type=None))["data"]
        card: Mapping[str, Any] = cards[0]
        model = str(card["id"])
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError) as e:
        raise FleetError(
            f"{url} does not say which model it serves ({type(e).__name__})",
            where="--worker-urls",
            remedy="start it first, or describe it in a fleet file",
        ) from e
    blocks, block_tokens = await _pool(session, url)
    context = card.get("max_model_len")
    parts = urlsplit(url)
    return Endpoint(
        id=EndpointId(f"{parts.hostname}:{parts.port}"),
        model=model,
        gpu="unknown",
        latency=latency_rows()[_ROW],
        kv_blocks=blocks,
        block_tokens=block_tokens,
        max_num_seqs=_SLOTS,
        max_model_len=context if isinstance(context, int) and context > 0 else _CONTEXT,
        url=url,
    )


async def _pool(session: aiohttp.ClientSession, url: str) -> tuple[int, int]:
    """Return blocks and tokens per block as the engine says, or usual ones."""
    try:
        async with session.get(f"{url}/metrics") as answer:
            text = await answer.text()
        for name, labels, _ in parse_metrics(text):
            if name == "vllm:cache_config_info":
                blocks, tokens = int(labels["num_gpu_blocks"]), int(labels["block_size"])
                if blocks > 1 and tokens > 0:
                    return blocks, tokens
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError):
        pass  # no metrics, or another engine's
    return _BLOCKS, _BLOCK_TOKENS
