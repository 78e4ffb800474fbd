"""HexAGenT: horizons, ratios, the greedy plan and its delayed application."""

import pytest

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallFinished,
    EndpointDown,
    RunStarted,
    Tick,
)
from planner.dispatch.policies import make_policy
from planner.dispatch.policies.hexagent import MOST_PLANNED, HexAGenT, Horizon
from planner.dispatch.policies.progress import RunProgress, Runs

from .bench import arrive, call, endpoint, finish, router, start


def revealed(*, tools: bool) -> tuple[Horizon, RunProgress, Runs]:
    """Return a run that began at 0 s, whose first call of 2 s ended at 10 s."""
    runs = Runs()
    runs.observe(RunStarted(run_id="r", workflow_hash="w", now_s=0.0))
    first = call("r.0", ready_s=0.0)
    runs.observe(CallArrived(call=first, now_s=0.0))
    horizon = Horizon()
    run = runs.of(first)
    horizon.reveal(first, run, 2.0, tools=tools)
    runs.sent(first, 1.0)
    runs.observe(CallFinished(call_id="r.0", now_s=10.0, output_tokens=50))
    return horizon, run, runs


@pytest.mark.parametrize(("tools", "expected"), [(True, 6.0), (False, 3.0)])
def test_the_horizon_is_the_longest_chain_of_what_is_revealed(tools: bool, expected: float) -> None:
    """2 s, a tool of 3 s if it counts, 1 s: waits in the queue (here 8 s) are not in it."""
    horizon, run, _ = revealed(tools=tools)
    assert horizon.seconds(slots=4) == 2.0
    horizon.reveal(call("r.1", ready_s=13.0, parents=("r.0",)), run, 1.0, tools=tools)
    assert horizon.seconds(slots=4) == expected


def test_real_lengths_replace_predicted_ones() -> None:
    """The first call took half a second only, so what follows begins earlier."""
    horizon, run, _ = revealed(tools=False)
    horizon.correct(call("r.0"), 0.5)
    horizon.reveal(call("r.1", ready_s=13.0, parents=("r.0",)), run, 1.0, tools=False)
    assert horizon.seconds(slots=4) == 1.5


def test_a_fan_out_wider_than_the_fleet_counts_by_its_work() -> None:
    """Six calls of 1 s beside each other take 3 s on two slots."""
    horizon, run = Horizon(), RunProgress("r", "w", 0.0)
    for number in range(6):
        horizon.reveal(call(f"r.{number}"), run, 1.0, tools=True)
    assert horizon.seconds(slots=2) == 3.0
    assert horizon.seconds(slots=8) == 1.0


def test_the_largest_projected_stretch_goes_first() -> None:
    """Both waited: the short call of 10 s latency over 1 s beats the long one over 4 s.

    Age alone (the fallback) would have taken the long one, whose run is older.
    """
    desk = router(make_policy("hexagent", planner_latency_s=0.0), endpoint("e0"))
    arrive(desk, "block", 0.0)
    arrive(desk, "long.0", 1.0, prompt_tokens=30_000, max_tokens=1)
    arrive(desk, "short.0", 2.0)
    assert finish(desk, "block", 10.0) == ["short.0@0"]


def test_a_plan_counts_only_after_its_latency_and_the_fallback_serves_meanwhile() -> None:
    """With 5 s of planning, a slot that frees within them goes to the older run."""
    desk = router(make_policy("hexagent", planner_latency_s=5.0), endpoint("e0"))
    policy = desk.policy
    assert isinstance(policy, HexAGenT)
    arrive(desk, "block", 0.0)
    arrive(desk, "long.0", 6.0, prompt_tokens=9_000, max_tokens=1)
    arrive(desk, "short.0", 7.0)
    assert finish(desk, "block", 8.0) == ["long.0@0"]
    # The plan of 6 s knew long.0 only, which has started: its entry is dropped.
    desk.handle(Tick(now_s=11.0))
    assert policy.dropped == 1


def test_an_entry_whose_pair_is_gone_is_dropped() -> None:
    """The planned endpoint goes down: the call is placed anew."""
    desk = router(
        make_policy("hexagent", planner_latency_s=0.0),
        endpoint("fast", speed=4.0),
        endpoint("slow"),
    )
    arrive(desk, "a", 0.0)
    assert arrive(desk, "b", 0.0) == []
    desk.handle(EndpointDown(endpoint=0, now_s=0.1))
    assert [one.call_id for one in desk.handle(Tick(now_s=0.2))] == ["b"]
    assert desk.policy.dropped == 1  # type: ignore[attr-defined]


def test_prefill_and_decode_are_placed_together() -> None:
    """Two pairs, each with one fast and one slow end: the sum decides, not the prefill alone.

    Prefill of 10,000 tokens takes 0.5 s or 1 s, decode of 100 tokens 2 s or 0.5 s; the link of the
    fast prefill endpoint is so slow that its 0.5 s are lost.
    """
    pools = (
        endpoint("p-far", role="prefill", speed=2.0, kv_bytes_per_token=100_000, link_gb_s=0.5),
        endpoint("p-near", role="prefill", kv_bytes_per_token=100_000, link_gb_s=100.0),
        endpoint("d", role="decode", kv_bytes_per_token=100_000, link_gb_s=100.0),
    )
    desk = router(make_policy("hexagent"), *pools)
    assert arrive(desk, "a", 0.0, prompt_tokens=10_000) == ["a@1"]


def test_the_pair_is_checked_for_kv_when_the_call_is_sent() -> None:
    """The decode endpoint has room for one context of 1,000 tokens: the second call waits."""
    pools = (
        endpoint("p", role="prefill", slots=8, kv_bytes_per_token=1),
        endpoint("d", role="decode", slots=8, kv_blocks=100, kv_bytes_per_token=1),
    )
    desk = router(make_policy("hexagent", planner_latency_s=0.0), *pools)
    assert arrive(desk, "a", 0.0, prompt_tokens=1000) == ["a@0"]
    assert arrive(desk, "b", 0.0, prompt_tokens=1000) == []
    assert finish(desk, "a", 3.0) == ["b@0"]


def test_the_full_horizon_needs_a_graph() -> None:
    """Without a graph the forecast of the rest is the call itself: both horizons agree."""
    orders = []
    for full in (False, True):
        desk = router(
            make_policy("hexagent", planner_latency_s=0.0, full_horizon=full), endpoint("e0")
        )
        arrive(desk, "block", 0.0)
        arrive(desk, "a.0", 1.0, prompt_tokens=3000)
        arrive(desk, "b.0", 2.0)
        orders.append(finish(desk, "block", 5.0))
    assert orders[0] == orders[1]


def test_a_plan_places_no_more_than_it_may() -> None:
    """Of a hundred waiting calls the most urgent are planned, the others come after them."""
    policy = HexAGenT(planner_latency_s=0.0)
    desk = router(policy, endpoint("e0"))
    start(desk, "r", 0.0)
    arrive(desk, "block", 0.0)
    held: list[Call] = []
    for number in range(MOST_PLANNED + 36):
        held.append(call(f"r{number}.0", ready_s=float(number), run_arrival_s=float(number)))
        desk.handle(CallArrived(call=held[-1], now_s=float(number)))
    assert policy.forecaster is not None
    plan = policy.plan(held, desk.view, policy.forecaster, 200.0)
    assert set(plan) == {one.call_id for one in held[:MOST_PLANNED]}
