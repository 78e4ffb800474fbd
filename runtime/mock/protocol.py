"""What a mock endpoint understands of a request, and the answers it draws for it.

Follows vLLM 0.33.0 (``vllm/entrypoints/openai``): unknown fields are ignored, wrong ones refused
in its words. Guided decoding is accepted and has no effect: say with ``mock_reply`` what the
answer should be. ``echo``, ``best_of`` and beam search are ignored.

A client steers an answer with ``vllm_xargs``
    mock_output_tokens      how long the answer is before limits cut it
    mock_reply              its first words
    mock_tool_calls         calls it ends with: ``[{"name": ..., "arguments": ...}]``, or that as
                            JSON text, arguments as JSON text or an object
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runtime.mock.text import (
    Vocabulary,
    block_chain,
    call_tokens,
    chat_tokens,
    prompt_tokens,
    reply_words,
)
from runtime.wire import ApiError

__all__ = [
    "Limits",
    "MockRequest",
    "Sample",
    "ToolCall",
    "check_model",
    "invalid",
    "read_object",
    "read_request",
]

_DEFAULT_COMPLETION_TOKENS = 16  # vLLM's default of max_tokens for /v1/completions
_MEDIAN_TOKENS, _SIGMA = 120.0, 0.8  # of answers whose length nobody set
_MOST_SAMPLES = 256  # answers of one request; vLLM's own bound is far above any use
_MOST_LOGPROBS = 20  # vLLM's default of --max-logprobs
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests are checked against.

    Parameters
    ----------
    models
        The served names: the model, then its adapters.
    max_model_len
        Longest prompt plus output in tokens: the fleet file's, or what the KV cache can hold.
    block_tokens
        Tokens per KV block.
    """

    models: tuple[str, ...]
    max_model_len: int
    block_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the answer makes; ``arguments`` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer to one prompt, as it will be once all of it is generated.

    Parameters
    ----------
    prompt
        Tokens of the prompt.
    tokens
        Tokens of the answer, cut to the limits.
    pieces
        The text that each of them adds.
    calls
        Tool calls at its end; their tokens add no text.
    stops_at_eos
        Whether it ends by itself (``stop``, ``tool_calls``) rather than by a limit (``length``).
    stop_reason
        The stop string or token id that ended it, or None.
    block_hashes
        Over prompt and answer.
    """

    prompt: tuple[str, ...]
    tokens: tuple[str, ...]
    pieces: tuple[str, ...]
    calls: tuple[ToolCall, ...]
    stops_at_eos: bool
    stop_reason: str | int | None
    block_hashes: tuple[int, ...]

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """What a client is told when it has ended."""
        if not self.stops_at_eos:
            return "length"
        return "tool_calls" if self.calls else "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class MockRequest:
    """A checked request with the answers it will get.

    Parameters
    ----------
    chat
        Whether it came to the chat route.
    samples
        The answers by choice index: those to the first prompt first.
    prompt_tokens
        Of all prompts, each counted once.
    max_tokens
        The limit that was asked for, or None.
    logprobs
        How many alternatives are told per token; None tells nothing.
    token_ids
        Whether token ids are told.
    stream_interval
        Tokens per chunk, or None for the server's.
    transfer
        ``kv_transfer_params``, or None.
    request_id
        Given in the body, or None.
    """

    chat: bool
    model: str
    samples: tuple[Sample, ...]
    n: int
    prompt_tokens: int
    max_tokens: int | None
    priority: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None
    token_ids: bool
    stream_interval: int | None
    transfer: Mapping[str, Any] | None
    request_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampling:
    """The fields of a request that decide where an answer ends."""

    asked: int | None
    least: int
    ignore_eos: bool
    stop: tuple[str, ...]
    keep_stop: bool
    stop_ids: frozenset[int]
    length: int | None
    beginning: tuple[str, ...]
    calls: tuple[ToolCall, ...]


def read_request(
    body: bytes,
    limits: Limits,
    *,
    chat: bool,
    seed: int,
    vocabulary: Vocabulary,
    priority: int | None = None,
) -> MockRequest:
    """Check a request body and draw its answers.

    Parameters
    ----------
    seed
        Of the endpoint; with the prompt it fixes length and words of the answers.
    vocabulary
        Of the endpoint, for token ids.
    priority
        From a header; the body's goes before it.

    Raises
    ------
    ApiError
        400 or 404 with vLLM's wording.
    """
    raw = read_object(body)
    check_model(raw, limits)
    _check_sampling(raw, chat=chat)
    prompts = _prompts(raw, vocabulary, chat=chat)
    n = _count(raw, "n", least=1) or 1
    if n * len(prompts) > _MOST_SAMPLES:
        raise invalid(f"{n} answers to {len(prompts)} prompts are more than {_MOST_SAMPLES}")
    sampling = _read_sampling(raw, chat=chat)
    salt = _cache_salt(raw)
    options = raw.get("stream_options")
    options = {} if options is None else options
    stream = _flag(raw, "stream")
    if not isinstance(options, dict):
        raise invalid("Input should be a valid dictionary: stream_options")
    if options and not stream:
        raise invalid("Stream options can only be defined when `stream=True`.")
    transfer = raw.get("kv_transfer_params")
    if transfer is not None and not isinstance(transfer, dict):
        raise invalid("Input should be a valid dictionary: kv_transfer_params")
    name = raw.get("request_id")
    own_priority = _integer(raw, "priority")
    return MockRequest(
        chat=chat,
        model=raw.get("model") or limits.models[0],
        samples=tuple(
            _draw(prompt, sampling, limits, seed, number, salt, vocabulary)
            for prompt in prompts
            for number in range(n)
        ),
        n=n,
        prompt_tokens=sum(map(len, prompts)),
        max_tokens=sampling.asked,
        priority=(own_priority if own_priority is not None else priority) or 0,
        stream=stream,
        include_usage=_flag(options, "include_usage"),
        continuous_usage=_flag(options, "include_usage")
        and _flag(options, "continuous_usage_stats"),
        logprobs=_logprobs(raw, chat=chat),
        token_ids=_flag(raw, "return_token_ids"),
        stream_interval=_count(raw, "stream_interval", least=1),
        transfer=transfer,
        request_id=name if isinstance(name, str) and name else None,
    )


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, or raise a 400 `ApiError`."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"JSON decode error: {error}") from error
    if not isinstance(raw, dict):
        raise invalid("Input should be a valid dictionary or object")
    return raw


def check_model(raw: Mapping[str, Any], limits: Limits) -> None:
    """Raise a 404 `ApiError` unless the request names a served model, or none."""
    model = raw.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid("Input should be a valid string: model")
    if model and model not in limits.models:
        raise ApiError(404, f"The model `{model[:200]}` does not exist.", param="model")


def invalid(message: str) -> ApiError:
    """Return the error of a request that fails validation."""
    return ApiError(400, message, kind="Bad Request")


def _draw(
    prompt: Sequence[str],
    sampling: _Sampling,
    limits: Limits,
    seed: int,
    number: int,
    salt: str,
    vocabulary: Vocabulary,
) -> Sample:
    """Return the answer ``number`` to a prompt.

    Raises
    ------
    ApiError
        400 if the prompt leaves no room for an answer.
    """
    room = limits.max_model_len - len(prompt)
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your "
            f"request has {len(prompt)} input tokens. Please reduce the length of the input "
            "messages.",
            param="input_tokens",
        )
    limit = room if sampling.asked is None else min(sampling.asked, room)
    (digest,) = block_chain(prompt, len(prompt))
    own_seed = hash((digest, seed, number)) if number else hash((digest, seed))
    ending = [one for call in sampling.calls for one in call_tokens(call.name, call.arguments)]
    beginning = sampling.beginning
    if sampling.length is not None:
        wanted = sampling.length
    elif ending:
        wanted = len(beginning) + len(ending)
    else:
        draw = random.Random(own_seed).lognormvariate(math.log(_MEDIAN_TOKENS), _SIGMA)
        wanted = max(1, round(draw), len(beginning))
    wanted = max(wanted, sampling.least, len(ending))
    if sampling.ignore_eos:
        wanted = max(wanted, limit + 1)
    # What a limit cuts off is not even drawn.
    spoken = min(wanted - len(ending), limit)
    tokens = [*reply_words(own_seed, spoken, beginning), *ending][: min(wanted, limit)]
    pieces = [f" {word}" for word in tokens[:spoken]] + [""] * (len(tokens) - spoken)
    if spoken:
        pieces[0] = tokens[0]
    stops = wanted <= limit
    stop_reason = None
    cut = _first_stop(tokens, pieces, sampling, vocabulary)
    if cut is not None:
        length, pieces, stop_reason = cut
        tokens, stops = tokens[:length], True
    return Sample(
        prompt=tuple(prompt),
        tokens=tuple(tokens),
        pieces=tuple(pieces),
        calls=() if cut is not None else sampling.calls,
        stops_at_eos=stops,
        stop_reason=stop_reason,
        block_hashes=block_chain([*prompt, *tokens], limits.block_tokens, salt),
    )


def _first_stop(
    tokens: Sequence[str],
    pieces: Sequence[str],
    sampling: _Sampling,
    vocabulary: Vocabulary,
) -> tuple[int, list[str], str | int] | None:
    """Return (tokens kept, their texts, reason) if a stop string or token ends the answer."""
    if not sampling.stop and not sampling.stop_ids:
        return None
    text = ""
    for position, (token, piece) in enumerate(zip(tokens, pieces, strict=True)):
        before = len(text)
        text += piece
        if position + 1 < sampling.least:
            continue
        if sampling.stop_ids:
            (one,) = vocabulary.ids([token])
            if one in sampling.stop_ids:
                return position + 1, [*pieces[:position], ""], one
        for stop in sampling.stop:
            at = text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                keep = at + len(stop) if sampling.keep_stop else at
                return position + 1, _cut(pieces[: position + 1], keep), stop
    return None


def _cut(pieces: Sequence[str], length: int) -> list[str]:
    """Return the pieces of a text with what lies behind ``length`` characters taken out."""
    kept = []
    for piece in pieces:
        kept.append(piece[: max(length, 0)])
        length -= len(piece)
    return kept


# Reading of fields


def _prompts(raw: Mapping[str, Any], vocabulary: Vocabulary, *, chat: bool) -> list[list[str]]:
    if chat:
        messages = raw.get("messages")
        if messages is None:
            raise invalid("Field required: messages")
        if not isinstance(messages, list) or not messages:
            raise invalid("Input should be a valid, non-empty list: messages")
        for one in messages:
            if not isinstance(one, dict) or not isinstance(one.get("role"), str):
                raise invalid("Field required: messages[].role")
        return [chat_tokens(messages, raw.get("tools"))]
    prompt = raw.get("prompt")
    if prompt is None:
        raise invalid("Field required: prompt")
    several = isinstance(prompt, list) and bool(prompt) and not _is_ids(prompt)
    return [_one_prompt(one, vocabulary) for one in (prompt if several else [prompt])]


def _one_prompt(prompt: Any, vocabulary: Vocabulary) -> list[str]:
    if isinstance(prompt, str):
        # A model that is fed nothing still begins with a token of its own.
        return prompt_tokens(prompt) or ["<|start|>"]
    if not _is_ids(prompt):
        raise invalid("Input should be a text, a list of token ids, or a list of one of them")
    if not prompt:
        raise ApiError(400, "The decoder prompt cannot be empty", param="prompt")
    for one in prompt:
        if not 0 <= one < 2**31:
            raise ApiError(400, f"Token id {one:.10g} is out of vocabulary", param="prompt")
    return vocabulary.words(prompt)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) for one in value
    )


def _cache_salt(raw: Mapping[str, Any]) -> str:
    salt = raw.get("cache_salt")
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 0 < len(salt) <= 128 or any(one in salt for one in "@/\\"):
        raise invalid(
            "Parameter 'cache_salt' must be a non-empty string of at most 128 characters without "
            "'@', '/' and '\\' if provided."
        )
    return salt


def _check_sampling(raw: Mapping[str, Any], *, chat: bool) -> None:
    """Check the fields that change nothing here, but that vLLM would refuse when wrong."""
    for name, least, most in (
        ("temperature", 0.0, math.inf),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ):
        value = raw.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise invalid(f"Input should be a valid number: {name}")
        if not least <= value <= most or (name == "top_p" and value == 0):
            raise ApiError(400, f"{name} is out of its range, got {value!r:.40}.", param=name)
    _integer(raw, "seed")
    tools = raw.get("tools")
    if chat and tools is not None:
        if not isinstance(tools, list) or not all(
            isinstance(one, dict) and isinstance(one.get("function"), dict) for one in tools
        ):
            raise invalid("Input should be a list of {type, function}: tools")
        choice = raw.get("tool_choice")
        if isinstance(choice, dict):
            named = choice.get("function")
            wanted = named.get("name") if isinstance(named, dict) else None
            if wanted not in [one["function"].get("name") for one in tools]:
                raise invalid("The tool specified in `tool_choice` does not match any of `tools`")
        elif choice not in (None, "none", "auto", "required"):
            raise invalid("Invalid value for `tool_choice`")
    answer = raw.get("response_format")
    if answer is not None and (not isinstance(answer, dict) or answer.get("type") not in _FORMATS):
        raise invalid(f"Input should have a type of {', '.join(_FORMATS)}: response_format")


def _read_sampling(raw: Mapping[str, Any], *, chat: bool) -> _Sampling:
    asked = _count(raw, "max_completion_tokens", least=1) if chat else None
    if asked is None:
        asked = _count(raw, "max_tokens", least=1)
    if asked is None and not chat:
        asked = _DEFAULT_COMPLETION_TOKENS
    least = _count(raw, "min_tokens") or 0
    if asked is not None and least > asked:
        raise ApiError(
            400,
            f"min_tokens must be less than or equal to max_tokens={asked}, got {least}.",
            param="min_tokens",
        )
    stop = raw.get("stop")
    stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
        raise invalid("Input should be a text or a list of texts: stop")
    if not all(stop):
        raise ApiError(400, "stop cannot contain an empty string.", param="stop")
    ids = raw.get("stop_token_ids")
    ids = [] if ids is None else ids
    if not _is_ids(ids):
        raise invalid("Input should be a list of integers: stop_token_ids")
    extra = raw.get("vllm_xargs")
    extra = {} if extra is None else extra
    if not isinstance(extra, dict):
        raise invalid("Input should be a valid dictionary: vllm_xargs")
    beginning = extra.get("mock_reply", "")
    length = extra.get("mock_output_tokens")
    if length is not None:
        if (
            isinstance(length, bool)
            or not isinstance(length, (int, float))
            or not 1 <= length <= 2**31
        ):
            raise invalid("vllm_xargs.mock_output_tokens should be a number >= 1")
        length = int(length)
    return _Sampling(
        asked=asked,
        least=least,
        ignore_eos=_flag(raw, "ignore_eos"),
        stop=tuple(stop),
        keep_stop=_flag(raw, "include_stop_str_in_output"),
        stop_ids=frozenset(ids),
        length=length,
        beginning=tuple(beginning.split()) if isinstance(beginning, str) else (),
        calls=_tool_calls(extra.get("mock_tool_calls")) if chat else (),
    )


def _tool_calls(value: Any) -> tuple[ToolCall, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [None]
    if isinstance(value, dict):
        value = [value]
    elif value is None:
        value = []
    calls = []
    for one in value if isinstance(value, list) else [None]:
        raw = one if isinstance(one, dict) else {}
        name = raw.get("name")
        if not isinstance(name, str) or len(name.split()) != 1:
            raise invalid("vllm_xargs.mock_tool_calls should be a list of {name, arguments}")
        arguments = raw.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(ToolCall(name=name, arguments=text))
    return tuple(calls)


def _logprobs(raw: Mapping[str, Any], *, chat: bool) -> int | None:
    if not chat:
        count = _count(raw, "logprobs")
    else:
        count = _count(raw, "top_logprobs")
        if not _flag(raw, "logprobs"):
            if count:
                raise ApiError(
                    400,
                    "when using `top_logprobs`, `logprobs` must be set to true.",
                    param="top_logprobs",
                )
            return None
        count = count or 0
    if count is not None and count > _MOST_LOGPROBS:
        raise ApiError(
            400,
            f"Requested sample logprobs of {count}, which is greater than max allowed: "
            f"{_MOST_LOGPROBS}",
            param="logprobs",
        )
    return count


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"Input should be a valid boolean: {name}")
    return bool(value)


def _integer(raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63
    ):
        raise invalid(f"Input should be a valid integer: {name}")
    return value


def _count(raw: Mapping[str, Any], name: str, least: int = 0) -> int | None:
    value = _integer(raw, name)
    if value is not None and value < least:
        raise ApiError(400, f"{name} must be at least {least}, got {value}.", param=name)
    return value
