"""What the parts of `almanac bench-planner` share: figures, their bars, and how to measure them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from planner.domain.files import read_jsonl

__all__ = ["Bar", "at_most", "check", "note", "published_rows", "timed"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A measured value and the bar it is held against; None where there is no bar."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    holds: bool | None = None


def at_most(name: str, value: float, unit: str, bar: float) -> Bar:
    """Return a figure that its bar must not be below."""
    return Bar(name=name, value=value, unit=unit, bar=bar, holds=value <= bar)


def timed(action: Callable[P, T], *args: P.args, **options: P.kwargs) -> tuple[T, float]:
    """Return what an action returns, and how long it took in seconds."""
    begin = time.perf_counter()
    result = action(*args, **options)
    return result, time.perf_counter() - begin


def published_rows(path: Path) -> list[Mapping[str, Any]]:
    """Return the instances of a published file."""
    return [row for _, row in read_jsonl(path, what="instance file")]


def check(violations: Sequence[object], what: str) -> None:
    """Stop at the first thing an independent check objects to: then no figure counts."""
    if violations:
        raise AssertionError(f"{what}: {violations[0]}")


def note(line: str) -> None:
    """Say how far it is, beside the figures."""
    print(f"bench-planner: {line}", file=sys.stderr, flush=True)
