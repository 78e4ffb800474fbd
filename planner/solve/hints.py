"""Earlier plans as the start of the next search: what a rolling horizon keeps from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.domain.plan import Plan
from planner.solve.arrays import Ints
from planner.solve.heuristics import Solution, greedy_solution
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.timing import Timing

__all__ = ["carried_over", "placements_of"]


def placements_of(plans: Sequence[Plan], instance: Instance) -> Ints | None:
    """Return the options (R, K) of earlier plans in a question that may have changed since.

    Each workflow follows the plan made for it, or else the one that shares most call sites with
    it. Where that says nothing that can still be done (a new call site, an endpoint that is gone
    or too small), the call takes the allowed endpoint with the least work. None if nothing of the
    plans can be kept.
    """
    index = {instance.option_name(m): m for m in range(instance.option_endpoint.size)}
    least = np.where(instance.allowed, instance.work_s[:, :, 0], np.inf).argmin(axis=1)
    placements = np.tile(least, (instance.run_classes, 1))
    sites_of = [{one.site for one in plan.assignments} for plan in plans]
    if not plans:
        return None
    kept = 0
    for source in instance.sources:
        same = [plan.workflow_hash == source.workflow_hash for plan in plans]
        common = [len(sites & set(source.paths)) for sites in sites_of]
        plan = plans[max(range(len(plans)), key=lambda n: (same[n], common[n]))]
        home = {
            (one.run_class, one.site): index.get(
                f"{one.prefill}>{one.endpoint}" if one.prefill else one.endpoint, -1
            )
            for one in plan.assignments
        }
        for r in range(instance.run_classes):
            for k, path in zip(source.sites, source.paths, strict=True):
                m = home.get((r % plan.run_classes, path), -1)
                if m >= 0 and bool(instance.allowed[k, m]):
                    placements[r, k] = m
                    kept += 1
    return placements if kept else None


def carried_over(
    plans: Sequence[Plan], instance: Instance, timing: Timing, goal: Goal, *, effort: float
) -> Solution | None:
    """Return the earlier plans, mended and improved by descent, or None if they find no room.

    ``effort`` bounds the descent, see `greedy_solution`.
    """
    start = placements_of(plans, instance)
    if start is None:
        return None
    return greedy_solution(instance, timing, goal, start=start, effort=effort)
