"""Runs that are about to be among the slowest."""

import pytest

from planner.dispatch.events import Call, CallArrived, CallCancelled, CallFinished, RunEnded
from planner.dispatch.tail import Tail


def play(
    tail: Tail, name: str, arrival_s: float, latency_s: float, *, ended_later_s: float
) -> None:
    """Let a run of one call come and go."""
    call = Call(call_id=f"{name}/0", run_id=name, run_arrival_s=arrival_s)
    tail.observe(CallArrived(call=call, now_s=arrival_s))
    end_s = arrival_s + latency_s
    tail.observe(CallFinished(call_id=call.call_id, now_s=end_s, output_tokens=1))
    tail.observe(RunEnded(run_id=name, now_s=end_s + ended_later_s))


def test_the_limit_is_what_one_run_in_twenty_exceeds() -> None:
    """Of 40 runs of 1 to 40 s two take longer than 38 s; silence after the last call is no time."""
    tail = Tail()
    for number in range(1, 40):
        play(tail, f"r{number}", 5.0, float(number), ended_later_s=300.0)
        assert tail.limit_s is None
    play(tail, "r40", 5.0, 40.0, ended_later_s=300.0)
    assert tail.limit_s == 39.0


def test_the_chance_rises_with_age_and_remainder() -> None:
    """It is 0 while nothing is known, and 1 once age and remainder reach the limit."""
    tail = Tail()
    call = Call(call_id="c", run_id="r", run_arrival_s=100.0)
    assert tail.chance(call, 50.0, 100.0) == 0.0
    tail.limit_s = 40.0
    assert tail.chance(call, 20.0, 100.0) == pytest.approx(1 / 16)
    assert tail.chance(call, 20.0, 110.0) == pytest.approx(0.75**4)
    assert tail.chance(call, 30.0, 110.0) == tail.chance(call, 99.0, 199.0) == 1.0


def test_nothing_is_kept_of_what_is_over() -> None:
    """Cancelled calls, and runs that ended without one, leave nothing behind."""
    tail = Tail()
    tail.observe(CallArrived(call=Call(call_id="c", run_id="r"), now_s=0.0))
    tail.observe(CallCancelled(call_id="c", now_s=1.0))
    tail.observe(RunEnded(run_id="r", now_s=2.0))
    play(tail, "s", 0.0, 1.0, ended_later_s=0.0)
    assert (tail._calls, tail._runs) == ({}, {})


def test_runs_that_nobody_ends_are_forgotten_the_oldest_first(monkeypatch):
    """Calls that come after the ends of their runs fill a place, not the memory."""
    monkeypatch.setattr("planner.dispatch.tail._RUNS", 3)
    tail = Tail()
    for number in range(5):
        call = Call(call_id=f"c{number}", run_id=f"r{number}")
        tail.observe(CallArrived(call=call, now_s=0.0))
        tail.observe(CallFinished(call_id=call.call_id, now_s=1.0, output_tokens=1))
    assert list(tail._runs) == ["r2", "r3", "r4"]
