"""The fleet plan with freely divided traffic: a bound within seconds, and shares to round.

Classes are exchangeable, so the mean of their placements is a feasible point of the relaxation
(latency is convex in it): one fractional placement stands for all classes. An endpoint may work at
a mix of levels; a mix offers the mix of their rooms. On studied questions the bound is within
0.5 % of that with whole levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from ortools.linear_solver.python import model_builder

from planner.solve.instance import Floats, Instance
from planner.solve.timing import Timing

__all__ = ["Relaxation", "relax"]

_TRUST = 1e-6
"""Relative error of the linear solver's optimum that the bound allows for."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Optimum of the relaxation.

    Parameters
    ----------
    bound_ticks
        No plan's summed latency is below.
    shares
        Share of site k's traffic on endpoint i at level l; shape (K, I, L).
    levels
        Share of each level of each endpoint; shape (I, L).
    """

    bound_ticks: int
    shares: Floats
    levels: Floats


def relax(instance: Instance, timing: Timing) -> Relaxation | None:
    """Return the relaxation's optimum, or None if the linear solver finds none."""
    model = model_builder.Model()  # type: ignore[no-untyped-call]
    classes, sites = instance.run_classes, len(instance.sites)
    levels = [
        [model.new_num_var(0.0, 1.0, f"level_{i}_{n}") for n in range(len(grid))]
        for i, grid in enumerate(instance.levels)
    ]
    keys = [
        (k, i, n)
        for k in range(sites)
        for i, grid in enumerate(instance.levels)
        if instance.allowed[k, i]
        for n in range(len(grid))
    ]
    use = {key: model.new_num_var(0.0, 1.0, "") for key in keys}
    load, room = instance.class_load * classes, instance.room
    total = model_builder.LinearExpr.weighted_sum
    for row in levels:
        model.add_linear_constraint(total(row, [1.0] * len(row)), lb=1.0, ub=1.0)
    for k in range(sites):
        mine = [use[key] for key in keys if key[0] == k]
        model.add_linear_constraint(total(mine, [1.0] * len(mine)), lb=1.0, ub=1.0)
    for (_, i, n), share in use.items():
        model.add_linear_constraint(share - levels[i][n], ub=0.0)
    for i, grid in enumerate(instance.levels):
        for n in range(len(grid)):
            users = [k for k in range(sites) if instance.allowed[k, i]]
            weights = [float(load[k, i, n]) for k in users]
            model.add_linear_constraint(
                total(
                    [*(use[k, i, n] for k in users), levels[i][n]], [*weights, -float(room[i, n])]
                ),
                ub=0.0,
            )
    starts = [model.new_num_var(0.0, math.inf, f"start_{j}") for j in range(len(timing.joins))]
    index = tuple(np.array(keys).T)

    def end(chains: list[int]) -> tuple[list[model_builder.Variable], list[float], float]:
        ticks = timing.ticks[chains].sum(axis=0)[index]
        used = np.flatnonzero(ticks)
        variables = [use[keys[position]] for position in used]
        weights = [float(value) for value in ticks[used]]
        for chain in chains:
            if timing.base[chain] >= 0:
                variables.append(starts[timing.base[chain]])
                weights.append(1.0)
        return variables, weights, float(timing.fixed[chains].sum())

    for j, chains in enumerate(timing.joins):
        for chain in chains:
            variables, weights, fixed = end([chain])
            model.add_linear_constraint(
                total([starts[j], *variables], [1.0, *(-w for w in weights)]), lb=fixed
            )
    variables, weights, fixed = end([int(chain) for chain in timing.ends])
    model.minimize(total(variables, weights) + fixed)
    solver = model_builder.Solver("GLOP")
    if solver.solve(model) != model_builder.SolveStatus.OPTIMAL:
        return None
    shares = np.zeros(instance.work_s.shape)
    for key, variable in use.items():
        shares[key] = solver.value(variable)
    mix = np.zeros(room.shape)
    for i, row in enumerate(levels):
        mix[i, : len(row)] = [solver.value(variable) for variable in row]
    bound = float(solver.objective_value) * classes * (1 - _TRUST)
    return Relaxation(math.ceil(bound), shares, mix)
