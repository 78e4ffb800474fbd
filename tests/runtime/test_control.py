"""What the gateway's state learns of whole runs, without HTTP."""

from __future__ import annotations

import pytest

from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from runtime.clock import Clock
from runtime.config import GatewayConfig
from runtime.control import Control
from runtime.diagnostics import diagnostics
from runtime.identity import Identity

WORKFLOW = Workflow(
    name="flow",
    nodes=(Node(id="a", kind="llm", call_sites=(CallSite(id="a#0"),)),),
    edges=((START, "a"), ("a", END)),
)
SITE = SiteEstimate(output_tokens=Quantiles.constant(20.0), prompt_tokens=Quantiles.constant(50.0))
ESTIMATES = EstimateTable(
    workflows={WORKFLOW.content_hash: WorkflowEstimate(name="flow", sites={"a#0": SITE})}
)


@pytest.mark.parametrize("online", [True, False])
def test_run_forecasts_follow_the_runs_that_end(fleet_of, online):
    """Runs that take four times their forecast raise the next one's, unless learning is off."""
    wall = [0.0]
    control = Control(
        fleet_of(1),
        estimates=ESTIMATES,
        workflows=[WORKFLOW],
        policy="round_robin",
        config=GatewayConfig(online=online),
        clock=Clock(wall=lambda: wall[0]),
    )

    def start(number):
        return control.lifecycle.run_of(
            Identity(run_id=f"r{number}", workflow=WORKFLOW.content_hash, session_id=None)
        )

    first = start(0)
    assert first.predicted_s == first.forecast_s
    for number in range(100):
        run = start(number)
        wall[0] += 4 * run.forecast_s
        control.lifecycle.end(run.run_id)
    last = start("last")
    assert last.forecast_s == first.forecast_s
    factor = last.predicted_s / first.predicted_s
    assert factor == pytest.approx(4.0 if online else 1.0, rel=0.15)
    kept = diagnostics(control)["runs"]
    assert (kept[WORKFLOW.content_hash]["seen"] == 100) if online else not kept
    control.set_policy("power_of_two")
    assert start("fresh").predicted_s == first.forecast_s


def test_a_resumed_run_starts_again_under_its_id(fleet_of):
    """An interrupt ends a run, which is no failure; resumed, it is a run in progress again."""
    control = Control(fleet_of(1), policy="round_robin", clock=Clock(wall=lambda: 0.0))
    event = {"run_id": "r", "workflow": "w", "session_id": "s"}
    ends = {**event, "type": "run_end", "status": "interrupted"}
    assert control.reports.take([{**event, "type": "run_start"}, ends]) == 2
    assert len(control.runs) == 0
    assert control.reports.take([{**event, "type": "run_start"}]) == 1
    assert len(control.runs) == 0  # a late event of a run that has ended
    assert control.reports.take([{**event, "type": "run_start", "resumed": True}]) == 1
    assert len(control.runs) == 1
