"""The last plan as the start of the next search: what a rolling horizon keeps from step to step."""

from __future__ import annotations

import numpy as np

from planner.domain.plan import Plan
from planner.solve.arrays import Ints
from planner.solve.heuristics import Solution, greedy_solution
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.timing import Timing

__all__ = ["carried_over", "placements_of"]


def placements_of(plan: Plan, instance: Instance) -> Ints | None:
    """Return the options (R, K) of an earlier plan in a question that may have changed since.

    Where the earlier plan says nothing that can still be done (a new call site, an endpoint that
    is gone or too small), the call takes the allowed endpoint with the least work. None if
    nothing of the plan can be kept.
    """
    index = {instance.option_name(m): m for m in range(instance.option_endpoint.size)}
    home = {
        (one.run_class, one.site): index.get(
            f"{one.prefill}>{one.endpoint}" if one.prefill else one.endpoint, -1
        )
        for one in plan.assignments
    }
    least = np.where(instance.allowed, instance.work_s[:, :, 0], np.inf).argmin(axis=1)
    placements = np.empty((instance.run_classes, len(instance.sites)), dtype=np.int64)
    kept = 0
    for r in range(instance.run_classes):
        for k, site in enumerate(instance.sites):
            m = home.get((r % plan.run_classes, site), -1)
            usable = m >= 0 and bool(instance.allowed[k, m])
            placements[r, k] = m if usable else least[k]
            kept += usable
    return placements if kept else None


def carried_over(
    plan: Plan, instance: Instance, timing: Timing, goal: Goal, *, effort: float
) -> Solution | None:
    """Return the earlier plan, mended and improved by descent, or None if it finds no room.

    ``effort`` bounds the descent, see `greedy_solution`.
    """
    start = placements_of(plan, instance)
    if start is None:
        return None
    return greedy_solution(instance, timing, goal, start=start, effort=effort)
