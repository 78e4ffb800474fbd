"""Limits no plan can pass: the critical path, and the rate the fleet can carry."""

from __future__ import annotations

import math

import numpy as np
from ortools.linear_solver.python import model_builder

from planner.domain.errors import SolveError
from planner.solve.arrays import Ints
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.timing import Timing

__all__ = [
    "carried_rate_rps",
    "chain_extremes",
    "critical_path_cost",
    "least_latencies",
    "longest_latency",
]


def chain_extremes(instance: Instance, timing: Timing) -> tuple[Ints, Ints]:
    """Return the least and the most ticks of each chain over options and levels; (C,).

    The least has all prefixes and sessions kept, the most none.
    """
    real = instance.modes[timing.site]
    far = np.iinfo(np.int64).max
    least = np.where(real, timing.ticks, far).min(axis=(1, 2))
    everything = timing.ticks + (timing.cold + timing.lost)[..., np.newaxis]
    most = np.where(real, everything, 0).max(axis=(1, 2))
    return timing.by_chain(least), timing.by_chain(most)


def least_latencies(instance: Instance, timing: Timing) -> Ints:
    """Return the ticks of each scenario on an idle fleet of the best endpoints; shape (S,)."""
    least, _ = chain_extremes(instance, timing)
    return np.asarray(timing.latencies(least[np.newaxis])[0])


def longest_latency(instance: Instance, timing: Timing) -> int:
    """Return ticks that no latency of any plan exceeds."""
    _, most = chain_extremes(instance, timing)
    return int(timing.latencies(most[np.newaxis]).max())


def critical_path_cost(instance: Instance, timing: Timing, goal: Goal) -> int:
    """Return the cost on an idle fleet of the best endpoints.

    No plan is below it, whatever the load, since costs grow with latencies.
    """
    least = least_latencies(instance, timing)
    return int(goal.cost(np.tile(least, (1, instance.run_classes, 1)))[0])


def carried_rate_rps(instance: Instance) -> float:
    """Return the largest arrival rate that any division of the traffic can carry, runs/s.

    Of a mix: all workflows together, in their proportions. KV is taken as ample. Every endpoint
    works at its top level, where it finishes most, and call sites may be divided at will. Infinite
    if no call is ever made.

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
        for m in np.flatnonzero(instance.allowed[k]).tolist():
            flow = model.new_num_var(0.0, math.inf, f"flow_{k}_{m}")
            i, p = int(instance.option_endpoint[m]), int(instance.option_prefill[m])
            top = len(instance.levels[i]) - 1
            load[i].append(float(instance.work_s[k, m, top]) * flow)
            if p >= 0:
                load[p].append(float(instance.lane_work_s[k, m]) * flow)
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
