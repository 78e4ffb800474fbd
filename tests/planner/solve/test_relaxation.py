"""The relaxation bounds every plan, and rounding gives plans with room."""

from __future__ import annotations

import numpy as np
import pytest

from planner.cli.bench_questions import random_fleet, random_workflow
from planner.domain.objective import Objective
from planner.graph.sampling import scenarios
from planner.solve import search
from planner.solve.bounds import carried_rate_rps, critical_path_cost
from planner.solve.budget import Budget
from planner.solve.heuristics import greedy_solution
from planner.solve.instance import Instance, build_instance
from planner.solve.objective import Goal
from planner.solve.relaxation import relax
from planner.solve.rounding import rounded_placements
from planner.solve.solver import solve_instance
from planner.solve.timing import Timing, build_timing

from .small import EXACT, case, endpoint, fan, fleet


def question(seed: int, load: float) -> tuple[Instance, Timing]:
    """Return eight call sites on four endpoints at a share of what they carry."""
    rng = np.random.default_rng(seed)
    machines = random_fleet(4, rng)
    workflow, estimates = random_workflow(8, rng)
    estimate = estimates.workflows[workflow.content_hash]
    runs = scenarios(workflow, estimate, 4, 0, defaults=estimates)

    def at(rate: float) -> Instance:
        return build_instance(
            workflow, machines, estimates, runs, arrival_rate_rps=rate, run_classes=3
        )

    instance = at(load * carried_rate_rps(at(1.0)))
    return instance, build_timing(instance)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("load", [0.3, 0.8])
def test_rounded_plans_lie_above_the_bound(seed: int, load: float) -> None:
    """Critical path <= relaxation <= rounded plan, which is near it and reproducible."""
    instance, timing = question(seed, load)
    goal = Goal(instance)
    relaxed = relax(instance, timing, goal)
    assert relaxed is not None
    assert critical_path_cost(instance, timing, goal) <= relaxed.bound + 1
    placements = rounded_placements(instance, timing, relaxed, relative_gap=0.05)
    assert placements is not None
    solution = greedy_solution(instance, timing, goal, start=placements)
    assert solution is not None
    assert relaxed.bound <= solution.cost <= 1.25 * relaxed.bound
    again = rounded_placements(instance, timing, relaxed, relative_gap=0.05)
    assert np.array_equal(placements, again)


def test_the_bound_holds_for_the_optimum() -> None:
    """The proven optimum of a fan on unequal endpoints is not below the relaxation."""
    small = case(fan("a", "b", "c", "d"), fleet(endpoint("e", slots=1), endpoint("f", 2.0)), 0.3,
                 (20, 99, 60, 40), classes=3)  # fmt: skip
    instance = small.instance()
    relaxed = relax(instance, build_timing(instance), Goal(instance))
    result = solve_instance(instance, small.runs, budget=EXACT)
    assert result.plan.status == "optimal"
    assert relaxed is not None
    assert relaxed.bound <= result.solution.cost


@pytest.mark.parametrize("objective", ["mean", "mean+0.5*cvar:0.9"])
def test_neighbourhoods_improve_plans_too_large_for_one_model(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few sites free at a time the plan gets better, stays above the bound and repeats."""
    instance, timing = question(1, 0.8)
    goal = Goal(instance, Objective.parse(objective))
    start = greedy_solution(instance, timing, goal, effort=1.0)
    monkeypatch.setattr(search, "_LARGE", 0)
    monkeypatch.setattr(search, "_NEIGHBOURHOOD", 100)
    monkeypatch.setattr(search, "first_plan", lambda *_: start)

    def found() -> search.StageResult:
        return search.run_stage(
            instance, timing, search.Stage(goal=goal), seed=0,
            budget=Budget.reproducible(0.02, relative_gap=0.02), carried_rps=1.0,
            note=lambda *_: None,
        )  # fmt: skip

    one, two = found(), found()
    assert start is not None
    assert one.bound <= one.solution.cost < start.cost
    assert np.array_equal(one.solution.placements, two.solution.placements)
    exact = search.run_stage(
        instance, timing, search.Stage(goal=goal, start=one.solution), seed=0,
        budget=Budget.reproducible(0.02, relative_gap=0.02), carried_rps=1.0, note=lambda *_: None,
    )  # fmt: skip
    assert exact.bound <= one.solution.cost
