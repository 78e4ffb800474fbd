"""Who is calling: run, node, site and session of a request, from headers, body or content.

Our own headers name the run directly; the headers and body fields of other routers and agent
programs name a session, which then stands for the run; a client that sends nothing is recognised
by the beginning of its conversation. Which headers and fields are looked at, and in what order,
is a setting; the first hit wins.

================================  ================================================================
header                            meaning
================================  ================================================================
``x-almanac-run-id`` ...          the run; also ``x-run-id`` or ``rid``, as AgentIR's SDKs send it
``x-almanac-workflow``            content hash (or registered name) of the workflow
``x-almanac-node`` ...            node of the graph (``outer|inner`` in sub-graphs); also
                                  ``x-node-name`` or ``node-name``
``x-almanac-site``                call site; ``<node>#0`` if absent
``x-almanac-step``                super-step of the run
``x-almanac-visit``               earlier entries of the run into the node
``x-almanac-attempt``             the client's own retries of this call
``x-almanac-session-id`` ...      the session, see `SESSION_HEADERS`
``x-almanac-parent-run-id`` ...   the run this one was started by, see `_PARENT_HEADERS`
``x-almanac-run-final: true``     the run ends with this call (``x-dynamo-session-final`` as well)
================================  ================================================================

vLLM's ``vllm_xargs.agentic_context`` gives ``program_id`` (the run), ``parent_program_id``,
``task_id`` (the node) and ``step_id``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from runtime.fingerprint import Prompt

__all__ = ["SESSION_FIELDS", "SESSION_HEADERS", "Identity", "identify"]

SESSION_HEADERS = (
    "x-almanac-session-id",
    "x-session-id",
    "x-dynamo-session-id",
    "x-smg-routing-key",
    "x-litellm-session-id",
    "x-claude-code-session-id",
    "session-id",  # Codex
    "session_id",
    "x-session-affinity",  # OpenCode
    "traceparent",
)
"""Of these only ``traceparent`` is not taken whole: its trace id stands for the session."""
SESSION_FIELDS = ("session_params.session_id", "prompt_cache_key", "previous_response_id", "user")
# Ours, then the two pairs that AgentIR's SDKs send.
_RUN_HEADERS = ("x-almanac-run-id", "x-run-id", "rid")
_NODE_HEADERS = ("x-almanac-node", "x-node-name", "node-name")
_AGENT_HEADERS = ("x-almanac-agent-id", "x-claude-code-agent-id")
_PARENT_HEADERS = ("x-almanac-parent-run-id", "x-parent-session-id")
_PARENT_AGENT_HEADERS = ("x-claude-code-parent-agent-id",)
_FINAL_HEADERS = ("x-almanac-run-final", "x-dynamo-session-final")
_CONTEXT = ("vllm_xargs", "agentic_context")
_LONGEST = 200
"""Characters of an identity that are kept; a longer one is cut."""
_LARGEST = 1_000_000
"""Largest counter that is believed."""
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Identity of one call.

    Parameters
    ----------
    run_id
        Never empty.
    workflow
        Hash or name as the client gave it, or an empty string.
    agent_id
        Sub-agent within the session, or an empty string.
    parent_id
        Run (or agent, ``session/agent``) that started this one, or an empty string.
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
    agent_id: str = ""
    parent_id: str = ""
    source: str = "content"
    final: bool = False


def identify(
    headers: Mapping[str, str],
    payload: Mapping[str, Any],
    prompt: Prompt,
    *,
    session_headers: Sequence[str] = SESSION_HEADERS,
    session_fields: Sequence[str] = SESSION_FIELDS,
) -> Identity:
    """Return the identity of a request.

    Parameters
    ----------
    headers
        By name in lower case.
    payload
        Parsed body.
    prompt
        Its fingerprint, for clients that send nothing.
    session_headers, session_fields
        Where a session may be named, first hit wins; dots lead inside a field.
    """
    session = _session(headers, payload, *_places(tuple(session_headers), tuple(session_fields)))
    context = _inside(payload, _CONTEXT) if _CONTEXT[0] in payload else None
    context = context if isinstance(context, dict) else {}
    agent = _first(headers, _AGENT_HEADERS)
    parent = _first(headers, _PARENT_HEADERS) or _clip(context.get("parent_program_id"))
    run, source = _first(headers, _RUN_HEADERS), "run"
    if not run:
        run, source = _clip(context.get("program_id")), "program"
    if not run and session:
        run, source = session, "session"
        if agent:
            # A sub-agent has a conversation and an end of its own within the session.
            above = _first(headers, _PARENT_AGENT_HEADERS)
            run, parent = f"{session}/{agent}", f"{session}/{above}" if above else session
    if not run:
        run, source = f"content-{prompt.head & 0xFFFFFFFFFFFFFFFF:016x}", "content"
    node = _first(headers, _NODE_HEADERS) or _clip(context.get("task_id"))
    return Identity(
        run_id=run,
        workflow=_clip(headers.get("x-almanac-workflow")),
        node=node,
        site=_clip(headers.get("x-almanac-site")) or (f"{node}#0" if node else ""),
        step=_counter(headers.get("x-almanac-step", context.get("step_id"))),
        visit=_counter(headers.get("x-almanac-visit")),
        attempt=_counter(headers.get("x-almanac-attempt")),
        session_id=session or None,
        agent_id=agent,
        parent_id=parent if parent != run else "",
        source=source,
        final=any(headers.get(name, "").lower() == "true" for name in _FINAL_HEADERS),
    )


@lru_cache(maxsize=8)
def _places(
    headers: tuple[str, ...], fields: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the names of headers in lower case, and the ways to fields, name by name."""
    return tuple(map(str.lower, headers)), tuple(tuple(field.split(".")) for field in fields)


def _session(
    headers: Mapping[str, str],
    payload: Mapping[str, Any],
    names: Sequence[str],
    fields: Sequence[Sequence[str]],
) -> str:
    """Return the session's name; empty if nothing names it."""
    for name in names:
        value = headers.get(name)
        if value and name == "traceparent":
            value = _trace_id(value)
        if value:
            return value[:_LONGEST]
    for way in fields:
        if way[0] in payload and (found := _clip(_inside(payload, way))):
            return found
    return ""


def _trace_id(value: str) -> str:
    """Return the trace id of a W3C ``traceparent``; empty if it is not valid."""
    match = _TRACE.fullmatch(value.strip().lower())
    return match[1] if match and match[1].strip("0") else ""


def _inside(payload: Mapping[str, Any], names: Sequence[str]) -> Any:
    value: Any = payload
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _clip(value: Any) -> str:
    return value[:_LONGEST] if isinstance(value, str) else ""


def _first(headers: Mapping[str, str], names: Sequence[str]) -> str:
    for name in names:
        value = headers.get(name)
        if value:
            return value[:_LONGEST]
    return ""


def _counter(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return min(max(value, 0), _LARGEST)
    text = value if isinstance(value, str) else ""
    return min(int(text), _LARGEST) if text.isascii() and text.isdigit() and len(text) < 19 else 0
