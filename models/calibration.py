"""Split conformal calibration of conditional quantiles: the offset that would have been right.

The online part, which goes on correcting while it is used, is `planner.domain.calibration`.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["LEAST_SCORES", "conformal_offsets", "shifted"]

Floats = npt.NDArray[np.float64]

LEAST_SCORES = 60
"""Scores below which no offset is learned: its own error would be larger than what it mends."""


def conformal_offsets(quantiles: Floats, observed: Floats, levels: tuple[float, ...]) -> Floats:
    """Return per level what to add to ``log(1 + quantile)`` so that its coverage is right.

    Parameters
    ----------
    quantiles
        Forecasts of rows the predictor has not seen, shape (rows, levels), >= 0.
    observed
        What happened, shape (rows,), >= 0.
    levels
        The promised coverages.

    Returns
    -------
    array, shape (levels,)
        Zeros if there are fewer than `LEAST_SCORES` rows.

    Notes
    -----
    One-sided conformalised quantile regression on ``log(1 + y)``: the offset of a level is the
    score of rank ``ceil((n + 1) level)``, which covers at least the level on exchangeable rows.
    Below the median the rank is ``floor((n + 1) level)``, so that the promise errs the same way.

    References
    ----------
    Romano, Patterson, Candes (2019), conformalized quantile regression, section 4.
    """
    if len(observed) < LEAST_SCORES:
        return np.zeros(len(levels))
    scores = np.sort(np.log1p(observed)[:, None] - np.log1p(quantiles), axis=0)
    count = len(observed)
    out = np.empty(len(levels))
    for column, level in enumerate(levels):
        rank = (count + 1) * level
        whole = math.ceil(rank) if level >= 0.5 else math.floor(rank)
        out[column] = scores[min(max(whole, 1), count) - 1, column]
    return out


def shifted(quantiles: Floats, offsets: Floats) -> Floats:
    """Return quantiles with the offsets applied, sorted along a row and >= 0."""
    return np.asarray(np.sort(np.maximum(np.expm1(np.log1p(quantiles) + offsets), 0.0), axis=1))
