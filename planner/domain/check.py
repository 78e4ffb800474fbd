"""Small field checks shared by the readers of files; each error names the field and the value."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from planner.domain.errors import InvalidInput

__all__ = ["closed_mapping", "integer", "items", "mapping", "number", "one_of", "text"]

Kind = type[InvalidInput]


def mapping(value: Any, where: str, kind: Kind = InvalidInput) -> Mapping[str, Any]:
    """Return ``value`` if it is a mapping with text keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise kind(f"expected a mapping, got {value!r:.80}", where=where, remedy="write key: value")
    return value


def closed_mapping(
    value: Any, where: str, known: Collection[str], kind: Kind = InvalidInput
) -> Mapping[str, Any]:
    """Return ``value`` if it is a mapping that holds no key but the known ones."""
    result = mapping(value, where, kind)
    for key in result:
        if key not in known:
            raise kind(
                f"unknown field {key!r}",
                where=where,
                remedy=f"known fields: {', '.join(sorted(known))}",
            )
    return result


def items(value: Any, where: str, kind: Kind = InvalidInput) -> Sequence[Any]:
    """Return ``value`` if it is a list."""
    if not isinstance(value, (list, tuple)):
        raise kind(f"expected a list, got {value!r:.80}", where=where, remedy="write a list")
    return value


def text(value: Any, where: str, kind: Kind = InvalidInput) -> str:
    """Return ``value`` if it is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise kind(f"expected a text, got {value!r:.80}", where=where, remedy="write a name")
    return value


def one_of(value: Any, where: str, known: Collection[str], kind: Kind = InvalidInput) -> str:
    """Return ``value`` if it is one of the known words."""
    if value not in known:
        raise kind(
            f"{value!r:.80} is unknown",
            where=where,
            remedy=f"use one of {', '.join(sorted(known))}",
        )
    return str(value)


def number(
    value: Any,
    where: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    kind: Kind = InvalidInput,
) -> float:
    """Return ``value`` as a float if it is a finite number in [least, most]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not least <= value <= most
    ):
        raise kind(
            f"{value!r:.80} is not a number",
            where=where,
            remedy=f"use a number in [{least:g}, {most:g}]",
        )
    return float(value)


def integer(
    value: Any,
    where: str,
    *,
    least: int = 0,
    most: int | None = None,
    kind: Kind = InvalidInput,
) -> int:
    """Return ``value`` if it is an integer in [least, most]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        span = f">= {least}" if most is None else f"from {least} to {most}"
        raise kind(f"{value!r:.80} is not an integer {span}", where=where, remedy="correct it")
    return value
