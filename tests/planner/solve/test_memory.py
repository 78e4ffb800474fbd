"""KV memory in plans: prefixes, sessions and contexts share it, and scarcity has a price."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.domain.errors import Infeasible
from planner.domain.estimates import EstimateTable
from planner.domain.plan import Plan
from planner.solve.explain import endpoint_use
from planner.solve.memory import contended, held
from planner.solve.solver import PlanResult
from planner.verify import verify_plan

from .small import Case, case, chain, endpoint, enumerate_best, fleet, session

ROUNDING = 0.02 * 8


def visits(rate: float, blocks: int, rounds: int = 3, slots: int = 4) -> Case:
    """Return a session on an endpoint with little KV and a slower one with plenty."""
    workflow, estimate = session(rounds)
    table = EstimateTable(workflows={workflow.content_hash: estimate})
    machines = fleet(endpoint("e", slots=slots, kv_blocks=blocks), endpoint("f", 9.0))
    return Case(workflow, machines, table, rate, samples=1, scarce=True)


def checked(question: Case) -> PlanResult:
    """Return a plan that the checker accepts."""
    result = question.solve()
    report = verify_plan(
        result.plan, question.workflow, question.fleet, question.estimates, result.scenarios
    )
    assert report.ok, report.violations
    levels, solution = result.solution.levels, result.solution
    tokens = held(result.instance, solution.placements, levels, solution.warm, solution.keep)
    for name, i in zip(result.instance.endpoints, range(tokens.size), strict=True):
        if name in report.tokens:
            # The solver rounds the tokens of each class and site up.
            assert report.tokens[name] <= tokens[i] + 1e-6
            assert tokens[i] - report.tokens[name] <= 4 * result.plan.run_classes
    return result


def test_with_ample_kv_everything_is_kept_for_nothing() -> None:
    """Without scarcity prefixes and sessions stay, and a token second costs nothing."""
    question = visits(0.05, 10_000)
    assert not contended(question.instance()).any()
    plan = checked(question).plan
    assert all(one.warm and one.keep for one in plan.assignments)
    (decision,) = plan.retention
    assert (decision.site, decision.share, decision.price) == ("a#0", 1.0, 0.0)
    assert decision.return_probability == pytest.approx(2 / 3)
    # 400 and 550 tokens are cached at the later visits, 1 ms each.
    assert decision.saved_s == pytest.approx(0.475)
    assert decision.gap_s == pytest.approx(2.0)
    assert decision.value == pytest.approx(2 / 3 * 0.475 / (550 * 2.0))
    assert plan.keeps("a#0")


def test_with_scarce_kv_sessions_are_dropped_and_the_run_takes_longer() -> None:
    """Pairs: with 10,000 tokens sessions are kept; with 720 they are dropped.

    Dropped, the later visits prefill 400 and 550 tokens again: 0.95 s at 1 ms each.
    """
    ample, scarce = checked(visits(0.13, 10_000)), checked(visits(0.13, 45))
    assert ample.plan.keeps("a#0")
    assert not scarce.plan.keeps("a#0")
    assert scarce.plan.objective_s == pytest.approx(ample.plan.objective_s + 0.95)
    use = {row.endpoint: row for row in endpoint_use(scarce)}
    assert use["e"].kv_tokens <= use["e"].kv_room == int(0.8 * 720)
    assert use["e"].kv_binding
    assert use["e"].kv_price > 0


@pytest.mark.parametrize(("rate", "blocks"), [(0.13, 45), (0.16, 45), (0.16, 60), (0.2, 80)])
def test_sessions_are_kept_where_they_are_worth_their_price(rate: float, blocks: int) -> None:
    """Seconds saved per token second against the dual of KV: the decision follows from them.

    At 0.16 runs/s and 960 tokens it is the static prefix that goes.
    """
    plan = checked(visits(rate, blocks)).plan
    (decision,) = plan.retention
    assert (decision.share == 1.0) == (decision.value >= decision.price)
    assert plan.assignments[0].warm == ((rate, blocks) != (0.16, 60))


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(0.02, 0.25),
    blocks=st.integers(40, 120),
    rounds=st.integers(2, 3),
    slots=st.sampled_from((1, 2)),
)
def test_enumeration_confirms_what_is_kept(
    rate: float, blocks: int, rounds: int, slots: int
) -> None:
    """Placement, level, prefix and session: optimum and infeasibility are the enumerated ones."""
    question = visits(rate, blocks, rounds, slots)
    best = enumerate_best(question)
    try:
        result = checked(question)
    except Infeasible:
        # Tokens of a class and site are rounded up to whole ones.
        assert best is None or enumerate_best(replace(question, rate=rate * 1.05)) is None
        return
    assert best is not None
    assert result.plan.status == "optimal"
    assert best - 1e-9 <= result.plan.objective_s
    if result.plan.objective_s > best + ROUNDING:
        # The best lies within the rounding of tokens: a little more load and it is gone.
        heavier = enumerate_best(replace(question, rate=rate * 1.05))
        assert heavier is None or result.plan.objective_s <= heavier + ROUNDING


def test_shared_prefix_is_stored_once() -> None:
    """Two sites with one prefix hash hold it once; with two hashes, twice."""
    plain = chain("a", "b")
    tokens = []
    for hashes in (("h", "h"), ("h", "g")):
        nodes = tuple(
            replace(
                node,
                call_sites=(
                    replace(node.call_sites[0], static_prefix_hash=name, static_prefix_tokens=100),
                ),
            )
            for node, name in zip(plain.nodes, hashes, strict=True)
        )
        workflow = replace(plain, nodes=nodes)
        question = case(plain, fleet(endpoint("e")), 0.1)
        own = question.estimates.workflows[plain.content_hash]
        table = EstimateTable(workflows={workflow.content_hash: own})
        result = checked(replace(question, workflow=workflow, estimates=table))
        solution = result.solution
        tokens.append(
            int(
                held(
                    result.instance,
                    solution.placements,
                    solution.levels,
                    solution.warm,
                    solution.keep,
                )[0]
            )
        )
    assert tokens[1] - tokens[0] == 100


def test_scarce_kv_limits_what_runs_side_by_side() -> None:
    """Pairs: at this rate the slots suffice, but contexts in service need more KV than 400."""
    ample = case(chain("a"), fleet(endpoint("e", slots=2)), rate=0.95)
    assert checked(ample).plan.levels == {"e": 2}
    scarce = replace(ample, fleet=fleet(endpoint("e", slots=2, kv_blocks=25)))
    with pytest.raises(Infeasible):
        scarce.solve()


def test_kv_conflict_is_named() -> None:
    """Slots would do if sessions could be kept, and KV would do if there were more slots."""
    with pytest.raises(Infeasible, match="within the KV memory of endpoint 'e', the slots of"):
        visits(0.2, 60).solve()


def test_plan_with_decisions_survives_json() -> None:
    """What a plan keeps and why is in its file."""
    plan = checked(visits(0.13, 45)).plan
    assert Plan.from_json(plan.to_json()) == plan
