"""Who is calling: run, node, site and session of a request, from headers, body or content.

The first hit wins, in the order of the tables below. Our own headers name the run directly; the
headers and body fields of other routers and agent programs name a session, which then stands for
the run; a client that sends nothing is recognised by the beginning of its conversation.

================================  ================================================================
header                            meaning
================================  ================================================================
``x-almanac-run-id``              the run
``x-almanac-workflow``            content hash (or registered name) of the workflow
``x-almanac-node``                node of the graph (``outer|inner`` in sub-graphs)
``x-almanac-site``                call site; ``<node>#0`` if absent
``x-almanac-step``                super-step of the run
``x-almanac-visit``               earlier entries of the run into the node
``x-almanac-attempt``             the client's own retries of this call
``x-almanac-session-id`` ...      the session, see `SESSION_HEADERS`
``x-dynamo-session-final: true``  the run ends with this call
================================  ================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.fingerprint import Prompt

__all__ = ["SESSION_HEADERS", "Identity", "identify"]

SESSION_HEADERS = (
    "x-almanac-session-id",
    "x-session-id",
    "x-dynamo-session-id",
    "x-smg-routing-key",
    "x-litellm-session-id",
    "x-claude-code-session-id",
    "session-id",
    "x-session-affinity",
)
_SESSION_FIELDS = ("prompt_cache_key", "previous_response_id", "user")
_LONGEST = 200
"""Characters of an identity that are kept; a longer one is cut."""
_LARGEST = 1_000_000
"""Largest counter that is believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Identity of one call.

    Parameters
    ----------
    run_id
        Never empty.
    workflow
        Hash or name as the client gave it, or an empty string.
    source
        Where the run id came from: ``run`` (our header), ``session``, ``program`` or ``content``.
    final
        Whether the client says that the run ends with this call.
    """

    run_id: str
    workflow: str = ""
    node: str = ""
    site: str = ""
    step: int = 0
    visit: int = 0
    attempt: int = 0
    session_id: str | None = None
    source: str = "content"
    final: bool = False


def identify(headers: Mapping[str, str], payload: Mapping[str, Any], prompt: Prompt) -> Identity:
    """Return the identity of a request.

    Parameters
    ----------
    headers
        With case-insensitive look-up.
    payload
        Parsed body.
    prompt
        Its fingerprint, for clients that send nothing.
    """
    session = _first(headers, SESSION_HEADERS) or _session_in(payload)
    run = _clip(headers.get("x-almanac-run-id"))
    source = "run"
    if not run:
        run, source = _program_in(payload), "program"
    if not run and session:
        run, source = session, "session"
    if not run:
        run, source = f"content-{prompt.head & 0xFFFFFFFFFFFFFFFF:016x}", "content"
    node = _clip(headers.get("x-almanac-node"))
    return Identity(
        run_id=run,
        workflow=_clip(headers.get("x-almanac-workflow")),
        node=node,
        site=_clip(headers.get("x-almanac-site")) or (f"{node}#0" if node else ""),
        step=_counter(headers, "x-almanac-step"),
        visit=_counter(headers, "x-almanac-visit"),
        attempt=_counter(headers, "x-almanac-attempt"),
        session_id=session or None,
        source=source,
        final=headers.get("x-dynamo-session-final", "").lower() == "true",
    )


def _clip(value: Any) -> str:
    return value[:_LONGEST] if isinstance(value, str) else ""


def _first(headers: Mapping[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        value = headers.get(name)
        if value:
            return value[:_LONGEST]
    return ""


def _session_in(payload: Mapping[str, Any]) -> str:
    parameters = payload.get("session_params")
    if isinstance(parameters, dict) and (found := _clip(parameters.get("session_id"))):
        return found
    for name in _SESSION_FIELDS:
        if found := _clip(payload.get(name)):
            return found
    return ""


def _program_in(payload: Mapping[str, Any]) -> str:
    extra = payload.get("vllm_xargs")
    context = extra.get("agentic_context") if isinstance(extra, dict) else None
    return _clip(context.get("program_id")) if isinstance(context, dict) else ""


def _counter(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "")
    return min(int(text), _LARGEST) if text.isascii() and text.isdigit() and len(text) < 19 else 0
