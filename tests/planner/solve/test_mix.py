"""Several workflows on one fleet: one capacity, weights, a plan for each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.dispatch.table import TAIL_WEIGHT
from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Fleet
from planner.domain.objective import Objective
from planner.domain.workflow import Workflow
from planner.solve.bounds import carried_rate_rps
from planner.solve.sample import enough_scenarios, standard_error
from planner.solve.solver import Demand, PlanResult, solve_mix
from planner.solve.tables import mix_table
from planner.verify import verify_plans

from .small import EXACT, case, chain, endpoint, fan, fleet

SPREAD = (0.3, 0.4, 0.7, 1.0, 1.4, 2.2, 3.0)
SHORT, LONG = chain("a"), fan("x", "y", "z", "w")


def table(*workflows: Workflow, outputs: tuple[float, ...] = ()) -> EstimateTable:
    """Return forecasts of 100 output tokens (or the given ones) with a spread."""
    known = {}
    for workflow in workflows:
        lengths = outputs or (100.0,) * len(workflow.call_sites)
        known |= case(
            workflow, fleet(endpoint("e")), 0.1, lengths, spread=SPREAD
        ).estimates.workflows
    return EstimateTable(workflows=known)


def solved(
    machines: Fleet,
    *demands: Demand,
    classes: int = 1,
    objective: str = "mean",
    scenarios: int = 3,
) -> PlanResult:
    """Return plans that the checker accepts together."""
    workflows = [demand.workflow for demand in demands]
    estimates = table(*workflows)
    result = solve_mix(
        demands, machines, estimates, run_classes=classes, scenarios=scenarios, budget=EXACT,
        objective=Objective.parse(objective),
    )  # fmt: skip
    report = verify_plans(result.plans, workflows, machines, estimates, result.samples)
    assert report.ok, report.violations
    return result


def test_capacity_is_shared() -> None:
    """Pairs: alone each workflow fits one slot, together the load is too much for it."""
    machines = fleet(endpoint("e", slots=1))
    short, other = Demand(workflow=SHORT, rate_rps=0.35), Demand(workflow=chain("b"), rate_rps=0.35)
    for one in (short, other):
        assert solved(machines, one).plan.status == "optimal"
    with pytest.raises(Infeasible, match=r"asks for 0\.7 runs/s"):
        solved(machines, short, other)


def test_each_workflow_gets_a_plan_of_its_own() -> None:
    """Plans name their own call sites and rates, and share levels, objective and bound."""
    machines = fleet(endpoint("e", slots=2), endpoint("f", 1.5, slots=2))
    result = solved(
        machines, Demand(workflow=SHORT, rate_rps=0.3), Demand(workflow=LONG, rate_rps=0.1),
        classes=2, objective="mean+cvar:0.9",
    )  # fmt: skip
    one, two = result.plans
    assert (one.workflow_hash, two.workflow_hash) == (SHORT.content_hash, LONG.content_hash)
    assert set(one.shares()) == {"a#0"}
    assert set(two.shares()) == set(LONG.call_sites)
    assert (one.arrival_rate_rps, two.arrival_rate_rps) == (0.3, 0.1)
    assert one.levels == two.levels
    assert one.objective_s == two.objective_s
    assert one.bound_s == two.bound_s


def test_one_workflow_as_a_mix_is_the_plan_of_it_alone() -> None:
    """The objective of a mix of one is that of the plan of one; the weight changes nothing."""
    machines = fleet(endpoint("e", slots=1), endpoint("f", 1.5, slots=2))
    plain = solved(machines, Demand(workflow=LONG, rate_rps=0.2)).plan
    heavy = solved(machines, Demand(workflow=LONG, rate_rps=0.2, weight=7.0)).plan
    assert heavy.objective_s == plain.objective_s
    assert heavy.shares() == plain.shares()


@pytest.mark.parametrize(("objective", "minds"), [("mean", False), ("mean+cvar:0.9", True)])
def test_a_table_minds_the_tail_if_its_plans_do(objective: str, minds: bool) -> None:
    """A CVaR term in the objective gives the table a weight on runs that are slow already."""
    machines = fleet(endpoint("e", slots=2), endpoint("f", 1.5, slots=2))
    demand = Demand(workflow=SHORT, rate_rps=0.3)
    made = mix_table(
        [demand], machines, table(SHORT), factors=(1.0,), budget=EXACT, run_classes=1,
        scenarios=3, objective=Objective.parse(objective),
    )  # fmt: skip
    assert (made.tuning.tail_weight >= TAIL_WEIGHT) is minds


def test_weight_decides_who_gets_the_fast_slot() -> None:
    """Two workflows want one fast slot that has room for one of them: the heavier one gets it."""
    machines = fleet(endpoint("fast", slots=1), endpoint("slow", 2.0))
    one, two = chain("a"), chain("b")
    for weights, winner in (((5.0, 1.0), 0), ((1.0, 5.0), 1)):
        result = solved(
            machines,
            Demand(workflow=one, rate_rps=0.45, weight=weights[0]),
            Demand(workflow=two, rate_rps=0.45, weight=weights[1]),
        )
        shares = [next(iter(plan.shares().values())) for plan in result.plans]
        assert shares[winner] == {"fast": 1.0}
        assert shares[1 - winner] == {"slow": 1.0}


def test_deadlines_are_each_workflows_own() -> None:
    """The workflow with the hard deadline gets the fast slot, whatever the other one loses."""
    machines = fleet(endpoint("fast", slots=1), endpoint("slow", 3.0))
    one, two = chain("a"), chain("b")
    result = solved(
        machines,
        Demand(workflow=one, rate_rps=0.45, weight=9.0),
        Demand(workflow=two, rate_rps=0.45, deadline_s=4.0, hard=True),
    )
    assert result.plans[1].shares()["b#0"] == {"fast": 1.0}
    assert result.plans[0].shares()["a#0"] == {"slow": 1.0}


def test_broken_mixes_are_rejected() -> None:
    """Plans that state different levels or objectives do not belong together."""
    machines = fleet(endpoint("e"), endpoint("f", 1.5))
    demands = Demand(workflow=SHORT, rate_rps=0.3), Demand(workflow=LONG, rate_rps=0.1)
    result = solved(machines, *demands)
    for change in ({"levels": {"e": 4, "f": 4}}, {"objective_s": 9.0}, {"bound_s": 0.1}):
        plans = (result.plans[0], replace(result.plans[1], **change))  # type: ignore[arg-type]
        report = verify_plans(plans, [SHORT, LONG], machines, table(SHORT, LONG), result.samples)
        assert "together" in {violation.rule for violation in report.violations}


@pytest.mark.parametrize(
    "change", [{"rate_rps": 0.0}, {"weight": 0.0}, {"deadline_s": -1.0}, {"hard": True}]
)
def test_bad_demands_are_refused(change: dict[str, float]) -> None:
    """A rate, weight or deadline that is not positive is bad input."""
    with pytest.raises(InvalidInput, match="workflow 'chain'"):
        Demand(**{"workflow": SHORT, "rate_rps": 0.1, **change})  # type: ignore[arg-type]


def test_a_workflow_given_twice_is_refused() -> None:
    """Rates of one workflow have to be added up."""
    demand = Demand(workflow=SHORT, rate_rps=0.1)
    with pytest.raises(InvalidInput, match="given twice"):
        solved(fleet(endpoint("e")), demand, demand)


def test_scenarios_follow_from_a_stated_error() -> None:
    """A smaller error takes more scenarios, and what is reported is reached."""
    machines = fleet(endpoint("e"), endpoint("f", 1.5))
    question = replace(case(LONG, machines, 0.1, spread=SPREAD))
    counts = []
    for target in (0.2, 0.05, 0.03):
        count, error = enough_scenarios(lambda n: replace(question, samples=n).instance(), target)
        assert error <= target
        counts.append(count)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    estimates = question.estimates
    result = solve_mix(
        [Demand(workflow=LONG, rate_rps=0.1)], machines, estimates, run_classes=1,
        scenarios="auto", target_error=0.05, budget=EXACT,
    )  # fmt: skip
    assert result.plan.scenarios == counts[1]
    assert result.plan.notes["scenario_error"] <= 0.05
    again = standard_error(result.instance, result.timing, result.solution)
    assert again == pytest.approx(result.plan.notes["scenario_error"], rel=0.3)
    with pytest.raises(InvalidInput, match="target error"):
        enough_scenarios(lambda n: replace(question, samples=n).instance(), 0.0)


def test_carried_rate_of_a_mix_counts_all_runs() -> None:
    """A workflow of one call and one of two calls, half and half: 1.5 calls per run."""
    machines = fleet(endpoint("e", slots=1))
    flat = (1.0,) * 7
    known = {
        **case(SHORT, machines, 0.1, spread=flat).estimates.workflows,
        **case(chain("b", "c"), machines, 0.1, spread=flat).estimates.workflows,
    }
    result = solve_mix(
        [Demand(workflow=SHORT, rate_rps=0.1), Demand(workflow=chain("b", "c"), rate_rps=0.1)],
        machines,
        EstimateTable(workflows=known),
        run_classes=1,
        budget=EXACT,
    )
    assert carried_rate_rps(result.instance) == pytest.approx(0.8 / (1.5 * 1.2))
