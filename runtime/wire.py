"""The OpenAI wire format, as far as both the gateway and the mock endpoint need it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DONE",
    "ApiError",
    "SseTap",
    "Usage",
    "error_body",
    "plain_text",
    "read_usage",
    "sse",
    "with_fields",
]

DONE = b"data: [DONE]\n\n"

_ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowed",
    413: "RequestEntityTooLarge",
    409: "ConflictError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "RequestHeaderFieldsTooLarge",
    500: "InternalServerError",
    502: "BadGateway",
    503: "Service Unavailable",
}


class ApiError(Exception):
    """An answer with an error status.

    Parameters
    ----------
    status
        HTTP status.
    message
        For the client; never holds prompt text.
    kind
        The ``type`` field; by status if None.
    param
        The request field at fault, or None.
    retry_after_s
        Seconds for a ``Retry-After`` header, or None.
    reason
        Why a call was refused, in a word, for metrics and a header; or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or _ERROR_TYPES.get(status, "Error")
        self.param = param
        self.retry_after_s = retry_after_s
        self.reason = reason

    @property
    def body(self) -> bytes:
        """The JSON error body."""
        return error_body(self.status, self.message, self.kind, self.param)

    @property
    def headers(self) -> dict[str, str]:
        """Those of the answer, its content type left out."""
        found: dict[str, str] = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.reason is not None:
            found["x-almanac-reason"] = self.reason
        return found


def error_body(status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """Return the OpenAI error body, as vLLM writes it."""
    return json.dumps(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}
    ).encode()


def plain_text(value: str | None, most: int = 200) -> str:
    """Return a header's value if it can be sent back as it is, cut to a length; else nothing."""
    return value[:most] if value and value.isascii() and value.isprintable() else ""


def sse(payload: Mapping[str, Any] | bytes) -> bytes:
    """Return one server-sent event; bytes are JSON already."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return b"data: " + data + b"\n\n"


def with_fields(body: bytes, payload: Mapping[str, Any], fields: Mapping[str, Any]) -> bytes:
    """Return a JSON object's bytes with fields set.

    Parameters
    ----------
    body, payload
        The object as received and as parsed.
    fields
        New values; existing fields of these names are replaced.

    Notes
    -----
    Where no field exists yet they are spliced in at the end, so that a long prompt is neither
    parsed nor written again.
    """
    if not fields:
        return body
    end = body.rstrip()
    if payload and end.endswith(b"}") and not any(name in payload for name in fields):
        return end[:-1] + b"," + json.dumps(fields).encode()[1:]
    return json.dumps({**payload, **fields}).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of an answer, and its id; None where the engine did not say."""

    prompt_tokens: int | None
    output_tokens: int
    cached_tokens: int | None = None
    response_id: str | None = None


def read_usage(payload: Any) -> Usage | None:
    """Return the usage of a parsed answer or chunk (chat, completions, responses), or None."""
    if not isinstance(payload, dict):
        return None
    raw = payload.get("usage")
    if raw is None and isinstance(payload.get("response"), dict):
        raw = payload["response"].get("usage")
    if not isinstance(raw, dict):
        return None
    details = raw.get("prompt_tokens_details") or raw.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(
        prompt_tokens=_count(raw.get("prompt_tokens", raw.get("input_tokens"))),
        output_tokens=_count(raw.get("completion_tokens", raw.get("output_tokens"))) or 0,
        cached_tokens=_count(cached),
        response_id=_response_id(payload),
    )


def _response_id(payload: Mapping[str, Any]) -> str | None:
    """Return the id by which a later request may continue the answer, if it is such an answer."""
    answer = payload.get("response", payload)
    found = answer.get("id") if isinstance(answer, dict) else None
    return found if isinstance(found, str) and found.startswith("resp_") else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


_BOUNDARY = re.compile(rb"\r?\n\r?\n")


class SseTap:
    """Watches a stream of server-sent events on its way to the client.

    Whole events are passed on as they complete. The tap learns the usage, whether the stream
    ended properly and whether it carried an error.

    Parameters
    ----------
    strip_usage
        Drop the chunk that holds nothing but usage: the gateway asked for it, the client did not.

    Attributes
    ----------
    usage
        The last usage seen, or None.
    chunks
        Data events passed on.
    done, failed
        Whether ``[DONE]``, or an error event, was seen.
    """

    __slots__ = ("_rest", "_strip_usage", "chunks", "done", "failed", "usage")

    def __init__(self, *, strip_usage: bool = False) -> None:
        self._rest = b""
        self._strip_usage = strip_usage
        self.usage: Usage | None = None
        self.chunks = 0
        self.done = False
        self.failed = False

    def feed(self, data: bytes) -> bytes:
        """Return what may be passed on now."""
        if self._rest:
            data = self._rest + data
        out: list[bytes] = []
        start = 0
        for boundary in _BOUNDARY.finditer(data):
            event = data[start : boundary.end()]
            start = boundary.end()
            if self._passes(event):
                out.append(event)
        self._rest = data[start:]
        return b"".join(out)

    def rest(self) -> bytes:
        """Return the incomplete event left when the stream ended."""
        rest, self._rest = self._rest, b""
        return rest

    def _passes(self, event: bytes) -> bool:
        if event.startswith(b"data: [DONE]"):
            self.done = True
            return True
        if event.startswith(b":"):
            # A comment keeps the connection alive; before the first event it says nothing.
            return self.chunks > 0
        self.chunks += 1
        if b'"usage"' in event or b'"error"' in event:
            payload = _data(event)
            if isinstance(payload, dict):
                if payload.get("error"):
                    self.failed = True
                usage = read_usage(payload)
                if usage is not None:
                    self.usage = usage
                    if self._strip_usage and payload.get("choices") == []:
                        return False
        return True


def _data(event: bytes) -> Any:
    for line in event.splitlines():
        if line.startswith(b"data:"):
            try:
                return json.loads(line[5:])
            except ValueError:
                return None
    return None
