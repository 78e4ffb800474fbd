"""Bounds on flow shops: never above an optimum, whenever they end and whatever rounding does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

from planner.solve.budget import Budget
from planner.solve.effort import Effort
from planner.solve.flow_bound import _Program, _violated, flow_bound, least_makespan
from planner.solve.flow_decode import Flow, decode
from planner.solve.intervals import solve_schedule
from planner.solve.public import hfsp_question

EXACT = Budget.reproducible(deterministic=10.0, relative_gap=0.0)
MIDDLE = Flow(np.array([[2, 2, 2], [7, 7, 1], [2, 2, 2]]), (1, 3, 1))
"""The optimum is 13, of the order given. On the first machine chains start at 2 on average or
later; all starts of the last are on average 4 before the makespan or sooner; and between them lie
2 and on average 5. Each stage alone takes 9, and the longest chain 11."""


def random_flow(seed: int) -> Flow:
    """Return a flow shop of up to five chains and three stages; some stages take no time."""
    rng = np.random.default_rng(seed)
    stages, chains = int(rng.integers(1, 4)), int(rng.integers(2, 6))
    ticks = rng.integers(0, 12, (stages, chains))
    ticks[0] += 1
    return Flow(ticks, tuple(rng.integers(1, 4, stages).tolist()))


def optimum(flow: Flow) -> int:
    """Return the least makespan by the exact solver."""
    row = {"times": flow.ticks.T.tolist(), "machines_per_stage": list(flow.machines)}
    result = solve_schedule(hfsp_question(row), budget=EXACT)
    assert result.status == "optimal"
    return result.schedule.objective


def test_all_stages_prove_more_than_each_alone() -> None:
    """The case by hand: 11 from the longest chain, 13 from all stages, and 13 is reached."""
    assert decode(MIDDLE, np.array([[0, 1, 2]]))[-1].max() == 13
    assert least_makespan(MIDDLE) == 11
    assert flow_bound(MIDDLE, makespan=20, effort=Effort(1.0)) == 13
    assert flow_bound(MIDDLE.mirrored, makespan=13, effort=Effort(1.0)) == 13


def test_long_durations_are_no_harder() -> None:
    """A billion times as long: as much more, but for the share that rounding could account for."""
    long = Flow(MIDDLE.ticks * 10**9, MIDDLE.machines)
    bound = flow_bound(long, makespan=20 * 10**9, effort=Effort(1.0))
    assert 13 * 10**9 * (1 - 1e-8) <= bound <= 13 * 10**9
    nothing = Flow(MIDDLE.ticks * 0, MIDDLE.machines)
    assert flow_bound(nothing, makespan=5, effort=Effort(1.0)) == 0


def test_two_machines_for_two_chains() -> None:
    """One stage of two machines, two chains: the longer one bounds, not all machines' mean."""
    assert least_makespan(Flow(np.array([[3, 5]]), (2,))) == 5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_no_bound_is_above_the_optimum(seed: int) -> None:
    """Small flow shops solved exactly: the bound is between that by stage and the optimum."""
    flow = random_flow(seed)
    best = optimum(flow)
    bound = flow_bound(flow, makespan=best + 7, effort=Effort(1.0))
    assert least_makespan(flow) <= bound <= best
    assert flow_bound(flow, makespan=best, effort=Effort(1.0)) <= best


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_schedules_violate_nothing(seed: int) -> None:
    """Starts of a real schedule, and its mirrored ones, keep the inequality for every set."""
    flow = random_flow(seed)
    chains = flow.ticks.shape[1]
    keys = np.random.default_rng(seed).permutation(chains)[np.newaxis]
    ends = decode(flow, keys)[:, 0]
    ways = flow.ticks.cumsum(axis=0)
    for s, machines in enumerate(flow.machines):
        ticks = flow.ticks[s].astype(np.float64)
        heads, tails = ways[s] - flow.ticks[s], ways[-1] - ways[s]
        starts, rests = ends[s] - flow.ticks[s], ends.max() - ends[s]
        for least, found in ((heads, starts), (tails, rests)):
            kept = _violated(ticks, machines, least.astype(np.float64), found.astype(np.float64))
            assert list(kept) == []
    # All at once on one machine is no schedule.
    nowhere = np.zeros(chains)
    assert list(_violated(flow.ticks[0].astype(np.float64), 1, nowhere, nowhere))


def test_interrupted_it_holds_as_well() -> None:
    """The more effort the higher, never above what a schedule reaches, the same every time."""
    rng = np.random.default_rng(4)
    ticks = np.vstack([np.full(30, 2), rng.integers(1, 60, (2, 30)), np.full(30, 2)])
    flow = Flow(ticks, (1, 30, 30, 1))
    reached = int(decode(flow, np.arange(30)[np.newaxis])[-1].max())
    limits = (0.0, 1e-3, 3e-3, 1e-2, 1.0)
    bounds = [flow_bound(flow, makespan=reached, effort=Effort(limit)) for limit in limits]
    assert bounds == sorted(bounds)
    assert bounds[0] == least_makespan(flow) < bounds[2] < bounds[-1] <= reached
    assert bounds == [flow_bound(flow, makespan=reached, effort=Effort(one)) for one in limits]


def test_a_timer_ends_it() -> None:
    """With a timer its readings count; a share of the effort already spent leaves nothing."""
    seconds = itertools.count()
    effort = Effort(4.0, lambda: float(next(seconds)))
    flow_bound(MIDDLE, makespan=20, effort=effort, share=0.5)
    assert next(seconds) <= 4
    assert flow_bound(MIDDLE, makespan=20, effort=effort, share=0.5) == 11


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_numerical_trouble_keeps_what_is_proven(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the solver gives up, the bound by stage is left."""

    def fail(*_: object, **__: object) -> None:
        raise error("ABNORMAL")

    monkeypatch.setattr(mathopt.IncrementalSolver, "solve", fail)
    assert flow_bound(MIDDLE, makespan=20, effort=Effort(1.0)) == 11


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_wrong_multipliers_prove_less(seed: int) -> None:
    """However far multipliers are off, what they prove is true."""
    rng = np.random.default_rng(seed)
    program = _Program(MIDDLE, 11, 20)
    effort = Effort(1.0)
    while program.solve(effort, 1.0) and program.tighten(effort):
        pass
    assert program.proven() == 13
    right = program._multipliers
    program._multipliers = right + rng.normal(0, 10.0 ** rng.uniform(-9, 0), len(right))
    assert program.proven() <= 13
