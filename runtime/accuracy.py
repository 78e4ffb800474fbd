"""How good the forecasts of calls were: what was said at dispatch against what came."""

from __future__ import annotations

from typing import Any

from planner.dispatch.learning import Kept
from planner.domain.calibration import QuantileTracker
from planner.domain.trace import CallRecord

__all__ = ["Accuracy"]


class Accuracy:
    """Forecast against actual service of the calls that ended well, in engine seconds."""

    __slots__ = ("_absolute_s", "_actual_s", "_calls", "_kept", "_signed_s")

    def __init__(self) -> None:
        self._kept = [Kept(QuantileTracker(level=level)) for level in (0.5, 0.9)]
        self._calls = 0
        self._signed_s = self._absolute_s = self._actual_s = 0.0

    def add(self, record: CallRecord) -> None:
        """Count an attempt that ended well; one without a forecast is left out."""
        if record.predicted_finish_s is None or record.finish_s is None:
            return
        error_s = record.predicted_finish_s - record.finish_s
        self._calls += 1
        self._signed_s += error_s
        self._absolute_s += abs(error_s)
        self._actual_s += record.finish_s - record.sent_s
        for kept in self._kept:
            kept.update(
                max(0.0, record.predicted_finish_s - record.sent_s),
                record.finish_s - record.sent_s,
            )

    def to_json(self) -> dict[str, Any]:
        """Return calls, mean errors in seconds, and how often each quantile was kept."""
        calls = self._calls
        return {
            "calls": calls,
            "mean_actual_s": self._actual_s / calls if calls else None,
            "mean_error_s": self._signed_s / calls if calls else None,
            "mean_absolute_error_s": self._absolute_s / calls if calls else None,
            # How often a call was done by its forecast, and by it as corrected to that level.
            "quantiles": [kept.to_json() for kept in self._kept],
        }
