"""Figures of a study's outcomes, and differences between them with their intervals.

Quantiles of runs are taken over the runs of all seeds together, everything else is a mean over the
seeds. Differences are paired: the same seeds' runs on both sides. Where contenders have more seeds
than the rest (`planner.study.contenders`), figures are of the seeds that all policies of the
setting have, and differences of all that both sides have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from planner.metrics import PairedDifference, paired_bootstrap, spread
from planner.report.comparison import BOOTSTRAP_SEED
from planner.study.grid import Outcome
from planner.study.measure import CellResult
from planner.study.pooled import pooled_difference, pooled_quantile, resampled_quantiles
from planner.study.settings import Setting

__all__ = ["Figures", "shared_seeds"]

_QUANTILES = {
    "p50_s": ("latencies", 0.5), "p95_s": ("latencies", 0.95), "p99_s": ("latencies", 0.99),
    "stretch_p95": ("stretches", 0.95), "stretch_p99": ("stretches", 0.99),
}  # fmt: skip
"""Metrics that are quantiles of runs: of what, at which level."""
_Drawn = npt.NDArray[np.float64]


class Figures:
    """All outcomes of a study.

    Attributes
    ----------
    by_setting
        The outcomes of each setting, in order.
    """

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.by_setting: dict[Setting, list[Outcome]] = {}
        for one in outcomes:
            self.by_setting.setdefault(one.setting, []).append(one)
        self._drawn: dict[tuple[Setting, str, str, tuple[int, ...]], _Drawn] = {}

    def find(self, setting: Setting, label: str) -> Outcome | None:
        """Return the outcome of a policy in a setting, if there is one."""
        found = (one for one in self.by_setting.get(setting, ()) if one.policy == label)
        return next(found, None)

    def others(self, one: Outcome) -> list[Outcome]:
        """Return the outcomes of the other policies in the same setting.

        Variants of a policy are no competitors of each other, unless there are none else.
        """
        group = [other for other in self.by_setting[one.setting] if other is not one]
        return [other for other in group if other.entry.policy != one.entry.policy] or group

    def common(self, one: Outcome) -> dict[int, CellResult]:
        """Return an outcome's results of the seeds that all policies of its setting have."""
        group = self.by_setting[one.setting]
        return {
            seed: result
            for seed, result in one.results.items()
            if all(seed in other.results for other in group)
        }

    def value(self, one: Outcome, metric: str) -> float | None:
        """Return a figure over the common seeds, None if nothing was observed."""
        return _value(self.common(one), metric)

    def summary(self, one: Outcome, metric: str) -> dict[str, float] | None:
        """Return the figure as ``mean``, with its spread over the seeds; None if unobserved."""
        value, values = self.value(one, metric), list(_by_seed(self.common(one), metric).values())
        if value is None or not values:
            return None
        return {**spread(values)._asdict(), "mean": value}

    def least(self, outcomes: Sequence[Outcome], metric: str) -> Outcome | None:
        """Return the outcome of the least figure; the first by name if some are equal.

        The best over the common seeds; if it is one of those with the most seeds, the best of
        these over all of theirs.
        """
        found = _least([(one, self.value(one, metric)) for one in outcomes])
        most = max((len(one.results) for one in outcomes), default=0)
        if found is None or len(found.results) < most:
            return found
        grown = [one for one in outcomes if len(one.results) == most]
        return _least([(one, _value(one.results, metric)) for one in grown])

    def difference(self, base: Outcome, other: Outcome, metric: str) -> PairedDifference | None:
        """Return by which share ``other`` lies above ``base``, None if either is unknown or 0."""
        seeds = shared_seeds(base, other)
        below, above = (
            _value({seed: one.results[seed] for seed in seeds}, metric) for one in (base, other)
        )
        if not below or above is None:
            return None
        if metric in _QUANTILES:
            return pooled_difference(
                (below, self._resampled(base, metric, seeds)),
                (above, self._resampled(other, metric, seeds)),
                seeds=len(seeds),
            )
        mine, theirs = _by_seed(other.results, metric), _by_seed(base.results, metric)
        shared = [seed for seed in mine if theirs.get(seed, 0.0) > 0]
        if not shared:
            return None
        return paired_bootstrap(
            [theirs[seed] for seed in shared], [mine[seed] for seed in shared], seed=BOOTSTRAP_SEED
        )

    def attainment(self, one: Outcome, scales: Sequence[float]) -> list[tuple[float, float]]:
        """Return (scale, share of runs that took at most so many times their time alone)."""
        stretches = np.sort(np.concatenate([r.stretches for r in self.common(one).values()]))
        if not stretches.size:
            return []
        shares = np.searchsorted(stretches, scales, side="right") / stretches.size
        return [
            (scale, round(float(share), 4)) for scale, share in zip(scales, shares, strict=True)
        ]

    def _resampled(self, one: Outcome, metric: str, seeds: tuple[int, ...]) -> _Drawn:
        key = one.setting, one.policy, metric, seeds
        if key not in self._drawn:
            results = {seed: one.results[seed] for seed in seeds}
            self._drawn[key] = resampled_quantiles(
                _samples(results, metric), _QUANTILES[metric][1], seed=BOOTSTRAP_SEED
            )
        return self._drawn[key]


def shared_seeds(one: Outcome, other: Outcome) -> tuple[int, ...]:
    """Return the seeds that both have, increasing."""
    return tuple(sorted(one.results.keys() & other.results.keys()))


def _least(values: Sequence[tuple[Outcome, float | None]]) -> Outcome | None:
    known = [(value, one.policy, one) for one, value in values if value is not None]
    return min(known, key=lambda item: item[:2])[2] if known else None


def _value(results: Mapping[int, CellResult], metric: str) -> float | None:
    if metric in _QUANTILES:
        samples = _samples(results, metric)
        return pooled_quantile(samples, _QUANTILES[metric][1]) if any(samples) else None
    values = list(_by_seed(results, metric).values())
    return spread(values).mean if values else None


def _samples(results: Mapping[int, CellResult], metric: str) -> list[Sequence[float]]:
    ordered = [results[seed] for seed in sorted(results)]
    if _QUANTILES[metric][0] == "latencies":
        return [result.metrics.latencies_s for result in ordered]
    return [result.stretches for result in ordered]


def _by_seed(results: Mapping[int, CellResult], metric: str) -> dict[int, float]:
    found = {seed: result.value(metric) for seed, result in results.items()}
    return {seed: value for seed, value in found.items() if value is not None}
