"""Opportunity prices: what a second of slot time on each endpoint costs the runs, on average.

The relaxed fleet plan divides the flow of each call site freely over endpoints and levels,

    min   sum over k, i, n of  criticality[k] * work[k, i, n] * x[k, i, n]
    s.t.  sum over i, n of x[k, i, n] = 1                             for each site k
          sum over k of rate * work[k, i, n] * x[k, i, n]
                <= cap * level[i, n] * z[i, n]                        for each i, n
          sum over n of z[i, n] <= 1                                  for each endpoint i

with work in seconds of service per run. The dual of a capacity row is the change of expected
latency (s per run) per busy slot; times the arrival rate it is run-seconds lost per slot second.
Higher levels are slower, so the price of an endpoint counts both what its scarce slots are worth
to others and how far more load would slow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from ortools.linear_solver.python import model_builder

from planner.domain.errors import Infeasible, SolveError
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.plan import PLAN_TICK_S
from planner.domain.run import RunSpec
from planner.domain.workflow import Workflow
from planner.graph.analysis import criticality
from planner.solve.bounds import carried_rate_rps
from planner.solve.instance import build_instance
from planner.solve.question import Instance

__all__ = ["capacity_prices", "instance_prices", "site_criticality"]


def capacity_prices(
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    scenarios: Sequence[RunSpec],
    *,
    arrival_rate_rps: float,
) -> dict[str, float]:
    """Return, by endpoint id, expected seconds of run latency per second of slot time, >= 0.

    Raises
    ------
    Infeasible
        If the fleet cannot carry the rate, or a call site fits no endpoint.
    """
    instance = build_instance(
        workflow, fleet, estimates, scenarios, arrival_rate_rps=arrival_rate_rps, run_classes=1
    )
    return instance_prices(instance, site_criticality(instance, scenarios))


def site_criticality(instance: Instance, *samples: Sequence[RunSpec]) -> dict[str, float]:
    """Return the share of each site's calls on a critical path, at the fleet's mean speed.

    ``samples`` are the runs of each workflow that the instance was made from.
    """
    ticks = instance.service_ticks[:, :, 0].mean(axis=1) + instance.delay_ticks
    position = 0
    out: dict[str, float] = {}
    for source, runs in zip(instance.sources, samples, strict=True):
        durations: dict[str, list[float]] = {}
        for run in runs:
            end = position + len(run.tasks)
            durations[run.run_id] = (ticks[position:end] * PLAN_TICK_S).tolist()
            position = end
        shares = criticality(runs, lambda run, own=durations: own[run.run_id])  # type: ignore[misc]
        names = dict(zip(source.paths, (instance.sites[k] for k in source.sites), strict=True))
        out |= {names[str(site)]: share for site, share in shares.items()}
    return out


def instance_prices(instance: Instance, site_weights: Mapping[str, float]) -> dict[str, float]:
    """Return the prices of an instance; ``site_weights`` are criticalities, 1 where absent."""
    model = model_builder.Model()  # type: ignore[no-untyped-call]
    chosen = [
        [model.new_num_var(0.0, 1.0, f"level_{i}_{n}") for n in range(len(grid))]
        for i, grid in enumerate(instance.levels)
    ]
    for levels in chosen:
        model.add_linear_constraint(sum(levels), ub=1.0)
    cost: list[model_builder.LinearExprT] = []
    load: dict[tuple[int, int], list[model_builder.LinearExprT]] = {}
    for k in np.flatnonzero(instance.work_s.max(axis=(1, 2)) > 0).tolist():
        weight = site_weights.get(instance.sites[k], 1.0)
        flows = []
        for m in np.flatnonzero(instance.allowed[k]).tolist():
            i, p = int(instance.option_endpoint[m]), int(instance.option_prefill[m])
            for n in range(len(instance.levels[i])):
                work, lane = float(instance.work_s[k, m, n]), float(instance.lane_work_s[k, m])
                flow = model.new_num_var(0.0, 1.0, f"flow_{k}_{m}_{n}")
                flows.append(flow)
                cost.append(weight * (work + lane) * flow)
                load.setdefault((i, n), []).append(instance.arrival_rate_rps * work * flow)
                if p >= 0:
                    load.setdefault((p, 0), []).append(instance.arrival_rate_rps * lane * flow)
        model.add_linear_constraint(sum(flows), lb=1.0, ub=1.0)
    rows = {}
    for (i, n), terms in load.items():
        busy = model.new_num_var(0.0, float(instance.levels[i][n]), f"busy_{i}_{n}")
        model.add_linear_constraint(sum([*terms, -1.0 * busy]), lb=0.0, ub=0.0)
        room = instance.utilisation_cap * instance.levels[i][n]
        rows[i, n] = busy, model.add_linear_constraint(busy - room * chosen[i][n], ub=0.0)
    model.minimize(sum(cost))
    solver = model_builder.Solver("GLOP")
    status = solver.solve(model)
    if status == model_builder.SolveStatus.INFEASIBLE:
        raise Infeasible(
            f"no prices at {instance.arrival_rate_rps:.4g} runs/s: the fleet carries at most "
            f"{carried_rate_rps(instance):.4g}"
        )
    if status != model_builder.SolveStatus.OPTIMAL:
        raise SolveError(f"the price problem was not solved: {status.name}")
    prices = {}
    for i, endpoint in enumerate(instance.endpoints):
        own = [rows[i, n] for n in range(len(instance.levels[i])) if (i, n) in rows]
        busy_calls = [max(0.0, solver.value(busy)) for busy, _ in own]
        duals = [max(0.0, -solver.dual_value(row)) for _, row in own]
        total = sum(busy_calls)
        mean = sum(b * d for b, d in zip(busy_calls, duals, strict=True)) / total if total else 0.0
        prices[endpoint] = instance.arrival_rate_rps * mean
    return prices
