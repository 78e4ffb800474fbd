"""Prefill/decode pairs: two lanes, a transfer between them, and the checker's word on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.domain.errors import Infeasible
from planner.domain.fleet import Endpoint
from planner.solve.explain import endpoint_use, runners_up
from planner.solve.prices import instance_prices
from planner.solve.solver import PlanResult
from planner.verify import verify_plan

from .small import Case, case, chain, endpoint, enumerate_best, fleet

KV_BYTES = 10**6


def part(
    name: str,
    role: Literal["prefill", "decode"],
    scale: float = 1.0,
    link: float = 10.0,
    slots: int = 4,
) -> Endpoint:
    """Return an endpoint of a pool; 300 tokens take 30 ms over 10 GB/s."""
    return replace(
        endpoint(name, scale, slots), role=role, kv_bytes_per_token=KV_BYTES, link_gb_s=link
    )


def checked(question: Case) -> PlanResult:
    """Return a plan that the checker accepts."""
    result = question.solve()
    report = verify_plan(
        result.plan, question.workflow, question.fleet, question.estimates, result.scenarios
    )
    assert report.ok, report.violations
    return result


def test_a_call_takes_prefill_transfer_and_decode() -> None:
    """0.2 s of prefill, 1 ms and 30 ms of transfer, 100 steps of 10 ms: 1.231 s, in ticks 1.24."""
    plan = checked(case(chain("a"), fleet(part("p", "prefill"), part("d", "decode")), 0.1)).plan
    assert plan.objective_s == pytest.approx(1.24)
    (one,) = plan.assignments
    assert (one.prefill, one.endpoint) == ("p", "d")
    assert plan.levels == {"p": 1, "d": 1}
    assert plan.shares() == {"a#0": {"p": 1.0}}


def test_decoding_beside_others_waits_for_no_prefill() -> None:
    """Pairs: at level 2 a whole endpoint adds another prefill of 0.2 s, a decode lane none."""
    whole = checked(case(chain("a"), fleet(endpoint("e", slots=2)), 1.0)).plan
    split = checked(
        case(chain("a"), fleet(part("p", "prefill"), part("d", "decode", slots=2)), 1.0)
    )
    assert whole.levels == {"e": 2}
    assert split.plan.levels == {"p": 1, "d": 2}
    assert whole.objective_s == pytest.approx(0.2 + 1.1 + 0.2)
    assert split.plan.objective_s == pytest.approx(0.2 + 1.1 + 0.031, abs=0.01)


def test_the_slower_link_counts() -> None:
    """At 1 GB/s on one side 300 MB take 0.3 s, whichever side it is."""
    for first, last in ((1.0, 10.0), (10.0, 1.0)):
        machines = fleet(part("p", "prefill", link=first), part("d", "decode", link=last))
        assert checked(case(chain("a"), machines, 0.1)).plan.objective_s == pytest.approx(
            0.2 + 0.301 + 1.0, abs=0.01
        )


def test_a_prefill_lane_has_a_capacity_of_its_own() -> None:
    """One lane carries 0.8 / 0.2 = 4 runs/s of prefill, however many slots decode."""
    machines = fleet(part("p", "prefill"), part("d", "decode", slots=64))
    question = case(chain("a"), machines, 3.9)
    use = {row.endpoint: row for row in endpoint_use(checked(question))}
    assert use["p"].busy == pytest.approx(0.78, abs=1e-3)
    assert use["p"].binding
    with pytest.raises(Infeasible, match="carries at most 4"):
        replace(question, rate=4.1).solve()


def test_explanations_and_prices_know_pairs() -> None:
    """The runner-up of a pair may be another pair; a scarce lane has a price."""
    machines = fleet(part("p", "prefill"), part("q", "prefill", 2.0), part("d", "decode", slots=16))
    result = checked(case(chain("a"), machines, 3.0))
    (row,) = runners_up(result)
    assert (row.endpoint, row.runner_up) == ("p>d", "q>d")
    assert row.extra_s == pytest.approx(0.2)
    prices = instance_prices(case(chain("a"), machines, 5.0).instance(), {})
    assert prices["p"] > prices["q"]


@settings(max_examples=25, deadline=None)
@given(
    scales=st.tuples(*[st.sampled_from((0.7, 1.0, 1.6))] * 4),
    rate=st.floats(0.1, 1.2),
    outputs=st.lists(st.integers(20, 250), min_size=1, max_size=2),
)
def test_enumeration_confirms_plans_with_pairs(
    scales: tuple[float, ...], rate: float, outputs: list[int]
) -> None:
    """With a whole endpoint, two lanes and a decode endpoint the optimum is the enumerated one."""
    machines = fleet(
        endpoint("e", scales[0], slots=2),
        part("p", "prefill", scales[1]),
        part("q", "prefill", scales[2]),
        part("d", "decode", scales[3], slots=2),
    )
    question = case(chain(*"ab"[: len(outputs)]), machines, rate, outputs=outputs)
    best = enumerate_best(question)
    try:
        result = checked(question)
    except Infeasible:
        assert best is None or enumerate_best(replace(question, rate=rate * 1.001)) is None
        return
    assert best is not None
    assert result.plan.status == "optimal"
    assert best - 1e-9 <= result.plan.objective_s <= best + 0.01 * len(outputs)


def test_broken_pairs_are_rejected() -> None:
    """A prefill endpoint alone, a decode endpoint alone and a swapped pair break rule role."""
    question = case(chain("a"), fleet(part("p", "prefill"), part("d", "decode")), 0.1)
    result = checked(question)
    (one,) = result.plan.assignments
    for prefill, last in ((None, "d"), (None, "p"), ("d", "p"), ("d", "d")):
        broken = replace(result.plan, assignments=(replace(one, prefill=prefill, endpoint=last),))
        report = verify_plan(
            broken, question.workflow, question.fleet, question.estimates, result.scenarios
        )
        assert "role" in {violation.rule for violation in report.violations}
