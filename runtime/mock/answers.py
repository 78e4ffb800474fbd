"""How a mock endpoint writes answers: whole, or chunk by chunk.

Nulls are sent where vLLM 0.33.0 sends them; the rest of the unset fields are left out. A chunk is
written for every token, so what its texts share is rendered once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from runtime.mock.protocol import MockRequest, Sample
from runtime.mock.text import Vocabulary, reply_words

__all__ = ["Writer", "usage_json"]

_WORDS = re.compile(r"\s*\S+")


def usage_json(request: MockRequest, produced: int, cached: int | None) -> dict[str, Any]:
    """Return the usage object; ``cached`` None leaves the details out, as vLLM's default does."""
    usage: dict[str, Any] = {
        "prompt_tokens": request.prompt_tokens,
        "total_tokens": request.prompt_tokens + produced,
        "completion_tokens": produced,
    }
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return usage


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


class Writer:
    """Renders the answers to one request.

    Parameters
    ----------
    request
        The request.
    request_id
        Without the ``chatcmpl-`` or ``cmpl-`` prefix.
    vocabulary
        Of the endpoint; read where token ids are told.
    """

    __slots__ = ("_calls", "_created", "_head", "_id", "_offsets", "_request", "_vocabulary")

    def __init__(self, request: MockRequest, request_id: str, vocabulary: Vocabulary) -> None:
        self._request = request
        self._vocabulary = vocabulary
        self._id = f"{'chatcmpl' if request.chat else 'cmpl'}-{request_id}"
        self._created = int(time.time())
        kind = "chat.completion.chunk" if request.chat else "text_completion"
        head = _compact(
            {"id": self._id, "object": kind, "created": self._created, "model": request.model}
        )
        self._head = f'data: {head[:-1]},"choices":'
        self._calls: dict[int, list[dict[str, Any] | None]] = {}  # choice -> delta of each token
        self._offsets: dict[int, int] = {}  # choice -> characters sent, for logprobs

    def first(self) -> bytes:
        """Return the chunks that open a chat stream, one per choice; nothing for completions."""
        request = self._request
        if not request.chat:
            return b""
        return "".join(
            f'{self._head}[{{"index":{index},"delta":{{"role":"assistant","content":""}},'
            '"logprobs":null,"finish_reason":null}],'
            f'"prompt_token_ids":{self._ids(sample.prompt)},"prompt_text":null}}\n\n'
            for index, sample in enumerate(request.samples)
        ).encode()

    def chunk(
        self,
        index: int,
        start: int,
        end: int,
        *,
        ended: bool = False,
        usage: Mapping[str, Any] | None = None,
        transfer: Mapping[str, Any] | None = None,
    ) -> bytes:
        """Return the chunk of a choice's tokens ``start`` to ``end``.

        Parameters
        ----------
        ended
            Whether it is the last one; it tells the reason then.
        transfer
            ``kv_transfer_params`` of the last one.
        """
        request = self._request
        sample = request.samples[index]
        text = "".join(sample.pieces[start:end])
        if request.chat:
            body = f'"delta":{{"content":{json.dumps(text)}}}'
            if sample.calls:
                body = f'"delta":{_compact(self._delta(index, start, end, text))}'
        else:
            body = f'"text":{json.dumps(text)}'
        logprobs = "null"
        if request.logprobs is not None:
            logprobs = _compact(self._logprobs(sample, start, end, self._offsets.get(index, 0)))
            self._offsets[index] = self._offsets.get(index, 0) + len(text)
        reason = "null"
        if ended:
            reason = f'"{sample.finish_reason}","stop_reason":{json.dumps(sample.stop_reason)}'
        tail = "" if usage is None else f',"usage":{_compact(usage)}'
        return (
            f'{self._head}[{{"index":{index},{body},"logprobs":{logprobs},"finish_reason":{reason},'
            f'"token_ids":{self._ids(sample.tokens[start:end])}}}],'
            f'"kv_transfer_params":{_compact(transfer)}{tail}}}\n\n'
        ).encode()

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """Return the chunk that holds nothing but usage."""
        return f'{self._head}[],"usage":{_compact(usage)}}}\n\n'.encode()

    def whole(self, usage: Mapping[str, Any], transfer: Mapping[str, Any] | None = None) -> bytes:
        """Return the answer to a request that is not streamed."""
        request = self._request
        answer: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion" if request.chat else "text_completion",
            "created": self._created,
            "model": request.model,
            "choices": [self._choice(index) for index in range(len(request.samples))],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": {"prompt_tokens_details": None, **usage},
            "kv_transfer_params": transfer,
        }
        if request.chat:
            answer["prompt_logprobs"] = None
            answer["prompt_token_ids"] = self._id_list(request.samples[0].prompt)
        return _compact(answer).encode()

    def _choice(self, index: int) -> dict[str, Any]:
        request = self._request
        sample = request.samples[index]
        text = "".join(sample.pieces)
        choice: dict[str, Any] = {"index": index}
        if request.chat:
            choice["message"] = {
                "role": "assistant",
                "content": text or (None if sample.calls else ""),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": self._whole_calls(index),
                "reasoning": None,
            }
        else:
            choice["text"] = text
        logprobs = None
        if request.logprobs is not None:
            logprobs = self._logprobs(sample, 0, len(sample.tokens), 0)
        choice |= {
            "logprobs": logprobs,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "token_ids": self._id_list(sample.tokens),
        }
        if not request.chat:
            choice["prompt_logprobs"] = None
            choice["prompt_token_ids"] = self._id_list(sample.prompt)
        return choice

    # Tool calls

    def _whole_calls(self, index: int) -> list[dict[str, Any]]:
        parts = self._call_parts(index, 0, len(self._request.samples[index].tokens))
        return [
            {"id": part["id"], "type": part["type"], "function": part["function"]} for part in parts
        ]

    def _delta(self, index: int, start: int, end: int, text: str) -> dict[str, Any]:
        parts = self._call_parts(index, start, end)
        delta: dict[str, Any] = {"content": text} if text or not parts else {}
        if parts:
            delta["tool_calls"] = parts
        return delta

    def _call_parts(self, index: int, start: int, end: int) -> list[dict[str, Any]]:
        """Return what the tokens ``start`` to ``end`` add to the tool calls of a choice."""
        if index not in self._calls:
            self._calls[index] = _call_deltas(self._request.samples[index], f"{self._id}-{index}")
        parts: list[dict[str, Any]] = []
        for delta in self._calls[index][start:end]:
            if delta is None:
                continue
            if parts and parts[-1]["index"] == delta["index"]:
                parts[-1]["function"]["arguments"] += delta["function"]["arguments"]
            else:
                parts.append({**delta, "function": dict(delta["function"])})
        return parts

    # Token ids and log probabilities: there are none to tell, so they are made up, and stable.

    def _id_list(self, tokens: Sequence[str]) -> list[int] | None:
        return self._vocabulary.ids(tokens) if self._request.token_ids else None

    def _ids(self, tokens: Sequence[str]) -> str:
        return _compact(self._id_list(tokens)) if self._request.token_ids else "null"

    def _logprobs(self, sample: Sample, start: int, end: int, offset: int) -> dict[str, Any]:
        most = self._request.logprobs or 0
        rows = []
        for position in range(start, end):
            piece = sample.pieces[position]
            seed = crc32(f"{position} {piece}".encode("utf-8", "replace"))
            rows.append((piece, -(1 + seed % 900) / 1000, reply_words(seed, max(0, most - 1))))
        if not self._request.chat:
            offsets = []
            for piece, _, _ in rows:
                offsets.append(offset)
                offset += len(piece)
            return {
                "text_offset": offsets,
                "token_logprobs": [logprob for _, logprob, _ in rows],
                "tokens": [piece for piece, _, _ in rows],
                "top_logprobs": [
                    {**{f" {one}": -2.0 - rank for rank, one in enumerate(others)}, piece: logprob}
                    for piece, logprob, others in rows
                ],
            }
        return {
            "content": [
                {
                    **_token_logprob(piece, logprob),
                    "top_logprobs": [
                        _token_logprob(piece, logprob),
                        *(_token_logprob(f" {one}", -2.0 - i) for i, one in enumerate(others)),
                    ][:most],
                }
                for piece, logprob, others in rows
            ]
        }


def _call_deltas(sample: Sample, seed: str) -> list[dict[str, Any] | None]:
    """Return what each token of an answer adds to its tool calls.

    A call's tokens are its start, its name and the words of its arguments.
    """
    deltas: list[dict[str, Any] | None] = [None for piece in sample.pieces if piece]
    for number, call in enumerate(sample.calls):
        name = f"chatcmpl-tool-{crc32(f'{seed}-{number}'.encode()):08x}"
        head = {"name": call.name, "arguments": ""}
        deltas += [None, {"id": name, "type": "function", "index": number, "function": head}]
        deltas += [
            {"index": number, "function": {"arguments": words}}
            for words in _WORDS.findall(call.arguments)
        ]
    return deltas[: len(sample.tokens)]


def _token_logprob(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}
