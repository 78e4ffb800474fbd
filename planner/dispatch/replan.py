"""When to plan again: the period, drift, a changed fleet, or calls the table does not cover.

Pure: time comes in as ``now_s``. The same code decides in the gateway and in the simulator.

Rules
-----
* Everything is measured against the state at the last attempt, adopted or not: a plan that was
  found worse is not asked for again until something changes further. An attempt that gave no
  verdict at all is repeated after the least gap, then after twice that, and so on.
* Drift needs to be larger than ``band`` for ``settle_s``, and ends the wait only by falling below
  the square root of the band (hysteresis), so that a rate that hovers at the edge neither fires
  at each crossing nor hides.
* A rate counts as changed only beyond `SIGNIFICANCE` standard deviations of a Poisson count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.domain.errors import InvalidInput
from planner.domain.latency import LatencyRow

__all__ = ["PlanBasis", "RateMeter", "ReplanTrigger", "speed_s"]

SIGNIFICANCE = 3.0


class RateMeter:
    """Arrivals per second by key, earlier ones fading exponentially.

    Parameters
    ----------
    window_s
        Time constant, > 0: an arrival counts 1/e after it.
    start_s
        Since when arrivals would have been seen.
    """

    __slots__ = ("_last_s", "_start_s", "_weight", "window_s")

    def __init__(self, window_s: float, start_s: float = 0.0) -> None:
        if not 0 < window_s < math.inf:
            raise InvalidInput(f"{window_s!r} s", where="window", remedy="use a number above 0")
        self.window_s = window_s
        self._start_s = start_s
        self._weight: dict[str, float] = {}
        self._last_s: dict[str, float] = {}

    def observe(self, key: str, now_s: float) -> None:
        """Count an arrival."""
        self._weight[key] = self._faded(key, now_s) + 1.0
        self._last_s[key] = now_s

    def rates_rps(self, now_s: float) -> dict[str, float]:
        """Return the rate of every key seen; unbiased from the start on for a steady rate."""
        seen_s = now_s - self._start_s
        if seen_s <= 0:
            return {}
        span_s = self.window_s * -math.expm1(-seen_s / self.window_s)
        return {key: self._faded(key, now_s) / span_s for key in sorted(self._weight)}

    def _faded(self, key: str, now_s: float) -> float:
        weight = self._weight.get(key, 0.0)
        if not weight:
            return 0.0
        return weight * math.exp(-max(0.0, now_s - self._last_s[key]) / self.window_s)


def speed_s(row: LatencyRow) -> float:
    """Return the seconds of a usual call on an endpoint, to tell how far its row has moved."""
    return row.prefill_s(1000.0) + 200.0 * row.decode_step_s(4.0, 8000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBasis:
    """What a plan rests on, as it is at one instant.

    Parameters
    ----------
    up
        Endpoints that take calls.
    rates_rps
        Arrivals per second by workflow that can be planned.
    speeds_s
        `speed_s` by endpoint, as learned.
    uncovered
        Share of recent calls of those workflows for which the table had no row, [0, 1].
    """

    up: frozenset[str]
    rates_rps: Mapping[str, float] = field(default_factory=dict)
    speeds_s: Mapping[str, float] = field(default_factory=dict)
    uncovered: float = 0.0


class ReplanTrigger:
    """Decides when the next plan is due.

    Parameters
    ----------
    period_s
        Longest time between two attempts, > 0.
    band
        Factor by which a rate or an endpoint's speed may differ from the plan's, > 1.
    settle_s
        How long it has to differ, and how long arrivals are watched before the first plan, >= 0.
    uncovered
        Share of calls without a row that the table may add before it counts as out of range,
        (0, 1].
    least_gap_s
        Shortest time between two attempts, >= 0.
    window_s
        Time constant of the rates given, > 0; see `RateMeter`.

    Raises
    ------
    InvalidInput
        If a number is out of range.
    """

    def __init__(
        self,
        period_s: float,
        *,
        band: float = 1.5,
        settle_s: float = 20.0,
        uncovered: float = 0.05,
        least_gap_s: float = 10.0,
        window_s: float = 60.0,
    ) -> None:
        ranges = (
            ("period", period_s, 0.0, math.inf),
            ("band", band, 1.0, math.inf),
            ("uncovered share", uncovered, 0.0, 1.0 + 1e-9),
            ("window", window_s, 0.0, math.inf),
            ("settle time", settle_s, -1e-12, math.inf),
            ("least gap", least_gap_s, -1e-12, math.inf),
        )
        for name, value, above, below in ranges:
            if not above < value < below:
                raise InvalidInput(
                    f"{value!r}",
                    where=f"replanning: {name}",
                    remedy=f"use a finite number above {max(above, 0):g}",
                )
        self.period_s = period_s
        self.band = band
        self.settle_s = settle_s
        self.uncovered = uncovered
        self.least_gap_s = least_gap_s
        self.window_s = window_s
        self._basis: PlanBasis | None = None
        self._at_s = -math.inf
        self._outside_since_s: float | None = None
        self._loaded_since_s: float | None = None
        self._failures = 0
        self._retry_s = math.inf

    def attempted(self, now_s: float, basis: PlanBasis) -> None:
        """Note that a plan is being made from this state."""
        self._basis, self._at_s, self._outside_since_s = basis, now_s, None
        self._retry_s = math.inf

    def answered(self, now_s: float, *, verdict: bool) -> None:
        """Note the end of the attempt: whether there was a plan and a verdict on it."""
        self._failures = 0 if verdict else self._failures + 1
        if not verdict:
            pause_s = max(self.least_gap_s, 1.0) * 2.0 ** (self._failures - 1)
            self._retry_s = now_s + min(self.period_s, pause_s)

    def due(self, now_s: float, state: PlanBasis) -> str | None:
        """Return why a plan is due now, or None.

        The reason is ``start``, ``fleet``, ``range``, ``drift``, ``retry`` or ``period``. Nothing
        is due while no workflow that can be planned has arrivals or no endpoint is up.
        """
        if not state.up or not any(rate > 0 for rate in state.rates_rps.values()):
            return None
        if self._loaded_since_s is None:
            self._loaded_since_s = now_s
        basis = self._basis
        if basis is None:
            # A rate read off the first few arrivals would be anything.
            return "start" if now_s - self._loaded_since_s >= self.settle_s else None
        drifted = self._drifted(now_s, basis, state)
        if now_s - self._at_s < self.least_gap_s:
            return None
        if state.up != basis.up:
            return "fleet"
        if state.uncovered > basis.uncovered + self.uncovered:
            return "range"
        if drifted:
            return "drift"
        if now_s >= self._retry_s:
            return "retry"
        return "period" if now_s - self._at_s >= self.period_s else None

    def _drifted(self, now_s: float, basis: PlanBasis, state: PlanBasis) -> bool:
        worst = max(
            (
                *(self._rate_factor(key, basis, state) for key in state.rates_rps),
                *(_factor(basis.speeds_s.get(one), now) for one, now in state.speeds_s.items()),
            ),
            default=1.0,
        )
        if worst >= self.band:
            if self._outside_since_s is None:
                self._outside_since_s = now_s
        elif worst < math.sqrt(self.band):
            self._outside_since_s = None
        since_s = self._outside_since_s
        return since_s is not None and now_s - since_s >= self.settle_s

    def _rate_factor(self, key: str, basis: PlanBasis, state: PlanBasis) -> float:
        planned, now = basis.rates_rps.get(key, 0.0), state.rates_rps[key]
        # The variance of an exponentially weighted Poisson rate is rate / (2 window).
        deviation = math.sqrt((planned + now) / (2.0 * self.window_s))
        if abs(now - planned) <= SIGNIFICANCE * deviation:
            return 1.0
        return _factor(planned, now) if planned else math.inf


def _factor(before: float | None, now: float) -> float:
    """Return by which factor a positive value moved, >= 1; 1 if there was none before."""
    if before is None:
        return 1.0
    if before <= 0 or now <= 0:
        return 1.0 if before == now else math.inf
    return max(now / before, before / now)
