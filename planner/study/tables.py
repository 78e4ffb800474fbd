"""Plans at several loads made into one dispatch table; used by commands and studies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from planner.dispatch.table import DispatchTable, LoadLevel, Tuning, compile_table
from planner.domain.errors import Infeasible, InvalidInput, SolveError
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Fleet
from planner.domain.plan import Plan
from planner.domain.workflow import Workflow
from planner.graph.sampling import scenarios
from planner.solve.prices import capacity_prices
from planner.solve.solver import Budget, PlanResult, solve_plan
from planner.verify import verify_plan

__all__ = ["LOAD_FACTORS", "busy_slots", "checked_plan", "plan_table"]

LOAD_FACTORS = (0.5, 0.75, 1.0, 1.25)
"""Loads that get a bucket of their own, relative to the expected rate."""


def checked_plan(
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    rate_rps: float,
    budget: Budget | None = None,
    seed: int = 0,
    run_classes: int = 4,
    sample: int = 8,
) -> PlanResult:
    """Return a plan that the independent checker has accepted.

    Raises
    ------
    SolveError
        If there is no plan, or the checker finds a rule broken (a bug, reported as such).
    """
    result = solve_plan(
        workflow,
        fleet,
        estimates,
        arrival_rate_rps=rate_rps,
        run_classes=run_classes,
        scenarios=sample,
        seed=seed,
        budget=budget,
    )
    report = verify_plan(result.plan, workflow, fleet, estimates, result.scenarios)
    if report.violations:
        raise SolveError(
            "the plan breaks rules of the independent checker: "
            + "; ".join(str(violation) for violation in report.violations)
        )
    return result


def busy_slots(result: PlanResult) -> float:
    """Return how many calls a plan expects to be in service at the same time."""
    instance, solution = result.instance, result.solution
    busy = 0.0
    for placement in solution.placements:
        for site, endpoint in enumerate(placement):
            level = solution.levels[endpoint]
            busy += float(instance.work_s[site, endpoint, level])
    return busy * instance.arrival_rate_rps / instance.run_classes


def plan_table(
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    rate_rps: float,
    base: PlanResult | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    factors: Sequence[float] = LOAD_FACTORS,
    progress: Callable[[str], object] = lambda _: None,
) -> DispatchTable:
    """Return the dispatch table of a workflow for loads around a rate.

    Parameters
    ----------
    rate_rps
        Expected runs per second.
    base
        The plan at exactly that rate, if it is already made.
    budget
        For each plan; 5 s each unless given.
    factors
        Loads relative to the rate, increasing. Loads beyond the fleet's capacity are left out;
        the last bucket is open and keeps the plan of the highest load that fits.

    Raises
    ------
    Infeasible
        If not even the lowest load fits the fleet.
    """
    budget = budget or Budget(wall_s=5.0, relative_gap=0.02)
    estimate = estimates.workflows.get(workflow.content_hash, WorkflowEstimate())
    sample = scenarios(workflow, estimate, 32, seed, defaults=estimates)
    made: list[tuple[float, Plan, dict[str, float]]] = []
    failure: Infeasible | None = None
    for factor in factors:
        rate = factor * rate_rps
        try:
            if base is not None and factor == 1.0:
                result = base
            else:
                result = checked_plan(
                    workflow, fleet, estimates, rate_rps=rate, budget=budget, seed=seed
                )
            prices = capacity_prices(workflow, fleet, estimates, sample, arrival_rate_rps=rate)
        except Infeasible as error:
            failure = error
            progress(f"load {factor:.0%} and above: no bucket of their own, {error}")
            break
        slots = busy_slots(result)
        plan = result.plan
        progress(
            f"load {factor:.0%}: {plan.objective_s:.2f} s expected, bound {plan.bound_s:.2f} s, "
            f"{slots:.1f} calls in service"
        )
        made.append((slots, plan, prices))
    if not made:
        if failure is None:
            raise InvalidInput("no load factor", where="factors", remedy="give at least one")
        raise failure
    total = sum(endpoint.max_num_seqs for endpoint in fleet.endpoints)
    levels: list[LoadLevel] = []
    for position, (slots, plan, prices) in enumerate(made):
        # Half way to the next load planned for; the last bucket is open.
        bound = math.inf
        if position + 1 < len(made):
            bound = max(
                (slots + made[position + 1][0]) / (2 * total),
                (levels[-1].occupancy if levels else 0.0) + 1e-6,
            )
        levels.append(LoadLevel(occupancy=bound, plan=plan, prices=prices))
    # Prices enter at face value; simulation decides how much of them to believe.
    return compile_table(levels, workflow, fleet, estimates, tuning=Tuning())
