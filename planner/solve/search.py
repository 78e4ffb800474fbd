"""One stage of a plan: relaxation, a first plan, then CP-SAT with that plan as the hint.

Every solver status has its own outcome: OPTIMAL and FEASIBLE give a plan; INFEASIBLE raises
`Infeasible` with the limits in conflict; MODEL_INVALID raises `ModelInvalid`; UNKNOWN gives the
first plan with the bound found, or raises `NoSolutionFound` if there is none.

A question too large for one model is improved by neighbourhoods: the placements of some call
sites are free, the others stay. The relaxation bounds it all the same, so what that costs is
stated by the gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from planner.domain.errors import Infeasible, ModelInvalid, NoSolutionFound
from planner.solve.arrays import Bools
from planner.solve.bounds import critical_path_cost, longest_latency
from planner.solve.budget import Budget
from planner.solve.constraints import add_constraints
from planner.solve.heuristics import Solution, greedy_solution, ordered
from planner.solve.objective import Goal
from planner.solve.question import Instance
from planner.solve.reasons import conflict
from planner.solve.relaxation import Relaxation, relax
from planner.solve.rounding import rounded_placements
from planner.solve.timing import Timing
from planner.solve.variables import Variables

__all__ = ["Stage", "StageResult", "build_model", "run_stage"]

POLISH = 2e7
"""Effort of the last descent from a rounded plan, in which levels follow."""
_LARGE = 60_000
"""Mode literals above which a question is improved by neighbourhoods."""
_NEIGHBOURHOOD = 8_000
"""Free mode literals of one."""
_SLICE = 0.5
"""Seconds (or deterministic time) of one."""
_BUILD_S = 1.5e-5
"""Seconds that a literal costs to build, charged to the budget since the search has no clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What to minimise, and what to keep.

    Parameters
    ----------
    goal
        What to minimise.
    caps
        Goals of earlier stages with the largest cost that a plan may have.
    start
        A plan to begin with, if one is known.
    """

    goal: Goal
    caps: Sequence[tuple[Goal, int]] = ()
    start: Solution | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """The best plan, the plan before the search, the proven least cost, and what it took."""

    solution: Solution
    first: Solution | None
    bound: int
    relaxed: Relaxation | None
    wall_s: float
    deterministic_time: float


def run_stage(
    instance: Instance,
    timing: Timing,
    stage: Stage,
    *,
    seed: int,
    budget: Budget,
    carried_rps: float,
    note: Callable[[float, float, float], None],
) -> StageResult:
    """Return the best plan of a stage found within a budget.

    Parameters
    ----------
    carried_rps
        Rate that the fleet could carry, for messages.
    note
        Called with seconds, cost and bound of each improvement.
    """
    goal = stage.goal
    relaxed = relax(instance, timing, goal, stage.caps)
    least = critical_path_cost(instance, timing, goal)
    if relaxed is not None:
        least = max(least, relaxed.bound)
    first = first_plan(instance, timing, stage, relaxed, budget.relative_gap, seed)
    if first is not None:
        note(0.0, first.cost, least)
        # The relaxation's bound is often all the proof that is asked for.
        if first.cost - least <= budget.relative_gap * first.cost:
            return StageResult(
                solution=first, first=first, bound=min(least, first.cost), relaxed=relaxed,
                wall_s=0.0, deterministic_time=0.0,
            )  # fmt: skip
        if _literals(instance) > _LARGE:
            best, wall_s, spent = _neighbourhoods(
                instance, timing, stage, first, least, seed, budget, note
            )
            return StageResult(
                solution=best, first=first, bound=min(least, best.cost), relaxed=relaxed,
                wall_s=wall_s, deterministic_time=spent,
            )  # fmt: skip
    model, variables = build_model(instance, timing, stage, least)
    if first is not None:
        _add_hint(model, variables, first)
    solver = cp_model.CpSolver()
    budget.apply(solver, seed)
    status = solver.solve(model, _Log(note, least))
    found = _outcome(status, solver, model, variables, goal, first, carried_rps)
    # Costs are whole, so the bound may be rounded up to one.
    bound = max(math.ceil(solver.best_objective_bound - 1e-6), least)
    return StageResult(
        solution=found,
        first=first,
        bound=min(bound, found.cost),
        relaxed=relaxed,
        wall_s=solver.wall_time,
        deterministic_time=solver.response_proto.deterministic_time,
    )


class _CpMaker:
    """Adds variables and constraints to a CP-SAT model."""

    def __init__(self, model: cp_model.CpModel) -> None:
        self._model = model

    def variable(self, least: int, most: int) -> Any:
        """Return a new whole-numbered variable."""
        return self._model.new_int_var(least, most, "")

    def add(self, constraint: Any) -> Any:
        """Add a constraint."""
        return self._model.add(constraint)


def build_model(
    instance: Instance,
    timing: Timing,
    stage: Stage,
    least: int,
    open_to: Bools | None = None,
) -> tuple[cp_model.CpModel, Variables]:
    """Return the model and its variables; ``least`` is a proven bound of the cost.

    ``open_to`` restricts the options of each site and class, see `Variables`.
    """
    model = cp_model.CpModel()
    variables = Variables(model, instance, timing, open_to)
    add_constraints(model, variables, whole=open_to is None)
    classes = range(instance.run_classes)
    total = sum(variables.total(r) for r in classes)
    plain = all(goal.plain for goal in (stage.goal, *(cap for cap, _ in stage.caps)))
    finish = (
        []
        if plain
        else [(s, variables.finish(r, s)) for r in classes for s in range(instance.scenarios)]
    )
    ceiling = longest_latency(instance, timing)
    maker = _CpMaker(model)
    for cap, most in stage.caps:
        model.add(cap.express(maker, total, finish, ceiling) <= most)
    cost = stage.goal.express(maker, total, finish, ceiling)
    if least > 0:
        model.add(cost >= least)
    model.minimize(cost)
    return model, variables


def first_plan(
    instance: Instance,
    timing: Timing,
    stage: Stage,
    relaxed: Relaxation | None,
    relative_gap: float,
    seed: int,
) -> Solution | None:
    """Return the best plan without search that keeps caps and deadlines, or None."""
    goal = stage.goal
    plans = [stage.start]
    if not stage.caps:
        rounded = None
        if relaxed is not None:
            rounded = rounded_placements(
                instance, timing, relaxed, relative_gap=relative_gap, seed=seed
            )
        if rounded is not None:
            plans.append(greedy_solution(instance, timing, goal, start=rounded, effort=POLISH))
        else:
            plans.append(greedy_solution(instance, timing, goal))
    kept = [one for one in plans if one is not None and _keeps(instance, timing, stage, one)]
    return min(kept, key=lambda one: one.cost, default=None)


def _keeps(instance: Instance, timing: Timing, stage: Stage, one: Solution) -> bool:
    """Whether a plan keeps the caps and the hard deadlines."""
    latencies = one.latencies(timing)
    for w, source in enumerate(instance.sources):
        if source.hard and source.deadline_ticks is not None:
            mine = latencies[:, instance.scenario_source == w]
            if int(mine.max()) > source.deadline_ticks:
                return False
    return all(int(cap.cost(latencies[np.newaxis])[0]) <= most for cap, most in stage.caps)


def _literals(instance: Instance) -> int:
    per_option = np.array([len(grid) for grid in instance.option_grids])
    return int((instance.allowed * per_option).sum()) * instance.run_classes


def _neighbourhoods(
    instance: Instance,
    timing: Timing,
    stage: Stage,
    start: Solution,
    least: int,
    seed: int,
    budget: Budget,
    note: Callable[[float, float, float], None],
) -> tuple[Solution, float, float]:
    """Return the best plan of a walk through neighbourhoods, and what it took."""
    rng = np.random.default_rng(seed)
    best, wall_s, spent = start, 0.0, 0.0
    sites = len(instance.sites)
    share = max(1, min(sites, sites * _NEIGHBOURHOOD // _literals(instance)))
    fixed = sum(len(grid) for grid in instance.levels) + sites * instance.run_classes
    charge = _BUILD_S * (_NEIGHBOURHOOD + fixed)
    wall_limit = math.inf if budget.wall_s is None else budget.wall_s
    work_limit = math.inf if budget.deterministic is None else budget.deterministic
    while best.cost - least > budget.relative_gap * best.cost:
        slice_wall, slice_work = wall_limit - wall_s - charge, work_limit - spent
        if min(slice_wall, slice_work) <= 0:
            break
        free = rng.choice(sites, share, replace=False)
        open_to = np.zeros((instance.run_classes, *instance.allowed.shape), dtype=bool)
        np.put_along_axis(open_to, best.placements[..., np.newaxis], True, axis=2)
        open_to[:, free] = True
        model, variables = build_model(instance, timing, stage, 0, open_to)
        _add_hint(model, variables, best)
        solver = cp_model.CpSolver()
        part = Budget(
            wall_s=min(_SLICE, slice_wall) if budget.wall_s is not None else None,
            deterministic=min(_SLICE, slice_work) if budget.deterministic is not None else None,
            relative_gap=budget.relative_gap / 10,
            workers=budget.workers,
        )
        part.apply(solver, int(rng.integers(2**31 - 1)))
        status = solver.solve(model)
        wall_s += solver.wall_time + charge
        spent += solver.response_proto.deterministic_time + charge
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            found = _read(solver, variables, stage.goal)
            if found.cost < best.cost:
                best = found
                note(wall_s, best.cost, least)
    return best, wall_s, spent


def _outcome(
    status: cp_model.CpSolverStatus,
    solver: cp_model.CpSolver,
    model: cp_model.CpModel,
    variables: Variables,
    goal: Goal,
    first: Solution | None,
    carried_rps: float,
) -> Solution:
    """Return the best solution, or raise what the solver's status means."""
    instance = variables.instance
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = _read(solver, variables, goal)
        return min((one for one in (found, first) if one is not None), key=lambda one: one.cost)
    if status == cp_model.MODEL_INVALID:
        raise ModelInvalid(f"CP-SAT refused the plan model: {model.validate()}")
    if first is not None:
        return first
    reason = conflict(instance, variables.timing, carried_rps)
    if reason is not None:
        raise reason
    if status == cp_model.INFEASIBLE:
        raise Infeasible(
            f"no plan for {len(instance.sites)} call sites on {len(instance.endpoints)} endpoints "
            f"at {instance.arrival_rate_rps:.4g} runs/s; lower the rate"
        )
    raise NoSolutionFound(
        f"no plan within {solver.wall_time:.1f} s for {len(instance.sites)} call sites on "
        f"{len(instance.endpoints)} endpoints; raise the time limit, or lower classes or scenarios"
    )


def _add_hint(model: cp_model.CpModel, v: Variables, hint: Solution) -> None:
    """Hint every placement, level and start, so that the solver begins with a solution."""
    instance, timing = v.instance, v.timing
    home = instance.option_endpoint
    for i, grid in enumerate(instance.levels):
        for n in range(len(grid)):
            model.add_hint(v.level(i, n), int(hint.levels[i] == n))
    repeated = np.repeat(hint.levels[np.newaxis], len(hint.placements), axis=0)
    sums = timing.sums(hint.placements, repeated)
    sums = sums + timing.extras(hint.placements, hint.warm, hint.keep)
    starts = timing.join_starts(sums)
    for r, row in enumerate(hint.placements):
        for k in range(len(instance.sites)):
            for m, n in v.modes(r, k):
                model.add_hint(v.use(r, k, m, n), int(row[k] == m and hint.levels[home[m]] == n))
        for kept, literals in ((hint.warm, v.warm(r)), (hint.keep, v.keep(r))):
            for (k, m), literal in literals.items():
                model.add_hint(literal, int(row[k] == m and bool(kept[r, k])))
        for j in range(len(timing.joins)):
            model.add_hint(v.start(r, j), int(starts[r, j]))


def _read(solver: cp_model.CpSolver, v: Variables, goal: Goal) -> Solution:
    """Return the solver's solution, its cost recomputed from placements and levels."""
    instance = v.instance
    levels = np.zeros(len(instance.endpoints), dtype=np.int64)
    for i, grid in enumerate(instance.levels):
        levels[i] = next(n for n in range(len(grid)) if solver.boolean_value(v.level(i, n)))
    shape = instance.run_classes, len(instance.sites)
    placements = np.zeros(shape, dtype=np.int64)
    warm, keep = np.ones(shape, dtype=bool), np.ones(shape, dtype=bool)
    for r in range(shape[0]):
        for k in range(shape[1]):
            m = next(m for m, n in v.modes(r, k) if solver.boolean_value(v.use(r, k, m, n)))
            placements[r, k] = m
            for kept, literals in ((warm, v.warm(r)), (keep, v.keep(r))):
                if (k, m) in literals:
                    kept[r, k] = solver.boolean_value(literals[k, m])
    return ordered(v.timing, goal, placements, levels, warm, keep)


class _Log(cp_model.CpSolverSolutionCallback):
    """Passes improvements on, with the best bound known; the solver forgets what it was given."""

    def __init__(self, note: Callable[[float, float, float], None], least: int) -> None:
        super().__init__()
        self._note = note
        self._least = least

    def on_solution_callback(self) -> None:
        """Note a new best solution (called by the solver)."""
        bound = max(self.best_objective_bound, self._least)
        self._note(self.wall_time, self.objective_value, bound)
