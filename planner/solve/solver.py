"""Makes plans that are ready to be verified: sample, arrange, solve stage by stage.

`planner.solve.search` says what each status of the solver means, `planner.solve.reasons` why there
may be no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Fleet
from planner.domain.objective import MEAN, Objective
from planner.domain.plan import Plan
from planner.domain.run import RunSpec
from planner.domain.workflow import Workflow
from planner.graph.sampling import scenarios as draw_scenarios
from planner.solve.bounds import critical_path_cost
from planner.solve.budget import Budget
from planner.solve.heuristics import Solution
from planner.solve.hints import carried_over
from planner.solve.instance import Demand, build_mix
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.reasons import check_limits
from planner.solve.result import PlanResult, Progress, Proof, make_plans
from planner.solve.sample import enough_scenarios
from planner.solve.search import POLISH, Stage, StageResult, run_stage
from planner.solve.timing import Timing, build_timing

__all__ = [
    "Budget",
    "Demand",
    "PlanResult",
    "Progress",
    "draw_samples",
    "solve_instance",
    "solve_mix",
    "solve_plan",
]


def solve_plan(
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    arrival_rate_rps: float,
    run_classes: int = 4,
    scenarios: int | Literal["auto"] = 8,
    target_error: float = 0.02,
    seed: int = 0,
    budget: Budget | None = None,
    progress: Callable[[Progress], None] | None = None,
    hint: Plan | None = None,
    objective: Objective = MEAN,
    deadline_s: float | None = None,
    hard_deadline: bool = False,
) -> PlanResult:
    """Plan one workflow on a fleet; see `solve_mix` for the parameters.

    Parameters
    ----------
    arrival_rate_rps
        Runs per second, > 0.
    deadline_s, hard_deadline
        Seconds a run may take, and whether every scenario has to keep it.
    hint
        An earlier plan to start from, if it is better than what is found without.
    """
    demand = Demand(
        workflow=workflow, rate_rps=arrival_rate_rps, deadline_s=deadline_s, hard=hard_deadline
    )
    return solve_mix(
        [demand],
        fleet,
        estimates,
        run_classes=run_classes,
        scenarios=scenarios,
        target_error=target_error,
        seed=seed,
        budget=budget,
        progress=progress,
        hint=() if hint is None else (hint,),
        objective=objective,
    )


def draw_samples(
    demands: Sequence[Demand], estimates: EstimateTable, count: int, seed: int
) -> tuple[tuple[RunSpec, ...], ...]:
    """Return ``count`` sampled runs of each workflow."""
    return tuple(
        draw_scenarios(
            demand.workflow,
            estimates.workflows.get(demand.workflow.content_hash, WorkflowEstimate()),
            count,
            seed,
            defaults=estimates,
        )
        for demand in demands
    )


def solve_mix(
    demands: Sequence[Demand],
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    run_classes: int = 4,
    scenarios: int | Literal["auto"] = 8,
    target_error: float = 0.02,
    seed: int = 0,
    budget: Budget | None = None,
    progress: Callable[[Progress], None] | None = None,
    hint: Sequence[Plan] = (),
    objective: Objective = MEAN,
) -> PlanResult:
    """Plan several workflows together on one fleet.

    Parameters
    ----------
    demands
        The workflows with their rates, weights and deadlines; at least one, each once.
    fleet, estimates
        Where to place them, and the forecasts.
    run_classes
        Equal shares of each workflow's traffic with a placement each, >= 1.
    scenarios, seed
        Sampled runs of each workflow, and their seed. ``auto`` takes as many as
        ``target_error`` asks for, which the plan's notes report.
    target_error
        Standard error of the mean that is aimed at, relative to it; > 0.
    budget
        15 s of wall clock on two workers unless given; shared by the stages of an objective.
    progress
        Called with each improvement, from a thread of the solver.
    hint
        Earlier plans of these workflows to start from, if that is better; they need not fit.
    objective
        What to minimise.

    Raises
    ------
    InvalidInput
        If a number is out of range or there is nothing to plan.
    Infeasible
        If a call fits no endpoint, a hard deadline cannot be kept, or the fleet cannot carry the
        load, with the figures.
    NoSolutionFound
        If the budget ended before a first plan.
    """
    if not demands:
        raise InvalidInput("no workflow", where="plan", remedy="give at least one")

    def arranged(count: int) -> tuple[Instance, tuple[tuple[RunSpec, ...], ...]]:
        samples = draw_samples(demands, estimates, count, seed)
        return build_mix(demands, fleet, estimates, samples, run_classes=run_classes), samples

    notes: dict[str, float] = {}
    if scenarios == "auto":
        scenarios, error = enough_scenarios(lambda n: arranged(n)[0], target_error)
        notes = {"target_error": target_error, "scenario_error": error}
    instance, samples = arranged(scenarios)
    result = solve_instance(
        instance,
        *samples,
        seed=seed,
        budget=budget,
        progress=progress,
        hint=hint,
        objective=objective,
    )
    if not notes:
        return result
    plans = tuple(replace(plan, notes={**plan.notes, **notes}) for plan in result.plans)
    return replace(result, plans=plans)


def solve_instance(
    instance: Instance,
    *samples: tuple[RunSpec, ...],
    seed: int = 0,
    budget: Budget | None = None,
    progress: Callable[[Progress], None] | None = None,
    hint: Sequence[Plan] = (),
    objective: Objective = MEAN,
) -> PlanResult:
    """Plan an instance made from ``samples``, the runs of each workflow; see `solve_mix`."""
    budget = budget or Budget()
    timing = build_timing(instance)
    carried = check_limits(instance, timing)
    log: list[Progress] = []
    stages = [Goal(instance, stage) for stage in objective.stages]
    done: list[StageResult] = []
    caps: list[tuple[Goal, int]] = []
    for goal in stages:

        def note(time_s: float, cost: float, bound: float, goal: Goal = goal) -> None:
            log.append(Progress(time_s, goal.seconds(cost), goal.seconds(bound)))
            if progress is not None:
                progress(log[-1])

        stage = Stage(goal=goal, caps=tuple(caps), start=_start(instance, timing, goal, done, hint))
        result = run_stage(
            instance, timing, stage, seed=seed, budget=_share(budget, len(stages)),
            carried_rps=carried, note=note,
        )  # fmt: skip
        note(result.wall_s, result.solution.cost, result.bound)
        done.append(result)
        caps.append((goal, int(result.solution.cost * (1 + objective.tolerance))))
    solution = done[-1].solution
    price = done[0].relaxed
    proof = Proof(
        bounds=tuple(one.bound for one in done),
        closed=all(one.bound >= one.solution.cost for one in done),
        wall_s=sum(one.wall_s for one in done),
        deterministic_time=sum(one.deterministic_time for one in done),
        notes=_notes(instance, timing, stages[0], done[0], carried, budget),
        token_price=np.zeros(len(instance.endpoints)) if price is None else price.token_price,
    )
    return PlanResult(
        plans=make_plans(
            instance, timing, solution, objective, proof, seed=seed,
            reproducible=budget.wall_s is None,
        ),
        samples=samples,
        log=tuple(log),
        instance=instance,
        timing=timing,
        solution=solution,
        token_price=proof.token_price,
        wall_s=proof.wall_s,
    )  # fmt: skip


def _start(
    instance: Instance,
    timing: Timing,
    goal: Goal,
    done: Sequence[StageResult],
    hint: Sequence[Plan],
) -> Solution | None:
    """Return the last stage's plan, or earlier plans mended, valued by this stage's goal."""
    if done:
        last = done[-1].solution
        return replace(last, cost=int(goal.cost(last.latencies(timing)[np.newaxis])[0]))
    if not hint:
        return None
    return carried_over(hint, instance, timing, goal, effort=POLISH)


def _share(budget: Budget, stages: int) -> Budget:
    """Return the budget of one of several stages."""
    return replace(
        budget,
        wall_s=None if budget.wall_s is None else budget.wall_s / stages,
        deterministic=None if budget.deterministic is None else budget.deterministic / stages,
    )


def _notes(
    instance: Instance,
    timing: Timing,
    goal: Goal,
    first: StageResult,
    carried: float,
    budget: Budget,
) -> dict[str, float]:
    notes = {
        "critical_path_bound_s": goal.seconds(critical_path_cost(instance, timing, goal)),
        "carried_rate_rps": carried,
        "gap_limit": budget.relative_gap,
    }
    if first.first is not None:
        notes["greedy_objective_s"] = goal.seconds(first.first.cost)
    return notes
