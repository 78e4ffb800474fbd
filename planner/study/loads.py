"""Loads: how much a fleet can carry of a mix, and when runs arrive.

Capacity is the largest arrival rate of the plan's own relaxation (`planner.solve.bounds`) with
the mix's truth: every endpoint at its top level, call sites divided at will, prefixes warm. Load
is the arrival rate over capacity. Simulation agrees where endpoints serve calls whole: on ``h02``
under marginal cost (mix ``agents``, 2,500 runs) the mean of each fifth of the runs settles at load
0.85 (12 to 14 s), creeps at 1.0 (22 to 26 s) and grows without end at 1.1 (27, 39, 49, 60 s).

Pools are followed less well: `hetero1` with `tree` begins to queue near 1.0 as it should, but
`homogeneous` with `chat`, where little is computed per token moved, carries more than 1.2. Give
such settings a rate of their own.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.graph.sampling import scenarios
from planner.sim.kernel import ClosedLoop
from planner.sim.workload import (
    Times,
    burst_arrivals,
    gamma_arrivals,
    poisson_arrivals,
    replayed_arrivals,
)
from planner.study.mixes import Mix, joined

__all__ = ["ARRIVALS", "arrival_times", "capacity_rps", "closed_loop"]

RECORDED = ("azure_code", "azure_conv", "mooncake_conversation")
ARRIVALS = ("poisson", "gamma", "closed", "burst", *RECORDED)
"""Laws: Poisson; ``gamma`` with a coefficient of variation; clients that start a run when their
last one ended; all at once; recorded arrivals stretched to the rate."""
_SCENARIOS = 256


@lru_cache(maxsize=256)
def capacity_rps(fleet: Fleet, mix: Mix) -> float:
    """Return the runs per second of a mix that a fleet can carry.

    Raises
    ------
    Infeasible
        If a call site fits no endpoint.
    """
    from planner.solve.bounds import carried_rate_rps
    from planner.solve.instance import build_instance
    from planner.study.forecasts import oracle

    workflow, estimates = joined(mix, oracle(mix))
    sample = scenarios(workflow, estimates.workflows[workflow.content_hash], _SCENARIOS, seed=0)
    instance = build_instance(
        workflow, fleet, EstimateTable(workflows=estimates.workflows), sample,
        arrival_rate_rps=1e-6, run_classes=1,
    )  # fmt: skip
    return carried_rate_rps(instance) / instance.utilisation_cap


def arrival_times(
    law: str,
    rate_rps: float,
    count: int,
    rng: np.random.Generator,
    *,
    cv: float = 3.0,
    data: Path | None = None,
) -> Times:
    """Return ``count`` arrival times in seconds, shape (count,).

    Parameters
    ----------
    law
        One of `ARRIVALS`; of a closed loop the times do not count, its runs are all there at 0.
    cv
        Coefficient of variation of ``gamma`` gaps.
    data
        Folder of the public datasets, for the recorded laws.

    Raises
    ------
    InvalidInput
        If the law is unknown or its data is missing.
    """
    if law == "poisson":
        return poisson_arrivals(rate_rps, count, rng)
    if law == "gamma":
        return gamma_arrivals(rate_rps, cv, count, rng)
    if law in ("closed", "burst"):
        return burst_arrivals(count)
    if law not in RECORDED:
        raise InvalidInput(
            f"{law!r} is unknown", where="arrivals", remedy=f"use one of {', '.join(ARRIVALS)}"
        )
    if data is None:
        raise InvalidInput(
            f"{law} arrivals need the public datasets",
            where="--data",
            remedy="give their folder (see `almanac data list`)",
        )
    from models.importers import arrivals

    return replayed_arrivals(arrivals(data, law).time_s, rate_rps, count, rng)


def closed_loop(fleet: Fleet, load: float) -> ClosedLoop:
    """Return clients in proportion to the fleet's slots: one for each at load 1."""
    slots = sum(endpoint.max_num_seqs for endpoint in fleet.endpoints)
    return ClosedLoop(clients=max(1, round(load * slots)))
