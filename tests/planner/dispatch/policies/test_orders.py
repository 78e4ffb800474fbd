"""The queue, its rules of room, and the orders, on one slot or two."""

import pytest

from planner.dispatch.events import CallFailed, EndpointDown, EndpointUp
from planner.dispatch.policies import make_policy

from .bench import arrive, endpoint, finish, router, start


def served(name: str, arrivals: list[tuple[str, float, dict[str, object]]], **parameters: float):
    """Return the order in which one slot serves calls that arrive while it is busy."""
    desk = router(make_policy(name, **parameters), endpoint("e0"))
    assert arrive(desk, "first", 0.0) == ["first@0"]
    for call, now_s, more in arrivals:
        assert arrive(desk, call, now_s, **more) == []
    order, last, now_s = [], "first", 100.0
    for _ in arrivals:
        (sent,) = finish(desk, last, now_s)
        last = sent.partition("@")[0]
        order.append(last)
        now_s += 1.0
    return order


def test_fcfs_call_goes_by_readiness_and_fcfs_workflow_by_the_runs_age() -> None:
    """A late call of an old run waits behind an early one of a young run, or before it."""
    arrivals = [
        ("young.0", 2.0, {"run_arrival_s": 2.0}),
        ("old.0", 3.0, {"run_arrival_s": 1.0}),
    ]
    assert served("fcfs_call", arrivals) == ["young.0", "old.0"]
    assert served("fcfs_workflow", arrivals) == ["old.0", "young.0"]


def test_least_laxity_is_deadline_less_what_is_left() -> None:
    """Due at 12 s with 1 s left comes after due at 11 s; without deadlines age decides."""
    due = [("late.0", 1.0, {"deadline_s": 11.0}), ("soon.0", 2.0, {"deadline_s": 9.0})]
    assert served("llf_workflow", due) == ["soon.0", "late.0"]
    plain = [("old.0", 1.0, {}), ("young.0", 2.0, {})]
    assert served("llf_workflow", plain) == ["old.0", "young.0"]
    # A longer answer to write leaves less laxity under the same deadline.
    sized = [
        ("short.0", 1.0, {"deadline_s": 10.0}),
        ("long.0", 1.0, {"deadline_s": 10.0, "prompt_tokens": 5000}),
    ]
    assert served("llf_workflow", sized) == ["long.0", "short.0"]


def test_las_serves_the_run_with_the_least_service() -> None:
    """A run that was served for 5 s waits behind one that was served for 1 s."""
    desk = router(make_policy("las"), endpoint("e0"))
    arrive(desk, "much.0", 0.0)
    finish(desk, "much.0", 5.0)
    arrive(desk, "little.0", 5.0)
    finish(desk, "little.0", 6.0)
    arrive(desk, "block", 6.0)
    arrive(desk, "much.1", 6.5)
    arrive(desk, "little.1", 7.0)
    assert finish(desk, "block", 8.0) == ["little.1@0"]


@pytest.mark.parametrize(("name", "first"), [("plas", "chain.2@0"), ("atlas", "fan.2@0")])
def test_atlas_counts_parallel_threads_once(name: str, first: str) -> None:
    """Two threads of 4 s beside each other are 8 s for PLAS and 4 s for ATLAS.

    A chain of 3 s and 3 s is 6 s for both, so PLAS serves the chain first and ATLAS the fan.
    """
    desk = router(make_policy(name, quantum_s=5.0, beta=1000.0), endpoint("e0", slots=2))
    arrive(desk, "fan.0", 0.0)
    arrive(desk, "fan.1", 0.0)
    finish(desk, "fan.0", 4.0)
    finish(desk, "fan.1", 4.0)
    arrive(desk, "chain.0", 4.0)
    finish(desk, "chain.0", 7.0)
    arrive(desk, "chain.1", 7.0, parents=("chain.0",))
    finish(desk, "chain.1", 10.0)
    arrive(desk, "block.0", 10.0)
    arrive(desk, "block.1", 10.0)
    # Limits 5 s, 10 s: one of the two is in the first queue or both in the second, by arrival.
    arrive(desk, "chain.2", 10.0, parents=("chain.1",))
    arrive(desk, "fan.2", 10.5, parents=("fan.0", "fan.1"))
    assert finish(desk, "block.0", 11.0) == [first]


def test_a_run_that_waits_too_long_is_lifted_to_the_first_queue() -> None:
    """Served 4 s and waiting 8 s: with beta 2 it goes before a run that was never served."""
    desk = router(make_policy("plas", quantum_s=1.0, beta=2.0), endpoint("e0"))
    arrive(desk, "old.0", 0.0)
    finish(desk, "old.0", 4.0)
    arrive(desk, "block.0", 4.0)
    arrive(desk, "old.1", 4.0)
    arrive(desk, "new.0", 5.0)
    # Only 4 s of waiting: the newcomer is in a higher queue.
    assert finish(desk, "block.0", 8.0) == ["new.0@0"]
    assert finish(desk, "new.0", 12.0) == ["old.1@0"]
    finish(desk, "old.1", 13.0)
    arrive(desk, "block.1", 13.0)
    arrive(desk, "old.2", 13.0)
    arrive(desk, "new.1", 30.0)
    assert finish(desk, "block.1", 31.0) == ["old.2@0"]


def test_a_call_waits_for_a_fast_endpoint_only_as_long_as_that_is_faster() -> None:
    """Each call that waits for the fast endpoint lengthens the wait of the next by its service."""
    fast, slow = endpoint("fast", speed=4.0), endpoint("slow", speed=0.4)
    desk = router(make_policy("fcfs_call"), fast, slow)
    assert arrive(desk, "a", 0.0) == ["a@0"]
    # A quarter second each on the fast one, two and a half on the slow one.
    waited = 0
    while not (sent := arrive(desk, f"w{waited}", 0.0)):
        waited += 1
    assert sent == [f"w{waited}@1"]
    assert 8 <= waited <= 10


def test_nothing_slips_past_a_large_call_that_waits_for_kv() -> None:
    """Of 1024 tokens 500 are taken: 800 wait, and 250 behind them wait too."""
    desk = router(make_policy("fcfs_call"), endpoint("e0", slots=8, kv_blocks=64))
    arrive(desk, "a", 0.0, prompt_tokens=400)
    assert arrive(desk, "large", 1.0, prompt_tokens=700) == []
    assert arrive(desk, "small", 2.0, prompt_tokens=150) == []
    assert finish(desk, "a", 3.0) == ["large@0"]
    assert finish(desk, "large", 4.0) == ["small@0"]


def test_a_queue_survives_failures_and_outages() -> None:
    """A failed call frees its slot; what waits for an endpoint that is down goes when it is up."""
    desk = router(make_policy("fcfs_workflow"), endpoint("e0"))
    arrive(desk, "a", 0.0)
    arrive(desk, "b", 1.0)
    commands = desk.handle(CallFailed(call_id="a", now_s=2.0))
    assert [one.call_id for one in commands] == ["b"]
    desk.handle(EndpointDown(endpoint=0, now_s=3.0))
    desk.handle(CallFailed(call_id="b", now_s=3.0))
    assert arrive(desk, "c", 4.0) == []
    assert [one.call_id for one in desk.handle(EndpointUp(endpoint=0, now_s=5.0))] == ["c"]


def test_with_pools_the_pair_of_least_time_is_chosen_and_waited_for() -> None:
    """The faster decoder is taken while it has a slot, though the prefill endpoint is the same."""
    pools = (
        endpoint("p", role="prefill", slots=8, kv_bytes_per_token=1000),
        endpoint("slow", role="decode", speed=0.5, kv_bytes_per_token=1000),
        endpoint("fast", role="decode", speed=2.0, kv_bytes_per_token=1000),
    )
    desk = router(make_policy("fcfs_call"), *pools)
    start(desk, "r", 0.0)
    arrive(desk, "r.0", 0.0)
    assert [state.in_flight for state in desk.view.states] == [1, 0, 1]
    # Half a second of waiting for the fast one beats two seconds on the slow one.
    assert arrive(desk, "r.1", 0.0) == []
    assert desk.held == 1
