"""SAGA: graphs, affinity, stealing, fair share, each on its own."""

import pytest

from planner.dispatch.events import CallArrived, Hold, RunEnded, Tick
from planner.dispatch.policies.aeg import ExecutionGraph, Step
from planner.dispatch.policies.saga import Saga, load

from .bench import arrive, busy, call, endpoint, finish, router, sends, start, states


def test_reuse_is_probability_times_overlap() -> None:
    """After a: b with 3/4 at overlap 0.8, c with 1/4 at 0.4, so 0.7; below 0.7 an edge is cut."""
    graph, sure = ExecutionGraph(), ExecutionGraph(least_probability=0.7)
    for target, overlap in (("b", 0.8), ("b", 0.8), ("b", 0.8), ("c", 0.4)):
        steps = [
            Step(site="a", work_s=1.0),
            Step(site=target, parents=(0,), overlap=(overlap,), work_s=2.0),
        ]
        graph.add(steps)
        sure.add(steps)
    assert graph.reuse("a") == pytest.approx(0.7)
    assert sure.reuse("a") == pytest.approx(0.6)
    assert (graph.goes_on("a"), graph.goes_on("b"), graph.goes_on("z")) == (1.0, 0.0, 0.0)
    assert (graph.work_s, graph.work_after_s("a"), graph.work_after_s("b")) == (3.0, 2.0, 0.0)


def test_load_is_the_artifacts() -> None:
    """Two of four slots and 400 of 16,000 tokens, three calls waiting."""
    (state,) = states(endpoint("e0", slots=4))
    busy(state, 2)
    assert load(state, 3) == pytest.approx(0.25 + 0.5 * 400 / 16000 + 0.03)


def quiet(**more: object) -> Saga:
    return Saga(**{"stealing": False, "fair_share": False, **more})  # type: ignore[arg-type]


def test_a_session_stays_where_its_text_is() -> None:
    """With affinity the second call goes back to a busy endpoint, without it to the idle one."""
    for affinity, index in ((True, 0), (False, 1)):
        desk = router(quiet(affinity=affinity), endpoint("e0", slots=4), endpoint("e1", slots=4))
        arrive(desk, "r.0", 0.0, prefix=(1, 2, 3))
        arrive(desk, "r.1", 0.0, prefix=(1, 2, 3, 4))
        assert desk.view.states[index].in_flight == (2 if affinity else 1)


def test_above_theta_a_session_leaves() -> None:
    """Load 0.5 and a bit: stays below theta 0.8, leaves above theta 0.4."""
    for theta, expected in ((0.8, 0), (0.4, 1)):
        desk = router(quiet(theta=theta), endpoint("e0", slots=2), endpoint("e1", slots=2))
        for number in range(2):
            arrive(desk, f"r.{number}", 0.0, prefix=(1, 2))
        held = desk.held
        arrive(desk, "r.2", 0.0, prefix=(1, 2))
        assert (desk.view.states[1].in_flight > 0) == (expected == 1)
        assert desk.held >= held


def stuck(**more: object):
    """Return a desk whose endpoint 0 is full and queued for, while endpoint 1 is idle."""
    policy = Saga(fair_share=False, **more)  # type: ignore[arg-type]
    desk = router(policy, endpoint("e0"), endpoint("e1"))
    arrive(desk, "r.0", 0.0, prefix=(1,))
    arrive(desk, "s.0", 0.0, prefix=(2,))
    finish(desk, "s.0", 0.02)
    for name in ("r.1", "r.2"):
        assert arrive(desk, name, 0.05, prefix=(1,)) == []
    return desk, policy


def test_an_idle_endpoint_steals_the_oldest_session_in_the_router() -> None:
    """After 100 ms of an empty queue, and with one endpoint loaded and one not, r moves over."""
    desk, policy = stuck()
    assert sends(desk.handle(Tick(now_s=0.09))) == []
    assert sends(desk.handle(Tick(now_s=0.2))) == ["r.1@1"]
    assert policy.steals == 1
    # The session's affinity has moved too.
    assert finish(desk, "r.1", 2.0) == ["r.2@1"]


def test_stealing_can_be_switched_off() -> None:
    """Then the session waits for its endpoint."""
    desk, policy = stuck(stealing=False)
    assert sends(desk.handle(Tick(now_s=9.0))) == []
    assert policy.steals == 0


def test_a_wait_asks_to_be_woken_to_steal() -> None:
    """Idleness is a matter of time, so a call that waits makes the router ask for a tick."""
    policy = Saga(fair_share=False)
    desk = router(policy, endpoint("e0"), endpoint("e1"))
    arrive(desk, "r.0", 0.0, prefix=(1,))
    one = call("r.1", ready_s=0.05, run_arrival_s=0.0, prefix=(1,))
    (hold,) = desk.handle(CallArrived(call=one, now_s=0.05))
    assert isinstance(hold, Hold)
    assert hold.until_s == pytest.approx(0.15)


def test_without_a_time_of_idleness_nobody_asks_to_be_woken() -> None:
    """Idle from the first instant, an endpoint steals at events; a tick now would never end."""
    policy = Saga(fair_share=False, idle_s=0.0, spread=100.0)
    desk = router(policy, endpoint("e0"), endpoint("e1"))
    arrive(desk, "r.0", 0.0, prefix=(1,))
    one = call("r.1", ready_s=0.05, run_arrival_s=0.0, prefix=(1,))
    (hold,) = desk.handle(CallArrived(call=one, now_s=0.05))
    assert isinstance(hold, Hold)
    assert hold.until_s is None


def test_fair_share_is_remaining_work_over_time_left_per_tenant() -> None:
    """Of two tenants the one whose run is due sooner is served first; without shares, the elder."""
    for fair, first in ((True, "urgent.0@0"), (False, "calm.0@0")):
        policy = Saga(stealing=False, fair_share=fair, hints=False)
        desk = router(policy, endpoint("e0"))
        for number in range(30):  # an inferred graph needs runs that have ended
            start(desk, f"old{number}", number)
            arrive(desk, f"old{number}.0", number, workflow_hash="w", site="x")
            finish(desk, f"old{number}.0", number + 0.5)
            desk.handle(RunEnded(run_id=f"old{number}", now_s=number + 0.5))
        arrive(desk, "block", 40.0)
        start(desk, "calm", 41.0, tenant="a")
        start(desk, "urgent", 42.0, tenant="b")
        arrive(desk, "calm.0", 41.0, workflow_hash="w", site="x", tenant="a", deadline_s=100.0)
        arrive(desk, "urgent.0", 42.0, workflow_hash="w", site="x", tenant="b", deadline_s=10.0)
        assert finish(desk, "block", 43.0) == [first]
        if fair:
            shares = policy.shares()
            # 1.01 s of work: due at 141 s and at 52 s, seen at 43 s.
            assert shares["a"] == pytest.approx(1.01 / 98.0, rel=0.01)
            assert shares["b"] == pytest.approx(1.01 / 9.0, rel=0.01)


def test_a_graph_is_inferred_after_thirty_runs_and_not_at_all_if_told_so() -> None:
    """Cold start: 29 runs are not enough."""
    for inferred in (True, False):
        policy = Saga(hints=False, inferred=inferred)
        desk = router(policy, endpoint("e0"))
        for number in range(30):
            assert policy.graph("w") is None
            start(desk, f"r{number}", number)
            arrive(desk, f"r{number}.0", number, workflow_hash="w", site="x")
            finish(desk, f"r{number}.0", number + 0.5)
            desk.handle(RunEnded(run_id=f"r{number}", now_s=number + 0.5))
        assert (policy.graph("w") is not None) == inferred
