"""Runs of a trace made into runs that can be simulated again."""

from __future__ import annotations

import pytest

from planner.dispatch.forecast import Forecaster
from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.trace import CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.graph.rebuild import runs_from_trace
from planner.sim.experiment import Cell, PolicySetup, World, mean_latency_s, run_cell
from planner.sim.workload import sampled_workload
from tests.planner.solve.small import case, chain, endpoint, fan, fleet

FLEET = fleet(endpoint("fast"), endpoint("slow", 4.0))


def call(node: str, ready_s: float, finish_s: float, **changes: object) -> CallRecord:
    values = {
        "run_id": "r", "call_id": f"r/{node}/{ready_s}", "workflow_hash": "w", "node": node,
        "site": f"{node}#0", "ready_s": ready_s, "sent_s": ready_s, "endpoint": "fast",
        "prompt_tokens": 300, "output_tokens": 50, "finish_s": finish_s,
    }  # fmt: skip
    return CallRecord(**(values | changes))  # type: ignore[arg-type]


def run(finish_s: float, run_id: str = "r", arrival_s: float = 0.0, **changes: str) -> RunRecord:
    values = {"workflow": "flow", "workflow_hash": "w", "status": "ok"} | changes
    return RunRecord(run_id=run_id, arrival_s=arrival_s, finish_s=finish_s, **values)


@pytest.mark.parametrize("shape", [chain("a", "b", "c"), fan("a", "b", "c", "d")])
def test_a_run_simulated_from_its_trace_takes_as_long(shape: object) -> None:
    """Tasks, dependencies, lengths and latency come back as they were, under any policy."""
    question = case(shape, FLEET, 0.1)  # type: ignore[arg-type]
    truth = question.estimates.workflows[question.workflow.content_hash]
    world = World(fleet=FLEET, forecaster=Forecaster(question.estimates, [question.workflow]))
    specs = sampled_workload(question.workflow, truth, [2.0 * n for n in range(12)], seed=3)

    def simulated(runs: object, policy: str) -> list[TraceRecord]:
        cell = Cell(setup=PolicySetup(policy=policy), seed=0, runs=runs, world=world)  # type: ignore[arg-type]
        return run_cell(cell)

    seen = simulated(specs, "round_robin")
    again = runs_from_trace(seen, [question.workflow], question.estimates)
    assert [[t.preds for t in one.tasks] for one in again] == [
        [t.preds for t in one.tasks] for one in specs
    ]
    for policy in ("round_robin", "marginal_cost"):
        assert mean_latency_s(simulated(again, policy)) == pytest.approx(
            mean_latency_s(simulated(specs, policy)), rel=0.02
        )


def test_delays_that_are_not_the_fleets_stay() -> None:
    """Tools keep their time, and what passed before a call was sent stays a delay."""
    records = [
        call("a", 1.0, 3.0),
        ToolRecord(run_id="r", workflow_hash="w", node="t", start_s=3.5, finish_s=5.0),
        call("b", 5.25, 7.0),
        run(7.0),
    ]
    (one,) = runs_from_trace(records)
    assert [(t.node, t.kind, t.preds, t.delay_s) for t in one.tasks] == [
        ("a", "llm", (), 1.0),
        ("t", "tool", (0,), 2.0),
        ("b", "llm", (1,), 0.25),
    ]


def test_growing_prompts_contain_what_was_said() -> None:
    """Where a site's prompts grow, a later prompt starts with the earlier one and its answer."""
    site = SiteEstimate(
        output_tokens=Quantiles.constant(50.0),
        prompt_tokens=Quantiles.constant(300.0),
        shared_prefix_tokens=100.0,
        growth_tokens=Quantiles.constant(10.0),
    )
    estimates = EstimateTable(workflows={"w": WorkflowEstimate(sites={"a#0": site})})
    records = [
        call("a", 0.0, 2.0),
        call("a", 2.0, 4.0, prompt_tokens=360, visit=1),
        call("a", 4.0, 5.0, prompt_tokens=200, visit=2),
        run(5.0),
    ]
    (one,) = runs_from_trace(records, (), estimates)
    first, second, third = one.tasks
    assert [segment.tokens for segment in first.prompt] == [100, 200]
    assert second.prompt[:2] == first.prompt
    assert [segment.tokens for segment in second.prompt] == [100, 200, 50, 10]
    assert second.prompt[2].key == first.output_key
    # A shorter prompt cannot contain the earlier ones; the static prefix is shared still.
    assert third.prompt[0] == first.prompt[0]
    assert third.prompt_tokens == 200


def test_only_what_ended_well_is_replayed() -> None:
    """Failed runs and attempts, and runs without calls, are left out; the last ones are kept."""
    records: list[TraceRecord] = [
        call("a", 0.0, 1.0, status="failed"),
        call("a", 1.0, 2.0, attempt=1, call_id="r#1"),
        run(2.0, arrival_s=0.0),
        call("a", 0.0, 1.0, run_id="lost"),
        run(1.0, run_id="lost", status="failed"),
        run(9.0, run_id="empty"),
        call("a", 5.0, 6.0, run_id="late"),
        run(6.0, run_id="late", arrival_s=5.0),
    ]
    assert [(one.run_id, one.arrival_s) for one in runs_from_trace(records)] == [
        ("r", 0.0), ("late", 5.0),
    ]  # fmt: skip
    assert len(runs_from_trace(records)[0].tasks) == 1
    assert [(one.run_id, one.arrival_s) for one in runs_from_trace(records, last=1)] == [
        ("late", 0.0)
    ]
    assert runs_from_trace([]) == ()
