"""Exact schedules and list schedules: optimal by hand, checked, never worse than the literature."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.domain.errors import InvalidInput
from planner.domain.schedule import Activity, Mode, Schedule, ScheduleQuestion
from planner.solve.budget import Budget
from planner.solve.effort import Effort
from planner.solve.flow import flow_schedule
from planner.solve.flow_bound import least_makespan
from planner.solve.flow_decode import Flow, decode
from planner.solve.intervals import ScheduleResult, solve_schedule
from planner.solve.lines import is_shop
from planner.solve.list_schedules import LIST_SCHEDULES, heft
from planner.solve.loads import priced_schedules, spread_loads
from planner.solve.public import dagbench_question, fjsp_question, hfsp_question
from planner.solve.spans import span_schedule
from planner.verify_schedule import schedule_objective, verify_schedule

EXACT = Budget.reproducible(deterministic=10.0, relative_gap=0.0)
SHORT = Budget.reproducible(deterministic=0.2)


def on(endpoint: int, ticks: int, lane: int = 0) -> Mode:
    return Mode(endpoint=endpoint, ticks=ticks, lane_ticks=lane)


def solved(question: ScheduleQuestion) -> ScheduleResult:
    """Solve exactly; every schedule passes the checker."""
    result = solve_schedule(question, budget=EXACT)
    assert verify_schedule(question, result.schedule) == ()
    return result


# Topcuoglu, Hariri, Wu (2002), figure 2: ten tasks on three processors; HEFT needs 80.
COSTS = (
    (14, 16, 9), (13, 19, 18), (11, 13, 19), (13, 8, 17), (12, 13, 10),
    (13, 16, 9), (7, 15, 11), (5, 11, 14), (18, 12, 20), (21, 7, 16),
)  # fmt: skip
EDGES = {
    (0, 1): 18, (0, 2): 12, (0, 3): 9, (0, 4): 11, (0, 5): 14, (1, 7): 19, (1, 8): 16, (2, 6): 23,
    (3, 7): 27, (3, 8): 23, (4, 8): 13, (5, 7): 15, (6, 9): 17, (7, 9): 11, (8, 9): 13,
}  # fmt: skip


def topcuoglu() -> ScheduleQuestion:
    return ScheduleQuestion(
        slots=(1, 1, 1),
        activities=tuple(
            Activity(
                modes=tuple(on(i, ticks) for i, ticks in enumerate(row)),
                preds=tuple(a for a, b in EDGES if b == task),
            )
            for task, row in enumerate(COSTS)
        ),
        transfers={
            edge: tuple(tuple(0 if i == j else size for j in range(3)) for i in range(3))
            for edge, size in EDGES.items()
        },
    )


def test_list_schedules_give_the_published_lengths() -> None:
    """On the graph of the HEFT paper: HEFT 80, CPoP 86; exact is no longer than either."""
    question = topcuoglu()
    found = {name: rule(question) for name, rule in LIST_SCHEDULES.items()}
    assert all(verify_schedule(question, one) == () for one in found.values())
    assert (found["HEFT"].objective, found["CPoP"].objective) == (80, 86)
    result = solved(question)
    assert result.schedule.objective <= min(one.objective for one in found.values())


def test_a_transfer_keeps_a_chain_together() -> None:
    """A chain of 3 + 3 stays on one endpoint: 6; moving to a faster one takes 3 + 5 + 1."""
    chain = (
        Activity(modes=(on(0, 3),)),
        Activity(modes=(on(0, 3), on(1, 1)), preds=(0,)),
    )
    free = ScheduleQuestion(slots=(1, 1), activities=chain)
    costly = replace(free, transfers={(0, 1): ((0, 5), (5, 0))})
    assert solved(free).schedule.objective == 4
    assert solved(costly).schedule.objective == 6


def test_slots_and_lane_bind() -> None:
    """Three calls of 4: one slot 12, three slots 4, three slots and 2 ticks of lane each 8."""

    def question(slots: int, lane: int) -> ScheduleQuestion:
        calls = tuple(Activity(modes=(on(0, 4, lane),)) for _ in range(3))
        return ScheduleQuestion(slots=(slots,), activities=calls)

    lengths = [solved(question(*one)).schedule.objective for one in ((1, 0), (3, 0), (3, 2))]
    assert lengths == [12, 4, 8]


def test_scenarios_of_a_call_share_their_endpoint() -> None:
    """Alone each scenario takes its faster endpoint (2 + 2); together the better one (2 + 3)."""
    one = Activity(modes=(on(0, 2), on(1, 9)), weight=1)
    two = Activity(modes=(on(2, 3), on(3, 2)), weight=1)
    apart = ScheduleQuestion(slots=(1,) * 4, activities=(one, two), makespan_weight=0)
    assert solved(apart).schedule.objective == 4
    assert solved(replace(apart, together=((0, 1),))).schedule.objective == 5


def test_releases_and_weights_count() -> None:
    """The heavier call goes first although it comes last; a delay needs no endpoint."""
    question = ScheduleQuestion(
        slots=(1,),
        activities=(
            Activity(modes=(on(0, 4),), weight=1),
            Activity(modes=(on(0, 4),), weight=5),
            Activity(modes=(Mode(endpoint=None, ticks=7),), release=2, weight=1),
        ),
        makespan_weight=0,
    )
    assert solved(question).schedule.objective == 8 + 5 * 4 + 9


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_enumeration_confirms_the_optimum(seed: int) -> None:
    """Up to four activities on two endpoints: no order of starts and choice of modes is better."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 5))
    activities = tuple(
        Activity(
            modes=tuple(on(i, int(rng.integers(1, 5))) for i in range(2)),
            preds=tuple(p for p in range(a) if rng.random() < 0.4),
            release=int(rng.integers(0, 3)),
            weight=int(rng.integers(0, 3)),
        )
        for a in range(size)
    )
    question = ScheduleQuestion(
        slots=(1, 2), activities=activities, makespan_weight=int(rng.integers(1, 3))
    )
    best = None
    for order in itertools.permutations(range(size)):
        for modes in itertools.product(range(2), repeat=size):
            starts = _earliest(question, order, modes)
            if starts is None:
                continue
            found = Schedule(starts=starts, modes=modes, objective=0, bound=0)
            value = schedule_objective(question, found)
            best = value if best is None else min(best, value)
    result = solved(question)
    assert (result.status, result.schedule.objective) == ("optimal", best)


def _earliest(
    question: ScheduleQuestion, order: tuple[int, ...], modes: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Start each in turn at the first tick the checker accepts, or None if preds come later."""
    starts: dict[int, int] = {}
    for a in order:
        if any(p not in starts for p in question.activities[a].preds):
            return None
        for tick in itertools.count():
            done = {**starts, a: tick}
            kept = sorted(done)
            small = ScheduleQuestion(
                slots=question.slots,
                activities=tuple(
                    replace(
                        question.activities[b],
                        preds=tuple(kept.index(p) for p in question.activities[b].preds),
                    )
                    for b in kept
                ),
            )
            trial = Schedule(
                starts=tuple(done[b] for b in kept),
                modes=tuple(modes[b] for b in kept),
                objective=0,
                bound=0,
            )
            if all(one.rule == "objective" for one in verify_schedule(small, trial)):
                starts[a] = tick
                break
    return tuple(starts[a] for a in range(len(order)))


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("length", {"starts": (0,)}),
        ("mode", {"modes": (0, 9)}),
        ("precedence", {"starts": (0, 0)}),
        ("objective", {"objective": 1}),
        ("bound", {"bound": 99}),
    ],
)
def test_broken_schedules_are_rejected(rule: str, change: dict[str, object]) -> None:
    """The checker names the rule a schedule breaks."""
    question = ScheduleQuestion(
        slots=(1,),
        activities=(Activity(modes=(on(0, 3),)), Activity(modes=(on(0, 3),), preds=(0,))),
    )
    broken = replace(heft(question), **change)  # type: ignore[arg-type]
    assert rule in {one.rule for one in verify_schedule(question, broken)}


def test_impossible_questions_say_what_is_wrong() -> None:
    """A predecessor that comes later, an endpoint that is not there, a mode too wide."""
    good = Activity(modes=(on(0, 1),))
    for bad in (
        replace(good, preds=(0,)),
        replace(good, modes=(on(1, 1),)),
        replace(good, modes=(Mode(endpoint=0, ticks=1, slots=2),)),
    ):
        with pytest.raises(InvalidInput, match="activity 0"):
            ScheduleQuestion(slots=(1,), activities=(bad,))


def test_published_rows_become_questions() -> None:
    """FJSP, HFSP and task-graph rows by hand have the optimum one can see."""
    shop = fjsp_question({"n_machines": 2, "jobs": [[[3, 0], [0, 2]], [[2, 2]]]})
    assert solved(shop).schedule.objective == 5
    flow = hfsp_question({"times": [[2, 3], [2, 3]], "machines_per_stage": [1, 2]})
    assert solved(flow).schedule.objective == 7
    graph = dagbench_question(
        {
            "tasks": [["b", 10.0], ["a", 10.0]],
            "edges": [["a", "b", 30.0]],
            "nodes": [["slow", 1.0], ["fast", 2.0]],
            "links": [["slow", "fast", 1.0]],
        }
    )
    # Both on the fast node: all the work there, which is a million ticks.
    assert solved(graph).schedule.objective == 1_000_000


@pytest.mark.parametrize("seed", range(4))
def test_flow_shops_are_searched_by_order(seed: int) -> None:
    """A flow shop's local search gives valid schedules, within 10 % of the optimum when small."""
    rng = np.random.default_rng(seed)
    row = {"times": rng.integers(1, 20, (6, 3)).tolist(), "machines_per_stage": [2, 1, 2]}
    question = hfsp_question(row)
    found = flow_schedule(question, effort=Effort(0.05), seed=1)
    assert found is not None
    assert verify_schedule(question, found) == ()
    assert found == flow_schedule(question, effort=Effort(0.05), seed=1)
    best = solved(question).schedule.objective
    assert best <= found.objective <= 1.1 * best


def test_orders_are_decoded_by_arrival() -> None:
    """Two machines, then one: whoever ends first goes first; keys by stage decide otherwise."""
    flow = Flow(np.array([[3, 1, 4], [2, 2, 2]]), (2, 1))
    by_arrival = decode(flow, np.array([[0, 1, 2], [2, 0, 1]]))
    assert by_arrival[:, 0].tolist() == [[3, 1, 5], [5, 3, 7]]
    assert by_arrival[:, 1].tolist() == [[4, 1, 4], [6, 3, 8]]
    by_stage = decode(flow, np.array([[[0, 1, 2]], [[0, 2, 1]]]))
    assert by_stage[:, 0].tolist() == [[3, 1, 5], [5, 9, 7]]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_batches_decode_like_one_schedule_at_a_time(seed: int) -> None:
    """Machine by machine in plain Python gives the same ends as a whole batch."""
    rng = np.random.default_rng(seed)
    chains, stages = (int(n) for n in rng.integers(1, 6, 2))
    flow = Flow(rng.integers(1, 9, (stages, chains)), tuple(rng.integers(1, 5, stages).tolist()))
    keys = rng.integers(-5, 5, (stages, 3, chains))
    ends = decode(flow, keys)
    for n in range(3):
        ready = [0] * chains
        for s, machines in enumerate(flow.machines):
            free = [0] * machines
            for j in sorted(range(chains), key=lambda j: (keys[s, n, j], j)):
                free.sort()
                free[0] = ready[j] = max(free[0], ready[j]) + int(flow.ticks[s, j])
            assert ends[s, n].tolist() == ready


def test_a_timer_ends_the_search_of_a_flow_shop() -> None:
    """With a timer its seconds count and not the work: three readings, and the limit is over."""
    row = {"times": [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]] * 8, "machines_per_stage": [2, 2, 1, 2, 2]}
    question = hfsp_question(row)
    seconds = iter(range(100))
    budget = Budget(wall_s=2.0, workers=1)
    result = solve_schedule(question, budget=budget, timer=lambda: float(next(seconds)))
    assert verify_schedule(question, result.schedule) == ()
    assert next(seconds) < 10


def test_a_flow_shop_reports_the_bound_of_all_stages() -> None:
    """Each stage alone says 45; on average 20 before, 15 2/7 and 4 on the way, 20 after say 60."""
    row = {"times": [[2, 31, 2]] * 10 + [[2, 1, 2]] * 11, "machines_per_stage": [1, 21, 1]}
    question = hfsp_question(row)
    found = flow_schedule(question, effort=Effort(0.2))
    assert found is not None
    assert verify_schedule(question, found) == ()
    assert found.bound == 60
    assert least_makespan(Flow(np.array(row["times"]).T, (1, 21, 1))) == 45
    assert solve_schedule(question, budget=SHORT).schedule.bound >= 60


def test_what_is_no_flow_shop_is_left_alone() -> None:
    """A job shop, and a task graph with transfers, have no order to search."""
    shop = fjsp_question({"n_machines": 2, "jobs": [[[3, 0], [0, 2]], [[0, 2], [2, 0]]]})
    assert flow_schedule(shop, effort=Effort(0.1)) is None
    assert flow_schedule(topcuoglu(), effort=Effort(0.1)) is None


def _random_shop(rng: np.random.Generator, jobs: int, steps: int) -> ScheduleQuestion:
    ticks = rng.integers(1, 20, (jobs, steps, 3))
    allowed = rng.random(ticks.shape) < 0.6
    allowed[:, :, 0] = True
    question = fjsp_question({"n_machines": 3, "jobs": np.where(allowed, ticks, 0).tolist()})
    return replace(question, slots=(1, 2, 1))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_spans_never_make_a_schedule_longer(seed: int) -> None:
    """From HEFT's schedule spans stay valid, never get worse than it or below the optimum."""
    question = _random_shop(np.random.default_rng(seed), 4, 3)
    start = heft(question)
    found, spent = span_schedule(question, start, budget=SHORT, seed=1)
    assert 0 < spent <= 1
    assert verify_schedule(question, found) == ()
    assert (found, spent) == span_schedule(question, start, budget=SHORT, seed=1)
    best = solved(question).schedule.objective
    assert best <= found.objective <= start.objective


def test_spans_improve_a_schedule_larger_than_a_span() -> None:
    """A hundred activities, two spans and a half at first: shorter than HEFT's."""
    question = _random_shop(np.random.default_rng(3), 20, 5)
    start = heft(question)
    loads = spread_loads(question)
    assert loads is not None
    found, _ = span_schedule(question, start, budget=SHORT, least=loads.least)
    assert verify_schedule(question, found) == ()
    assert loads.least <= found.objective < start.objective


def test_spans_wait_for_releases() -> None:
    """An activity released late starts no sooner, whether in the span or behind it."""
    question = _random_shop(np.random.default_rng(5), 20, 4)
    last = len(question.activities) - 1
    late = replace(question.activities[last], release=400)
    question = replace(question, activities=(*question.activities[:last], late))
    found, _ = span_schedule(question, heft(question), budget=SHORT)
    assert verify_schedule(question, found) == ()
    assert found.objective >= 400 + min(mode.ticks for mode in late.modes)


def test_loads_bound_and_price() -> None:
    """Two calls of 4 or 6: split so that both are equally busy, 4 and 6 against 6 and 4 ticks.

    With u of the two on the first, 4 u = 6 (2 - u): u = 1.2, and 4.8 ticks on each. One more tick
    of work costs least where all are slow: prices are in the proportion of 6 to 4.
    """
    call = Activity(modes=(on(0, 4), on(1, 6)))
    loads = spread_loads(ScheduleQuestion(slots=(1, 1), activities=(call, call)))
    assert loads is not None
    assert loads.least == 5
    assert loads.price == pytest.approx((1.2, 0.8))
    assert sum(loads.ticks) == pytest.approx(2 * 4.8)


@pytest.mark.parametrize("seed", range(3))
def test_priced_schedules_are_valid(seed: int) -> None:
    """Each list schedule with prices passes the checker and keeps the bound of the loads."""
    question = _random_shop(np.random.default_rng(seed), 30, 3)
    loads = spread_loads(question)
    assert loads is not None
    for one in priced_schedules(question, loads):
        assert verify_schedule(question, one) == ()
        assert one.objective >= loads.least


def test_large_shops_are_searched_reproducibly() -> None:
    """Beyond 60 activities heuristics come first: valid, repeatable, no worse than any of HEFT."""
    question = _random_shop(np.random.default_rng(1), 22, 3)
    budget = Budget.reproducible(deterministic=0.3, relative_gap=0.0)
    result = solve_schedule(question, budget=budget)
    assert verify_schedule(question, result.schedule) == ()
    assert result.schedule.objective <= heft(question).objective
    assert result.schedule == solve_schedule(question, budget=budget).schedule


def test_what_is_no_shop_is_left_to_the_model() -> None:
    """Weights, transfers and lanes each make a question more than a shop."""
    shop = fjsp_question({"n_machines": 2, "jobs": [[[3, 0], [0, 2]], [[0, 2], [2, 0]]]})
    assert is_shop(shop)
    assert not is_shop(topcuoglu())
    assert not is_shop(replace(shop, makespan_weight=0))
    weighted = replace(shop.activities[0], weight=1)
    assert not is_shop(replace(shop, activities=(weighted, *shop.activities[1:])))
    assert not is_shop(ScheduleQuestion(slots=(1,), activities=(Activity(modes=(on(0, 4, 2),)),)))
