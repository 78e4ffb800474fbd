"""What a study is held to: claims about figures, judged by the same code for every policy.

A claim compares one policy in one setting with the best of others (maybe in another setting: other
forecasts, another tool), or looks at one figure alone, and says in which range it is expected. It
holds if the figure lies in the range; the interval is shown beside it, for the reader to weigh.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from planner.domain.errors import InvalidInput
from planner.metrics import PairedDifference
from planner.study.settings import Setting

__all__ = ["Bar", "Claim", "Side", "sides_of"]

Measured = Literal["relative", "difference", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A policy in a setting; ``policy`` as `planner.study.entries.parse_entry` reads it."""

    setting: Setting
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What is expected of a figure.

    Parameters
    ----------
    name
        Whom it is about and what is compared, for tables.
    metric
        As `planner.study.measure.CellResult.value` has it.
    of
        Whose figure.
    against
        With whom it is compared: the one with the least figure among them.
    measured
        ``relative``: share by which ``of`` is above; ``difference``: in the metric's own unit;
        ``value``: the figure of ``of`` itself, ``against`` is empty.
    low, high
        The range, both ends included.
    source
        What was published, and where.
    """

    name: str
    metric: str
    of: Side
    against: tuple[Side, ...] = ()
    measured: Measured = "relative"
    low: float = -math.inf
    high: float = math.inf
    source: str = ""

    def __post_init__(self) -> None:
        if (self.measured == "value") == bool(self.against):
            raise InvalidInput(
                f"{self.measured} with {len(self.against)} to compare with", where=self.name,
                remedy="compare with someone, or look at the value alone",
            )  # fmt: skip
        if not self.low <= self.high:
            raise InvalidInput(f"{self.low} to {self.high}", where=self.name, remedy="give a range")

    @property
    def sides(self) -> tuple[Side, ...]:
        """All policies and settings it needs."""
        return (self.of, *self.against)

    def judged(self, found: PairedDifference, rival: str = "") -> Bar:
        """Return the bar for a figure with its interval."""
        unit = "%" if self.measured == "relative" else ""
        scale = 100.0 if unit else 1.0
        return Bar(
            name=f"{self.name} ({self.metric}{f' against {rival}' if rival else ''})",
            value=found.mean * scale,
            unit=unit,
            low=self.low * scale,
            high=self.high * scale,
            interval=(found.low * scale, found.high * scale),
            source=self.source,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A figure, where it should lie, and whether it does.

    Parameters
    ----------
    low, high
        The range, in the unit; infinite where it is open.
    interval
        95 % interval of the figure, or None.
    """

    name: str
    value: float
    unit: str
    low: float = -math.inf
    high: float = math.inf
    interval: tuple[float, float] | None = None
    source: str = ""

    @property
    def holds(self) -> bool:
        """Whether the figure lies in the range."""
        return self.low <= self.value <= self.high

    @property
    def range_text(self) -> str:
        """The range in words."""
        if math.isinf(self.low):
            return f"<= {self.high:g}"
        return f">= {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"

    def to_json(self) -> dict[str, Any]:
        """Return name, value, unit, bar and holds, as benchmarks print them, and the rest.

        ``bar`` is a number where the range has one end, else both ends.
        """
        ends = [end for end in (self.low, self.high) if math.isfinite(end)]
        shown = None
        if self.interval is not None and all(math.isfinite(end) for end in self.interval):
            shown = [round(end, 3) for end in self.interval]
        return {
            "name": self.name,
            "value": round(self.value, 3),
            "unit": self.unit,
            "bar": ends[0] if len(ends) == 1 else ends,
            "holds": self.holds,
            "range": self.range_text,
            "interval": shown,
            "source": self.source,
        }


def sides_of(claims: Iterable[Claim]) -> tuple[Side, ...]:
    """Return what claims need, each once, in order."""
    return tuple(dict.fromkeys(side for claim in claims for side in claim.sides))
