"""A measured value beside the bar it has to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

__all__ = ["Figure", "quantile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of a report; ``bar`` and ``holds`` are None where nothing was promised."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    holds: bool | None = None

    @classmethod
    def of(cls, name: str, value: float, unit: str) -> Self:
        """Return a value that has no bar."""
        return cls(name=name, value=round(value, 4), unit=unit)

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, bar: float) -> Self:
        """Return a value that may not be above its bar."""
        return cls(name=name, value=round(value, 4), unit=unit, bar=bar, holds=value <= bar)

    @classmethod
    def at_least(cls, name: str, value: float, unit: str, bar: float) -> Self:
        """Return a value that may not be below its bar."""
        return cls(name=name, value=round(value, 4), unit=unit, bar=bar, holds=value >= bar)


def quantile(values: Sequence[float], level: float) -> float:
    """Return an order statistic: the smallest value with a share ``level`` of all up to it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(level * len(ordered)))]
