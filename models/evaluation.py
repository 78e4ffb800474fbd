"""Measures of predictors, each next to the same measure of a constant baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["coverage", "log_loss", "median_relative_error", "pinball_loss", "r2_log"]

Floats = npt.NDArray[np.floating[Any]]


def pinball_loss(observed: Floats, predicted: Floats, level: float) -> float:
    """Return the mean pinball loss of quantile predictions, in the unit of the observations.

    ``max(level (y - q), (level - 1) (y - q))``: the loss whose minimiser is the quantile.
    """
    miss = observed - predicted
    return float(np.mean(np.maximum(level * miss, (level - 1) * miss)))


def coverage(observed: Floats, predicted: Floats) -> float:
    """Return the share of observations at or below their predicted quantile."""
    return float(np.mean(observed <= predicted))


def r2_log(observed: Floats, log_mean: Floats, baseline_log_mean: float) -> float:
    """Return 1 - SSE / SSE of a constant, on ``log(1 + y)``.

    The constant is the training mean, so that a predictor that only repeats it scores 0.
    """
    log_y = np.log1p(observed)
    total = float(np.sum((log_y - baseline_log_mean) ** 2))
    return 1.0 - float(np.sum((log_y - log_mean) ** 2)) / total if total > 0 else 0.0


def log_loss(probabilities: Floats) -> float:
    """Return the mean of -log p of what happened, in nats; p is floored at 1e-9."""
    return float(-np.mean(np.log(np.maximum(probabilities, 1e-9))))


def median_relative_error(observed: Floats, predicted: Floats) -> float:
    """Return the median of ``|predicted - observed| / observed``; observations must be > 0."""
    return float(np.median(np.abs(predicted - observed) / observed))
