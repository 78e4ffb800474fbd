"""Policies on hand-made situations."""

import math

import pytest

from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import POLICIES, make_policy, parse_policy
from planner.dispatch.policies.base import Ready
from planner.dispatch.view import EndpointState, FleetView, Resident
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow


def state(index: int, *, decode_ms: float = 10.0, prefill_us: float = 50.0, slots: int = 4):
    row = LatencyRow(
        prefill_base_ms=5,
        prefill_us_per_token=prefill_us,
        prefill_ns_per_token_sq=0,
        decode_base_ms=decode_ms,
        decode_us_per_call=500,
        decode_ns_per_kv_token=0,
    )
    endpoint = Endpoint(
        id=EndpointId(f"e{index}"),
        model="m",
        gpu="G",
        latency=row,
        kv_blocks=200,
        max_num_seqs=slots,
    )
    return EndpointState(index, endpoint, row)


def load(target: EndpointState, calls: int, *, output: float = 100.0) -> None:
    for number in range(calls):
        target.add(
            Resident(
                call_id=f"{target.index}-{number}",
                run_id="r",
                prompt_tokens=100,
                uncached_tokens=100.0,
                output_tokens=output,
                criticality=1.0,
                sent_s=0.0,
            )
        )


def ready(states: list[EndpointState], **call: object) -> Ready:
    values = {"call_id": "c", "prompt_tokens": 320, "prefix": tuple(range(20)), **call}
    return Ready(
        Call(**values),  # type: ignore[arg-type]
        states,
        FleetView(states),
        Forecaster(EstimateTable()),
        0.0,
    )


def test_round_robin_takes_turns() -> None:
    """Three endpoints are used in fleet order, again and again."""
    states = [state(i) for i in range(3)]
    policy = make_policy("round_robin")
    assert [policy.choose(ready(states)).endpoint for _ in range(5)] == [0, 1, 2, 0, 1]


def test_power_of_two_never_takes_the_worst_of_three() -> None:
    """Of any two endpoints the less loaded wins, so the most loaded of all never does."""
    states = [state(i) for i in range(3)]
    load(states[1], 5)
    policy = make_policy("power_of_two", seed=1)
    assert {policy.choose(ready(states)).endpoint for _ in range(50)} == {0, 2}


def test_least_load_counts_calls_in_flight() -> None:
    """The emptiest endpoint is chosen."""
    states = [state(i) for i in range(3)]
    load(states[0], 2)
    load(states[1], 1)
    assert make_policy("least_load").choose(ready(states)).endpoint == 2


def test_prefix_affinity_follows_the_prefix_until_the_gap_is_too_wide() -> None:
    """Ray's rule: matching endpoint, unless the queue gap exceeds the threshold."""
    states = [state(i) for i in range(2)]
    states[1].prefix.record(tuple(range(20)), 16.0)
    load(states[1], 3)
    loyal = make_policy("prefix_affinity", imbalanced_threshold=math.inf)
    assert loyal.choose(ready(states)).endpoint == 1
    fair = make_policy("prefix_affinity", imbalanced_threshold=2)
    assert fair.choose(ready(states)).endpoint == 0


def test_prefix_affinity_without_a_match_takes_the_emptiest_cache() -> None:
    """Below the match rate the endpoint with the least cached text is chosen."""
    states = [state(i) for i in range(2)]
    states[0].prefix.record(tuple(range(100, 120)), 16.0)
    assert make_policy("prefix_affinity").choose(ready(states)).endpoint == 1


def test_least_expected_finish_weighs_speed_queue_and_prefix() -> None:
    """A fast endpoint wins idle; a cached prefix wins when prefill is what costs."""
    fast, slow = state(0, decode_ms=5), state(1, decode_ms=20)
    policy = make_policy("least_expected_finish")
    assert policy.choose(ready([fast, slow])).endpoint == 0
    load(fast, 12, output=2000)
    assert policy.choose(ready([fast, slow])).endpoint == 1
    one, two = state(0, prefill_us=5000), state(1, prefill_us=5000)
    two.prefix.record(tuple(range(20)), 16.0)
    assert policy.choose(ready([one, two])).endpoint == 1


def test_marginal_cost_spares_busy_neighbours() -> None:
    """With the imposed delay priced high, an idle slower endpoint is preferred to a busy one."""
    fast, slow = state(0, decode_ms=9.5, slots=16), state(1, decode_ms=14, slots=16)
    load(fast, 6)
    states = [fast, slow]
    assert make_policy("marginal_cost", theta=0.0).choose(ready(states)).endpoint == 0
    assert make_policy("marginal_cost", theta=3.0).choose(ready(states)).endpoint == 1


def test_marginal_cost_serves_older_runs_first() -> None:
    """The engine priority is the age of the run; smaller is older."""
    policy = make_policy("marginal_cost")
    old = policy.choose(ready([state(0)], run_arrival_s=1.0)).priority
    young = policy.choose(ready([state(0)], run_arrival_s=2.0)).priority
    assert old < young


def test_almanac_without_a_table_falls_back_and_says_so() -> None:
    """No table, no row: least expected finish, labelled as a fallback."""
    choice = make_policy("almanac").choose(ready([state(0, decode_ms=20), state(1)]))
    assert (choice.endpoint, choice.reason) == (1, "fallback")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_chooses_only_among_candidates(name: str) -> None:
    """An endpoint that is not a candidate is never chosen, whatever its state."""
    states = [state(i) for i in range(4)]
    policy = make_policy(name, seed=3)
    one = ready(states)
    for _ in range(20):
        limited = Ready(one.call, states[2:], one.fleet, one.forecaster, 0.0)
        assert policy.choose(limited).endpoint in (2, 3)


def test_unknown_policies_and_parameters_are_named() -> None:
    """The error says which policies and parameters exist."""
    with pytest.raises(InvalidInput, match="round_robin"):
        make_policy("best")
    with pytest.raises(InvalidInput, match="theta"):
        make_policy("marginal_cost", thta=1.0)
    with pytest.raises(InvalidInput, match="key=number"):
        parse_policy("marginal_cost:theta=high")
    for text in ("marginal_cost:theta=-1", "marginal_cost:theta=nan"):
        with pytest.raises(InvalidInput, match="out of range; use a number >= 0"):
            parse_policy(text)
    for text in ("random:seed=1", "almanac:table=1", "random:theta=1"):
        with pytest.raises(InvalidInput, match="has no parameter .*; known: none"):
            parse_policy(text)
    assert parse_policy("marginal_cost:theta=2") == ("marginal_cost", {"theta": 2.0})
