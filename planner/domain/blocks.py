"""Identity of prompt text without the text: segments, and the hash chain of 16-token blocks.

A prompt is a sequence of segments. Two segments with the same key and length stand for the same
tokens, so two prompts share a prefix exactly as far as their segments agree. The chain follows
vLLM's prefix cache: the hash of a block covers the hash of the block before it, hence equal
hashes mean equal prefixes. Only full blocks have a hash.

Hashes are plain integers made from integers, so they are the same in every process.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.domain.records import record

__all__ = ["BLOCK_TOKENS", "Segment", "block_hashes", "total_tokens"]

BLOCK_TOKENS = 16
"""Tokens per KV block, vLLM's default."""


@record(kw_only=False)
class Segment:
    """A run of tokens with an identity.

    Parameters
    ----------
    key
        Identity of the text; equal keys mean equal tokens.
    tokens
        Length in tokens, >= 0.
    """

    key: int
    tokens: int


def total_tokens(segments: Iterable[Segment]) -> int:
    """Return the number of tokens of a prompt."""
    return sum(segment.tokens for segment in segments)


def block_hashes(
    segments: Iterable[Segment], block_tokens: int = BLOCK_TOKENS, salt: int = 0
) -> tuple[int, ...]:
    """Return the hash chain of the full blocks of a prompt.

    Parameters
    ----------
    segments
        The prompt, in order.
    block_tokens
        Tokens per block, >= 1.
    salt
        Separates caches that must not share (vLLM's ``cache_salt``); 0 is the shared cache.

    Returns
    -------
    tuple of int, length ``total_tokens // block_tokens``.
    """
    chain: list[int] = []
    parent = salt
    room = block_tokens
    pieces: list[int] = []  # flat (key, offset, length) triples of the block being filled
    for segment in segments:
        offset = 0
        left = segment.tokens
        key = segment.key
        while left > 0:
            if room == block_tokens and left >= room:  # most blocks lie within one segment
                parent = hash((parent, key, offset, room))
                chain.append(parent)
                offset += room
                left -= room
                continue
            take = min(room, left)
            pieces += (key, offset, take)
            offset += take
            left -= take
            room -= take
            if room == 0:
                parent = hash((parent, *pieces))
                chain.append(parent)
                pieces.clear()
                room = block_tokens
    return tuple(chain)
