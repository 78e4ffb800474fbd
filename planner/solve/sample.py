"""How many scenarios a plan needs for a stated error of its objective.

A pilot plan without search is evaluated on growing samples. Scenario n depends on the seed and n
alone, so each sample contains the smaller ones (common random numbers), and the spread of latencies
over its scenarios tells how many of them bring the standard error of the mean below the target,

    error = sqrt(sum over workflows of v^2 variance / n) / mean,    v its share of the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from planner.domain.errors import InvalidInput
from planner.solve.bounds import chain_extremes
from planner.solve.heuristics import Solution, greedy_solution
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.timing import Timing, build_timing

__all__ = ["MOST_SCENARIOS", "enough_scenarios", "standard_error"]

MOST_SCENARIOS = 256
"""Beyond, models grow faster than they improve; the error reached is reported all the same."""
_PILOT = 16
_EFFORT = 1e6


def enough_scenarios(arranged: Callable[[int], Instance], target_error: float) -> tuple[int, float]:
    """Return a number of scenarios and the relative standard error that it leaves.

    Parameters
    ----------
    arranged
        Returns the question with that many scenarios of each workflow.
    target_error
        Standard error of the mean relative to it, > 0. Above `MOST_SCENARIOS` it is not pursued.

    Raises
    ------
    InvalidInput
        If the target is not positive.
    """
    if not (target_error > 0 and math.isfinite(target_error)):
        raise InvalidInput(
            f"{target_error!r}", where="target error", remedy="use a number > 0, such as 0.02"
        )
    count = _PILOT
    while True:
        instance = arranged(count)
        timing = build_timing(instance)
        pilot = greedy_solution(instance, timing, Goal(instance), effort=_EFFORT)
        if pilot is None:
            # Without room for a greedy plan the idle fleet tells how latencies spread.
            least = chain_extremes(instance, timing)[0]
            error = _relative(instance, timing.latencies(least[np.newaxis]))
        else:
            error = standard_error(instance, timing, pilot)
        if error <= target_error or count == MOST_SCENARIOS:
            return count, error
        wanted = math.ceil(count * (error / target_error) ** 2)
        count = min(MOST_SCENARIOS, max(count + 1, wanted))


def standard_error(instance: Instance, timing: Timing, solution: Solution) -> float:
    """Return the standard error of a plan's mean latency over scenarios, relative to the mean.

    Infinite for a single scenario.
    """
    return _relative(instance, solution.latencies(timing))


def _relative(instance: Instance, latencies: object) -> float:
    ticks = np.asarray(latencies, dtype=float).mean(axis=0)
    shares = instance.scenario_weight / instance.scenario_weight.sum()
    variance = 0.0
    for w in range(len(instance.sources)):
        mine = instance.scenario_source == w
        if mine.sum() < 2:
            return math.inf
        share = float(shares[mine].sum())
        variance += share**2 * float(ticks[mine].var(ddof=1)) / int(mine.sum())
    mean = float(ticks @ shares)
    return math.sqrt(variance) / mean if mean > 0 else 0.0
