"""Quantiles that keep their promise: offsets learned from past errors, corrected as errors come.

Works on ``log(1 + y)``, so that one offset serves short and long answers alike. No numpy, no
estimator: the runtime corrects with it, the predictors are judged with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["QuantileTracker", "adapted"]

RATE = 0.1
"""Step of a correction in mean absolute log errors: a tenth moves a 0.9 quantile by about 4 % at
each miss and gives it back over the nine hits that should follow."""
_MEMORY = 50.0


@dataclass(slots=True)
class QuantileTracker:
    """Online correction of one quantile: up by a step after a miss, slowly down after hits.

    Parameters
    ----------
    level
        The promised share of observations at or below the quantile, in (0, 1).
    offset
        Added to ``log(1 + quantile)``; the start, usually of a split conformal calibration.
    rate
        Size of a step in units of the mean absolute log error, > 0.

    Notes
    -----
    After observation y with ``e = log(1 + y) - log(1 + q)``:
    ``offset += rate * scale * (1[e > offset] - (1 - level))``. Whatever the sequence, the share
    of misses after T steps differs from 1 - level by at most (range of e + step) / (step T).

    References
    ----------
    Gibbs and Candes (2021), adaptive conformal inference; Angelopoulos, Candes and Tibshirani
    (2023), conformal PID control, section 2 (quantile tracking).
    """

    level: float
    offset: float = 0.0
    rate: float = RATE
    scale: float = 0.0
    seen: int = 0

    def correct(self, quantile: float) -> float:
        """Return the corrected quantile, >= 0, same unit."""
        return max(0.0, math.expm1(math.log1p(quantile) + self.offset))

    def update(self, quantile: float, observed: float) -> None:
        """Learn from an observation; ``quantile`` is the forecast before correction.

        A value that is not a finite number >= 0 is ignored.
        """
        if not (math.isfinite(observed) and observed >= 0.0):
            return
        error = math.log1p(observed) - math.log1p(quantile)
        self.seen += 1
        self.scale += (abs(error) - self.scale) / min(self.seen, _MEMORY)
        missed = 1.0 if error > self.offset else 0.0
        self.offset += self.rate * self.scale * (missed - (1.0 - self.level))


def adapted(
    quantiles: Sequence[Sequence[float]],
    observed: Sequence[float],
    levels: Sequence[float],
    offsets: Sequence[float] | None = None,
    rate: float = RATE,
) -> list[list[float]]:
    """Return the quantiles as they would have been promised, each corrected by the rows before it.

    Parameters
    ----------
    quantiles
        Forecasts per row and level, in order of time.
    observed
        What happened, per row.
    levels
        Quantile levels.
    offsets
        Starting offsets per level; none if absent.
    rate
        See `QuantileTracker`.

    Returns
    -------
    list of list of float
        Corrected quantiles, non-decreasing along a row.
    """
    starts = [0.0] * len(levels) if offsets is None else list(offsets)
    trackers = [
        QuantileTracker(level=level, offset=start, rate=rate)
        for level, start in zip(levels, starts, strict=True)
    ]
    out = []
    for row, value in zip(quantiles, observed, strict=True):
        out.append(
            sorted(
                tracker.correct(quantile) for tracker, quantile in zip(trackers, row, strict=True)
            )
        )
        for tracker, quantile in zip(trackers, row, strict=True):
            tracker.update(quantile, value)
    return out
