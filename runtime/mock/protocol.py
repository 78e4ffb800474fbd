"""What a mock endpoint understands of a request, and how it writes answers and chunks.

Follows vLLM 0.33.0 (``vllm/entrypoints/openai``): unknown fields are ignored, nulls are sent
where vLLM sends them. Deliberately absent: ``n`` > 1, several prompts in one request, log
probabilities, stop strings, tool calls and guided decoding in answers.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.mock.text import block_chain, chat_tokens, prompt_tokens, reply_words
from runtime.wire import ApiError

__all__ = ["Limits", "MockRequest", "Writer", "read_request", "usage_json"]

_DEFAULT_COMPLETION_TOKENS = 16  # vLLM's default of max_tokens for /v1/completions
_MEDIAN_TOKENS, _SIGMA = 120.0, 0.8  # of answers whose length nobody set


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests are checked against.

    Parameters
    ----------
    model
        The served name.
    max_model_len
        Longest prompt plus output in tokens: the fleet file's, or what the KV cache can hold.
    block_tokens
        Tokens per KV block.
    """

    model: str
    max_model_len: int
    block_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MockRequest:
    """A checked request with the answer it will get.

    Parameters
    ----------
    chat
        Whether it came to the chat route.
    words
        The answer, word by word, already cut to the limit.
    stops_at_eos
        Whether it ends by itself (``stop``) rather than by a limit (``length``).
    block_hashes
        Over prompt and answer.
    """

    chat: bool
    model: str
    prompt_tokens: int
    words: tuple[str, ...]
    stops_at_eos: bool
    block_hashes: tuple[int, ...]
    priority: int
    stream: bool
    include_usage: bool
    continuous_usage: bool


def read_request(body: bytes, limits: Limits, *, chat: bool, seed: int) -> MockRequest:
    """Check a request body and draw its answer.

    Parameters
    ----------
    seed
        Of the endpoint; with the prompt it fixes length and words of the answer.

    Raises
    ------
    ApiError
        400 or 404 with vLLM's wording.
    """
    raw = read_object(body)
    check_model(raw, limits)
    tokens = _prompt(raw, chat=chat)
    salt = raw.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt or len(salt) > 128):
        raise _invalid("Parameter 'cache_salt' must be a non-empty string if provided.")
    if raw.get("n", 1) not in (1, None):
        raise _invalid("This mock endpoint serves n=1 only.")
    room = limits.max_model_len - len(tokens)
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your "
            f"request has {len(tokens)} input tokens. Please reduce the length of the input "
            "messages.",
            param="input_tokens",
        )
    asked = _count(raw, "max_completion_tokens", least=1)
    if asked is None:
        asked = _count(raw, "max_tokens", least=1)
    if asked is None and not chat:
        asked = _DEFAULT_COMPLETION_TOKENS
    limit = room if asked is None else min(asked, room)
    prompt_seed = crc_of(tokens, seed)
    wanted, beginning = _wanted(raw, prompt_seed)
    if raw.get("ignore_eos"):
        wanted = limit + 1
    wanted = max(wanted, _count(raw, "min_tokens") or 1)
    words = reply_words(prompt_seed, min(wanted, limit), beginning)
    options = raw.get("stream_options")
    options = options if isinstance(options, dict) else {}
    priority = raw.get("priority", 0)
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise _invalid("Input should be a valid integer: priority")
    return MockRequest(
        chat=chat,
        model=limits.model,
        prompt_tokens=len(tokens),
        words=tuple(words),
        stops_at_eos=wanted <= limit,
        block_hashes=block_chain([*tokens, *words], limits.block_tokens, salt or ""),
        priority=priority,
        stream=bool(raw.get("stream")),
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
    )


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, or raise a 400 `ApiError`."""
    try:
        raw = json.loads(body)
    except ValueError as error:
        raise _invalid(f"JSON decode error: {error}") from error
    if not isinstance(raw, dict):
        raise _invalid("Input should be a valid dictionary or object")
    return raw


def check_model(raw: Mapping[str, Any], limits: Limits) -> None:
    """Raise a 404 `ApiError` unless the request names the served model, or none."""
    model = raw.get("model")
    if model is not None and model != limits.model:
        raise ApiError(404, f"The model `{str(model)[:200]}` does not exist.", param="model")


def crc_of(tokens: Sequence[str], seed: int) -> int:
    """Return the seed of the answer to a prompt."""
    (digest,) = block_chain(tokens, len(tokens)) if tokens else (0,)
    return hash((digest, seed))


def _prompt(raw: Mapping[str, Any], *, chat: bool) -> list[str]:
    if chat:
        messages = raw.get("messages")
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise _invalid("Field required: messages" if messages is None else "Bad messages")
        return chat_tokens(messages, raw.get("tools"))
    prompt = raw.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    whole = isinstance(prompt, list) and all(isinstance(one, int) for one in prompt)
    if not isinstance(prompt, str) and not whole:
        raise _invalid(
            "Field required: prompt" if prompt is None else "This mock serves one prompt at a time"
        )
    assert prompt is not None  # noqa: S101 - narrowed above
    return prompt_tokens(prompt) or ["<|start|>"]


def _wanted(raw: Mapping[str, Any], seed: int) -> tuple[int, list[str]]:
    """Return the answer's own length and its first words."""
    extra = raw.get("vllm_xargs")
    extra = extra if isinstance(extra, dict) else {}
    beginning = extra.get("mock_reply", "")
    words = beginning.split() if isinstance(beginning, str) else []
    length = extra.get("mock_output_tokens")
    if length is not None:
        if isinstance(length, bool) or not isinstance(length, (int, float)) or length < 1:
            raise _invalid("vllm_xargs.mock_output_tokens should be a number >= 1")
        return int(length), words
    draw = random.Random(seed).lognormvariate(math.log(_MEDIAN_TOKENS), _SIGMA)
    return max(1, round(draw), len(words)), words


def _count(raw: Mapping[str, Any], name: str, least: int = 0) -> int | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ApiError(400, f"{name} must be at least {least}, got {value!r:.40}.", param=name)
    return value


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, kind="Bad Request")


def usage_json(request: MockRequest, produced: int, cached: int | None) -> dict[str, Any]:
    """Return the usage object; ``cached`` None leaves the details out, as vLLM's default does."""
    return {
        "prompt_tokens": request.prompt_tokens,
        "total_tokens": request.prompt_tokens + produced,
        "completion_tokens": produced,
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
    }


class Writer:
    """Renders one answer, whole or in chunks.

    Parameters
    ----------
    request
        The request.
    request_id
        Without the ``chatcmpl-`` or ``cmpl-`` prefix.
    """

    __slots__ = ("_created", "_head", "_id", "_request")

    def __init__(self, request: MockRequest, request_id: str) -> None:
        self._request = request
        self._id = f"{'chatcmpl' if request.chat else 'cmpl'}-{request_id}"
        self._created = int(time.time())
        kind = "chat.completion.chunk" if request.chat else "text_completion"
        # Rendered once: a chunk is written per token.
        head = json.dumps(
            {"id": self._id, "object": kind, "created": self._created, "model": request.model}
        )
        self._head = "data: " + head[:-1] + ', "choices": '

    def first(self) -> bytes:
        """Return the chunk that opens a chat stream; nothing for completions."""
        if not self._request.chat:
            return b""
        return (
            self._head + '[{"index": 0, "delta": {"role": "assistant", "content": ""}, '
            '"logprobs": null, "finish_reason": null}], '
            '"prompt_token_ids": null, "prompt_text": null}\n\n'
        ).encode()

    def chunk(
        self, start: int, end: int, reason: str | None, usage: Mapping[str, Any] | None
    ) -> bytes:
        """Return the chunk of the words ``start`` to ``end``, the last one with its reason."""
        text = json.dumps(self._text(start, end))
        reason_json = "null" if reason is None else f'"{reason}"'
        stop = "" if reason is None else ', "stop_reason": null'
        body = f'{{"content": {text}}}' if self._request.chat else text
        field = "delta" if self._request.chat else "text"
        tail = "" if usage is None else f', "usage": {json.dumps(usage)}'
        return (
            f'{self._head}[{{"index": 0, "{field}": {body}, "logprobs": null, '
            f'"finish_reason": {reason_json}{stop}, "token_ids": null}}], '
            f'"kv_transfer_params": null{tail}}}\n\n'
        ).encode()

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """Return the chunk that holds nothing but usage."""
        return f'{self._head}[], "usage": {json.dumps(usage)}}}\n\n'.encode()

    def whole(self, reason: str, usage: Mapping[str, Any]) -> bytes:
        """Return the answer to a request that is not streamed."""
        request = self._request
        text = self._text(0, len(request.words))
        choice: dict[str, Any] = {"index": 0}
        if request.chat:
            choice["message"] = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            }
        else:
            choice["text"] = text
        choice |= {
            "logprobs": None, "finish_reason": reason, "stop_reason": None, "token_ids": None,
        }  # fmt: skip
        return json.dumps(
            {
                "id": self._id,
                "object": "chat.completion" if request.chat else "text_completion",
                "created": self._created,
                "model": request.model,
                "choices": [choice],
                "service_tier": None,
                "system_fingerprint": None,
                "usage": usage,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "kv_transfer_params": None,
            }
        ).encode()

    def _text(self, start: int, end: int) -> str:
        text = " ".join(self._request.words[start:end])
        return f" {text}" if start else text
