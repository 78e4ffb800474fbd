"""What no policy can beat on the runs of a comparison; `almanac simulate` puts it beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec

__all__ = ["SharedBound", "shared_bound"]

_PERCENT = 95


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBound:
    """Means over the seeds of least mean and least P95 run latency, s, and the bounds behind."""

    mean_s: float
    p95_s: float
    names: tuple[str, ...]

    def text(self, *, noise: bool) -> str:
        """Return one line for people."""
        of = "; of engines whose steps take what the fleet file says, without noise"
        return (
            f"no policy can be below: mean {self.mean_s:.2f} s, P95 {self.p95_s:.2f} s "
            f"(bounds: {', '.join(self.names)}{of if noise else ''})"
        )


def shared_bound(workloads: Mapping[int, Sequence[RunSpec]], fleet: Fleet) -> SharedBound:
    """Return the bound of workloads by seed, each all the runs that a result counts.

    Raises
    ------
    InvalidInput
        If a workload is empty or a call fits no endpoint.
    """
    from planner.solve.workload_bounds import workload_bound  # OR-Tools takes a second to load

    means, tails, names = [], [], set()
    for _, runs in sorted(workloads.items()):
        percent = _below_interpolation(len(runs))
        bound = workload_bound(runs, fleet, percentiles=(percent,))
        means.append(bound.mean_s)
        tails.append(bound.percentile_s[percent])
        names.add(bound.name)
    return SharedBound(mean_s=fmean(means), p95_s=fmean(tails), names=tuple(sorted(names)))


def _below_interpolation(count: int) -> int:
    """Return the largest percentage whose order statistic is not above an interpolated P95.

    Results interpolate between order statistics, bounds are of one of them.
    """
    reached = math.floor(_PERCENT / 100 * (count - 1)) + 1
    return max(1, min(_PERCENT, 100 * reached // count))
