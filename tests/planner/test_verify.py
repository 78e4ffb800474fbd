"""The plan checker: a good plan by hand passes, and each rule rejects a plan broken that way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, SiteId
from planner.domain.latency import LatencyRow
from planner.domain.plan import Assignment, Plan
from planner.domain.run import RunSpec
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from planner.graph.sampling import scenarios
from planner.verify import VerifyReport, verify_plan

ROW = LatencyRow(
    prefill_base_ms=0.0,
    prefill_us_per_token=1000.0,
    prefill_ns_per_token_sq=0.0,
    decode_base_ms=10.0,
    decode_us_per_call=0.0,
    decode_ns_per_kv_token=0.0,
)
"""1 ms per prompt token, 10 ms per output token."""


def endpoint(name: str, model: str = "m", scale: float = 1.0, kv_blocks: int = 1000) -> Endpoint:
    """Return an endpoint with four slots."""
    return Endpoint(
        id=EndpointId(name),
        model=model,
        gpu="G",
        latency=ROW.scaled(scale),
        kv_blocks=kv_blocks,
        max_num_seqs=4,
    )


def site(name: str) -> Node:
    """Return a node with one call to model m."""
    call = CallSite(id=SiteId(f"{name}#0"), model="m")
    return Node(id=NodeId(name), kind="llm", call_sites=(call,))


WORKFLOW = Workflow(
    name="two",
    nodes=(site("a"), site("b")),
    edges=((START, NodeId("a")), (NodeId("a"), NodeId("b")), (NodeId("b"), END)),
)
FLEET = Fleet(name="f", endpoints=(endpoint("fast"), endpoint("slow", scale=2.0)))
CALL = SiteEstimate(
    output_tokens=Quantiles.constant(100.0),
    prompt_tokens=Quantiles.constant(300.0),
    shared_prefix_tokens=100.0,
)
ESTIMATES = EstimateTable(
    workflows={WORKFLOW.content_hash: WorkflowEstimate(sites={"a#0": CALL, "b#0": CALL})}
)
RUNS = scenarios(WORKFLOW, ESTIMATES.workflows[WORKFLOW.content_hash], 2, 0)

# At level 1 a call takes 0.2 s of prefill (100 of 300 tokens are cached) and 1 s of decode on the
# fast endpoint, twice that on the slow one: 1.2 s + 2.4 s for a run.
PLAN = Plan(
    workflow_hash=WORKFLOW.content_hash,
    fleet_hash=FLEET.content_hash(),
    arrival_rate_rps=0.3,
    run_classes=1,
    assignments=(
        Assignment(run_class=0, site="a#0", endpoint="fast"),
        Assignment(run_class=0, site="b#0", endpoint="slow"),
    ),
    levels={"fast": 1, "slow": 1},
    objective_s=3.6,
    bound_s=3.6,
    status="optimal",
    scenarios=2,
    seed=0,
)


def check(
    plan: Plan, fleet: Fleet = FLEET, runs: Sequence[RunSpec] = RUNS, workflow: Workflow = WORKFLOW
) -> VerifyReport:
    """Check a plan against the small case, or a changed one."""
    return verify_plan(plan, workflow, fleet, ESTIMATES, runs)


def rules(report: VerifyReport) -> set[str]:
    """Return the names of the broken rules."""
    return {violation.rule for violation in report.violations}


def test_the_plan_made_by_hand_passes() -> None:
    """A run takes 1.2 s + 2.4 s and keeps the endpoints 0.36 and 0.72 busy."""
    report = check(PLAN)
    assert report.ok, report.violations
    assert report.objective_s == pytest.approx(3.6)
    assert report.loads == pytest.approx({"fast": 0.36, "slow": 0.72})


def test_level_slows_by_the_prefills_of_the_others() -> None:
    """At level 3 each of 100 steps waits for 2 / 100 prefills of 0.2 s: 0.4 s more on fast."""
    plan = replace(PLAN, levels={"fast": 3, "slow": 1}, objective_s=4.0, bound_s=4.0)
    report = check(plan)
    assert report.ok, report.violations
    assert report.objective_s == pytest.approx(4.0)


def test_another_workflow_is_rejected() -> None:
    """A plan for another graph breaks rule workflow."""
    assert "workflow" in rules(check(replace(PLAN, workflow_hash="0" * 16)))


def test_another_fleet_is_rejected() -> None:
    """A plan for another fleet breaks rule fleet."""
    other = Fleet(name="f", endpoints=(endpoint("fast"), endpoint("slow", scale=3.0)))
    assert rules(check(PLAN, fleet=other)) == {"fleet"}


def test_another_sample_is_rejected() -> None:
    """A plan stated over another number of scenarios, or none, breaks rule scenarios."""
    assert rules(check(PLAN, runs=RUNS[:1])) == {"scenarios"}
    assert rules(check(replace(PLAN, scenarios=0), runs=())) == {"scenarios"}


def test_runs_of_another_workflow_are_rejected() -> None:
    """Scenarios drawn from another graph break rule scenarios."""
    other = replace(WORKFLOW, nodes=(site("a"), Node(id=NodeId("b"), kind="tool")))
    runs = (*RUNS[:1], *scenarios(other, WorkflowEstimate(), 1, 0))
    assert rules(check(PLAN, runs=runs)) == {"scenarios"}


@pytest.mark.parametrize(
    "broken",
    [
        replace(PLAN, status="infeasible"),
        replace(PLAN, bound_s=3.0),  # optimal, yet a gap of 17 %
        replace(PLAN, objective_s=float("nan")),
        replace(PLAN, arrival_rate_rps=0.0),
    ],
    ids=["no plan", "open gap", "not a number", "no traffic"],
)
def test_impossible_status_is_rejected(broken: Plan) -> None:
    """A status, rate or value that no finished plan has breaks rule status."""
    assert rules(check(broken)) == {"status"}


def test_missing_assignment_is_rejected() -> None:
    """A call site without an endpoint breaks rule assignment."""
    assert rules(check(replace(PLAN, assignments=PLAN.assignments[:1]))) == {"assignment"}


def test_double_assignment_is_rejected() -> None:
    """A call site with two endpoints breaks rule assignment."""
    again = Assignment(run_class=0, site="a#0", endpoint="slow")
    assert rules(check(replace(PLAN, assignments=(*PLAN.assignments, again)))) == {"assignment"}


def test_stray_assignment_is_rejected() -> None:
    """A call site or a run class the plan does not have breaks rule assignment."""
    for stray in (
        Assignment(run_class=0, site="c#0", endpoint="fast"),
        Assignment(run_class=1, site="a#0", endpoint="fast"),
    ):
        broken = replace(PLAN, assignments=(*PLAN.assignments, stray))
        assert rules(check(broken)) == {"assignment"}


def test_unknown_endpoint_is_rejected() -> None:
    """An endpoint the fleet does not have breaks rule endpoint."""
    lost = replace(PLAN.assignments[0], endpoint="gone")
    broken = replace(PLAN, assignments=(lost, PLAN.assignments[1]))
    assert "endpoint" in rules(check(broken))


def test_wrong_model_is_rejected() -> None:
    """A call sent to an endpoint that serves another model breaks rule model."""
    fleet = Fleet(name="f", endpoints=(endpoint("fast", model="x"), endpoint("slow", scale=2.0)))
    broken = replace(PLAN, fleet_hash=fleet.content_hash())
    assert rules(check(broken, fleet=fleet)) == {"model"}


@pytest.mark.parametrize(
    "levels",
    [
        {"fast": 1},
        {"fast": 0, "slow": 1},
        {"fast": 5, "slow": 1},
        {"fast": 1, "slow": 1, "gone": 1},
    ],
    ids=["missing", "zero", "beyond the slots", "of no endpoint"],
)
def test_wrong_level_is_rejected(levels: dict[str, int]) -> None:
    """A level that is missing, out of range or of an unknown endpoint breaks rule level."""
    assert rules(check(replace(PLAN, levels=levels))) == {"level"}


def test_too_long_context_is_rejected() -> None:
    """A prompt and answer of 400 tokens do not fit a cache of 320, nor a model length of 399."""
    small = endpoint("slow", scale=2.0, kv_blocks=20)
    short = replace(endpoint("slow", scale=2.0), max_model_len=399)
    for narrow in (small, short):
        fleet = Fleet(name="f", endpoints=(endpoint("fast"), narrow))
        assert "context" in rules(
            check(replace(PLAN, fleet_hash=fleet.content_hash()), fleet=fleet)
        )


def test_too_many_contexts_at_once_are_rejected() -> None:
    """Two calls of 350 tokens on average do not fit a cache of 640 tokens: rule kv."""
    fleet = Fleet(name="f", endpoints=(endpoint("fast"), endpoint("slow", scale=2.0, kv_blocks=40)))
    broken = replace(PLAN, fleet_hash=fleet.content_hash(), levels={"fast": 1, "slow": 2})
    assert "kv" in rules(check(broken, fleet=fleet))


def test_overload_is_rejected() -> None:
    """At 0.4 runs per second the slow endpoint is 0.96 busy, above 0.8 of its level 1."""
    assert rules(check(replace(PLAN, arrival_rate_rps=0.4))) == {"capacity"}


@pytest.mark.parametrize("stated", [3.5, 3.7])
def test_wrong_objective_is_rejected(stated: float) -> None:
    """An objective that is not the recomputed one breaks rule objective, in both directions."""
    assert rules(check(replace(PLAN, objective_s=stated, bound_s=stated))) == {"objective"}


def test_objective_may_be_rounded_up_to_ticks() -> None:
    """Rounding each of two calls up by less than a tick of 10 ms is allowed."""
    assert check(replace(PLAN, objective_s=3.619, bound_s=3.619)).ok


def test_bound_above_the_objective_is_rejected() -> None:
    """A bound that the plan itself beats breaks rule bound."""
    assert rules(check(replace(PLAN, bound_s=3.7))) == {"bound"}
