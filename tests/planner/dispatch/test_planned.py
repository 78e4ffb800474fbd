"""Almanac's policy: prices on the delay of others, and runs that are soon over first."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    EndpointDown,
    EndpointUp,
    Event,
    Hold,
    Send,
)
from planner.dispatch.forecast import Forecast, Forecaster
from planner.dispatch.joins import RunDelay
from planner.dispatch.policies.base import Ready
from planner.dispatch.policies.planned import Planned
from planner.dispatch.router import Router
from planner.dispatch.table import DispatchTable, Ranked, Row, Tuning
from planner.dispatch.view import EndpointState, FleetView, Resident
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
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


def pools(*roles: str) -> Fleet:
    """One slot each, so that two calls are sent before one waits."""
    return Fleet(
        name="pools",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{index}"),
                model="m",
                gpu="G",
                latency=ROW,
                kv_blocks=200,
                max_num_seqs=1,
                role=role,
                kv_bytes_per_token=1000,
            )
            for index, role in enumerate(roles)
        ),
    )


def router(*roles: str, **tuning: float) -> Router:
    fleet = pools(*roles)
    prices = {str(endpoint.id): 0.0 for endpoint in fleet.endpoints}
    policy = Planned(table=table(prices, **tuning))
    return Router(fleet, policy, Forecaster(EstimateTable(), [WORKFLOW]))


def arrival(name: str, site: str = "late", run: str = "", *, arrived_s: float = 0.0) -> CallArrived:
    call = Call(
        call_id=name,
        run_id=run or name,
        workflow_hash=WORKFLOW.content_hash,
        site=f"{site}#0",
        prompt_tokens=100,
        run_arrival_s=arrived_s,
    )
    return CallArrived(call=call, now_s=0.0)


def sent(made: Router, *events: Event) -> list[str]:
    """Return the calls that some events send, in order."""
    commands = [command for event in events for command in made.handle(event)]
    return [command.call_id for command in commands if isinstance(command, Send)]


def finished(name: str) -> CallFinished:
    return CallFinished(call_id=name, now_s=1.0, output_tokens=1)


def test_calls_wait_in_the_router_in_fleets_with_pools_only() -> None:
    """With pools the third call for a slot waits until one ends; others get all at once."""
    made = router("prefill", "decode")
    assert sent(made, arrival("x1"), arrival("x2")) == ["x1", "x2"]
    assert made.handle(arrival("x3")) == [Hold(call_id="x3", reason="queued")]
    (send,) = made.handle(finished("x1"))
    assert isinstance(send, Send)
    assert (send.call_id, send.endpoint, send.decode_endpoint) == ("x3", 0, 1)
    assert send.reason == "plan"
    whole = router("both")
    assert sent(whole, *map(arrival, ("x1", "x2", "x3"))) == ["x1", "x2", "x3"]


def test_what_waits_goes_by_what_remains_of_its_run() -> None:
    """Run b has its last call to do; a has a longer one besides, and goes second with both.

    By their calls alone the last ones of both runs would come first.
    """
    made = router("prefill", "decode")
    sent(made, arrival("x1"), arrival("x2"))
    waiting = [arrival("a1", "late", "a"), arrival("a2", "early", "a"), arrival("b", "late", "b")]
    assert sent(made, *waiting) == []
    order = [sent(made, finished(name)) for name in ("x1", "x2", "b", "a2")]
    assert order == [["b"], ["a2"], ["a1"], []]


def test_old_runs_wait_for_young_ones_no_longer_than_their_remainder() -> None:
    """A run that came first by more than it takes longer goes first, and any does at weight 0."""
    for weight, between_s, first in ((1.0, 1.0, "young"), (1.0, 60.0, "old"), (0.0, 1.0, "old")):
        made = router("prefill", "decode", remaining_weight=weight)
        sent(made, arrival("x1"), arrival("x2"))
        sent(made, arrival("old", "early"), arrival("young", "late", arrived_s=between_s))
        assert sent(made, finished("x1")) == [first]


def test_engines_of_a_pool_serve_in_the_order_of_the_router() -> None:
    """Priority is the run's arrival in ms plus the remainder of its longest waiting call.

    Both calls of run a go at once, the longer one first, and alike.
    """
    made = router("prefill", "decode", remaining_weight=1.0)
    sent(made, arrival("x"), finished("x"), EndpointDown(endpoint=1, now_s=1.0))
    sent(made, arrival("a1", "late", "a"), arrival("a2", "early", "a"))
    commands = made.handle(EndpointUp(endpoint=1, now_s=2.0))
    longest_s = made.forecaster.of(arrival("a2", "early").call).remaining_s
    ranked = [(one.call_id, one.priority) for one in commands if isinstance(one, Send)]
    assert ranked == [("a2", int(longest_s * 1000)), ("a1", int(longest_s * 1000))]


def test_a_call_that_counts_nothing_still_gets_the_better_decode_endpoint() -> None:
    """Where its own time has no weight all decode endpoints score alike; the idle one it is."""
    made = router("prefill", "decode", "decode")
    made.forecaster._critical[WORKFLOW.content_hash, "early#0"] = 0.0
    for name, other in (("x", 1), ("y", 2)):
        (send,) = made.handle(arrival(name, "early"))
        assert isinstance(send, Send)
        assert send.decode_endpoint == other


def test_without_a_row_calls_wait_by_age_and_go_where_they_finish_first() -> None:
    """Unknown sites and a missing table fall back, with pools as without."""
    made = router("prefill", "decode")
    assert isinstance(made.policy, Planned)
    made.policy.table = None
    (send,) = made.handle(arrival("x1", "early"))
    assert isinstance(send, Send)
    assert (send.reason, send.priority, send.decode_endpoint) == ("fallback", 0, 1)
    sent(made, arrival("x2"), arrival("young", arrived_s=2.0), arrival("old", "early"))
    assert sent(made, finished("x1")) == ["old"]


def test_nothing_waits_for_ever() -> None:
    """Calls are sent when those before them fail or leave, and when an endpoint comes back."""
    made = router("prefill", "decode")
    assert sent(made, *map(arrival, ("a", "b", "c", "d", "e"))) == ["a", "b"]
    assert sent(made, CallFailed(call_id="a", now_s=1.0, reason="x")) == ["c"]
    assert sent(made, CallCancelled(call_id="d", now_s=1.0)) == []
    assert sent(made, CallCancelled(call_id="b", now_s=1.0)) == ["e"]
    down = [CallFailed(call_id=name, now_s=1.0, reason="crash") for name in ("c", "e")]
    assert sent(made, EndpointDown(endpoint=1, now_s=1.0), *down, arrival("f")) == []
    assert sent(made, EndpointUp(endpoint=1, now_s=2.0)) == ["f"]
    assert sent(made, finished("f")) == []
    assert (made.in_flight, made.held) == (0, 0)


@pytest.mark.parametrize("roles", [("both", "both"), ("prefill", "decode", "decode")])
def test_calls_that_wait_are_sent_after_the_fleet_has_changed(roles: tuple[str, ...]) -> None:
    """The next event sends what has room by then, and everything where there are no pools."""
    made = router("prefill", "decode")
    sent(made, *map(arrival, ("a", "b", "c", "d")))
    assert made.held == 2
    fleet = pools(*roles)
    made.refit(fleet)
    assert isinstance(made.policy, Planned)
    made.policy.table = table({str(endpoint.id): 0.0 for endpoint in fleet.endpoints})
    made.handle(finished("a"))
    made.handle(finished("b"))
    assert (made.in_flight, made.held) == (2, 0)
    assert sent(made, finished("c"), finished("d")) == []
    # Whole endpoints take all that comes, and pools are filled as before.
    later = [f"e{number}" for number in range(6)]
    assert len(sent(made, *map(arrival, later))) == (6 if roles[0] == "both" else 2)
