"""Steps of the rolling horizon."""

from __future__ import annotations

from typing import Any

import pytest

from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.snapshot import Snapshot
from planner.solve.budget import Budget
from planner.solve.hints import placements_of
from planner.solve.horizon import plan_snapshot
from planner.solve.tables import LOAD_FACTORS
from tests.planner.solve.small import Case, case, chain, endpoint, fleet

BUDGET = Budget.reproducible(deterministic=8.0, relative_gap=0.02)
ONE = case(chain("a", "b"), fleet(endpoint("fast"), endpoint("slow", 4.0)), 0.1)
TWO = case(chain("c", "d", "e"), ONE.fleet, 0.1)


def snapshot(question: Case = ONE, **changes: Any) -> Snapshot:
    key = str(question.workflow.content_hash)
    values: dict[str, Any] = {
        "now_s": 0.0,
        "fleet": question.fleet,
        "up": tuple(str(one.id) for one in question.fleet.endpoints),
        "workflows": (question.workflow,),
        "estimates": question.estimates,
        "rates_rps": {key: question.rate},
        "latency": {},
        "active_runs": {},
        "horizon_s": 300.0,
    }
    return Snapshot(**(values | changes))


def both(rates: tuple[float, float]) -> Snapshot:
    """Return a snapshot with two workflows."""
    return snapshot(
        workflows=(ONE.workflow, TWO.workflow),
        estimates=EstimateTable(workflows={**ONE.estimates.workflows, **TWO.estimates.workflows}),
        rates_rps={
            str(one.workflow.content_hash): rate
            for one, rate in zip((ONE, TWO), rates, strict=True)
        },
    )


def test_a_snapshot_gives_a_table_and_plans_that_hint_the_next() -> None:
    """One bucket per load that is carried; with its own plans as the hint nothing gets worse."""
    first = plan_snapshot(snapshot(), (), BUDGET)
    assert len(first.plans) == len(LOAD_FACTORS) == len(first.table.bounds)
    assert {row.site for row in first.table.rows} == {"a#0", "b#0"}
    first.table.check_fleet(ONE.fleet)
    again = plan_snapshot(snapshot(), first.plans, BUDGET)
    assert again.objective_s <= first.objective_s + 1e-9
    assert again.bound_s <= again.objective_s
    assert plan_snapshot(snapshot(), (), BUDGET).table.version == first.table.version


def test_endpoints_that_are_down_get_no_share_and_stay_in_the_table() -> None:
    """With the fast endpoint down all goes to the slow one; the table still fits the fleet."""
    planned = plan_snapshot(snapshot(up=("slow",)), (), BUDGET)
    planned.table.check_fleet(ONE.fleet)
    for row in planned.table.rows:
        assert [(one.endpoint, one.share) for one in row.ranked] == [("slow", 1.0), ("fast", 0.0)]


def test_learned_rows_decide_the_plan() -> None:
    """Where the fast endpoint has become the slower one, the plan moves away from it."""
    slowed = ONE.fleet.endpoints[0].latency.scaled(40.0)
    before = plan_snapshot(snapshot(), (), BUDGET).table.rows[0].ranked[0].endpoint
    after = plan_snapshot(snapshot(latency={"fast": slowed}), (), BUDGET)
    assert (before, after.table.rows[0].ranked[0].endpoint) == ("fast", "slow")
    after.table.check_fleet(ONE.fleet)


def test_several_workflows_share_the_fleet() -> None:
    """Rows carry the names of their own workflows, and the load is that of both."""
    planned = plan_snapshot(both((0.2, 0.1)), (), BUDGET)
    sites = {(row.workflow_hash, row.site) for row in planned.table.rows}
    assert sites == {
        *((ONE.workflow.content_hash, f"{n}#0") for n in "ab"),
        *((TWO.workflow.content_hash, f"{n}#0") for n in "cde"),
    }
    assert planned.loads_rps[-1] == pytest.approx(1.25 * 0.3)


def test_plans_of_several_workflows_hint_the_next_step() -> None:
    """Each workflow starts from its own plan at the nearest load; nothing gets worse."""
    first = plan_snapshot(both((0.9, 0.001)), (), BUDGET)
    assert len(first.plans) == 2 * len(first.loads_rps)
    again = plan_snapshot(both((0.9, 0.001)), first.plans, BUDGET)
    assert again.objective_s <= first.objective_s + 1e-9
    only = [plan for plan in first.plans if plan.workflow_hash == TWO.workflow.content_hash]
    partly = plan_snapshot(both((0.9, 0.001)), only, BUDGET)
    assert partly.bound_s <= partly.objective_s


def test_overload_is_planned_for_as_far_as_the_fleet_carries() -> None:
    """At many times the capacity the plan is for the load that fits, and says so."""
    key = str(ONE.workflow.content_hash)
    planned = plan_snapshot(snapshot(rates_rps={key: 20.0}), (), BUDGET)
    assert 0 < planned.loads_rps[-1] < 20.0
    with pytest.raises(Infeasible):
        plan_snapshot(snapshot(rates_rps={key: 1e6}), (), BUDGET)


def test_nothing_to_plan_is_bad_input() -> None:
    """No arrivals and no endpoint that is up each give one clear error."""
    with pytest.raises(InvalidInput, match="no workflow has arrivals"):
        plan_snapshot(snapshot(rates_rps={}), (), BUDGET)
    with pytest.raises(InvalidInput, match="no endpoint is up"):
        plan_snapshot(snapshot(up=()), (), BUDGET)


def test_an_old_plan_is_mended_for_a_new_question() -> None:
    """Call sites and endpoints the old plan does not know get a place; nothing in common: None."""
    plan = ONE.solve().plan
    grown = case(chain("a", "b", "new"), ONE.fleet, 0.1).instance()
    placements = placements_of([plan], grown)
    assert placements is not None
    kept = {one.site: one.endpoint for one in plan.assignments}
    named = {site: grown.endpoints[i] for site, i in zip(grown.sites, placements[0], strict=True)}
    assert {site: named[site] for site in kept} == kept
    assert placements_of([plan], TWO.instance()) is None
    other = fleet(endpoint("x"), endpoint("y"))
    assert placements_of([plan], case(chain("a", "b"), other, 0.1).instance()) is None
