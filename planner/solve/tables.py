"""The dispatch table of several workflows planned together, for loads around their rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from planner.dispatch.table import DispatchTable, LoadLevel, compile_table, merge_tables
from planner.domain.errors import Infeasible, SolveError
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Fleet
from planner.domain.objective import MEAN, Objective
from planner.graph.sampling import scenarios as draw_scenarios
from planner.solve.budget import Budget
from planner.solve.instance import Demand, build_mix
from planner.solve.prices import instance_prices, site_criticality
from planner.solve.result import PlanResult
from planner.solve.solver import solve_mix
from planner.verify import verify_plans

__all__ = ["LOAD_FACTORS", "mix_table"]

LOAD_FACTORS = (0.5, 0.75, 1.0, 1.25)
"""Loads that get a bucket of their own, relative to the expected rates."""
_PRICE_SAMPLE = 32


def mix_table(
    demands: Sequence[Demand],
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    base: PlanResult,
    budget: Budget,
    seed: int = 0,
    objective: Objective = MEAN,
    run_classes: int,
    scenarios: int,
    progress: Callable[[str], object] = lambda _: None,
) -> DispatchTable:
    """Return one table with the rows of all workflows.

    Parameters
    ----------
    demands
        The workflows at their expected rates.
    base
        Their plans at exactly these rates.
    budget, run_classes, scenarios
        Of each further plan, see `planner.solve.solver.solve_mix`.

    Raises
    ------
    Infeasible
        If not even the lowest load fits the fleet.
    SolveError
        If the checker finds a rule broken (a bug, reported as such).
    """
    made: list[tuple[PlanResult, dict[str, float]]] = []
    for factor in LOAD_FACTORS:
        loaded = [replace(one, rate_rps=factor * one.rate_rps) for one in demands]
        try:
            result = base
            if factor != 1.0:
                result = solve_mix(
                    loaded, fleet, estimates, run_classes=run_classes, scenarios=scenarios,
                    seed=seed, budget=budget, objective=objective,
                )  # fmt: skip
                _check(result, loaded, fleet, estimates)
            prices = _prices(loaded, fleet, estimates, seed)
        except Infeasible as error:
            if not made:
                raise
            progress(f"load {factor:.0%} and above: no bucket of their own, {error}")
            break
        progress(
            f"load {factor:.0%}: {result.plan.values['mean']:.2f} s expected, objective "
            f"{result.plan.objective_s:.2f} s, bound {result.plan.bound_s:.2f} s, "
            f"{result.busy_slots:.1f} calls in service"
        )
        made.append((result, prices))
    slots = sum(endpoint.max_num_seqs for endpoint in fleet.endpoints)
    bounds: list[float] = []
    for position, (result, _) in enumerate(made):
        # Half way to the next load planned for; the last bucket is open.
        bound = math.inf
        if position + 1 < len(made):
            middle = (result.busy_slots + made[position + 1][0].busy_slots) / (2 * slots)
            bound = max(middle, (bounds[-1] if bounds else 0.0) + 1e-6)
        bounds.append(bound)
    return merge_tables(
        [
            compile_table(
                [
                    LoadLevel(occupancy=bound, plan=result.plans[w], prices=prices)
                    for bound, (result, prices) in zip(bounds, made, strict=True)
                ],
                demand.workflow,
                fleet,
                estimates,
            )
            for w, demand in enumerate(demands)
        ]
    )


def _check(
    result: PlanResult, demands: Sequence[Demand], fleet: Fleet, estimates: EstimateTable
) -> None:
    report = verify_plans(
        result.plans, [one.workflow for one in demands], fleet, estimates, result.samples
    )
    if not report.ok:
        raise SolveError(
            "the plan breaks rules of the independent checker: "
            + "; ".join(str(violation) for violation in report.violations)
        )


def _prices(
    demands: Sequence[Demand], fleet: Fleet, estimates: EstimateTable, seed: int
) -> dict[str, float]:
    samples = [
        draw_scenarios(
            one.workflow,
            estimates.workflows.get(one.workflow.content_hash, WorkflowEstimate()),
            _PRICE_SAMPLE,
            seed,
            defaults=estimates,
        )
        for one in demands
    ]
    instance = build_mix(demands, fleet, estimates, samples, run_classes=1)
    return instance_prices(instance, site_criticality(instance, *samples))
