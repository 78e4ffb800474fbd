"""The last plan as the start of the next search: what a rolling horizon keeps from step to step."""

from __future__ import annotations

import numpy as np

from planner.domain.plan import Plan
from planner.solve.heuristics import Solution, greedy_solution
from planner.solve.instance import Instance, Ints
from planner.solve.timing import Timing

__all__ = ["carried_over", "placements_of"]


def placements_of(plan: Plan, instance: Instance) -> Ints | None:
    """Return the placements (R, K) of an earlier plan in a question that may have changed since.

    Where the earlier plan says nothing that can still be done (a new call site, an endpoint that
    is gone or too small), the call takes the allowed endpoint with the least work. None if
    nothing of the plan can be kept.
    """
    index = {name: i for i, name in enumerate(instance.endpoints)}
    home = {(one.run_class, one.site): index.get(one.endpoint, -1) for one in plan.assignments}
    least = np.where(instance.allowed, instance.work_s[:, :, 0], np.inf).argmin(axis=1)
    placements = np.empty((instance.run_classes, len(instance.sites)), dtype=np.int64)
    kept = 0
    for r in range(instance.run_classes):
        for k, site in enumerate(instance.sites):
            i = home.get((r % plan.run_classes, site), -1)
            usable = i >= 0 and bool(instance.allowed[k, i])
            placements[r, k] = i if usable else least[k]
            kept += usable
    return placements if kept else None


def carried_over(
    plan: Plan, instance: Instance, timing: Timing, *, effort: float
) -> Solution | None:
    """Return the earlier plan, mended and improved by descent, or None if it finds no room.

    ``effort`` bounds the descent, see `greedy_solution`.
    """
    start = placements_of(plan, instance)
    return None if start is None else greedy_solution(instance, timing, start=start, effort=effort)
