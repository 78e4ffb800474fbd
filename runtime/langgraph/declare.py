"""Optional declarations on node, tool and router functions.

A decorator only sets an attribute and returns the function it was given: nothing is wrapped, so
signatures, coroutines and LangGraph's own inspection stay as they were. What is declared refines
the workflow graph; without any declaration everything still works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = [
    "CallDeclaration",
    "ToolDeclaration",
    "branch",
    "declare_calls",
    "declared_calls",
    "declared_outcomes",
    "declared_tool",
    "llm_call",
    "positive_s",
    "tool_call",
]

_CALLS = "__almanac_llm_calls__"
_TOOL = "__almanac_tool__"
_OUTCOMES = "__almanac_outcomes__"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDeclaration:
    """What is declared about one call site; None means not declared."""

    expected_output_tokens: float | None = None
    static_prefix: str | None = None
    static_prefix_tokens: int | None = None
    model: str | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    deadline_s: float | None = None
    priority: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDeclaration:
    """What is declared about a tool."""

    expected_latency_s: float | None = None


def llm_call(
    *,
    expected_output_tokens: float | None = None,
    static_prefix: str | None = None,
    static_prefix_tokens: int | None = None,
    model: str | None = None,
    reads: Iterable[str] = (),
    writes: Iterable[str] = (),
    deadline_s: float | None = None,
    priority: str | int | None = None,
) -> Callable[[F], F]:
    """Declare one call to a language model inside a node function.

    Stack it once per call site; the topmost is the first call.

    Parameters
    ----------
    expected_output_tokens
        Typical answer length, tokens, >= 0.
    static_prefix
        The prompt text that is the same in every run (a system prompt). Only its hash leaves the
        process.
    static_prefix_tokens
        Its length, if known.
    model
        Model the call needs; None for whatever the request names.
    reads, writes
        State keys the prompt uses and the answer fills.
    deadline_s
        Hard limit of this call, seconds after it is made, > 0; the run's own counts too.
    priority
        Of this call in place of the run's, see `runtime.langgraph.settings.run`.

    Raises
    ------
    ValueError
        If a number is out of range or not finite.
    """
    declaration = CallDeclaration(
        expected_output_tokens=_not_negative(expected_output_tokens, "expected_output_tokens"),
        static_prefix=static_prefix,
        static_prefix_tokens=static_prefix_tokens,
        model=model,
        reads=tuple(reads),
        writes=tuple(writes),
        deadline_s=positive_s(deadline_s, "deadline_s"),
        priority=priority,
    )
    _not_negative(static_prefix_tokens, "static_prefix_tokens")

    def declare(function: F) -> F:
        # Decorators apply from the bottom up; calls are counted from the top.
        return declare_calls(function, (declaration, *declared_calls(function)))

    return declare


def tool_call(*, expected_latency_s: float | None = None) -> Callable[[F], F]:
    """Declare that a function is a tool: a delay without a language model.

    Parameters
    ----------
    expected_latency_s
        Typical duration, seconds, >= 0.

    Raises
    ------
    ValueError
        If the number is negative or not finite.
    """
    declaration = ToolDeclaration(
        expected_latency_s=_not_negative(expected_latency_s, "expected_latency_s")
    )

    def declare(function: F) -> F:
        setattr(function, _TOOL, declaration)
        return function

    return declare


def branch(*, outcomes: Iterable[str | Collection[str]]) -> Callable[[F], F]:
    """Declare what a router function may return.

    Parameters
    ----------
    outcomes
        One entry per possible answer: a label, or the set of labels taken together. Labels are
        those of ``path_map``, or node names if there is none.

    Raises
    ------
    ValueError
        If there is no outcome, or an outcome is empty.
    """
    declared = tuple(
        (entry,) if isinstance(entry, str) else tuple(sorted(map(str, entry))) for entry in outcomes
    )
    if not declared or not all(declared):
        raise ValueError(
            f"branch(outcomes={declared!r}): give at least one outcome, each with a label"
        )

    def declare(function: F) -> F:
        setattr(function, _OUTCOMES, declared)
        return function

    return declare


def declare_calls(function: F, calls: Iterable[CallDeclaration]) -> F:
    """Set the call sites of a function, in order of execution, and return it."""
    setattr(function, _CALLS, tuple(calls))
    return function


def declared_calls(function: Any) -> tuple[CallDeclaration, ...]:
    """Return the call sites declared on a function, in order of execution."""
    return tuple(getattr(function, _CALLS, ()))


def declared_tool(function: Any) -> ToolDeclaration | None:
    """Return what `tool_call` declared on a function, or None."""
    found = getattr(function, _TOOL, None)
    return found if isinstance(found, ToolDeclaration) else None


def declared_outcomes(function: Any) -> tuple[tuple[str, ...], ...]:
    """Return the outcomes declared on a router function; empty if none are."""
    return tuple(getattr(function, _OUTCOMES, ()))


def positive_s(value: float | None, name: str) -> float | None:
    """Return a limit in seconds as it is.

    Raises
    ------
    ValueError
        If it is neither None nor a number > 0.
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: use seconds > 0")
    return value


def _not_negative(value: float | None, name: str) -> float | None:
    if value is None:
        return None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: use a number >= 0")
    return float(value)
