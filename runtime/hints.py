"""What a client says of its call's urgency and length, in the words of several routers.

==============================================  =========================================
hint                                            source
==============================================  =========================================
``x-almanac-priority``, ``-deadline-s``,        ``almanac``
``-output-tokens``
``vllm_xargs.agentic_context``                  ``agentic_context``
``{priority, deadline_seconds,``
``expected_output_length}``
``nvext.agent_hints``                           ``nvext``
``{priority, strict_priority, osl}``
``x-llm-d-slo-ttft-ms``, ``-tpot-ms``           ``llm-d`` (``x-slo-ttft-ms`` ... as well)
``x-smg-priority``                              ``smg``
==============================================  =========================================

**Higher priority = more urgent, everywhere.** The engine's own ``priority`` field is the opposite
(vLLM serves smaller ones first); `head_start_s` is what turns one into the other.

A hint that cannot be read never fails a request: it is ignored, and its name is returned so that
it can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "HINT_SOURCES",
    "NO_HINTS",
    "Hints",
    "deadline_s",
    "head_start_s",
    "read_hints",
    "stepping_back",
]

HINT_SOURCES = ("almanac", "agentic_context", "nvext", "llm-d", "smg")
"""In order of precedence: the first that gives a value wins, value by value."""

_LEVELS = {
    "critical": 3,
    "high": 1,
    "interactive": 1,
    "normal": 0,
    "default": 0,
    "standard": 0,
    "low": -1,
    "batch": -2,
}
"""Priority classes by word; ours and SMG's."""
_MOST_PRIORITY = 1000.0
_MOST_S = 7 * 86400.0
_MOST_TOKENS = 10_000_000.0

CLASS_S = 60.0
"""Seconds of waiting that make up for one priority class, so that no class starves."""
USUAL_DEADLINE_S = 300.0
"""A deadline nearer than this moves a call forward by the difference."""
STRICT_S = 1e6
"""Head start of a strict tier: more than any wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What one request says of itself; None where it says nothing.

    Parameters
    ----------
    priority
        Higher = more urgent; 0 is usual.
    strict_priority
        Tier that waiting does not make up for; higher first.
    deadline_s
        Seconds from now by which the client wants the whole answer, > 0.
    run_deadline_s
        The same for the whole run, counted from its arrival.
    ttft_s, tpot_s
        Wanted seconds to the first token, and per further token.
    output_tokens
        Expected length of the answer, >= 1.
    ignored
        Names of hints that could not be read.
    """

    priority: int | None = None
    strict_priority: int | None = None
    deadline_s: float | None = None
    run_deadline_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens: int | None = None
    ignored: tuple[str, ...] = ()


NO_HINTS = Hints()


def stepping_back(hints: Hints) -> Hints:
    """Return hints without what makes a call more urgent than usual by its client's word alone."""
    if (hints.priority or 0) <= 0 and (hints.strict_priority or 0) <= 0:
        return hints
    return replace(
        hints,
        priority=min(hints.priority or 0, 0),
        strict_priority=min(hints.strict_priority or 0, 0),
    )


def head_start_s(hints: Hints, *, age_s: float = 0.0) -> float:
    """Return by how much earlier a call counts as arrived, engine order included; may be < 0.

    ``60 s x priority + max(0, 300 s - seconds left to the deadline)``, and a strict tier on top:
    a class is worth a minute of waiting, and among equals the earlier deadline comes first.

    Parameters
    ----------
    age_s
        Seconds since the arrival of the run.
    """
    start_s = CLASS_S * (hints.priority or 0) + STRICT_S * (hints.strict_priority or 0)
    left_s = deadline_s(hints, age_s=age_s)
    if left_s is None and hints.ttft_s is not None:
        left_s = age_s + hints.ttft_s
    if left_s is not None:
        start_s += max(0.0, USUAL_DEADLINE_S - (left_s - age_s))
    return start_s


def deadline_s(hints: Hints, *, age_s: float = 0.0) -> float | None:
    """Return when the answer is due, seconds after the arrival of the run; None if nobody said."""
    due = [one for one in (hints.run_deadline_s,) if one is not None]
    if hints.deadline_s is not None:
        due.append(age_s + hints.deadline_s)
    return min(due, default=None)


def read_hints(
    headers: Mapping[str, str],
    payload: Mapping[str, Any],
    sources: Sequence[str] = HINT_SOURCES,
) -> Hints:
    """Return the hints of a request.

    Parameters
    ----------
    headers
        By name in lower case.
    payload
        Parsed body.
    sources
        Whose hints count, first hit wins.
    """
    if not (
        any(field in payload for field in _FIELDS) or any(name in headers for name in _HEADERS)
    ):
        return NO_HINTS  # most requests say nothing, and need not be asked source by source
    given: dict[str, tuple[str, Any]] = {}
    for source in sources:
        for field, name, value in _READERS[source](headers, payload):
            if value is not None and field not in given:
                given[field] = (name, value)
    if not given:
        return NO_HINTS
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for field, (name, raw) in given.items():
        value = _VALUES[field](raw)
        if value is None:
            ignored.append(name)
        else:
            values[field] = value
    return Hints(**values, ignored=tuple(ignored))


_Found = list[tuple[str, str, Any]]


def _almanac(headers: Mapping[str, str], _payload: Mapping[str, Any]) -> _Found:
    return [
        ("priority", "x-almanac-priority", headers.get("x-almanac-priority")),
        ("run_deadline_s", "x-almanac-deadline-s", headers.get("x-almanac-deadline-s")),
        ("output_tokens", "x-almanac-output-tokens", headers.get("x-almanac-output-tokens")),
    ]


def _agentic(_headers: Mapping[str, str], payload: Mapping[str, Any]) -> _Found:
    context = _inside(payload, "vllm_xargs", "agentic_context")
    return [
        (field, f"agentic_context.{name}", context.get(name))
        for field, name in (
            ("priority", "priority"),
            ("deadline_s", "deadline_seconds"),
            ("output_tokens", "expected_output_length"),
        )
    ]


def _nvext(_headers: Mapping[str, str], payload: Mapping[str, Any]) -> _Found:
    hints = _inside(payload, "nvext", "agent_hints")
    return [
        (field, f"agent_hints.{name}", hints.get(name))
        for field, name in (
            ("priority", "priority"),
            ("strict_priority", "strict_priority"),
            ("output_tokens", "osl"),
        )
    ]


def _llm_d(headers: Mapping[str, str], _payload: Mapping[str, Any]) -> _Found:
    found: _Found = []
    for field, short in (("ttft_s", "ttft"), ("tpot_s", "tpot")):
        for name in (f"x-llm-d-slo-{short}-ms", f"x-slo-{short}-ms"):
            value = headers.get(name)
            if value is not None:
                milliseconds = _number(value)
                found.append((field, name, value if milliseconds is None else milliseconds / 1e3))
                break
    return found


def _smg(headers: Mapping[str, str], _payload: Mapping[str, Any]) -> _Found:
    return [("priority", "x-smg-priority", headers.get("x-smg-priority"))]


_READERS = {
    "almanac": _almanac,
    "agentic_context": _agentic,
    "nvext": _nvext,
    "llm-d": _llm_d,
    "smg": _smg,
}


def _inside(payload: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    value: Any = payload
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _priority(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().lower() in _LEVELS:
        return _LEVELS[value.strip().lower()]
    number = _number(value)
    return None if number is None or abs(number) > _MOST_PRIORITY else round(number)


def _seconds(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 < number <= _MOST_S else None


def _tokens(value: Any) -> int | None:
    number = _number(value)
    return round(number) if number is not None and 1 <= number <= _MOST_TOKENS else None


_FIELDS = ("vllm_xargs", "nvext")
_HEADERS = (
    "x-almanac-priority", "x-almanac-deadline-s", "x-almanac-output-tokens",
    "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms",
    "x-smg-priority",
)  # fmt: skip
"""Where hints may be."""
_VALUES = {
    "priority": _priority,
    "strict_priority": _priority,
    "deadline_s": _seconds,
    "run_deadline_s": _seconds,
    "ttft_s": _seconds,
    "tpot_s": _seconds,
    "output_tokens": _tokens,
}
