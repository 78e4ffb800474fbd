"""What a scenario changes against another, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.whatif.answer import Answer
from planner.whatif.figures import LEVEL, Figure, difference, mean_figure
from planner.whatif.question import METRICS, Metric

__all__ = ["Effect", "effect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a scenario changes against another: relative, by metric; shares as differences."""

    label: str
    against: str
    changes: Mapping[Metric, Figure]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "label": self.label,
            "against": self.against,
            "changes": {name: one.to_json() for name, one in self.changes.items()},
        }


def effect(before: Answer, after: Answer, level: float = LEVEL) -> Effect:
    """Return the paired effect of a change: both answers saw the same seeds."""
    found: dict[Metric, Figure] = {}
    for metric in METRICS:
        pairs = [
            (one, other)
            for a, b in zip(before.samples, after.samples, strict=False)
            if (one := a.value(metric)) is not None and (other := b.value(metric)) is not None
        ]
        if not pairs:
            continue
        old, new = [one for one, _ in pairs], [other for _, other in pairs]
        if metric != "attainment":
            if math.isfinite(math.fsum(old)) and math.fsum(old) > 0:
                found[metric] = difference(old, new, level)
            continue
        # A share may rise from 0: its change is a difference, laid as one of means around 1.
        shift = mean_figure([1.0 + y - x for x, y in pairs], level)
        found[metric] = Figure(
            value=shift.value - 1.0, low=max(-1.0, shift.low - 1.0), high=min(1.0, shift.high - 1.0)
        )
    return Effect(label=after.label, against=before.label, changes=found)
