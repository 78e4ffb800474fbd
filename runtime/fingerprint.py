"""Size and identity of a prompt from the bytes of the request, without a tokenizer.

The messages are rendered to one text, which is cut into chunks of `CHUNK_BYTES` bytes; each
item of the chain covers its chunk and all before it, so equal leading items mean equal leading
text. Only full chunks have an item. How many tokens a chunk holds is learned per model from the
``usage`` of answers.

Only sizes and hashes leave this module, never text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

__all__ = ["CHUNK_BYTES", "Prompt", "TokenScale", "read_prompt"]

CHUNK_BYTES = 128
_FIRST_GUESS = 4.0  # bytes of English text per token
_FORGET = 0.98  # weight of the past at each answer: about the last 50 count
_ROLE, _END = "\x1f", "\x1e"  # separators that text does not contain


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What may be known of a prompt.

    Parameters
    ----------
    size_bytes
        Length of the rendered text.
    chain
        Hash chain of its full chunks.
    head
        Hash of the conversation's beginning (up to the first user message), the same on every
        turn of a conversation.
    exact_tokens
        Length in tokens where the client sent token ids, else None.
    """

    size_bytes: int
    chain: tuple[int, ...]
    head: int
    exact_tokens: int | None = None


def read_prompt(payload: Mapping[str, Any]) -> Prompt:
    """Return size and identity of the prompt of a request body.

    Parameters
    ----------
    payload
        Parsed body of a chat, completions, responses or embeddings request. Whatever is missing
        or of an unexpected type counts as empty: judging it is the endpoint's business.
    """
    salt = payload.get("cache_salt")
    seed = crc32(salt.encode("utf-8", "replace")) if isinstance(salt, str) else 0
    tokens: int | None = None
    messages = payload.get("messages")
    if isinstance(messages, list):
        head, rest = _render_messages(messages)
        tools = payload.get("tools")
        if tools:
            # Chat templates put the tools into the system prompt.
            head = _compact(tools) + _END + head
        text = head + rest
    else:
        prompt = payload.get("prompt", payload.get("input", ""))
        if isinstance(prompt, list) and prompt and all(isinstance(one, int) for one in prompt):
            tokens = len(prompt)
        head = text = prompt if isinstance(prompt, str) else _compact(prompt)
    data = text.encode("utf-8", "replace")
    return Prompt(
        size_bytes=len(data),
        chain=_chain(data, seed),
        head=hash((seed, crc32(head.encode("utf-8", "replace")), len(head))),
        exact_tokens=tokens,
    )


def _render_messages(messages: list[Any]) -> tuple[str, str]:
    """Return the text up to and including the first user message, and the text after it."""
    parts: list[str] = []
    head: int | None = None
    for message in messages:
        if not isinstance(message, dict):
            parts.append(_compact(message) + _END)
            continue
        role = message.get("role")
        parts.append(f"{role}{_ROLE}{_content(message.get('content'))}")
        calls = message.get("tool_calls")
        if calls:
            parts.append(_compact(calls))
        parts.append(_END)
        if head is None and role == "user":
            head = len(parts)
    return "".join(parts[:head]), "" if head is None else "".join(parts[head:])


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(
            part["text"]
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else _compact(part)
            for part in content
        )
    return _compact(content)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _chain(data: bytes, seed: int) -> tuple[int, ...]:
    # Hashes of tuples of integers are the same in every process, unlike those of text.
    chain: list[int] = []
    parent = seed
    view = memoryview(data)
    for start in range(0, len(data) - CHUNK_BYTES + 1, CHUNK_BYTES):
        parent = hash((parent, crc32(view[start : start + CHUNK_BYTES])))
        chain.append(parent)
    return tuple(chain)


class TokenScale:
    """Bytes per prompt token by model, learned from answers with exponential forgetting."""

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[str | None, tuple[float, float]] = {}

    def bytes_per_token(self, model: str | None) -> float:
        """Return the present estimate, > 0."""
        sums = self._sums.get(model)
        return _FIRST_GUESS if sums is None else sums[0] / sums[1]

    def learn(self, model: str | None, size_bytes: int, tokens: int) -> None:
        """Take in what an engine said a prompt of ``size_bytes`` is in tokens."""
        if size_bytes <= 0 or tokens <= 0:
            return
        old_bytes, old_tokens = self._sums.get(model, (0.0, 0.0))
        self._sums[model] = (_FORGET * old_bytes + size_bytes, _FORGET * old_tokens + tokens)

    def to_json(self) -> list[list[Any]]:
        """Return what was learned, JSON-ready."""
        return [[model, *sums] for model, sums in self._sums.items()]

    def restore(self, rows: Iterable[Sequence[Any]]) -> None:
        """Take up what `to_json` returned.

        Raises
        ------
        ValueError, TypeError
            If it is something else.
        """
        for model, size_bytes, tokens in rows:
            sums = (float(size_bytes), float(tokens))
            if min(sums) > 0:
                self._sums[model] = sums

    def tokens(self, prompt: Prompt, model: str | None) -> tuple[int, float]:
        """Return the prompt's length in tokens (>= 1) and the tokens per item of its chain."""
        scale = self.bytes_per_token(model)
        if prompt.exact_tokens is not None:
            scale = max(prompt.size_bytes, 1) / max(prompt.exact_tokens, 1)
        return max(1, round(prompt.size_bytes / scale)), CHUNK_BYTES / scale
