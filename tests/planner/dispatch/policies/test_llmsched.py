"""LLMSched: the gates of fidelity, on networks small enough to check by hand."""

import math

import pytest

from planner.dispatch.events import RunEnded
from planner.dispatch.policies.bayes import ABSENT, StageNetwork
from planner.dispatch.policies.llmsched import LlmSched

from .bench import arrive, endpoint, finish, router, start


def network(*counted: tuple[int, dict[str, float]], bins: int = 2) -> StageNetwork:
    return StageNetwork([run for times, run in counted for _ in range(times)], bins=bins)


def tied() -> StageNetwork:
    """Return a network: after a short plan a short tool, else a long one, 9 times of 10."""
    return network(
        (45, {"plan": 1.0, "tool": 2.0}),
        (5, {"plan": 1.0, "tool": 20.0}),
        (5, {"plan": 5.0, "tool": 2.0}),
        (45, {"plan": 5.0, "tool": 20.0}),
    )


def loose() -> StageNetwork:
    """Return one with the same marginals, independent of each other."""
    return network(
        (25, {"plan": 1.0, "tool": 2.0}),
        (25, {"plan": 1.0, "tool": 20.0}),
        (25, {"plan": 5.0, "tool": 2.0}),
        (25, {"plan": 5.0, "tool": 20.0}),
    )


def test_the_posterior_is_the_one_computed_by_hand() -> None:
    """After a short plan the tool is long with 5.1 of 50.3 (0.1 per cell, ABSENT included)."""
    belief = tied().posterior({"plan": tied().state("plan", 1.0)})
    long_tool = tied().state("tool", 20.0)
    assert belief.marginals["tool"][long_tool] == pytest.approx(5.1 / 50.3)


def test_a_chain_passes_evidence_on() -> None:
    """X -> y -> z: observing x moves z, by the product of the two conditionals."""
    chain = network(
        (40, {"x": 1.0, "y": 1.0, "z": 1.0}),
        (10, {"x": 1.0, "y": 2.0, "z": 2.0}),
        (10, {"x": 2.0, "y": 1.0, "z": 1.0}),
        (40, {"x": 2.0, "y": 2.0, "z": 2.0}),
    )
    given = chain.posterior({"x": 1})
    assert given.marginals["z"][1] == pytest.approx(0.8, abs=0.02)
    assert sum(given.marginals["z"]) == pytest.approx(1.0)


def test_equal_marginals_with_another_joint_give_another_answer() -> None:
    """Evidence moves the rest only where stages are tied."""
    for make, short, long in ((tied, 3.8, 18.2), (loose, 11.0, 11.0)):
        found = make()
        assert found.posterior({"plan": 1}).left_s() == pytest.approx(short, abs=0.3)
        assert found.posterior({"plan": 2}).left_s() == pytest.approx(long, abs=0.3)


def test_information_not_entropy_ranks_a_stage() -> None:
    """Both plans have one bit of entropy; only the one that tells about the tool is worth it.

    I = ln 2 - H(0.1) = 0.368 nats for a noise of 1 in 10, times a range of 18 s.
    """
    belief = tied().posterior({})
    nats = math.log(2) + 0.1 * math.log(0.1) + 0.9 * math.log(0.9)
    assert belief.reduction("plan") == pytest.approx(nats * 18.0, rel=0.05)
    assert loose().posterior({}).reduction("plan") == 0.0


def test_a_stage_that_is_over_reduces_nothing() -> None:
    """Nor does one whose neighbours are all known, nor an unknown one."""
    found = tied()
    assert found.posterior({"plan": 1}).reduction("plan") == 0.0
    assert found.posterior({"tool": 1}).reduction("plan") == 0.0
    assert found.posterior({}).reduction("nothing") == 0.0


def test_being_absent_shrinks_what_is_left() -> None:
    """A tool of 10 s that occurs in one run of five is worth 2 s; and it can be learned absent."""
    rare = network((20, {"a": 1.0, "tool": 10.0}), (80, {"a": 1.0}))
    assert rare.posterior({"a": 1}).left_s() == pytest.approx(2.0, abs=0.1)
    assert rare.posterior({"a": 1, "tool": ABSENT}).left_s() == 0.0


def taught(epsilon: float) -> LlmSched:
    """Return a policy that has seen: the first answer tells how long the second will be."""
    policy = LlmSched(epsilon=epsilon, least_runs=20, bins=2)
    desk = router(policy, endpoint("e0"))
    now_s = 0.0
    for number in range(40):
        tokens = 10 if number % 2 else 200
        name = f"old{number}"
        start(desk, name, now_s)
        for step, size in enumerate((tokens, 10 * tokens)):
            arrive(desk, f"{name}.{step}", now_s, workflow_hash="w", site=f"s{step}")
            finish(desk, f"{name}.{step}", now_s + 1.0, output=size)
            now_s += 1.0
        desk.handle(RunEnded(run_id=name, now_s=now_s))
    return policy


def flow(first_of_a: int, epsilon: float = 0.0) -> list[str]:
    """Return which of two runs with a first answer each gets the slot for its second."""
    policy = taught(epsilon)
    desk = router(policy, endpoint("e0"))
    for name, tokens in (("a", first_of_a), ("b", 100)):
        start(desk, name, 100.0)
        arrive(desk, f"{name}.0", 100.0, workflow_hash="w", site="s0")
        finish(desk, f"{name}.0", 101.0, output=tokens)
    arrive(desk, "block", 101.0)
    arrive(desk, "a.1", 101.0, workflow_hash="w", site="s1")
    arrive(desk, "b.1", 101.0, workflow_hash="w", site="s1")
    return finish(desk, "block", 102.0)


def test_one_observed_duration_flips_the_choice() -> None:
    """A short first answer of a promises a short rest; a long one lets b go first."""
    assert flow(first_of_a=10) == ["a.1@0"]
    assert flow(first_of_a=200) == ["b.1@0"]


def test_exploring_takes_what_tells_most() -> None:
    """With epsilon 1 a run at its telling first stage goes before one that is nearly done."""
    for epsilon, first in ((0.0, "done.1@0"), (1.0, "fresh.0@0")):
        policy = taught(epsilon)
        desk = router(policy, endpoint("e0"))
        start(desk, "done", 100.0)
        arrive(desk, "done.0", 100.0, workflow_hash="w", site="s0")
        finish(desk, "done.0", 101.0, output=10)
        arrive(desk, "block", 101.0)
        arrive(desk, "done.1", 101.0, workflow_hash="w", site="s1")
        start(desk, "fresh", 101.0)
        arrive(desk, "fresh.0", 101.0, workflow_hash="w", site="s0")
        assert finish(desk, "block", 102.0) == [first]


def test_without_a_profile_runs_go_by_age() -> None:
    """Nothing has been observed: first come, first served."""
    desk = router(LlmSched(), endpoint("e0"))
    arrive(desk, "block", 0.0)
    arrive(desk, "a.0", 1.0)
    arrive(desk, "b.0", 2.0)
    assert finish(desk, "block", 3.0) == ["a.0@0"]
