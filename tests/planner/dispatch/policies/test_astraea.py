"""Astraea: levels, the ratio with all waits, aging, one queue at a time, the barrier."""

from planner.dispatch.policies.astraea import Astraea

from .bench import arrive, call, endpoint, finish, router


def test_costly_segments_demote_and_cheap_ones_promote() -> None:
    """Quotas 128, 256, 256: 200 tokens leave the first queue, 200 more return from the second."""
    policy = Astraea(queues=3)
    desk = router(policy, endpoint("e0"))
    levels = []
    for number, tokens in enumerate((200, 300, 300, 200, 100, 100)):
        arrive(desk, f"r.{number}", float(number))
        finish(desk, f"r.{number}", number + 0.5, output=tokens)
        levels.append(policy.level["r"])
    assert levels == [1, 2, 2, 1, 0, 0]


def test_cost_may_add_up_and_hold_the_prompt() -> None:
    """100 + 100 tokens exceed 128 only together; a prompt of 100 counts only if it is told to."""
    for switches, level in (
        ({}, 0),
        ({"cumulative": True}, 1),
        ({"count_prefill": True}, 1),
    ):
        policy = Astraea(**switches)
        desk = router(policy, endpoint("e0"))
        arrive(desk, "r.0", 0.0)
        finish(desk, "r.0", 1.0, output=100)
        arrive(desk, "r.1", 1.0, prompt_tokens=20)
        finish(desk, "r.1", 2.0, output=100)
        after_first = 1 if switches.get("count_prefill") else 0
        # With the prompt 200 tokens demote at once, and 120 promote again.
        assert policy.level["r"] == (0 if after_first else level)


def test_the_ratio_remembers_waits_of_earlier_segments() -> None:
    """Waited 9 s before and 1 s now beats waited 5 s now; without the ratio the elder is first."""
    for ratio, first in ((True, "r.1@0"), (False, "s.0@0")):
        desk = router(Astraea(response_ratio=ratio), endpoint("e0"))
        arrive(desk, "block.0", 0.0)
        arrive(desk, "r.0", 1.0)
        assert finish(desk, "block.0", 10.0) == ["r.0@0"]
        finish(desk, "r.0", 11.0)
        arrive(desk, "block.1", 11.0)
        arrive(desk, "s.0", 11.0)
        arrive(desk, "r.1", 15.0, parents=("r.0",))
        assert finish(desk, "block.1", 16.0) == [first]


def low(policy: Astraea, slots: int = 1):
    """Return a desk with a call of a demoted run waiting, and one of a fresh run after it."""
    desk = router(policy, endpoint("e0", slots=slots))
    arrive(desk, "low.0", 0.0)
    finish(desk, "low.0", 5.0, output=5000)
    for number in range(slots):
        arrive(desk, f"block{number}", 5.0)
    arrive(desk, "low.1", 5.0)
    arrive(desk, "high.0", 6.0)
    return desk


def test_a_higher_queue_goes_first_until_aging_lifts_the_lower() -> None:
    """A second of service: a ratio of 10 is reached after 9 s of waiting."""
    assert finish(low(Astraea(queues=2)), "block0", 8.0) == ["high.0@0"]
    assert finish(low(Astraea(queues=2)), "block0", 30.0) == ["low.1@0"]
    assert finish(low(Astraea(queues=2, tau_age=float("inf"))), "block0", 30.0) == ["high.0@0"]


def test_a_cycle_draws_from_one_queue_unless_it_may_fill_up() -> None:
    """Two free slots: the strict cycle leaves the second to the next event."""
    desk = low(Astraea(), slots=2)
    assert finish(desk, "block0", 6.0) == ["high.0@0"]
    for one_queue, sent in ((True, ["high.0@0"]), (False, ["high.0@0", "low.1@0"])):
        desk = low(Astraea(one_queue=one_queue), slots=2)
        state = desk.view.states[0]
        state.remove("block1")  # two slots come free with one event
        assert finish(desk, "block0", 6.0) == sent


def test_a_queue_that_no_endpoint_can_serve_counts_as_empty() -> None:
    """A waiting call of an unknown model does not block the queues below it."""
    desk = low(Astraea())
    arrive(desk, "lost", 6.0, model="unknown")
    finish(desk, "block0", 7.0)
    assert finish(desk, "high.0", 8.0) == ["low.1@0"]


def test_with_a_barrier_an_endpoint_fills_only_when_empty() -> None:
    """Two slots, one in use: the second call waits for the batch to end."""
    desk = router(Astraea(barrier=True), endpoint("e0", slots=2))
    assert arrive(desk, "a", 0.0) == ["a@0"]
    assert arrive(desk, "b", 0.5) == []
    assert arrive(desk, "c", 0.6) == []
    assert finish(desk, "a", 2.0) == ["b@0", "c@0"]


def test_gaps_are_learned_by_call_site() -> None:
    """Two pauses of 2 s and 4 s after site x: mean 3 s; nothing is known of site y."""
    policy = Astraea()
    desk = router(policy, endpoint("e0", slots=4))
    for run, gap in (("a", 2.0), ("b", 4.0)):
        arrive(desk, f"{run}.0", 0.0, site="x")
        finish(desk, f"{run}.0", 1.0)
        arrive(desk, f"{run}.1", 1.0 + gap, parents=(f"{run}.0",), site="y")
    assert policy.gaps.mean_s(call("c", site="x")) == 3.0
    assert policy.gaps.mean_s(call("c", site="y")) is None
