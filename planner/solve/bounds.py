"""Limits no plan can pass: the critical path, and the rate the fleet can carry."""

from __future__ import annotations

import math

import numpy as np
from ortools.linear_solver.python import model_builder

from planner.domain.errors import SolveError
from planner.solve.instance import Instance, Ints
from planner.solve.timing import Timing

__all__ = ["carried_rate_rps", "chain_extremes", "critical_path_ticks"]


def chain_extremes(instance: Instance, timing: Timing) -> tuple[Ints, Ints]:
    """Return the least and the most ticks of each chain over all endpoints and levels; (C,)."""
    real = np.zeros(instance.work_s.shape, dtype=bool)
    for i, grid in enumerate(instance.levels):
        real[:, i, : len(grid)] = instance.allowed[:, i, np.newaxis]
    far = np.iinfo(np.int64).max
    least = np.where(real, timing.ticks, far).min(axis=(2, 3)).sum(axis=1)
    most = np.where(real, timing.ticks, 0).max(axis=(2, 3)).sum(axis=1)
    return least, most


def critical_path_ticks(instance: Instance, timing: Timing) -> int:
    """Return the latency summed over classes and scenarios on an idle fleet of the best endpoints.

    No plan is below it, whatever the load.
    """
    least, _ = chain_extremes(instance, timing)
    return int(timing.latency(least[np.newaxis])[0]) * instance.run_classes


def carried_rate_rps(instance: Instance) -> float:
    """Return the largest arrival rate that any division of the traffic can carry, runs/s.

    Every endpoint works at its top level, where it finishes most, and call sites may be divided
    at will. Infinite if no call is ever made.

    Raises
    ------
    SolveError
        If the linear solver fails.
    """
    busy_sites = np.flatnonzero(instance.work_s.max(axis=(1, 2)) > 0)
    if busy_sites.size == 0:
        return math.inf
    model = model_builder.Model()  # type: ignore[no-untyped-call]
    rate = model.new_num_var(0.0, math.inf, "rate")
    load: list[list[model_builder.LinearExprT]] = [[] for _ in instance.endpoints]
    for k in busy_sites.tolist():
        flows = []
        for i in np.flatnonzero(instance.allowed[k]).tolist():
            flow = model.new_num_var(0.0, math.inf, f"flow_{k}_{i}")
            top = len(instance.levels[i]) - 1
            load[i].append(float(instance.work_s[k, i, top]) * flow)
            flows.append(flow)
        model.add_linear_constraint(sum(flows) - rate, lb=0.0, ub=0.0)
    for i, terms in enumerate(load):
        if terms:
            room = instance.utilisation_cap * instance.levels[i][-1]
            model.add_linear_constraint(sum(terms), ub=room)
    model.maximize(rate)
    solver = model_builder.Solver("GLOP")
    status = solver.solve(model)
    if status != model_builder.SolveStatus.OPTIMAL:
        raise SolveError(f"the rate the fleet can carry could not be found: {status.name}")
    return float(solver.objective_value)
