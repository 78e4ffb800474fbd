"""Known runs on a fleet, solved exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.domain.errors import Infeasible
from planner.solve.budget import Budget
from planner.solve.intervals import solve_schedule
from planner.solve.offline import offline_question
from planner.verify_schedule import verify_schedule

from .small import case, chain, endpoint, fan, fleet

EXACT = Budget.reproducible(deterministic=10.0, relative_gap=0.0)
CALL = 30 + 100
"""Ticks of a call at level 1: 300 prompt tokens at 1 ms, 100 output tokens at 10 ms."""


def test_runs_share_slots_and_the_prefill_lane() -> None:
    """Two runs of one call: with one slot 1 + 2 times; with two the second waits one prefill."""
    question = case(chain("a"), fleet(endpoint("e", slots=2)), 1.0)
    ends = []
    for slots in (1, 2):
        machines = fleet(endpoint("e", slots=slots))
        asked = offline_question(question.runs, machines, level=1)
        result = solve_schedule(asked, budget=EXACT)
        assert verify_schedule(asked, result.schedule) == ()
        assert result.status == "optimal"
        ends.append(result.schedule.objective)
    assert ends == [CALL + 2 * CALL, CALL + CALL + 30]


def test_a_join_waits_for_the_slower_branch() -> None:
    """a, then b and c on two unlike endpoints, then d: never faster than the best chain alone."""
    question = case(fan("a", "b", "c", "d"), fleet(endpoint("e", slots=1), endpoint("f", 2.0)), 1.0)
    run = question.runs[0]
    late = replace(run, arrival_s=5.0)
    at_once = solve_schedule(offline_question([run], question.fleet, level=1), budget=EXACT)
    later = solve_schedule(offline_question([late], question.fleet, level=1), budget=EXACT)
    # Both of b and c on the fast one take as long as one of them on the slow one.
    assert at_once.schedule.objective == 4 * CALL
    assert later.schedule.objective == 4 * CALL + 500


def test_a_call_that_fits_nowhere_is_named() -> None:
    """Too small a KV pool is infeasible, with the size that is needed."""
    question = case(chain("a"), fleet(endpoint("e")), 1.0)
    with pytest.raises(Infeasible, match="400 tokens"):
        offline_question(question.runs, fleet(endpoint("e", kv_blocks=20)))
