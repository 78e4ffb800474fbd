"""Tails over all seeds together, with intervals that respect the seeds.

A tail of one seed's few hundred runs is a rough figure; the tail of all seeds' runs together is
not. Its interval comes from drawing whole seeds with replacement, for both policies the same ones,
so that runs of one seed stay together and policies stay paired.

References
----------
Davison, Hinkley, Bootstrap Methods and their Application, 1997, section 3.8: resampling clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planner.metrics import PairedDifference

__all__ = ["pooled_difference", "pooled_quantile", "resampled_quantiles"]

_DRAWS = 500


def pooled_quantile(samples: Sequence[Sequence[float]], level: float) -> float:
    """Return the least value that a share ``level`` of the runs of all seeds does not exceed.

    At least one value; the level is in (0, 1].
    """
    values = np.concatenate([np.asarray(one, dtype=float) for one in samples])
    return float(np.quantile(values, level, method="inverted_cdf"))


def resampled_quantiles(
    samples: Sequence[Sequence[float]], level: float, *, seed: int, draws: int = _DRAWS
) -> npt.NDArray[np.float64]:
    """Return the quantile in each of ``draws`` samples of whole seeds, shape (draws,).

    Of `pooled_quantile`. With the same seed and number of samples the same ones are drawn.
    """
    values = np.concatenate([np.asarray(one, dtype=float) for one in samples])
    owners = np.repeat(np.arange(len(samples)), [len(one) for one in samples])
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    picks = np.random.default_rng(seed).integers(len(samples), size=(draws, len(samples)))
    times = np.stack([np.bincount(pick, minlength=len(samples)) for pick in picks])
    # By place, how many of each seed's values are up to there: a sample has `times` as many.
    upto = np.cumsum(owners[:, None] == np.arange(len(samples)), axis=0)
    wanted = level * (times * upto[-1]).sum(axis=1)
    low, high = np.zeros(draws, dtype=np.intp), np.full(draws, len(values) - 1)
    while (low < high).any():
        middle = (low + high) // 2
        enough = (times * upto[middle]).sum(axis=1) >= wanted
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    found: npt.NDArray[np.float64] = values[low]
    return found


def pooled_difference(
    baseline: tuple[float, npt.NDArray[np.float64]], other: tuple[float, npt.NDArray[np.float64]],
    *, seeds: int, level: float = 0.95,
) -> PairedDifference:  # fmt: skip
    """Return the relative difference of two pooled quantiles with its interval.

    Parameters
    ----------
    baseline, other
        `pooled_quantile` > 0 and `resampled_quantiles` of each, from the same draws.
    seeds
        How many; one says nothing of its spread: its interval is the whole line.
    level
        Coverage meant, in (0, 1).
    """
    mean = other[0] / baseline[0] - 1.0
    if seeds < 2:
        return PairedDifference(mean, -math.inf, math.inf)
    found = other[1] / baseline[1] - 1.0
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return PairedDifference(mean, float(low), float(high))
