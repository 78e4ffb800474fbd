"""Almanac's policy: prices on the delay of others, and runs that are soon over first."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.joins import RunDelay
from planner.dispatch.policies.base import Ready
from planner.dispatch.policies.planned import Planned
from planner.dispatch.table import DispatchTable, Ranked, Row, Tuning
from planner.dispatch.view import EndpointState, FleetView, Resident
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint
from planner.domain.ids import EndpointId, NodeId, SiteId
from planner.domain.latency import LatencyRow
from planner.domain.workflow import END, START, CallSite, Node, Workflow

ROW = LatencyRow(
    prefill_base_ms=5,
    prefill_us_per_token=100,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=500,
    decode_ns_per_kv_token=0,
)
NAMES = (NodeId("early"), NodeId("late"))
WORKFLOW = Workflow(
    name="two",
    nodes=tuple(
        Node(id=name, kind="llm", call_sites=(CallSite(id=SiteId(f"{name}#0")),)) for name in NAMES
    ),
    edges=((START, NAMES[0]), NAMES, (NAMES[1], END)),
)


def states() -> list[EndpointState]:
    """Two equal endpoints with one long call each."""
    made = []
    for index in range(2):
        endpoint = Endpoint(
            id=EndpointId(f"e{index}"),
            model="m",
            gpu="G",
            latency=ROW,
            kv_blocks=200,
            max_num_seqs=4,
        )
        state = EndpointState(index, endpoint, ROW)
        state.add(
            Resident(
                call_id=f"r{index}",
                run_id="r",
                prompt_tokens=100,
                uncached_tokens=100.0,
                output_tokens=100.0,
                criticality=1.0,
                sent_s=0.0,
            )
        )
        made.append(state)
    return made


def table(prices: Mapping[str, float], **tuning: float) -> DispatchTable:
    ranked = tuple(
        Ranked(endpoint=name, cost_s=1.0, share=0.5, price=price) for name, price in prices.items()
    )
    return DispatchTable(
        fleet_hash="f",
        endpoints=tuple(prices),
        bounds=(math.inf,),
        rows=tuple(
            Row(
                workflow_hash=WORKFLOW.content_hash,
                site=f"{name}#0",
                bucket=0,
                valid_from=0.0,
                valid_to=math.inf,
                ranked=ranked,
            )
            for name in NAMES
        ),
        tuning=Tuning(**tuning),
    )


def ready(site: str = "early#0") -> Ready:
    made = states()
    call = Call(
        call_id="c",
        workflow_hash=WORKFLOW.content_hash,
        site=site,
        prompt_tokens=320,
        run_arrival_s=5.0,
    )
    return Ready(call, made, FleetView(made), Forecaster(EstimateTable(), [WORKFLOW]), 6.0)


@pytest.mark.parametrize(("scale", "chosen"), [(0.0, 0), (1.0, 1)])
def test_what_an_endpoint_is_worth_to_others_keeps_calls_away(scale: float, chosen: int) -> None:
    """Of two equal endpoints the first wins; if its slot seconds are dear, the other one does."""
    policy = Planned(table=table({"e0": 1.0, "e1": 0.5}, price_scale=scale))
    choice = policy.choose(ready())
    assert (choice.endpoint, choice.reason) == (chosen, "plan")


def test_of_two_runs_of_an_age_the_one_that_is_sooner_over_goes_first() -> None:
    """Engine priority is the run's arrival in ms plus the weighted remainder; smaller is first."""
    oldest_first = Planned(table=table({"e0": 0.0, "e1": 0.0}, remaining_weight=0.0))
    assert {oldest_first.choose(ready(f"{name}#0")).priority for name in NAMES} == {5000}
    weighted = Planned(table=table({"e0": 0.0, "e1": 0.0}, remaining_weight=1.0))
    early, late = (weighted.choose(ready(f"{name}#0")).priority for name in NAMES)
    assert early > late > 5000


@pytest.mark.parametrize(
    ("allowance_s", "weight", "chosen"), [(0.0, 1.0, 0), (60.0, 1.0, 1), (60.0, 0.0, 0)]
)
def test_a_branch_with_time_to_spare_leaves_the_fast_endpoint_alone(
    allowance_s: float, weight: float, chosen: int
) -> None:
    """Its own time is free until it delays the join; without the weight it is worth as always."""
    made = states()
    made[1].remove("r1")
    made[1].refit(replace(made[1].endpoint, latency=ROW.scaled(3.0)))
    forecast = Forecast(output_tokens=100.0, criticality=1.0, delay=RunDelay([1.0], [allowance_s]))

    class Branch(Forecaster):
        def of(self, call: Call) -> Forecast:
            return forecast

    policy = Planned(table=table({"e0": 0.0, "e1": 0.0}, join_weight=weight))
    branch = replace(ready(), candidates=made, fleet=FleetView(made))
    branch.forecaster = Branch(EstimateTable())
    assert policy.choose(branch).endpoint == chosen


def test_a_run_about_to_be_among_the_slowest_gets_the_better_endpoint() -> None:
    """With a tail weight its own time counts more than what it costs others, and only its own."""
    made = states()
    fast, slow = made
    slow.remove("r1")
    for number in range(2):
        fast.add(
            Resident(
                call_id=f"x{number}",
                run_id="r",
                prompt_tokens=100,
                uncached_tokens=0.0,
                output_tokens=300.0,
                criticality=1.0,
                sent_s=0.0,
                first_token_s=0.0,
            )
        )
    slow.refit(replace(slow.endpoint, latency=ROW.scaled(1.2)))
    view = FleetView(made)
    forecaster = Forecaster(EstimateTable(), [WORKFLOW])
    policy = Planned(table=table({"e0": 0.0, "e1": 0.0}, theta=1.0, tail_weight=50.0))

    def chosen(run_arrival_s: float) -> int:
        call = Call(
            call_id="c",
            workflow_hash=WORKFLOW.content_hash,
            site="early#0",
            prompt_tokens=320,
            run_arrival_s=run_arrival_s,
        )
        return policy.choose(Ready(call, made, view, forecaster, 100.0)).endpoint

    policy._tail.limit_s = 60.0
    assert (chosen(99.0), chosen(10.0)) == (1, 0)
