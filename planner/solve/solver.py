"""Makes a verified-ready plan: sample, arrange, greedy plan, CP-SAT with that plan as the hint.

Every solver status has its own outcome: OPTIMAL and FEASIBLE give a plan; INFEASIBLE raises
`Infeasible`; MODEL_INVALID raises `ModelInvalid`; UNKNOWN gives the greedy plan with the bound
found, or raises `NoSolutionFound` if there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from planner.domain.errors import Infeasible, ModelInvalid, NoSolutionFound
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.fleet import Fleet
from planner.domain.plan import Assignment, Plan
from planner.domain.run import RunSpec
from planner.domain.workflow import Workflow
from planner.graph.sampling import scenarios as draw_scenarios
from planner.solve.bounds import carried_rate_rps, critical_path_ticks
from planner.solve.budget import Budget
from planner.solve.constraints import add_constraints
from planner.solve.heuristics import Solution, greedy_solution
from planner.solve.hints import carried_over
from planner.solve.instance import Instance, Ints, build_instance
from planner.solve.objective import mean_latency_s, minimise_latency
from planner.solve.relaxation import Relaxation, relax
from planner.solve.rounding import rounded_placements
from planner.solve.timing import Timing, build_timing
from planner.solve.variables import Variables

__all__ = ["Budget", "PlanResult", "Progress", "build_model", "solve_instance", "solve_plan"]

_POLISH = 2e7
"""Effort of the last descent from a rounded plan, in which levels follow."""


@dataclass(frozen=True, slots=True)
class Progress:
    """State of the search: seconds since it began, best objective and bound in seconds."""

    time_s: float
    objective_s: float
    bound_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A plan with what led to it.

    Parameters
    ----------
    plan
        The plan.
    scenarios
        The runs its objective is stated over.
    log
        One row per improvement, and a last one.
    instance, timing, solution
        The question and the answer in arrays.
    wall_s
        Search time; the plan itself carries it only when the budget is by the wall clock.
    """

    plan: Plan
    scenarios: tuple[RunSpec, ...]
    log: tuple[Progress, ...]
    instance: Instance
    timing: Timing
    solution: Solution
    wall_s: float


def solve_plan(
    workflow: Workflow,
    fleet: Fleet,
    estimates: EstimateTable,
    *,
    arrival_rate_rps: float,
    run_classes: int = 4,
    scenarios: int = 8,
    seed: int = 0,
    budget: Budget | None = None,
    progress: Callable[[Progress], None] | None = None,
    hint: Plan | None = None,
) -> PlanResult:
    """Plan one workflow on a fleet.

    Parameters
    ----------
    workflow, fleet, estimates
        What to place, where, and the forecasts.
    arrival_rate_rps
        Runs per second, > 0.
    run_classes
        Equal shares of the traffic with a placement each, >= 1.
    scenarios, seed
        Size and seed of the sample the objective is the mean of.
    budget
        15 s of wall clock on two workers unless given.
    progress
        Called with each improvement, from a thread of the solver.
    hint
        An earlier plan to start from, if it is better than what is found without.

    Raises
    ------
    InvalidInput
        If a number is out of range or there is nothing to plan.
    Infeasible
        If a call fits no endpoint or the fleet cannot carry the load, with the figures.
    NoSolutionFound
        If the budget ended before a first plan.
    """
    estimate = estimates.workflows.get(workflow.content_hash, WorkflowEstimate())
    runs = draw_scenarios(workflow, estimate, scenarios, seed, defaults=estimates)
    instance = build_instance(
        workflow,
        fleet,
        estimates,
        runs,
        arrival_rate_rps=arrival_rate_rps,
        run_classes=run_classes,
    )
    return solve_instance(instance, runs, seed=seed, budget=budget, progress=progress, hint=hint)


def solve_instance(
    instance: Instance,
    runs: tuple[RunSpec, ...],
    *,
    seed: int = 0,
    budget: Budget | None = None,
    progress: Callable[[Progress], None] | None = None,
    hint: Plan | None = None,
) -> PlanResult:
    """Plan an instance made from ``runs``; see `solve_plan`."""
    budget = budget or Budget()
    timing = build_timing(instance)
    carried = carried_rate_rps(instance)
    if carried < instance.arrival_rate_rps * (1 - 1e-9):
        raise Infeasible(
            f"the load asks for {instance.arrival_rate_rps:.4g} runs/s; at "
            f"{instance.utilisation_cap:.0%} of its slots the fleet carries at most {carried:.4g}; "
            f"lower the rate or add endpoints"
        )
    relaxed = relax(instance, timing)
    least = critical_path_ticks(instance, timing)
    if relaxed is not None:
        least = max(least, relaxed.bound_ticks)
    start = _first_plan(instance, timing, relaxed, budget.relative_gap, seed)
    if hint is not None:
        carried_plan = carried_over(hint, instance, timing, effort=_POLISH)
        if carried_plan is not None:
            known = (carried_plan,) if start is None else (start, carried_plan)
            start = min(known, key=lambda one: one.objective_ticks)
    log = _Log(instance, progress)
    if start is not None:
        log.note(0.0, start.objective_ticks, least)
        # The relaxation's bound is often all the proof that is asked for.
        if start.objective_ticks - least <= budget.relative_gap * start.objective_ticks:
            return _result(instance, timing, runs, start, least, seed, budget, log, carried, start)
    model, variables = build_model(instance, timing, least)
    if start is not None:
        _add_hint(model, variables, start)

    solver = cp_model.CpSolver()
    budget.apply(solver, seed)
    status = solver.solve(model, log)
    solution = _outcome(status, solver, model, variables, start, carried)
    # The objective is a whole number of ticks, so the bound may be rounded up to one.
    bound = max(math.ceil(solver.best_objective_bound - 1e-6), least)
    return _result(
        instance, timing, runs, solution, bound, seed, budget, log, carried, start, solver
    )


def build_model(
    instance: Instance, timing: Timing, least: int
) -> tuple[cp_model.CpModel, Variables]:
    """Return the model and its variables; ``least`` is a proven bound in ticks."""
    model = cp_model.CpModel()
    variables = Variables(model, instance, timing)
    add_constraints(model, variables)
    minimise_latency(model, variables, least)
    return model, variables


def _first_plan(
    instance: Instance,
    timing: Timing,
    relaxed: Relaxation | None,
    relative_gap: float,
    seed: int,
) -> Solution | None:
    """Return the best plan without search: rounded from the relaxation, else greedy."""
    if relaxed is not None:
        rounded = rounded_placements(
            instance, timing, relaxed, relative_gap=relative_gap, seed=seed
        )
        if rounded is not None:
            return greedy_solution(instance, timing, start=rounded, effort=_POLISH)
    return greedy_solution(instance, timing)


def _result(
    instance: Instance,
    timing: Timing,
    runs: tuple[RunSpec, ...],
    solution: Solution,
    bound: int,
    seed: int,
    budget: Budget,
    log: _Log,
    carried: float,
    start: Solution | None,
    solver: cp_model.CpSolver | None = None,
) -> PlanResult:
    """Return the result; ``solver`` is None if the first plan was close enough to its bound."""
    bound = min(bound, solution.objective_ticks)
    wall_s = 0.0 if solver is None else solver.wall_time
    spent = 0.0 if solver is None else solver.response_proto.deterministic_time
    log.note(wall_s, solution.objective_ticks, bound)
    reproducible = budget.wall_s is None
    notes = {
        "critical_path_bound_s": mean_latency_s(critical_path_ticks(instance, timing), instance),
        "carried_rate_rps": carried,
        "gap_limit": budget.relative_gap,
    }
    if start is not None:
        notes["greedy_objective_s"] = mean_latency_s(start.objective_ticks, instance)
    plan = Plan(
        workflow_hash=instance.workflow_hash,
        fleet_hash=instance.fleet_hash,
        arrival_rate_rps=instance.arrival_rate_rps,
        run_classes=instance.run_classes,
        assignments=tuple(
            Assignment(run_class=r, site=site, endpoint=instance.endpoints[i])
            for r, row in enumerate(solution.placements.tolist())
            for site, i in zip(instance.sites, row, strict=True)
        ),
        levels={
            instance.endpoints[i]: instance.levels[i][solution.levels[i]]
            for i in np.unique(solution.placements).tolist()
        },
        objective_s=mean_latency_s(solution.objective_ticks, instance),
        bound_s=mean_latency_s(bound, instance),
        status="optimal" if bound == solution.objective_ticks else "feasible",
        scenarios=instance.scenarios,
        seed=seed,
        wall_s=0.0 if reproducible else round(wall_s, 3),
        deterministic_time=round(spent, 6),
        notes=notes,
    )
    return PlanResult(
        plan=plan,
        scenarios=runs,
        log=tuple(log.rows),
        instance=instance,
        timing=timing,
        solution=solution,
        wall_s=wall_s,
    )


def _outcome(
    status: cp_model.CpSolverStatus,
    solver: cp_model.CpSolver,
    model: cp_model.CpModel,
    variables: Variables,
    greedy: Solution | None,
    carried_rps: float,
) -> Solution:
    """Return the best solution, or raise what the solver's status means."""
    instance = variables.instance
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = _read(solver, variables)
        return min((s for s in (found, greedy) if s is not None), key=lambda s: s.objective_ticks)
    if status == cp_model.MODEL_INVALID:
        raise ModelInvalid(f"CP-SAT refused the plan model: {model.validate()}")
    if status == cp_model.INFEASIBLE:
        raise Infeasible(
            f"{instance.arrival_rate_rps:.4g} runs/s cannot be placed in {instance.run_classes} "
            f"whole run classes, though divided freely the fleet would carry {carried_rps:.4g}; "
            f"use more classes or lower the rate"
        )
    if greedy is not None:
        return greedy
    raise NoSolutionFound(
        f"no plan within {solver.wall_time:.1f} s for {len(instance.sites)} call sites on "
        f"{len(instance.endpoints)} endpoints; raise the time limit, or lower classes or scenarios"
    )


def _add_hint(model: cp_model.CpModel, v: Variables, hint: Solution) -> None:
    """Hint every variable, so that the solver starts from a complete solution."""
    instance = v.instance
    for i, grid in enumerate(instance.levels):
        for n in range(len(grid)):
            model.add_hint(v.level(i, n), int(hint.levels[i] == n))
    sites = np.arange(len(instance.sites))
    for r, row in enumerate(hint.placements):
        for k in sites.tolist():
            for i, n in v.modes(k):
                model.add_hint(v.use(r, k, i, n), int(row[k] == i and hint.levels[i] == n))
        sums: Ints = v.timing.ticks[:, sites, row, hint.levels[row]].sum(axis=1)
        starts = v.timing.join_starts(sums[np.newaxis])[0]
        for j in range(len(v.timing.joins)):
            model.add_hint(v.start(r, j), int(starts[j]))


def _read(solver: cp_model.CpSolver, v: Variables) -> Solution:
    """Return the solver's solution, its objective recomputed from placements and levels."""
    instance = v.instance
    levels = np.zeros(len(instance.endpoints), dtype=np.int64)
    for i, grid in enumerate(instance.levels):
        levels[i] = next(n for n in range(len(grid)) if solver.boolean_value(v.level(i, n)))
    placements = np.array(
        [
            [
                next(i for i, n in v.modes(k) if solver.boolean_value(v.use(r, k, i, n)))
                for k in range(len(instance.sites))
            ]
            for r in range(instance.run_classes)
        ],
        dtype=np.int64,
    )
    totals = v.timing.totals(placements, np.repeat(levels[None], len(placements), axis=0))
    return Solution(placements, levels, int(totals.sum()))


class _Log(cp_model.CpSolverSolutionCallback):
    """Keeps one row per improvement and passes it on."""

    def __init__(self, instance: Instance, listener: Callable[[Progress], None] | None) -> None:
        super().__init__()
        self._instance = instance
        self._listener = listener
        self.rows: list[Progress] = []

    def on_solution_callback(self) -> None:
        """Note a new best solution (called by the solver)."""
        self.note(self.wall_time, self.objective_value, self.best_objective_bound)

    def note(self, time_s: float, objective: float, bound: float) -> None:
        """Add a row; objective and bound in ticks."""
        row = Progress(
            time_s,
            mean_latency_s(objective, self._instance),
            mean_latency_s(bound, self._instance),
        )
        self.rows.append(row)
        if self._listener is not None:
            self._listener(row)
