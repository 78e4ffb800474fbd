"""What a call's time costs its run where branches join: nothing while another branch takes longer.

A run waits at a join for the last of its branches. A call that takes t seconds makes its run later
by max(0, t - a), where its allowance a is what the others leave it. Over the scenarios of a graph,
with X the call's own time, f how many times as long it takes on an endpoint, and the other calls
on endpoints of any speed, the expected delay E max(0, f X - a) is convex in f: a slow endpoint
costs more by the second than a fast one saves, while criticality, its slope, would be the same for
both.

Everywhere the others' speeds are unknown, so each call alone is likely to be late, and the weights
of all branches of a join sum to more than one; `planner.dispatch.table.Tuning` scales them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planner.domain.ids import SiteId
from planner.domain.run import RunSpec
from planner.graph.analysis import Durations, allowances_s

__all__ = ["RunDelay", "run_delays"]

Floats = npt.NDArray[np.float64]

_FACTORS: Floats = np.array([0.0, *(0.125 * 2.0 ** (step / 2) for step in range(15))])
"""Times as long as expected at which delays are kept; straight lines in between."""
_FAR = 1e6
"""From the last factor up to here each second counts whole."""
_DRAWS = 8
"""Speeds that each scenario is tried with."""
_TASKS = 40_000
"""Tasks looked at in all: beyond, each scenario is tried with fewer speeds, but at least one."""
_SPEED_SD = 1.0
"""Standard deviation of the logarithm of how the others' times spread over endpoints and waits."""


class RunDelay:
    """By how much a run is expected to end later because of one call.

    Parameters
    ----------
    own_s
        What the call takes in each scenario, s, >= 0, not all 0; shape (scenarios,).
    allowances_s
        What it may take there, s, >= 0; shape (scenarios,).
    """

    __slots__ = ("_delays_s", "_times_s")

    def __init__(self, own_s: Sequence[float], allowances_s: Sequence[float]) -> None:
        own: Floats = np.array(own_s)
        expected_s = float(own.mean())
        delays = np.maximum(0.0, np.outer(_FACTORS, own) - np.array(allowances_s)).mean(axis=1)
        beyond = delays[-1] + (_FAR - _FACTORS[-1]) * expected_s
        self._times_s: Floats = np.append(_FACTORS, _FAR) * expected_s
        self._delays_s: Floats = np.append(delays, beyond)

    def of(self, times_s: Floats) -> Floats:
        """Return the delays, s, for expected times of the call, s, >= 0; same shape."""
        delays: Floats = np.interp(times_s, self._times_s, self._delays_s)
        return delays


def run_delays(
    runs: Sequence[RunSpec], durations: Durations, *, seed: int = 0
) -> dict[SiteId, RunDelay]:
    """Return the delays of the call sites that are not on every chain of the sampled runs.

    Parameters
    ----------
    runs
        Scenarios of one workflow.
    durations
        What their tasks take on an endpoint of middling speed, s.
    seed
        Of the speeds that the other calls meet.
    """
    rng = np.random.default_rng(seed)
    draws = max(1, min(_DRAWS, _TASKS // max(1, sum(len(run.tasks) for run in runs))))
    own: dict[SiteId, list[float]] = {}
    allowed: dict[SiteId, list[float]] = {}
    for run in runs:
        expected = durations(run)
        factors = rng.lognormal(-0.5 * _SPEED_SD**2, _SPEED_SD, (draws, len(expected)))
        # A call's site is None for what is no call: tools keep their time.
        fixed = [task.site is None for task in run.tasks]
        for met in np.where(fixed, 1.0, factors) * np.array(expected):
            for task, seconds, allowance in zip(
                run.tasks, expected, allowances_s(run, met.tolist()), strict=True
            ):
                if task.site is not None:
                    own.setdefault(task.site, []).append(seconds)
                    allowed.setdefault(task.site, []).append(allowance)
    return {
        site: RunDelay(seconds, allowed[site])
        for site, seconds in sorted(own.items())
        if any(allowed[site]) and any(seconds)
    }
