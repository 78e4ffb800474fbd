"""Objectives: the optimum of each is the enumerated one, and what has none says why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.domain.errors import Infeasible, InvalidInput
from planner.domain.objective import Objective, Term, mix_shares
from planner.solve.objective import Goal
from planner.solve.solver import solve_plan
from planner.solve.timing import build_timing
from planner.verify import verify_plan

from .small import EXACT, Case, case, chain, endpoint, enumerate_best, fan, fleet

UNEQUAL = (0.3, 0.4, 0.7, 1.0, 1.4, 2.2, 3.0)
ROUNDING = 0.01
TERMS = ("mean", "cvar:0.5", "cvar:0.9", "makespan", "tardiness", "miss", "mean+2*cvar:0.75")

QUESTIONS = st.builds(
    lambda shape, slow, slots, rate, outputs, term, deadline, hard: replace(
        case(
            shape(*"abcd"[: len(outputs)]),
            fleet(endpoint("e", slots=slots), endpoint("f", slow, slots=2)),
            rate,
            outputs=outputs,
            spread=UNEQUAL,
        ),
        samples=3,
        objective=Objective.parse(term),
        deadline_s=deadline,
        hard=hard,
    ),
    shape=st.sampled_from((chain, fan)),
    slow=st.sampled_from((1.2, 1.6, 2.5)),
    slots=st.sampled_from((1, 2, 4)),
    rate=st.floats(0.05, 0.5),
    outputs=st.lists(st.integers(20, 250), min_size=3, max_size=4),
    term=st.sampled_from(TERMS),
    deadline=st.floats(1.5, 9.0),
    hard=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(question=QUESTIONS)
def test_enumeration_confirms_the_optimum_of_every_objective(question: Case) -> None:
    """Up to four calls, optimum and infeasibility of any objective are the enumerated ones."""
    best = enumerate_best(question)
    # A latency, or what is late, may be rounded up by a tick per task and the deadline's own.
    slack = ROUNDING * 6
    try:
        result = question.solve()
    except Infeasible:
        assert question.deadline_s is not None
        tighter = replace(
            question, rate=question.rate * 1.001, deadline_s=question.deadline_s - slack
        )
        assert best is None or enumerate_best(tighter) is None
        return
    assert best is not None
    assert result.plan.status == "optimal"
    report = verify_plan(
        result.plan, question.workflow, question.fleet, question.estimates, result.scenarios
    )
    assert report.ok, report.violations
    terms = question.objective.terms
    if terms[0].kind == "miss":
        # Shares jump where a latency is rounded across the deadline.
        assert question.deadline_s is not None
        later = replace(question, deadline_s=question.deadline_s - slack)
        assert best - 1e-9 <= result.plan.objective_s
        most = enumerate_best(later)
        assert most is None or result.plan.objective_s <= most + 1e-9
    else:
        weight = sum(term.weight for term in terms)
        assert best - 1e-9 <= result.plan.objective_s <= best + weight * slack


def test_tail_and_mean_want_different_plans() -> None:
    """For the mean the common short call gets the fast slot; for the tail the rare long one does.

    Of two calls in parallel classes only one fits the fast endpoint; the deviation of b decides
    the worst tenth.
    """
    machines = fleet(endpoint("slow", 2.0, slots=4), endpoint("fast", slots=1))
    question = replace(
        case(chain("a", "b"), machines, 0.35, outputs=(190, 100), spread=(1.0,) * 7), samples=16
    )
    estimate = question.estimates.workflows[question.workflow.content_hash]
    rare = replace(
        estimate.sites["b#0"],
        output_tokens=replace(
            estimate.sites["b#0"].output_tokens, values=(20, 20, 20, 20, 20, 400, 800), mean=100.0
        ),
    )
    table = replace(
        question.estimates,
        workflows={
            question.workflow.content_hash: replace(estimate, sites={**estimate.sites, "b#0": rare})
        },
    )
    question = replace(question, estimates=table)
    by_mean = question.solve().plan
    tail = replace(question, objective=Objective.parse("cvar:0.9")).solve().plan
    assert by_mean.shares()["a#0"] == {"fast": 1.0}
    assert tail.shares()["b#0"] == {"fast": 1.0}
    assert tail.values["mean"] > by_mean.values["mean"]


def test_terms_one_after_the_other_keep_the_first() -> None:
    """Mean after makespan: the makespan stays at its least, the mean is the best that leaves."""
    machines = fleet(endpoint("e", slots=1), endpoint("f", 1.4, slots=2), endpoint("g", 2.0))
    question = replace(
        case(fan("a", "b", "c", "d"), machines, 0.35, (20, 90, 60, 40), spread=UNEQUAL), samples=4
    )
    least = replace(question, objective=Objective.parse("makespan")).solve().plan
    both = replace(question, objective=Objective.parse("makespan>mean")).solve()
    assert both.plan.objective_s == pytest.approx(least.objective_s)
    assert both.plan.values["mean"] <= least.values["mean"] + 1e-9
    assert set(both.plan.bounds) == {"makespan", "mean"}
    mean = question.solve().plan
    loose = replace(question, objective=Objective.parse("makespan>mean", tolerance=5.0)).solve()
    assert loose.plan.values["mean"] == pytest.approx(mean.objective_s)
    report = verify_plan(
        both.plan, question.workflow, question.fleet, question.estimates, both.scenarios
    )
    assert report.ok, report.violations


def test_hard_deadline_below_the_critical_path_says_so() -> None:
    """A call of 1.2 s cannot end within 1 s anywhere; the error has both figures."""
    question = replace(case(chain("a"), fleet(endpoint("e")), 0.1), deadline_s=1.0, hard=True)
    with pytest.raises(Infeasible, match=r"deadline 1 s of workflow 'chain': .* takes 1\.2 s"):
        question.solve()


def test_hard_deadline_in_conflict_with_load_names_both() -> None:
    """The fast slot has no room for both calls and the slow one is too slow: three limits."""
    machines = fleet(endpoint("fast", slots=1), endpoint("slow", 3.0))
    question = case(chain("a", "b"), machines, 0.38)
    with pytest.raises(Infeasible, match="deadline of 2.5 s of workflow 'chain'") as caught:
        replace(question, deadline_s=2.5, hard=True).solve()
    assert "the slots of endpoint 'fast'" in str(caught.value)
    assert "endpoint 'slow'" not in str(caught.value)
    assert replace(question, deadline_s=9.0, hard=True).solve().plan.hard_deadline
    assert replace(question, deadline_s=2.5).solve().plan.deadline_s == 2.5


def test_plans_of_any_objective_are_reproducible() -> None:
    """One worker, a seed and a deterministic limit give the same plan, bit for bit."""
    machines = fleet(endpoint("e", slots=1), endpoint("f", 1.4, slots=2), endpoint("g", 2.0))
    question = case(fan("a", "b", "c", "d"), machines, 0.5, (20, 90, 60, 40), 3, UNEQUAL)
    for name in ("mean", "cvar:0.9", "makespan>mean"):
        asked = replace(question, objective=Objective.parse(name), samples=4)
        assert asked.solve().plan == asked.solve().plan


def test_cost_of_latencies_is_the_value_by_definition() -> None:
    """The tail mean of (1, 2, 3, 4) s at 0.5 is 3.5 s, at 0.9 it is 4 s; the makespan is 4 s."""
    question = replace(case(chain("a"), fleet(endpoint("e")), 0.1), samples=4, deadline_s=2.5)
    instance = replace(question).instance()
    sources = (replace(instance.sources[0], deadline_ticks=250, deadline_s=2.5),)
    instance = replace(instance, sources=sources)
    latencies = np.array([[[400, 100, 300, 200]]])
    wanted = {"mean": 2.5, "cvar:0.5": 3.5, "cvar:0.9": 4.0, "makespan": 4.0, "tardiness": 0.5}
    wanted |= {"miss": 0.5, "mean+2*makespan": 10.5}
    for name, value in wanted.items():
        goal = Goal(instance, Objective.parse(name))
        assert goal.seconds(int(goal.cost(latencies)[0])) == pytest.approx(value)
    assert build_timing(instance).weight.sum() == 4


def test_objectives_are_read_as_they_are_written() -> None:
    """A name parses to the objective that has it."""
    for name in ("mean", "cvar:0.95", "mean+0.5*cvar:0.9", "miss>mean"):
        assert Objective.parse(name).name == name
    assert Objective.parse("deadline").terms == (Term(kind="tardiness"),)
    assert Objective.from_json(Objective.parse("miss>mean").to_json()).name == "miss>mean"


@pytest.mark.parametrize(
    "text", ["", "speed", "cvar:1.0", "cvar:x", "mean+mean", "2*mean>miss", "0*mean", "mean:0.5"]
)
def test_bad_objectives_are_refused(text: str) -> None:
    """An unknown term, level or weight is bad input."""
    with pytest.raises(InvalidInput, match="objective"):
        Objective.parse(text)


def test_late_terms_need_a_deadline() -> None:
    """Tardiness without any deadline is bad input, and so is a hard deadline without a time."""
    question = case(chain("a"), fleet(endpoint("e")), 0.1)
    with pytest.raises(InvalidInput, match="without a deadline"):
        replace(question, objective=Objective.parse("miss")).solve()
    with pytest.raises(InvalidInput, match="hard deadline without a time"):
        solve_plan(
            question.workflow, question.fleet, question.estimates, arrival_rate_rps=0.1,
            hard_deadline=True, budget=EXACT,
        )  # fmt: skip


def test_shares_sum_to_a_thousand() -> None:
    """Shares by largest remainder: none is lost, and none is zero."""
    assert mix_shares([1.0, 1.0, 1.0]) == (334, 333, 333)
    assert mix_shares([7.0]) == (1000,)
    assert min(mix_shares([1e-9, 1.0])) == 1
