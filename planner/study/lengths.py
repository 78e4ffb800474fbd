"""Heavy-tailed truths: lognormal lengths and delays, and mixtures of them.

`planner.domain.estimates.Quantiles` is flat beyond its outermost levels, which is right for a
forecast and cuts the tail off a truth. The distributions here are read as quantiles by whoever
forecasts with them, and sampled to the end of the tail by `planner.graph.sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from planner.domain.estimates import LEVELS, Quantiles

__all__ = ["LogNormal", "Mixture", "lognormal", "mixture", "plain", "pooled"]

_NORMAL = NormalDist()
_EDGE = 1e-12
_DRAWS = 2000
"""Evenly spaced draws behind the quantiles of a mixture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal(Quantiles):
    """A lognormal distribution cut off at ``most``.

    Parameters
    ----------
    median
        exp(mu), unit of the quantiles, > 0.
    sigma
        Standard deviation of the logarithm, >= 0; 0.5 is mild, 1 heavy.
    most
        Largest value; draws above it give it.
    """

    median: float
    sigma: float
    most: float

    def sample(self, uniform: float) -> float:
        """Return the value for a uniform number in [0, 1]."""
        z = _NORMAL.inv_cdf(min(max(uniform, _EDGE), 1.0 - _EDGE))
        return min(self.median * math.exp(self.sigma * z), self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture(Quantiles):
    """One of several distributions, by shares that sum to one."""

    shares: tuple[float, ...]
    parts: tuple[Quantiles, ...]

    def sample(self, uniform: float) -> float:
        """Return the value for a uniform number: its place in its share chooses the quantile."""
        for share, part in zip(self.shares[:-1], self.parts[:-1], strict=True):
            if uniform < share:
                return part.sample(uniform / share)
            uniform -= share
        return self.parts[-1].sample(min(1.0, uniform / self.shares[-1]))


def lognormal(mean: float, sigma: float, most: float = math.inf) -> LogNormal:
    """Return the lognormal distribution of a mean (before the cut) > 0.

    Parameters
    ----------
    most
        Cut; by default 12 times the mean, which a call in a thousand reaches at sigma 1.
    """
    most = min(most, 12.0 * mean)
    mu = math.log(mean) - sigma * sigma / 2.0
    if sigma == 0.0:
        cut_mean = mean
    else:
        at = (math.log(most) - mu) / sigma
        cut_mean = mean * _NORMAL.cdf(at - sigma) + most * (1.0 - _NORMAL.cdf(at))
    median = math.exp(mu)
    return LogNormal(
        values=tuple(
            min(median * math.exp(sigma * _NORMAL.inv_cdf(level)), most) for level in LEVELS
        ),
        mean=cut_mean,
        provenance="declared",
        median=median,
        sigma=sigma,
        most=most,
    )


def mixture(shares: Sequence[float], parts: Sequence[Quantiles]) -> Mixture:
    """Return the mixture of distributions; ``shares`` sum to one."""
    draws: list[float] = []
    for share, part in zip(shares, parts, strict=True):
        count = max(1, round(share * _DRAWS))
        draws += [part.sample((position + 0.5) / count) for position in range(count)]
    return Mixture(
        values=tuple(float(value) for value in np.quantile(draws, LEVELS)),
        mean=sum(share * part.mean for share, part in zip(shares, parts, strict=True)),
        provenance="declared",
        shares=tuple(shares),
        parts=tuple(parts),
    )


def plain(quantiles: Quantiles, provenance: str = "declared") -> Quantiles:
    """Return what a forecaster may see of a truth: its quantiles and its mean."""
    return Quantiles(values=quantiles.values, mean=quantiles.mean, provenance=provenance)


def pooled(parts: Sequence[Quantiles]) -> Quantiles:
    """Return the mean of quantiles, each weighted by how often it was observed."""
    weights = np.array([max(1, part.count) for part in parts], dtype=float)
    weights /= weights.sum()
    return Quantiles(
        values=tuple((weights @ np.array([part.values for part in parts])).tolist()),
        mean=float(weights @ np.array([part.mean for part in parts])),
        provenance="learned",
    )
