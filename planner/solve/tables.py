"""The dispatch table of workflows planned together, for loads around their rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.dispatch.table import (
    TAIL_WEIGHT,
    DispatchTable,
    LoadLevel,
    Tuning,
    compile_table,
    merge_tables,
)
from planner.domain.errors import Infeasible, SolveError
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.objective import MEAN, Objective
from planner.domain.plan import Plan
from planner.solve.budget import Budget
from planner.solve.instance import Demand, build_mix
from planner.solve.prices import instance_prices, site_criticality
from planner.solve.result import PlanResult
from planner.solve.solver import draw_samples, solve_mix
from planner.verify import verify_plans

__all__ = ["LOAD_FACTORS", "Rung", "checked_mix", "mix_table", "plan_ladder", "table_of"]

LOAD_FACTORS = (0.5, 0.75, 1.0, 1.25)
"""Loads that get a bucket of their own, relative to the expected rates."""
_PRICE_SAMPLE = 32


@dataclass(frozen=True, slots=True)
class Rung:
    """Plans for one load, and the price of a slot second on each endpoint."""

    result: PlanResult
    prices: dict[str, float]


def checked_mix(
    demands: Sequence[Demand],
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    run_classes: int = 4,
    scenarios: int = 8,
    seed: int = 0,
    budget: Budget | None = None,
    objective: Objective = MEAN,
    hint: Sequence[Plan] = (),
) -> PlanResult:
    """Return plans that the independent checker has accepted; see `solve_mix`.

    Raises
    ------
    SolveError
        If there is no plan, or the checker finds a rule broken (a bug, reported as such).
    """
    result = solve_mix(
        demands,
        fleet,
        estimates,
        run_classes=run_classes,
        scenarios=scenarios,
        seed=seed,
        budget=budget,
        objective=objective,
        hint=hint,
    )
    report = verify_plans(
        result.plans, [one.workflow for one in demands], fleet, estimates, result.samples
    )
    if not report.ok:
        raise SolveError(
            "the plan breaks rules of the independent checker: "
            + "; ".join(str(violation) for violation in report.violations)
        )
    return result


def mix_table(
    demands: Sequence[Demand],
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    base: PlanResult | None = None,
    factors: Sequence[float] = LOAD_FACTORS,
    budget: Budget | None = None,
    seed: int = 0,
    objective: Objective = MEAN,
    run_classes: int = 4,
    scenarios: int = 8,
    progress: Callable[[str], object] = lambda _: None,
) -> DispatchTable:
    """Return one table with the rows of all workflows; see `plan_ladder`."""
    rungs = plan_ladder(
        demands,
        fleet,
        estimates,
        base=base,
        factors=factors,
        budget=budget,
        seed=seed,
        objective=objective,
        run_classes=run_classes,
        scenarios=scenarios,
        progress=progress,
    )
    return table_of(rungs, demands, fleet, estimates)


def plan_ladder(
    demands: Sequence[Demand],
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    base: PlanResult | None = None,
    factors: Sequence[float] = LOAD_FACTORS,
    budget: Budget | None = None,
    seed: int = 0,
    objective: Objective = MEAN,
    run_classes: int = 4,
    scenarios: int = 8,
    hint: Sequence[Plan] = (),
    progress: Callable[[str], object] = lambda _: None,
) -> list[Rung]:
    """Return checked plans at increasing loads, as far as the fleet carries them.

    Parameters
    ----------
    demands
        The workflows at their expected rates.
    base
        Their plans at exactly these rates, if they are already made.
    factors
        Loads relative to the rates, increasing; at least one.
    budget
        Of each plan; 5 s of wall clock unless given.
    run_classes, scenarios, objective
        Of each plan, see `planner.solve.solver.solve_mix`.
    hint
        Plans of an earlier ladder, by load and workflow; they need not fit.

    Raises
    ------
    Infeasible
        If not even the lowest load fits the fleet.
    SolveError
        If the checker finds a rule broken (a bug, reported as such).
    """
    budget = budget or Budget(wall_s=5.0, relative_gap=0.02)
    made: list[Rung] = []
    for position, factor in enumerate(factors):
        loaded = [replace(one, rate_rps=factor * one.rate_rps) for one in demands]
        try:
            result = base
            if result is None or factor != 1.0:
                result = checked_mix(
                    loaded, fleet, estimates, run_classes=run_classes, scenarios=scenarios,
                    seed=seed, budget=budget, objective=objective,
                    hint=_of_load(hint, position),
                )  # fmt: skip
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
        made.append(Rung(result, prices))
    return made


def table_of(
    rungs: Sequence[Rung], demands: Sequence[Demand], fleet: Fleet, estimates: EstimateTable
) -> DispatchTable:
    """Return the table of plans at increasing loads, a bucket for each.

    Plans that mind the tail (CVaR) give a table that minds it at dispatch too.
    """
    terms = rungs[0].result.plan.objective.terms
    tail = any(term.kind == "cvar" for term in terms)
    tuning = Tuning(tail_weight=TAIL_WEIGHT) if tail else Tuning()
    slots = sum(endpoint.max_num_seqs for endpoint in fleet.endpoints)
    bounds: list[float] = []
    for position, rung in enumerate(rungs):
        # Half way to the next load planned for; the last bucket is open.
        bound = math.inf
        if position + 1 < len(rungs):
            busy = rung.result.busy_slots + rungs[position + 1].result.busy_slots
            bound = max(busy / (2 * slots), (bounds[-1] if bounds else 0.0) + 1e-6)
        bounds.append(bound)
    return merge_tables(
        [
            compile_table(
                [
                    LoadLevel(occupancy=bound, plan=rung.result.plans[w], prices=rung.prices)
                    for bound, rung in zip(bounds, rungs, strict=True)
                ],
                demand.workflow,
                fleet,
                estimates,
                tuning=tuning,
            )
            for w, demand in enumerate(demands)
        ]
    )


def _of_load(hint: Sequence[Plan], position: int) -> list[Plan]:
    """Return the plan of each workflow that a ladder had at a position, or its last."""
    own: dict[str, list[Plan]] = {}
    for plan in hint:
        own.setdefault(plan.workflow_hash, []).append(plan)
    return [plans[min(position, len(plans) - 1)] for plans in own.values()]


def _prices(
    demands: Sequence[Demand], fleet: Fleet, estimates: EstimateTable, seed: int
) -> dict[str, float]:
    samples = draw_samples(demands, estimates, _PRICE_SAMPLE, seed)
    instance = build_mix(demands, fleet, estimates, samples, run_classes=1)
    return instance_prices(instance, site_criticality(instance, *samples))
