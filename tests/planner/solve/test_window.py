"""Window plans: enumerated optimum, valid bounds, and what only a joint view can see."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from planner.cli.bench_questions import random_window
from planner.domain.errors import Infeasible, InvalidInput
from planner.solve.budget import Budget
from planner.solve.window import Window, greedy_window, solve_window, window_cost

EXACT = Budget.reproducible(deterministic=5.0, relative_gap=0.0)


def plain(own: list[list[float]], delay: float = 0.0) -> Window:
    """Return a window of one scenario; on one endpoint every call costs every other ``delay``."""
    own_s = np.array(own)[np.newaxis]
    _, calls, endpoints = own_s.shape
    delay_s = np.full((1, calls, calls, endpoints), delay)
    delay_s[:, np.arange(calls), np.arange(calls)] = 0.0
    return Window(
        own_s=own_s,
        imposed_s=np.zeros((calls, endpoints)),
        delay_s=delay_s,
        allowed=np.ones((calls, endpoints), dtype=bool),
        weight=np.ones(calls),
        tail_s=np.zeros(calls),
    )


def test_calls_that_slow_each_other_go_apart() -> None:
    """Both prefer endpoint 0 by 0.5 s; sharing it costs 2 x 1 s, so one of them yields."""
    own = [[1.0, 1.5], [1.0, 1.5]]
    assert set(solve_window(plain(own), budget=EXACT).endpoints) == {0}
    plan = solve_window(plain(own, delay=1.0), budget=EXACT)
    assert sorted(plan.endpoints) == [0, 1]
    assert (plan.cost_s, plan.status) == (pytest.approx(2.5), "optimal")


def test_a_shared_prefix_brings_calls_together() -> None:
    """Each is 0.2 s better off elsewhere; sharing a prefix saves 2 x 0.5 s."""
    own = [[1.0, 1.2], [1.2, 1.0]]
    assert solve_window(plain(own), budget=EXACT).endpoints == (0, 1)
    assert len(set(solve_window(plain(own, delay=-0.5), budget=EXACT).endpoints)) == 1


def test_a_join_counts_its_last_call() -> None:
    """Beside a call of 9 s in its join a call may be slow: it leaves the fast one to a third."""
    own = [[9.0, 9.0], [1.0, 5.0], [1.0, 6.0]]
    joined = replace(plain(own), joins=((0, 1),))
    slow = np.zeros_like(joined.delay_s)
    slow[0, 1, 2, 0] = slow[0, 2, 1, 0] = 4.5
    assert solve_window(replace(joined, delay_s=slow), budget=EXACT).endpoints[1:] == (1, 0)


@pytest.mark.parametrize("seed", range(12))
def test_enumeration_confirms_optimum_and_bound(seed: int) -> None:
    """Five calls, three endpoints, joins of four or none: no placement costs less."""
    window = random_window(5, 3, 3, np.random.default_rng(seed), joins=seed % 2)
    best = min(window_cost(window, one) for one in itertools.product(range(3), repeat=5))
    plan = solve_window(window, budget=EXACT)
    assert plan.cost_s == pytest.approx(window_cost(window, plan.endpoints))
    # Times are rounded to milliseconds in the model.
    assert plan.cost_s == pytest.approx(best, abs=0.01)
    assert plan.bound_s <= best + 1e-6


@pytest.mark.parametrize("joins", [0, 3])
def test_bound_is_below_and_greedy_above(joins: int) -> None:
    """On a full window the plan is no worse than greedy, and never beats its bound."""
    window = random_window(16, 5, 4, np.random.default_rng(3), joins=joins)
    plan = solve_window(window, budget=Budget.reproducible(deterministic=0.2))
    assert 0 < plan.bound_s <= plan.cost_s
    assert plan.cost_s <= window_cost(window, greedy_window(window)) + 1e-9
    again = solve_window(window, budget=Budget.reproducible(deterministic=0.2))
    assert again.endpoints == plan.endpoints


def test_calls_stay_where_they_are_allowed() -> None:
    """An endpoint that cannot take a call is never chosen; a call that fits none is named."""
    window = plain([[1.0, 9.0], [1.0, 9.0]], delay=0.1)
    only = np.array([[False, True], [True, True]])
    plan = solve_window(replace(window, allowed=only), budget=EXACT)
    assert plan.endpoints == (1, 0)
    with pytest.raises(Infeasible, match="call 1"):
        replace(window, allowed=np.array([[True, True], [False, False]]))


def test_wrong_shapes_are_named() -> None:
    """An array of the wrong shape, and a call in two joins, are refused."""
    window = plain([[1.0, 2.0]])
    with pytest.raises(InvalidInput, match="weight"):
        replace(window, weight=np.ones(3))
    with pytest.raises(InvalidInput, match="joins"):
        replace(window, joins=((0,), (0,)))
