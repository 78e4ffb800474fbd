"""Figures with intervals: means over seeds, and paired differences, by Student's t.

A seed is a batch: what its runs say together is one observation, and observations of different
seeds are independent, which single runs of one seed are not (they queue behind each other).
Intervals are laid in logarithms, since latencies are positive and lean to the right.

References
----------
Law, Simulation Modeling and Analysis, chapters 9 (replications) and 10 (paired t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.domain.errors import InvalidInput

__all__ = ["Figure", "difference", "mean_figure", "share_figure", "student_t"]

LEVEL = 0.95
"""Coverage that intervals are meant to have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A value with its interval; ``low <= value <= high``, both infinite ends from one seed."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether a value lies inside the interval."""
        return self.low <= value <= self.high

    def to_json(self) -> dict[str, float | None]:
        """Return the JSON form; an unbounded end is null."""
        return {
            name: value if math.isfinite(value := getattr(self, name)) else None
            for name in ("value", "low", "high")
        }

    def text(self, digits: int = 2, scale: float = 1.0) -> str:
        """Return ``11.86 [11.20, 12.50]``, each times ``scale``."""
        value, low, high = (
            f"{one * scale:.{digits}f}" for one in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]" if math.isfinite(self.high - self.low) else value


@lru_cache(maxsize=64)
def student_t(level: float, degrees: int) -> float:
    """Return the half-width, in standard errors, of a two-sided interval of Student's t.

    Parameters
    ----------
    level
        Coverage, in (0, 1).
    degrees
        Degrees of freedom, >= 1.

    Notes
    -----
    With ``x = sqrt(degrees) tan(a)`` the density of x is in proportion to ``cos(a) ** (degrees -
    1)``; its integral is inverted on a grid (relative error below 1e-4).
    """
    if not 0 < level < 1 or degrees < 1:
        raise InvalidInput(
            f"level {level!r}, {degrees!r} degrees of freedom",
            where="interval",
            remedy="use a level between 0 and 1 and at least two seeds",
        )
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    angle = float(np.interp(level, mass / mass[-1], angles))
    return math.sqrt(degrees) * math.tan(angle)


def mean_figure(values: Sequence[float], level: float = LEVEL) -> Figure:
    """Return the mean of positive values, one per seed, with its interval.

    Raises
    ------
    InvalidInput
        If there is no value.
    """
    if not values:
        raise InvalidInput("no value", where="interval", remedy="give at least one seed")
    mean = float(np.mean(values))
    if len(values) == 1 or not math.isfinite(mean) or mean <= 0:
        return Figure(value=mean, low=0.0 if mean >= 0 else -math.inf, high=math.inf)
    relative = float(np.std(values, ddof=1)) / math.sqrt(len(values)) / mean
    factor = math.exp(student_t(level, len(values) - 1) * relative)
    return Figure(value=mean, low=mean / factor, high=mean * factor)


def share_figure(shares: Sequence[float], counted: int, level: float = LEVEL) -> Figure:
    """Return the mean of shares in [0, 1], one per seed, with its interval.

    Parameters
    ----------
    counted
        Runs behind all of them; where all shares are 0 or all are 1 they alone say how far the
        truth may be off (the rule of three).
    """
    mean = float(np.mean(shares))
    if len(shares) == 1:
        return Figure(value=mean, low=0.0, high=1.0)
    error = float(np.std(shares, ddof=1)) / math.sqrt(len(shares))
    half = student_t(level, len(shares) - 1) * error
    if half == 0.0:
        half = 1.0 - (1.0 - level) ** (1.0 / max(1, counted))
    return Figure(value=mean, low=max(0.0, mean - half), high=min(1.0, mean + half))


def difference(before: Sequence[float], after: Sequence[float], level: float = LEVEL) -> Figure:
    """Return the relative change of the mean, ``mean(after) / mean(before) - 1``, of paired seeds.

    Parameters
    ----------
    before, after
        One positive value per seed, in the same order: a pair saw the same runs.

    Raises
    ------
    InvalidInput
        If the lengths differ or the mean before is not positive.

    Notes
    -----
    The ratio of two means, its error from the residuals ``after - ratio * before`` (delta
    method): common random numbers make them small.
    """
    one, other = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if one.size != other.size or one.size == 0 or not one.mean() > 0:
        raise InvalidInput(
            f"{one.size} and {other.size} values with mean {one.mean() if one.size else 0.0!r}",
            where="paired difference",
            remedy="give as many of one as of the other, with a positive mean",
        )
    ratio = float(other.mean() / one.mean())
    if one.size == 1 or not math.isfinite(ratio) or ratio <= 0:
        return Figure(value=ratio - 1.0, low=-1.0, high=math.inf)
    error = float(np.std(other - ratio * one, ddof=1)) / math.sqrt(one.size) / float(one.mean())
    factor = math.exp(student_t(level, one.size - 1) * error / ratio)
    return Figure(value=ratio - 1.0, low=ratio / factor - 1.0, high=ratio * factor - 1.0)
