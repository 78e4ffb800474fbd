"""How long runs pause after a call: tools and whatever else lies before the next call.

A gap is observed when a call becomes ready: from the end of each call that made it so. It is kept
by the call site it follows, which stands for the kind of tool a step uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from planner.dispatch.events import Call
from planner.dispatch.policies.progress import RunProgress

__all__ = ["Gaps"]

_WEIGHT = 0.1
"""Of a new observation in the moving log-normal, as SAGA has it."""
_LEAST_S = 1e-3


@dataclass(slots=True)
class _Law:
    count: int = 0
    mean_s: float = 0.0
    log_mean: float = 0.0
    log_variance: float = 0.0

    def add(self, gap_s: float) -> None:
        self.count += 1
        self.mean_s += (gap_s - self.mean_s) / self.count
        value = math.log(max(gap_s, _LEAST_S))
        if self.count == 1:
            self.log_mean = value
            return
        step = value - self.log_mean
        self.log_mean += _WEIGHT * step
        self.log_variance = (1.0 - _WEIGHT) * (self.log_variance + _WEIGHT * step * step)


class Gaps:
    """Gaps by workflow and call site, learned as they pass."""

    def __init__(self) -> None:
        self._laws: dict[tuple[str, str], _Law] = {}

    def arrived(self, call: Call, run: RunProgress) -> None:
        """Learn from a call that has become ready."""
        for parent in run.parents(call):
            key = parent.call.workflow_hash, parent.call.site
            self._laws.setdefault(key, _Law()).add(max(0.0, call.ready_s - parent.finish_s))

    def mean_s(self, call: Call) -> float | None:
        """Return the mean gap after calls of this site, s, or None if none was seen."""
        law = self._laws.get((call.workflow_hash, call.site))
        return None if law is None else law.mean_s

    def quantile_s(self, call: Call, level: float) -> float | None:
        """Return a quantile of the moving log-normal, s, or None if none was seen."""
        law = self._laws.get((call.workflow_hash, call.site))
        if law is None:
            return None
        spread = NormalDist().inv_cdf(level) * math.sqrt(law.log_variance)
        return math.exp(law.log_mean + spread)
